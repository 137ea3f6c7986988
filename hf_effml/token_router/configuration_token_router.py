"""Configurations of token routing: of a router, and of whole checkpoints that carry one."""

from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config


try:
    from hf_effml.utils.model_kinds import read_config_dict
except ImportError:  # a saved folder, which brings its own kind, where the package is not installed

    def read_config_dict(read: Any, wanted: Any, *args: Any, **options: Any) -> Any:  # type: ignore[misc]
        """Reads a configuration as it is."""
        return read(*args, **options)


# No block may skip more than this share: the first and the last token always go through.
MAX_SPARSITY = 0.95
# Far above any model: what is larger is a slip, and would fill the memory before it failed.
_LARGEST = {"num_hidden_layers": 2**14, "router_hidden_size": 2**20}
# How far the mean of a schedule may be from the target.
_TOLERANCE = 1e-3


@strict
class TokenRouterConfig(PreTrainedConfig):
    r"""Configuration of token routing: which tokens skip which decoder blocks of a frozen language model.

    "FTP: A Fine-grained Token-wise Pruner for Large Language Models via Token Routing"
    (https://huggingface.co/papers/2412.11494).

    Args:
        router_type (`str`, *optional*, defaults to `"one_pass"`):
            `"one_pass"` decides for all blocks after the first dense one; `"dynamic"` before every block, from the
            newest attention scores, at the price of a score in every block; `"static"` keeps the first and the newest
            tokens and has nothing to train; `"random"` keeps any tokens and is a baseline.
        target_sparsity (`float`, *optional*, defaults to 0.3):
            Share of the tokens that skip a block, averaged over all blocks.
        sparsity_schedule (`list[float]`, *optional*):
            That share for each block. Uniform over the blocks that are not protected if left out.
        num_protected_first (`int`, *optional*, defaults to 1):
            Blocks at the beginning that are never skipped. The learned routers need one to take scores from.
        num_protected_last (`int`, *optional*, defaults to 0):
            Blocks at the end that are never skipped.
        selection (`str`, *optional*, defaults to `"budget"`):
            `"budget"` keeps exactly as many tokens as the schedule says; `"threshold"` keeps those that a learned
            router would rather keep, so that the sparsity is only steered by training, as in the paper.
        kv_policy (`str`, *optional*, defaults to `"drop"`):
            `"drop"`: a skipped token has no key and value in that block, which saves cache; the paper's reading.
            `"keep"`: it has, for better quality, dense cache and some more work.
        skip_unit (`str`, *optional*, defaults to `"block"`):
            `"block"` skips attention and MLP, `"mlp"` the MLP alone.
        decode_policy (`str`, *optional*, defaults to `"keep"`):
            What generated tokens do: `"keep"` processes them everywhere. `"threshold"`, the paper's, skips blocks
            whose sparsity is over `decode_threshold`, all samples alike: as good as removing these blocks, which
            ruins the text unless the schedule was searched for it.
        decode_threshold (`float`, *optional*, defaults to 0.5):
            See `decode_policy`.
        score_mode (`str`, *optional*, defaults to `"window"`):
            Queries whose attention scores a token: `"window"` the last `score_window`, `"last"` the last one, `"mean"`
            all, which costs a whole attention matrix.
        score_window (`int`, *optional*, defaults to 32):
            See `score_mode`.
        normalize_scores (`bool`, *optional*, defaults to `False`):
            Multiply scores by the number of tokens.
        router_hidden_size (`int`, *optional*, defaults to 64):
            Width of the router.
        always_keep_first (`int`, *optional*, defaults to 1):
            First tokens of a text that learned routers always keep, inside the budget.
        always_keep_last (`int`, *optional*, defaults to 1):
            The same for the last tokens of the prompt.
        min_tokens (`int`, *optional*, defaults to 64):
            Prompts shorter than this run dense, as there is little to save. On top of a cache, a call with fewer new
            tokens follows `decode_policy`, so that drafts of assisted generation are treated like single tokens.
        random_seed (`int`, *optional*, defaults to 0):
            Seed of `router_type="random"`.
        base_model_name_or_path (`str`, *optional*):
            The model that the router belongs to.
        base_model_revision (`str`, *optional*):
            Its commit or branch.
        num_hidden_layers (`int`, *optional*):
            Number of its blocks; filled in when the router is applied.

    Raises:
        StrictDataclassError: If a field has the wrong type or an impossible value; the message names both.

    Example:

    ```python
    >>> from hf_effml import TokenRouterConfig

    >>> TokenRouterConfig(target_sparsity=0.3, num_hidden_layers=4).schedule
    [0.0, 0.4, 0.4, 0.4]

    ```
    """

    model_type = "token_router"

    router_type: Literal["static", "dynamic", "one_pass", "random"] = "one_pass"
    target_sparsity: float | int = 0.3
    sparsity_schedule: list[float | int] | None = None
    num_protected_first: int = 1
    num_protected_last: int = 0
    selection: Literal["budget", "threshold"] = "budget"
    kv_policy: Literal["drop", "keep"] = "drop"
    skip_unit: Literal["block", "mlp"] = "block"
    decode_policy: Literal["threshold", "keep"] = "keep"
    decode_threshold: float | int = 0.5
    score_mode: Literal["window", "last", "mean"] = "window"
    score_window: int = 32
    normalize_scores: bool = False
    router_hidden_size: int = 64
    always_keep_first: int = 1
    always_keep_last: int = 1
    min_tokens: int = 64
    random_seed: int = 0
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    num_hidden_layers: int | None = None

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads a saved configuration; that of another kind of model is refused."""
        return read_config_dict(super().get_config_dict, cls.model_type, *args, **kwargs)

    @property
    def is_learned(self) -> bool:
        """Whether the router's parameters take part in the decisions."""
        return self.router_type in ("dynamic", "one_pass")

    @property
    def max_target_sparsity(self) -> float:
        """The largest `target_sparsity` that the blocks which are not protected can reach."""
        return MAX_SPARSITY * self._num_routed / (self.num_hidden_layers or 1)

    @property
    def schedule(self) -> list[float | int]:
        """Required sparsity of each block: `sparsity_schedule`, or the uniform one. Needs `num_hidden_layers`."""
        if self.sparsity_schedule is not None:
            return self.sparsity_schedule
        if self.num_hidden_layers is None:
            raise ValueError(
                "`num_hidden_layers` must be known to spread `target_sparsity` over the blocks; set it, or apply the "
                "configuration to a model."
            )
        share = self.target_sparsity * self.num_hidden_layers / max(self._num_routed, 1)
        middle = [round(share, 12)] * self._num_routed
        return [0.0] * self.num_protected_first + middle + [0.0] * self.num_protected_last

    @property
    def _num_routed(self) -> int:
        return max((self.num_hidden_layers or 0) - self.num_protected_first - self.num_protected_last, 0)

    def validate_token_routing(self) -> None:
        """Checks values and how they go together; called by `strict` on construction."""
        not_negative = (
            "num_protected_first",
            "num_protected_last",
            "always_keep_first",
            "always_keep_last",
            "min_tokens",
        )
        for name in not_negative:
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative; got {getattr(self, name)}.")
        # The first two hidden units of a router hold the static rule.
        for name, least in (("score_window", 1), ("router_hidden_size", 2), ("num_hidden_layers", 1)):
            value = getattr(self, name)
            if value is not None and not least <= value <= _LARGEST.get(name, value):
                limit = f" and at most {_LARGEST[name]}" if name in _LARGEST else ""
                raise ValueError(f"`{name}` must be at least {least}{limit}; got {value}.")
        for name in ("num_protected_first", "num_protected_last"):
            value, most = getattr(self, name), _LARGEST["num_hidden_layers"]
            if value > most:
                raise ValueError(f"`{name}` must be at most {most}; got {value}.")
        if not 0 <= self.random_seed < 2**63:
            raise ValueError(f"`random_seed` must be from 0 to 2**63 - 1; got {self.random_seed}.")
        if not 0 <= self.decode_threshold <= 1:
            raise ValueError(f"`decode_threshold` must be between 0 and 1; got {self.decode_threshold}.")
        if not 0 <= self.target_sparsity < 1:
            raise ValueError(
                f"`target_sparsity` must be at least 0 and less than 1; got {self.target_sparsity}. It is the share "
                "of tokens that skip a block: 0.3 for 30 %."
            )
        if self.is_learned and self.num_protected_first < 1:
            raise ValueError(
                f'`num_protected_first` must be at least 1 for `router_type="{self.router_type}"`, whose scores come '
                f'from the block before; got {self.num_protected_first}. Only "static" and "random" can route block 0.'
            )
        if self.selection == "threshold" and not self.is_learned:
            raise ValueError(
                f'`selection="threshold"` asks a learned router; got `router_type="{self.router_type}"`. Use '
                '`selection="budget"`.'
            )
        if self.kv_policy == "keep" and self.skip_unit == "mlp":
            raise ValueError(
                '`kv_policy="keep"` has no meaning with `skip_unit="mlp"`, which skips no attention and keeps all '
                'keys anyway. Leave `kv_policy` at "drop".'
            )
        self._validate_schedule()

    def _validate_schedule(self) -> None:
        schedule, layers = self.sparsity_schedule, self.num_hidden_layers
        if schedule is None:
            if layers is not None and self.target_sparsity > self.max_target_sparsity + _TOLERANCE:
                raise ValueError(
                    f"`target_sparsity` of {self.target_sparsity} cannot be reached with "
                    f"{layers - self._num_routed} of {layers} blocks protected: the most is "
                    f"{MAX_SPARSITY} * {self._num_routed} / {layers} = {self.max_target_sparsity:.4g}. Lower it, or "
                    "protect fewer blocks."
                )
            return
        if layers is not None and len(schedule) != layers:
            raise ValueError(
                f"`sparsity_schedule` must have one share for each of the {layers} blocks; got {len(schedule)}."
            )
        wrong = [share for share in schedule if not 0 <= share < 1]
        if wrong:
            raise ValueError(f"`sparsity_schedule` must hold shares of at least 0 and less than 1; got {wrong[0]}.")
        mean = sum(schedule) / max(len(schedule), 1)
        if abs(mean - self.target_sparsity) > _TOLERANCE:
            raise ValueError(
                f"`sparsity_schedule` has a mean of {mean:.4f}, but `target_sparsity` is {self.target_sparsity}; they "
                f"may differ by {_TOLERANCE}. Set both."
            )
        protected = [*schedule[: self.num_protected_first], *schedule[len(schedule) - self.num_protected_last :]]
        if any(protected):
            raise ValueError(
                f"`sparsity_schedule` skips tokens in blocks that `num_protected_first={self.num_protected_first}` "
                f"and `num_protected_last={self.num_protected_last}` protect; got {list(schedule)}."
            )


# For type checkers: the next class in line is that of the language model.
_Config: Any = PreTrainedConfig if TYPE_CHECKING else object


class _CheckpointConfig(_Config):
    """What the configurations of whole checkpoints share."""

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads a saved configuration; that of the plain language model serves, too, another is refused."""
        kinds = (cls.model_type, cls.model_type.removeprefix("token_router_"))
        values, unused = read_config_dict(super().get_config_dict, kinds, *args, **kwargs)
        return values | {"model_type": cls.model_type}, unused


@strict
class TokenRouterLlamaConfig(_CheckpointConfig, LlamaConfig):
    r"""Configuration of [`TokenRouterLlamaForCausalLM`]: a Llama's, and the router's.

    Args:
        token_router (`dict`, *optional*):
            Fields of [`TokenRouterConfig`]; the default one if left out.
        kwargs: The fields of [`~transformers.LlamaConfig`].
    """

    model_type = "token_router_llama"

    token_router: dict[str, Any] | None = None


@strict
class TokenRouterQwen2Config(_CheckpointConfig, Qwen2Config):
    r"""Configuration of [`TokenRouterQwen2ForCausalLM`]: a Qwen2's, and the router's.

    Args:
        token_router (`dict`, *optional*):
            Fields of [`TokenRouterConfig`]; the default one if left out.
        kwargs: The fields of [`~transformers.Qwen2Config`].
    """

    model_type = "token_router_qwen2"

    token_router: dict[str, Any] | None = None


@strict
class TokenRouterQwen3Config(_CheckpointConfig, Qwen3Config):
    r"""Configuration of [`TokenRouterQwen3ForCausalLM`]: a Qwen3's, and the router's.

    Args:
        token_router (`dict`, *optional*):
            Fields of [`TokenRouterConfig`]; the default one if left out.
        kwargs: The fields of [`~transformers.Qwen3Config`].
    """

    model_type = "token_router_qwen3"

    token_router: dict[str, Any] | None = None
