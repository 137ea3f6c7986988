"""DyVM: Vision Mamba that drops patch tokens on its way and lets every image skip scan directions, block by block."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.jit import is_tracing
from transformers import initialization as init
from transformers.utils import logging

from .configuration_dyvm import DyVMConfig
from .configuration_vim import VimConfig
from .direction_gates import DyVMBlock
from .dyvm_run import DyVMRun
from .gate_calibration import calibrate
from .losses import dyvm_patch_features, dyvm_ratio_losses
from .modeling_vim import (
    VimForImageClassification,
    VimImageClassifierOutput,
    VimModel,
    VimModelOutput,
    VimPreTrainedModel,
)
from .token_selection import TokenPredictor


logger = logging.get_logger(__name__)


@dataclass
class DyVMModelOutput(VimModelOutput):
    """Output of [`DyVMModel`]. What a mechanism that is switched off would report is `None`, and so is `merge_info`.

    Args:
        last_hidden_state (`Tensor` of shape `(batch, tokens, hidden_size)`):
            Normalised tokens that are left, class token(s) in their place. In training all are there, the dropped ones
            after the kept ones.
        pooler_output (`Tensor` of shape `(batch, hidden_size)`):
            The feature that a head reads.
        hidden_states (`tuple[Tensor, ...]`, *optional*):
            `num_hidden_layers + 1` tensors `(batch, tokens, hidden_size)`: the embeddings, then the residual stream
            after every block; fewer and fewer tokens in evaluation.
        cls_token_index (`Tensor` of shape `(batch, class tokens)`):
            Where the class token(s) stand.
        kept_indices (`tuple[Tensor, ...]`, *optional*):
            In evaluation, per stage the original patches `(batch, kept)` that stay, ascending.
        token_decisions (`tuple[Tensor, ...]`, *optional*):
            In training, per stage `(batch, patches)` 1 for tokens that stay, in the order before the stage, with
            gradient.
        token_policy (`Tensor` of shape `(batch, patches)`, *optional*):
            The last of them, in the order at the end.
        token_positions (`Tensor` of shape `(batch, patches)`):
            Original patch of every patch token of `last_hidden_state`, in its order.
        block_gates (`Tensor` of shape `(batch, blocks, 2)`, *optional*):
            1 where the forward and the backward scan ran; with gradient in training.
        block_gate_logits (`Tensor` of shape `(batch, blocks, 2)`, *optional*):
            What they were decided from, the offset of the configuration added, without noise.
        token_keep_ratio (`Tensor` of shape `(batch, stages)`, *optional*):
            Share of the patches left after each stage.
        block_keep_ratio (`Tensor` of shape `(batch,)`, *optional*):
            Share of the scans that ran.
    """

    kept_indices: tuple[Tensor, ...] | None = None
    token_decisions: tuple[Tensor, ...] | None = None
    token_policy: Tensor | None = None
    token_positions: Tensor | None = None
    block_gates: Tensor | None = None
    block_gate_logits: Tensor | None = None
    token_keep_ratio: Tensor | None = None
    block_keep_ratio: Tensor | None = None


@dataclass
class DyVMImageClassifierOutput(VimImageClassifierOutput):
    """Output of [`DyVMForImageClassification`].

    Args:
        loss (`Tensor` of shape `()`, *optional*):
            When `labels` are given: the loss of a [`VimForImageClassification`], and in training the weighted ratio
            losses with it.
        logits (`Tensor` of shape `(batch, num_labels)`):
            Scores before the softmax.
        hidden_states, cls_token_index, last_hidden_state, kept_indices, token_decisions, token_policy,
        token_positions, block_gates, block_gate_logits, token_keep_ratio, block_keep_ratio:
            As in [`DyVMModelOutput`].
    """

    cls_token_index: Tensor | None = None
    last_hidden_state: Tensor | None = None
    kept_indices: tuple[Tensor, ...] | None = None
    token_decisions: tuple[Tensor, ...] | None = None
    token_policy: Tensor | None = None
    token_positions: Tensor | None = None
    block_gates: Tensor | None = None
    block_gate_logits: Tensor | None = None
    token_keep_ratio: Tensor | None = None
    block_keep_ratio: Tensor | None = None


class DyVMPreTrainedModel(VimPreTrainedModel):
    """Initialisation and switches shared by all DyVM classes."""

    config_class = DyVMConfig
    config: DyVMConfig
    _no_split_modules = ["DyVMBlock"]
    _plain_class: type[VimPreTrainedModel]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Gates start open; the predictors are linear layers and norms like any other."""
        super()._init_weights(module)
        if hasattr(module, "starts_open"):
            init.zeros_(module.weight)
            init.constant_(module.bias, float(self.config.block_gate_bias_init))

    @classmethod
    def from_vim(cls, model: VimPreTrainedModel | str | PathLike, **dyvm_fields: Any) -> Self:
        """Make a DyVM from a trained Vim of the same kind; weights are copied, the rest is fresh and needs training.

        Args:
            model ([`VimModel`], [`VimForImageClassification`], `str` or `PathLike`):
                The plain model, or its folder or name on the Hub. Of an R-MeeTo model the merging is left out.
            dyvm_fields:
                Fields of [`DyVMConfig`], `token_keep_ratio=0.7` for example.

        Returns:
            The DyVM, on the same device, with the same types and in the same mode.

        Raises:
            TypeError: If `model` is of another kind, or a field is not known.
            StrictDataclassError: If a field has an impossible value.
        """
        if isinstance(model, str | PathLike):
            model = cls._plain_class.from_pretrained(model)
        if not isinstance(model, cls._plain_class) or model.config.model_type == DyVMConfig.model_type:
            raise TypeError(
                f"`{cls.__name__}.from_vim` needs a plain `{cls._plain_class.__name__}`; got a "
                f"`{type(model).__name__}`."
            )
        dynamic = cls(_dyvm_config(model.config, dyvm_fields))
        state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        report = dynamic.load_state_dict(state, strict=False, assign=True)
        if report.unexpected_keys:
            raise TypeError(f"The Vim has weights of no use here: {', '.join(report.unexpected_keys)}.")
        for name in report.missing_keys:
            fresh = dynamic.get_parameter(name)
            fresh.data = fresh.data.to(device=model.device, dtype=model.dtype)
        return dynamic.train(model.training)

    def set_pruning(self, enabled: bool) -> None:
        """Switch both mechanisms off, which gives exactly the plain Vim, or on again.

        Args:
            enabled (`bool`):
                Whether tokens are dropped and scans skipped. It is not saved with the model.
        """
        for encoder in _encoders(self):
            encoder.pruning = enabled

    def set_token_keep_ratio(self, ratio: float | list[float]) -> None:
        """Change how many tokens are kept from the next forward pass on; the predictors rank tokens for any number.

        The configuration changes with it, so a saved model keeps it.

        Args:
            ratio (`float` or `list[float]`):
                See `token_keep_ratio` in [`DyVMConfig`].

        Raises:
            ValueError: If it has an impossible value; nothing is changed then.
        """
        config = self.config
        before = config.token_keep_ratio
        try:
            config.token_keep_ratio = ratio
            config.token_keep_ratio = list(config.keep_ratios)
            config.validate_token_pruning()
        except Exception:
            config.token_keep_ratio = before
            raise

    def calibrate_block_gates(
        self,
        dataloader: Iterable[Any],
        target: float | None = None,
        per: str = "global",
        max_batches: int | None = None,
    ) -> list[dict[str, Any]]:
        """Shift the gates so that the wanted share of scans runs in evaluation.

        Training sets the share of gates that are *drawn*; decided without noise, more are open. The
        offsets are stored in the configuration and travel with the model. With a class token the gates of block 0 see
        nothing of the image: they are open for all images or for none, whatever the offset.

        Args:
            dataloader (`Iterable`):
                Batches of training images, gone through several times: dictionaries with `pixel_values`, or tensors.
            target (`float`, *optional*):
                Share of scans to run; `config.block_keep_ratio` by default.
            per (`str`, *optional*, defaults to `"global"`):
                One offset for all gates, or one per `"block"` or `"direction"` (of every block), which makes each of
                them run the same share.
            max_batches (`int`, *optional*):
                Use only so many batches.

        Returns:
            `list[dict[str, Any]]`: Rows with `block`, `direction`, the shares `before` and `after`, and `offset`; the
            first row is over all gates.

        Raises:
            ValueError: If the model has no gates, an argument is impossible, or there is no batch.
        """
        return calibrate(self, dataloader, target, per, max_batches)


class DyVMEncoder(DyVMPreTrainedModel):
    """What [`DyVMModel`] and [`DyVMBackbone`] have beside their Vim."""

    block_class = DyVMBlock
    run_class: type[DyVMRun] = DyVMRun

    def __init__(self, config: DyVMConfig):
        super().__init__(config)
        self.pruning = True
        learned = config.enable_token_pruning and config.token_selection == "learned"
        predictors = (TokenPredictor(config.hidden_size) for _ in config.pruning_layers or [])
        self.score_predictors = nn.ModuleList(predictors) if learned else None
        self._warned = False
        self.post_init()

    def begin_run(
        self,
        stream: Tensor,
        class_positions: tuple[int, ...],
        kept_indices: Sequence[Tensor] | None = None,
        block_gates: Tensor | None = None,
        generator: torch.Generator | None = None,
        **decisions: Any,
    ) -> DyVMRun:
        """Start a forward pass that drops tokens and skips scans.

        Args:
            stream, class_positions, decisions:
                See [`VimEncoder`].
            kept_indices, block_gates, generator:
                See [`DyVMModel`].

        Returns:
            [`DyVMRun`]

        Raises:
            ValueError: If forced decisions have the wrong shape.
        """
        self._warn_if_fresh()
        return self.run_class(
            self.config,
            stream,
            class_positions,
            predictors=self.score_predictors,
            training=self.training,
            enabled=self.pruning,
            kept_indices=kept_indices,
            block_gates=block_gates,
            generator=generator,
        )

    def _warn_if_fresh(self) -> None:
        """Once: dropping tokens by predictors that never saw a gradient, whose biases are still zero."""
        if self.training or not self.pruning or self._warned or torch.compiler.is_compiling() or is_tracing():
            return
        self._warned = True
        biases = [predictor.out_conv[-1].bias for predictor in self.score_predictors or ()]
        # In a quantised layer the bias is a method.
        if biases and all(isinstance(bias, Tensor) and not bias.any() for bias in biases):
            logger.warning_once(
                "The token predictors of this DyVM are untrained: it drops tokens at random. Fine-tune it first, with "
                "`DyVMTrainer` for example; `model.set_pruning(False)` gives the plain Vim meanwhile."
            )


class DyVMModel(DyVMEncoder, VimModel):
    r"""Dynamic Vision Mamba without a head (https://huggingface.co/papers/2504.04787).

    In evaluation the tokens that a stage drops are gone and a scan runs for the images that want it. In training
    decisions are drawn, and dropped tokens stay, masked behind the others, which gives the same values. [`DyVMRun`]
    tells how.

    Its `forward` is that of [`VimModel`] with three keywords more:

    - `kept_indices` (`Sequence[Tensor]`): per stage the original patches `(batch, kept)` to keep, ascending, as in the
      output of an earlier pass, instead of choosing them;
    - `block_gates` (`Tensor` of shape `(batch, blocks, 2)`): the gates, 0 or 1, instead of deciding them;
    - `generator` (`torch.Generator`): source of the noise in training; the default generator of the device if unset.

    Example:

    ```python
    >>> import torch
    >>> from hf_effml import DyVMConfig, DyVMModel
    >>> config = DyVMConfig(
    ...     image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=3, token_keep_ratio=0.5
    ... )
    >>> DyVMModel(config).eval()(torch.zeros(1, 3, 32, 32)).last_hidden_state.shape
    torch.Size([1, 5, 32])

    ```
    """

    _plain_class = VimModel
    output_class = DyVMModelOutput


class DyVMForImageClassification(DyVMPreTrainedModel, VimForImageClassification):
    r"""Dynamic Vision Mamba with a linear classifier on the class token (https://huggingface.co/papers/2504.04787).

    Its `forward` takes the keywords of [`DyVMModel`] too and returns a [`DyVMImageClassifierOutput`].

    Example:

    ```python
    >>> import torch
    >>> from hf_effml import DyVMForImageClassification, VimConfig, VimForImageClassification
    >>> vim = VimForImageClassification(VimConfig(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=3))
    >>> model = DyVMForImageClassification.from_vim(vim, token_keep_ratio=0.5).eval()
    >>> [kept.shape[1] for kept in model(torch.zeros(1, 3, 32, 32)).kept_indices]
    [8, 4]

    ```
    """

    _plain_class = VimForImageClassification
    model_class = DyVMModel

    def _loss(self, logits: Tensor, labels: Tensor, outputs: DyVMModelOutput) -> Tensor:
        loss = super()._loss(logits, labels, outputs)
        return loss + sum(dyvm_ratio_losses(outputs, self.config).values()) if self.training else loss

    def _output(self, loss: Tensor | None, logits: Tensor, outputs: DyVMModelOutput) -> DyVMImageClassifierOutput:
        shared = {name: value for name, value in outputs.items() if name != "pooler_output"}
        return DyVMImageClassifierOutput(loss=loss, logits=logits, **shared)

    def patch_features(self, outputs: DyVMImageClassifierOutput) -> Tensor:
        """The patch tokens among the normalised tokens at the end, for distillation.

        Args:
            outputs ([`DyVMImageClassifierOutput`]):
                From this model.

        Returns:
            `Tensor` of shape `(batch, patches, hidden_size)`: In the order of `outputs.token_positions`.
        """
        return dyvm_patch_features(outputs.last_hidden_state, outputs.cls_token_index)


def _encoders(model: nn.Module) -> list[DyVMEncoder]:
    return [module for module in model.modules() if isinstance(module, DyVMEncoder)]


def _dyvm_config(config: VimConfig, dyvm_fields: dict[str, Any]) -> DyVMConfig:
    """`config` as that of a DyVM; what `dyvm_fields` leaves open stays as in `config`, or at its default."""
    known = {field.name for field in fields(DyVMConfig) if field.name[0] != "_"} | {"out_features", "out_indices"}
    unknown = sorted(set(dyvm_fields) - known)
    if unknown:
        raise TypeError(f"Unknown field {', '.join(unknown)} of `DyVMConfig`.")
    # Derived, or about the file that `config` came from.
    own = ("architectures", "auto_map", "model_type", "out_features", "out_indices", "stage_names")
    values = {name: value for name, value in config.to_dict().items() if name not in (*own, "transformers_version")}
    values = {name: value for name, value in values.items() if not name.startswith("merge_")}
    return DyVMConfig(**values | dyvm_fields)


__all__ = [
    "DyVMEncoder",
    "DyVMForImageClassification",
    "DyVMImageClassifierOutput",
    "DyVMModel",
    "DyVMModelOutput",
    "DyVMPreTrainedModel",
]
