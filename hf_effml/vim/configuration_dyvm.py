"""Configuration of DyVM, a Vision Mamba that drops tokens and skips scan directions, image by image."""

import math
from dataclasses import fields
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_vim import VimConfig


@strict
class DyVMConfig(VimConfig):
    r"""Configuration of [`DyVMModel`], [`DyVMForImageClassification`] and [`DyVMBackbone`].

    They are the models of "Dynamic Vision Mamba" (https://huggingface.co/papers/2504.04787).

    Args:
        pruning_layers (`list[int]`, *optional*):
            Blocks before which patch tokens are dropped, ascending, from 1 on; at a quarter, half and three quarters
            of the depth by default, which is `[6, 12, 18]` of 24.
        token_keep_ratio (`float` or `list[float]`, *optional*, defaults to 0.7):
            Share of the patch tokens that a stage keeps of those it gets; the paper uses 0.9 for tiny, 0.7 for small
            and base. It is stored as a list with one share of the *original* number of patches per stage, its powers;
            `int(share * patches)` tokens are kept. A list is taken as it is and may not increase.
        block_keep_ratio (`float`, *optional*, defaults to 0.8):
            Share of the scans that training aims to keep; 0.7 for base in the paper.
        enable_token_pruning (`bool`, *optional*, defaults to `True`):
            Whether tokens are dropped at all.
        enable_block_selection (`bool`, *optional*, defaults to `True`):
            Whether scan directions are skipped at all.
        token_selection (`str`, *optional*, defaults to `"learned"`):
            `"learned"` asks a predictor which tokens to keep. Two baselines without one: `"even"` keeps evenly spaced
            tokens; `"random"` draws new ones for every image in training, and in evaluation takes the same fixed ones
            for all images, by `token_selection_seed`.
        token_selection_seed (`int`, *optional*, defaults to 0):
            Seed of `token_selection="random"` in evaluation.
        token_gumbel_tau (`float`, *optional*, defaults to 1.0):
            Temperature of the token decisions in training.
        block_gumbel_tau (`float`, *optional*, defaults to 2.0):
            Temperature of the gates in training.
        block_gate_threshold (`float`, *optional*, defaults to 0.5):
            Probability above which a scan runs. With `None` training multiplies by the probability itself, and
            evaluation takes 0.5.
        block_gate_logit_offset (`float` or `list[list[float]]`, *optional*, defaults to 0.0):
            Added to the logits of the gates, one number or one per block and direction; written by
            `calibrate_block_gates`.
        block_gate_bias_init (`float`, *optional*, defaults to 5.0):
            Initial bias of the gates: all scans run.
        token_ratio_loss_weight (`float`, *optional*, defaults to 10.0):
            Weight of the loss that sets the token ratio.
        block_ratio_loss_weight (`float`, *optional*, defaults to 10.0):
            Weight of the loss that sets the scan ratio.
        distillation_weight (`float`, *optional*, defaults to 0.5):
            Weight of each of the two distillation losses.
        inference_mode (`str`, *optional*, defaults to `"select"`):
            `"select"` runs a scan for the images that want it only; `"mask"` runs all of them and multiplies by the
            gates, which gives the same values with static shapes. `torch.compile` and `torch.export` always mask.
        kwargs:
            The fields of [`VimConfig`].

    Raises:
        StrictDataclassError: If a field has the wrong type or an impossible value; the message names both.

    Example:

    ```python
    >>> from hf_effml import DyVMConfig
    >>> config = DyVMConfig(token_keep_ratio=0.7)
    >>> config.token_keep_ratio[:2], config.tokens_kept_at_default_size
    ([0.7, 0.48999999999999994], [137, 96, 67])

    ```
    """

    model_type = "dyvm"
    # Beside the logits: shapes differ between training and evaluation, and `Trainer` would gather all of it.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "hidden_states",
        "cls_token_index",
        "last_hidden_state",
        "kept_indices",
        "token_decisions",
        "token_policy",
        "token_positions",
        "block_gates",
        "block_gate_logits",
        "token_keep_ratio",
        "block_keep_ratio",
    ]

    pruning_layers: list[int] | None = None
    token_keep_ratio: float | int | list[float | int] = 0.7
    block_keep_ratio: float | int = 0.8
    enable_token_pruning: bool = True
    enable_block_selection: bool = True
    token_selection: Literal["learned", "random", "even"] = "learned"
    token_selection_seed: int = 0
    token_gumbel_tau: float | int = 1.0
    block_gumbel_tau: float | int = 2.0
    block_gate_threshold: float | int | None = 0.5
    block_gate_logit_offset: float | int | list[list[float | int]] = 0.0
    block_gate_bias_init: float | int = 5.0
    token_ratio_loss_weight: float | int = 10.0
    block_ratio_loss_weight: float | int = 10.0
    distillation_weight: float | int = 0.5
    inference_mode: Literal["select", "mask"] = "select"

    def __post_init__(self, **kwargs: Any) -> None:
        if self.pruning_layers is None:
            quarters = {self.num_hidden_layers * quarter // 4 for quarter in (1, 2, 3)}
            self.pruning_layers = sorted(quarters - {0})
        self.token_keep_ratio = self.keep_ratios
        kwargs.pop("tokens_kept_at_default_size", None)  # derived
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads a saved configuration; that of a plain Vim, whose weights are a start, is taken for our own."""
        values, unused = super().get_config_dict(*args, **kwargs)
        if values.get("model_type") == VimConfig.model_type:
            values["model_type"] = cls.model_type
        return values, unused

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Makes a configuration; what `kwargs` changes is completed and checked like the rest."""
        known = {field.name for field in fields(cls)} - {field.name for field in fields(PreTrainedConfig)}
        changes = {name: kwargs.pop(name) for name in known & kwargs.keys()}
        return super().from_dict({**config_dict, **changes}, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The fields, and beside them how many tokens every stage keeps."""
        return super().to_dict() | {"tokens_kept_at_default_size": self.tokens_kept_at_default_size}

    def stage_ratios(self, ratio: float | int) -> list[float | int]:
        """The powers of a ratio, one per stage.

        Args:
            ratio (`float`):
                Share of the tokens that a stage keeps of those it gets.

        Returns:
            `list[float]`: Shares of the original number of patches.
        """
        return [ratio**stage for stage in range(1, len(self.pruning_layers or []) + 1)]

    def tokens_kept(self, num_patches: int) -> list[int]:
        """How many patch tokens every stage keeps.

        Args:
            num_patches (`int`):
                Patches of the image.

        Returns:
            `list[int]`: One number per stage, at least 1; empty without token pruning.
        """
        if not self.enable_token_pruning:
            return []
        return [max(int(ratio * num_patches), 1) for ratio in self.keep_ratios]

    @property
    def keep_ratios(self) -> list[float | int]:
        """`token_keep_ratio` as a list, also where one number was assigned to it."""
        ratio = self.token_keep_ratio
        return ratio if isinstance(ratio, list) else self.stage_ratios(ratio)

    @property
    def tokens_kept_at_default_size(self) -> list[int]:
        """Patch tokens after every stage, for images of `image_size`."""
        return self.tokens_kept(self.num_patches)

    def validate_token_pruning(self) -> None:
        """Check where and how much is dropped; called by `strict` on construction and when the ratio is changed."""
        layers, ratios = self.pruning_layers or [], self.keep_ratios
        if not self.enable_token_pruning:
            return
        if not layers or sorted(set(layers)) != layers or layers[0] < 1 or layers[-1] >= self.num_hidden_layers:
            raise ValueError(
                f"`pruning_layers` must be ascending blocks from 1 to {self.num_hidden_layers - 1}, each once; got "
                f"{layers}. Block 0 cannot prune: nothing is computed before it."
            )
        if len(ratios) != len(layers):
            raise ValueError(
                f"A list in `token_keep_ratio` has one share per pruning layer ({len(layers)}); got {ratios}."
            )
        if any(not 0 < ratio <= 1 for ratio in ratios) or sorted(ratios, reverse=True) != ratios:
            raise ValueError(
                "`token_keep_ratio` must be above 0, at most 1, and may not increase from stage to stage; got "
                f"{ratios}. Every share is one of the original patches."
            )
        if int(ratios[-1] * self.num_patches) < 1:
            raise ValueError(
                f"`token_keep_ratio` {ratios[-1]} keeps none of {self.num_patches} patches. Keep at least "
                f"{1 / self.num_patches:.3g}."
            )
        if self.token_selection == "learned" and self.hidden_size % 4:
            raise ValueError(f"`hidden_size` must be a multiple of 4 for the token predictor; got {self.hidden_size}.")

    def validate_block_selection(self) -> None:
        """Check the gates; called by `strict` on construction and when an offset is set."""
        if not 0 < self.block_keep_ratio <= 1:
            raise ValueError(f"`block_keep_ratio` must be above 0 and at most 1; got {self.block_keep_ratio}.")
        threshold = self.block_gate_threshold
        if threshold is not None and not 0 < threshold < 1:
            raise ValueError(f"`block_gate_threshold` must be between 0 and 1, or None; got {threshold}.")
        offset = self.block_gate_logit_offset
        for value in (self.block_gate_bias_init, *(sum(offset, []) if isinstance(offset, list) else [offset])):
            if not math.isfinite(value):
                raise ValueError(f"`block_gate_bias_init` and `block_gate_logit_offset` must be finite; got {value}.")
        if isinstance(offset, list) and [len(pair) for pair in offset] != [2] * self.num_hidden_layers:
            raise ValueError(
                f"A list in `block_gate_logit_offset` has one pair per block ({self.num_hidden_layers}); got {offset}."
            )

    def validate_training(self) -> None:
        """Check temperatures and loss weights; called by `strict` on construction."""
        for name in ("token_gumbel_tau", "block_gumbel_tau"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be positive and finite; got {getattr(self, name)}.")
        for name in ("token_ratio_loss_weight", "block_ratio_loss_weight", "distillation_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be finite and at least 0; got {getattr(self, name)}.")


__all__ = ["DyVMConfig"]
