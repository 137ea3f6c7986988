"""The language model with a router that is trained, saved and shared."""

from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from .configuration_token_router import TokenRouterConfig
from .modeling_token_router_causal_lm import make_full_checkpoint
from .patching import apply_token_router, disable_routing, find_decoder, is_patched, make_routing_report
from .routing_report import RoutingReport


try:
    from hf_effml.utils.model_kinds import check_task
except ImportError:  # a saved folder where the package is not installed

    def check_task(name_or_path: Any, auto_class: str, **options: Any) -> str:  # type: ignore[misc]
        """Leaves it to transformers."""
        return ""


_WEIGHTS_NAME = "model.safetensors"


class TokenRouterModel(PreTrainedModel):
    """A language model with a token router: generates, trains its router, saves 2 kB (https://huggingface.co/papers/2412.11494).

    The language model is patched in place and stays available as `.model`; every class and tool for it works on that.
    `save_pretrained` writes the router and its configuration only. The folder names the base model, so it loads in one
    line, also with `AutoModelForCausalLM` and `trust_remote_code=True` where this package is not installed.

    Args:
        model (`PreTrainedModel`):
            The language model, see [`apply_token_router`]. One that is patched already keeps its router.
        config ([`TokenRouterConfig`], *optional*):
            What to do; not for a model that is patched already.

    Example:

    ```python
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_effml import TokenRouterConfig, TokenRouterModel

    >>> shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, vocab_size=50)
    >>> base = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    >>> model = TokenRouterModel(base, TokenRouterConfig(target_sparsity=0.3, min_tokens=0))
    >>> tokens = model.generate(torch.arange(20).unsqueeze(0), max_new_tokens=5, do_sample=False)
    >>> model.routing_report.kept_per_block
    [20.0, 12.0, 12.0, 12.0]

    ```
    """

    config_class = TokenRouterConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    # Whatever the language model supports has been settled when it was made.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    # The language model divides by `num_items_in_batch` itself.
    accepts_loss_kwargs = True

    def __init__(self, model: PreTrainedModel, config: TokenRouterConfig | None = None):
        if not is_patched(find_decoder(model)):
            apply_token_router(model, config)
        elif config is not None:
            raise RuntimeError(
                "This model has a token router already. Remove it with `remove_token_router(model)`, or leave out "
                "`config` to wrap it as it is."
            )
        super().__init__(find_decoder(model).token_routing_hook.config)
        self.model = model

    @property
    def decoder(self) -> nn.Module:
        """The patched decoder."""
        return find_decoder(self.model)

    @property
    def token_router(self) -> nn.Module:
        """The router."""
        return self.decoder.token_router

    @property
    def routing_report(self) -> RoutingReport:
        """What the latest prompt was spared, see [`RoutingReport`]."""
        return make_routing_report(self.model)

    @property
    def generation_config(self) -> Any:
        """That of the language model."""
        return self.model.generation_config

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        # The base class sets one before there is a language model.
        if "model" in self._modules:
            self.model.generation_config = value

    @classmethod
    def can_generate(cls) -> bool:
        """Whether it has `generate`: always."""
        return True

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs the language model.

        Args:
            input_ids (`Tensor` of shape `(batch, tokens)`, *optional*):
                As for the language model.
            attention_mask (`Tensor` of shape `(batch, tokens)`, *optional*):
                The same.
            labels (`Tensor` of shape `(batch, tokens)`, *optional*):
                The same.
            kwargs (`dict`):
                As for the language model, and, but not in `generate`:
                `keep_mask`, decisions to replay instead of asking the router, of shape `(blocks, batch, new tokens)`
                as in a report, or a dictionary from blocks to `(batch, new tokens)`;
                `token_router_config`, to use instead of the model's own in this call;
                `as_generated=True`, to let all tokens of this call follow `decode_policy`, however many they are;
                `generated` of shape `(batch, new tokens)`, `True` for those that do so after their prompt.

        Returns:
            `CausalLMOutputWithPast`: its output.
        """
        # Named, as `Trainer` drops what it finds no argument for.
        named = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        return self.model(**kwargs, **{name: value for name, value in named.items() if value is not None})

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generates text with the language model.

        Args:
            args (`tuple`):
                As for [`~transformers.GenerationMixin.generate`].
            kwargs (`dict`):
                The same.

        Returns:
            `Tensor` or `ModelOutput`: what it returns.
        """
        return self.model.generate(*args, **kwargs)

    def disable_routing(self) -> Any:
        """Runs dense inside a `with`, see [`disable_routing`]."""
        return disable_routing(self.model)

    def get_input_embeddings(self) -> nn.Module:
        """The embeddings of the language model."""
        return self.model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        """The head of the language model."""
        return self.model.get_output_embeddings()

    def load_state_dict(self, state_dict: dict[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """Loads weights: those of a router alone, as `save_pretrained` writes them, or all.

        Args:
            state_dict (`dict[str, Tensor]`):
                Weights by name.
            strict (`bool`, *optional*, defaults to `True`):
                Whether the names must fit.
            assign (`bool`, *optional*, defaults to `False`):
                As for [`~torch.nn.Module.load_state_dict`].

        Returns:
            `NamedTuple`: names missing and unexpected.
        """
        if state_dict.keys() == self.token_router.state_dict().keys():
            return self.token_router.load_state_dict(state_dict, strict, assign)
        return super().load_state_dict(state_dict, strict, assign)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Saves the router and its configuration: 2 kB beside the model code. [`to_full_checkpoint`] has the rest.

        Args:
            save_directory (`str` or `Path`):
                Folder to write.
            kwargs (`dict`, *optional*):
                As for [`~transformers.PreTrainedModel.save_pretrained`].
        """
        super().save_pretrained(save_directory, **(kwargs | {"state_dict": self.token_router.state_dict()}))

    @classmethod
    def from_pretrained(
        cls, base_or_router: str | Path | PreTrainedModel, router: str | Path | None = None, **kwargs: Any
    ) -> "TokenRouterModel":
        """Loads a router onto its base model.

        Args:
            base_or_router (`str` or `Path` or `PreTrainedModel`):
                With `router`, the base model, loaded or not. Alone, the folder or Hub id of the router, which names
                its base model.
            router (`str` or `Path`, *optional*):
                Folder or Hub id of the router.
            kwargs (`dict`, *optional*):
                `revision` of the router, `token`, `cache_dir`, `force_download`, `local_files_only` and
                `config`; everything else is for loading the base model: `dtype`, `device_map` and so on.

        Returns:
            [`TokenRouterModel`]: in evaluation mode.

        Raises:
            ValueError: If the router names no base model, or one that is no language model or has another number of
                blocks, or if weights are missing, not finite or of another shape.

        Example:

        ```python
        >>> model = TokenRouterModel.from_pretrained("me/llama-router")  # doctest: +SKIP
        >>> model = TokenRouterModel.from_pretrained("meta-llama/Llama-2-7b-hf", "me/llama-router")  # doctest: +SKIP
        ```
        """
        base, router = (None, base_or_router) if router is None else (base_or_router, router)
        config = kwargs.pop("config", None)
        for_auto_classes = ("trust_remote_code", "code_revision", "adapter_kwargs", "_from_auto", "_commit_hash")
        for name in for_auto_classes:
            kwargs.pop(name, None)
        revision = kwargs.pop("revision", None)
        shared = ("token", "cache_dir", "force_download", "local_files_only")
        hub = {name: kwargs[name] for name in shared if name in kwargs}
        if config is None:
            config = TokenRouterConfig.from_pretrained(router, revision=revision, **hub)
        path = Path(router) / _WEIGHTS_NAME
        if not Path(router).is_dir():
            path = Path(hf_hub_download(str(router), _WEIGHTS_NAME, revision=revision, **hub))
        weights = _read_router(path, config)
        if base is None:
            base = config.base_model_name_or_path
        if base is None:
            raise ValueError(
                f"`{router}` does not say which model it belongs to. Give the base model first: "
                f'`TokenRouterModel.from_pretrained(base_model, "{router}")`.'
            )
        if isinstance(base, str | Path):
            named = str(base) == config.base_model_name_or_path
            base_revision = config.base_model_revision if named else None
            check_task(base, "AutoModelForCausalLM", revision=base_revision, **hub)
            base = AutoModelForCausalLM.from_pretrained(base, revision=base_revision, **kwargs)
        model = cls(base, config)
        model.load_state_dict(weights)
        return model.eval()

    def to_full_checkpoint(self) -> PreTrainedModel:
        """Makes one model of base and router, with a configuration of its own, to save or push as a whole.

        Returns:
            `PreTrainedModel`: a [`TokenRouterLlamaForCausalLM`], or the same of Qwen2 or Qwen3. It shares its weights
            with this one.

        Raises:
            TypeError: If the family has no such class.
        """
        return make_full_checkpoint(self.model)


def _read_router(path: Path, config: TokenRouterConfig) -> dict[str, Tensor]:
    """The weights of a router, all of them and no others."""
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"`{path}` is no file of weights: {error}. Get it again, or save the router anew.") from error
    width = config.router_hidden_size
    wanted = {"fc1.weight": (width, 4), "fc1.bias": (width,), "fc2.weight": (2, width), "fc2.bias": (2,)}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if found != wanted:
        name = next(name for name in sorted(wanted | found) if wanted.get(name) != found.get(name))
        raise ValueError(
            f"`{path}` holds no router of `router_hidden_size` {width}: `{name}` is "
            f"{found.get(name, 'missing')} and should be {wanted.get(name, 'absent')}. Save the router again."
        )
    wrong = [name for name, value in weights.items() if not value.float().isfinite().all()]
    if wrong:
        raise ValueError(f"`{path}` holds values in `{wrong[0]}` that are not finite. Train the router again.")
    return weights
