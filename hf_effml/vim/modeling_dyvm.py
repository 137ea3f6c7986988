"""DyVM: Vision Mamba that drops patch tokens on its way and lets every image skip scan directions, block by block."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils import logging

from .configuration_dyvm import DyVMConfig
from .configuration_vim import VimConfig
from .direction_gates import DyVMBlock, DyVMGateHead, Gating
from .dyvm_losses import patch_features, ratio_losses
from .gate_calibration import calibrate
from .modeling_vim import (
    VimForImageClassification,
    VimImageClassifierOutput,
    VimModel,
    VimModelOutput,
    VimPreTrainedModel,
)
from .token_reduction import take_rows
from .token_selection import (
    TokenLayout,
    TokenPredictor,
    decisions_from,
    fixed_ranks,
    sample_decisions,
    sample_exponential,
)


logger = logging.get_logger(__name__)


@dataclass
class DyVMModelOutput(VimModelOutput):
    """
    Output of [`DyVMModel`]. What a mechanism that is switched off would report is `None`, and so is `merge_info`.

    Args:
        last_hidden_state (`Tensor` of shape `(batch, tokens, hidden_size)`):
            Normalised tokens that are left, class token(s) in their place. In training all are there, the dropped ones
            after the kept ones.
        pooler_output (`Tensor` of shape `(batch, hidden_size)`): The feature that a head reads.
        hidden_states (`tuple[Tensor, ...]`, *optional*):
            `num_hidden_layers + 1` tensors `(batch, tokens, hidden_size)`: the embeddings, then the residual stream
            after every block; fewer and fewer tokens in evaluation.
        cls_token_index (`Tensor` of shape `(batch, class tokens)`): Where the class token(s) stand.
        kept_indices (`tuple[Tensor, ...]`, *optional*):
            In evaluation, per stage the original patches `(batch, kept)` that stay, ascending.
        token_decisions (`tuple[Tensor, ...]`, *optional*):
            In training, per stage `(batch, patches)` 1 for tokens that stay, in the order before the stage, with
            gradient.
        token_policy (`Tensor` of shape `(batch, patches)`, *optional*): The last of them, in the order at the end.
        token_positions (`Tensor` of shape `(batch, patches)`):
            Original patch of every patch token of `last_hidden_state`, in its order.
        block_gates (`Tensor` of shape `(batch, blocks, 2)`, *optional*):
            1 where the forward and the backward scan ran; with gradient in training.
        block_gate_logits (`Tensor` of shape `(batch, blocks, 2)`, *optional*):
            What they were decided from, the offset of the configuration added, without noise.
        token_keep_ratio (`Tensor` of shape `(batch, stages)`, *optional*): Share of the patches left after each stage.
        block_keep_ratio (`Tensor` of shape `(batch,)`, *optional*): Share of the scans that ran.
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
    """
    Output of [`DyVMForImageClassification`].

    Args:
        loss (`Tensor` of shape `()`, *optional*):
            When `labels` are given: the mean cross-entropy, and in training the weighted ratio losses with it.
        logits (`Tensor` of shape `(batch, num_labels)`): Scores before the softmax.
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


class DyVMPass:
    """
    One forward pass: the layout of the stream at the moment, and everything that was decided so far.

    Args:
        config ([`DyVMConfig`]): When and how to choose.
        predictors (`nn.ModuleList`, *optional*): One [`TokenPredictor`] per stage, for learned selection.
        training (`bool`): Whether to draw decisions and keep all tokens, or to decide and drop.
        layout ([`TokenLayout`]): That of the stream before block 0.
        kept_indices, block_gates, generator: See [`DyVMModel`].
    """

    def __init__(
        self,
        config: DyVMConfig,
        predictors: nn.ModuleList | None,
        training: bool,
        layout: TokenLayout,
        kept_indices: Sequence[Tensor] | None,
        block_gates: Tensor | None,
        generator: torch.Generator | None,
    ):
        self.config = config
        self.predictors = predictors
        self.training = training
        self.layout = layout
        self.forced_indices = kept_indices
        self.forced_gates = block_gates
        self.generator = generator
        batch, self.patches = layout.positions.shape
        self.counts = config.tokens_kept(self.patches)
        layers = config.pruning_layers or [] if config.enable_token_pruning else []
        self.stages = {block: stage for stage, block in enumerate(layers)}
        self.token_mask: Tensor | None = None
        self.kept: list[Tensor] = []
        self.decisions: list[Tensor] = []
        self.decided: list[Tensor] = []
        device = layout.positions.device
        self.offsets = torch.tensor(config.block_gate_logit_offset, dtype=torch.float32, device=device)
        self.offsets = self.offsets.expand(config.num_hidden_layers, 2)
        self.select = config.inference_mode == "select" and not training and not torch.compiler.is_compiling()

    def prunes(self, block: int) -> bool:
        """
        Whether tokens are dropped before a block.

        Args:
            block (`int`): Its index.

        Returns:
            `bool`
        """
        return block in self.stages

    def step(self, block: int, layer: DyVMBlock, stream: Tensor) -> Tensor:
        """
        Choose tokens if it is time to, and apply a block.

        Args:
            block (`int`): Its index.
            layer ([`DyVMBlock`]): The block.
            stream (`Tensor` of shape `(batch, tokens, hidden_size)`): Its input.

        Returns:
            `Tensor` of shape `(batch, tokens left, hidden_size)`
        """
        if self.prunes(block):
            stage = self.stages[block]
            stream = self._mark(stage, stream) if self.training else self._drop(stage, stream)
        if not self.config.enable_block_selection:
            return layer(stream, self.token_mask)[0]
        stream, decided = layer(stream, self.token_mask, gating=self._gating(block))
        self.decided.append(decided)
        return stream

    def _gating(self, block: int) -> Gating:
        config, noise = self.config, None
        forced = None if self.forced_gates is None else self.forced_gates[:, block]
        if self.training and forced is None:
            shape, device = (len(self.layout.positions), 2), self.offsets.device
            plus, minus = (sample_exponential(shape, device, self.generator).log() for _ in range(2))
            noise = minus - plus
        return Gating(
            class_rows=self.layout.class_rows,
            offset=self.offsets[block],
            threshold=config.block_gate_threshold,
            tau=config.block_gumbel_tau,
            noise=noise,
            forced=forced,
            select=self.select,
        )

    def _log_probs(self, stage: int, stream: Tensor) -> Tensor:
        """Of keeping and dropping every patch token, `(batch, patches, 2)`, in stream order."""
        if self.predictors is None:
            raise RuntimeError(
                'This model has no token predictors: it was built with `token_selection="random"` or `"even"`, or '
                "without token pruning. Load it with the setting wanted instead of changing its configuration."
            )
        scores = self.predictors[stage](stream, self.layout.row_weights(class_weight=0.0))
        return scores.gather(1, self.layout.patch_rows.unsqueeze(2).expand(-1, -1, 2))

    def _drop(self, stage: int, stream: Tensor) -> Tensor:
        """Evaluation: the same number of tokens goes on for every image (dyvm.md 2.3)."""
        batch, tokens = self.layout.positions.shape
        kept = self.counts[stage]
        if self.forced_indices is not None:
            ranks = self._forced_ranks(self.forced_indices[stage])
            kept = ranks.shape[1]
        elif kept == tokens:
            self.kept.append(self.layout.positions)
            return stream
        elif self.config.token_selection == "learned":
            ranks = self._log_probs(stage, stream)[..., 0].topk(kept, dim=1).indices.sort(dim=1).values
        else:
            ranks = self._fixed_ranks(stage, tokens)
        counts = torch.full((batch,), kept, device=ranks.device)
        stream, self.layout = self.layout.rearrange(stream, ranks, counts, self.config.cls_token_position)
        self.kept.append(self.layout.positions)
        return stream

    def _forced_ranks(self, patches: Tensor) -> Tensor:
        """Of original patches, `(batch, kept)`, among those that are left."""
        left = self.layout.positions.contiguous()
        ranks = torch.searchsorted(left, patches).clamp(max=left.shape[1] - 1)
        if not torch.compiler.is_compiling() and not torch.equal(left.gather(1, ranks), patches):
            raise ValueError("`kept_indices` must be ascending patches that no earlier stage has dropped.")
        return ranks

    def _mark(self, stage: int, stream: Tensor) -> Tensor:
        """Training: drawn decisions; kept tokens come first, the others stay behind them, masked (dyvm.md 2.4)."""
        decisions = self._draw(stage, stream)
        if self.layout.policy is not None:
            decisions = decisions * self.layout.policy
        self.decisions.append(decisions)
        dropped = decisions < 0.5
        order = dropped.to(torch.uint8).argsort(dim=1, stable=True)
        counts = decisions.shape[1] - dropped.sum(1)
        layout = self.layout._replace(policy=decisions)
        stream, self.layout = layout.rearrange(stream, order, counts, self.config.cls_token_position)
        self.token_mask = self.layout.row_weights(class_weight=1.0)
        return stream

    def _draw(self, stage: int, stream: Tensor) -> Tensor:
        """Which patch tokens to keep, `(batch, patches)` 0 or 1, whatever was decided before."""
        batch, tokens = self.layout.positions.shape
        selection = self.config.token_selection
        if self.forced_indices is not None:
            return decisions_from(self.forced_indices[stage], tokens).gather(1, self.layout.positions)
        if selection == "learned":
            tau = float(self.config.token_gumbel_tau)
            return sample_decisions(self._log_probs(stage, stream), tau, self.generator)
        # Kept tokens stand first, so the ranks of those that are left are the first ones.
        left = self.counts[stage - 1] if stage else tokens
        if selection == "even":
            return decisions_from(self._fixed_ranks(stage, left), tokens)
        noise = sample_exponential((batch, left), stream.device, self.generator)
        return decisions_from(noise.topk(self.counts[stage], dim=1).indices, tokens)

    def _fixed_ranks(self, stage: int, tokens: int) -> Tensor:
        seed = f"{self.config.token_selection_seed}-{stage}"
        ranks = fixed_ranks(self.config.token_selection, tokens, self.counts[stage], seed)
        return torch.tensor(ranks, device=self.layout.positions.device).expand(len(self.layout.positions), -1)

    def report(self) -> dict[str, Any]:
        """
        What was decided.

        Returns:
            `dict[str, Any]`: The fields of [`DyVMModelOutput`] from `cls_token_index` on.
        """
        values: dict[str, Any] = {
            "cls_token_index": self.layout.class_rows,
            "token_positions": self.layout.positions,
        }
        if self.kept:
            shares = [positions.shape[1] / self.patches for positions in self.kept]
            values["kept_indices"] = tuple(self.kept)
            values["token_keep_ratio"] = torch.tensor(shares, device=self.offsets.device).expand(
                len(self.layout.positions), -1
            )
        if self.decisions:
            values["token_decisions"] = tuple(self.decisions)
            values["token_policy"] = self.layout.policy
            values["token_keep_ratio"] = torch.stack([step.detach().mean(1) for step in self.decisions], dim=1)
        if self.decided:
            gates, logits = torch.stack(self.decided, dim=1).unbind(2)
            values["block_gates"], values["block_gate_logits"] = gates, logits
            values["block_keep_ratio"] = gates.detach().mean((1, 2))
        return values


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
        if isinstance(module, DyVMGateHead):
            init.zeros_(module.weight)
            init.constant_(module.bias, float(self.config.block_gate_bias_init))

    @classmethod
    def from_vim(cls, model: VimPreTrainedModel | str | PathLike, **dyvm_fields: Any) -> Self:
        """
        Make a DyVM from a trained Vim of the same kind; the weights are copied, the rest is fresh and needs training.

        Args:
            model ([`VimModel`], [`VimForImageClassification`], `str` or `PathLike`):
                The plain model, or its folder or name on the Hub. Of an R-MeeTo model the merging is left out.
            dyvm_fields: Fields of [`DyVMConfig`], `token_keep_ratio=0.7` for example.

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
        """
        Switch both mechanisms off, which gives exactly the plain Vim, or on again.

        Args:
            enabled (`bool`): Whether tokens are dropped and scans skipped. It is not saved with the model.
        """
        for encoder in _encoders(self):
            encoder.pruning = enabled

    def set_token_keep_ratio(self, ratio: float | list[float]) -> None:
        """
        Change how many tokens are kept from the next forward pass on; the predictors rank tokens for any number.

        The configuration changes with it, so a saved model keeps it.

        Args:
            ratio (`float` or `list[float]`): See `token_keep_ratio` in [`DyVMConfig`].

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
        """
        Shift the gates so that the wanted share of scans runs in evaluation.

        Training sets the share of gates that are *drawn*; decided without noise, more are open (dyvm.md 3.4). The
        offsets are stored in the configuration and travel with the model. With a class token the gates of block 0 see
        nothing of the image: they are open for all images or for none, whatever the offset.

        Args:
            dataloader (`Iterable`):
                Batches of training images, gone through several times: dictionaries with `pixel_values`, or tensors.
            target (`float`, *optional*): Share of scans to run; `config.block_keep_ratio` by default.
            per (`str`, *optional*, defaults to `"global"`):
                One offset for all gates, or one per `"block"` or `"direction"` (of every block), which makes each of
                them run the same share.
            max_batches (`int`, *optional*): Use only so many batches.

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

    def __init__(self, config: DyVMConfig):
        super().__init__(config)
        self.pruning = True
        learned = config.enable_token_pruning and config.token_selection == "learned"
        predictors = (TokenPredictor(config.hidden_size) for _ in config.pruning_layers or [])
        self.score_predictors = nn.ModuleList(predictors) if learned else None
        self._warned = False
        self.post_init()

    def _begin(
        self,
        stream: Tensor,
        kept_indices: Sequence[Tensor] | None = None,
        block_gates: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> DyVMPass:
        """Start a forward pass on the stream before block 0."""
        self._warn_if_fresh()
        batch, tokens, _ = stream.shape
        patches, position = tokens - self.config.num_class_tokens, self.config.cls_token_position
        self._check_forced(batch, kept_indices, block_gates)
        layout = TokenLayout.start(batch, patches, position, stream.device)
        return DyVMPass(
            self.config, self.score_predictors, self.training, layout, kept_indices, block_gates, generator
        )

    def _check_forced(self, batch: int, kept_indices: Sequence[Tensor] | None, block_gates: Tensor | None) -> None:
        stages, blocks = len(self.config.pruning_layers or []), self.config.num_hidden_layers
        if kept_indices is not None and len(kept_indices) != stages:
            raise ValueError(
                f"`kept_indices` needs one (batch, kept) tensor per stage ({stages}); got {len(kept_indices)}."
            )
        if block_gates is not None and tuple(block_gates.shape) != (batch, blocks, 2):
            raise ValueError(f"`block_gates` must be {(batch, blocks, 2)}; got {tuple(block_gates.shape)}.")

    def _warn_if_fresh(self) -> None:
        """Once: dropping tokens by predictors that never saw a gradient, whose biases are still zero."""
        if self.training or not self.pruning or self._warned or torch.compiler.is_compiling():
            return
        self._warned = True
        if self.score_predictors and not any(p.out_conv[-1].bias.any() for p in self.score_predictors):
            logger.warning_once(
                "The token predictors of this DyVM are untrained: it drops tokens at random. Fine-tune it first, with "
                "`DyVMTrainer` for example; `model.set_pruning(False)` gives the plain Vim meanwhile."
            )


class DyVMModel(DyVMEncoder, VimModel):
    r"""
    Dynamic Vision Mamba without a head (https://huggingface.co/papers/2504.04787).

    In evaluation the tokens that a stage drops are gone and a scan runs for the images that want it. In training
    decisions are drawn, and dropped tokens stay, masked behind the others, which gives the same values.

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

    def forward(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool | None = None,
        output_merge_info: bool = False,
        return_dict: bool | None = None,
        kept_indices: Sequence[Tensor] | None = None,
        block_gates: Tensor | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> DyVMModelOutput | tuple:
        """
        Encode images.

        Args:
            pixel_values, interpolate_pos_encoding, output_hidden_states, return_dict: See [`VimModel`].
            output_merge_info (`bool`, *optional*, defaults to `False`): As for a plain Vim, nothing to tell.
            kept_indices (`Sequence[Tensor]`, *optional*):
                Per stage the original patches `(batch, kept)` to keep, ascending, instead of choosing them, as in the
                output of an earlier pass.
            block_gates (`Tensor` of shape `(batch, blocks, 2)`, *optional*):
                The gates, 0 or 1, instead of deciding them.
            generator (`torch.Generator`, *optional*):
                Source of the noise in training; the default generator of the device if unset.

        Returns:
            [`DyVMModelOutput`]

        Raises:
            ValueError: If images have the wrong shape, size or type, or forced decisions the wrong shape.
        """
        keep_all = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        stream, _ = self._embed(pixel_values, interpolate_pos_encoding)
        run = self._begin(stream, kept_indices, block_gates, generator)
        all_states = [stream]
        for index, layer in enumerate(self.layers):
            stream = run.step(index, layer, stream) if self.pruning else layer(stream)[0]
            if keep_all:
                all_states.append(stream)
        stream = self.norm_f(stream)
        output = DyVMModelOutput(
            last_hidden_state=stream,
            pooler_output=self._pool_kept(stream, run.layout),
            hidden_states=tuple(all_states) if keep_all else None,
            **run.report(),
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def _pool_kept(self, stream: Tensor, layout: TokenLayout) -> Tensor:
        """As without dropped tokens; an image may have none left."""
        if layout.policy is None or self.config.pooling == "cls":
            return self._pool(stream, layout.class_rows, None)
        weights = layout.policy.unsqueeze(2)
        count = weights.sum(1)
        if self.config.pooling == "mean":
            return ((stream * weights).sum(1) / count.clamp(min=1)).to(stream.dtype)
        last = (count.long() - 1).clamp(min=0)
        return take_rows(stream, last).squeeze(1)


class DyVMForImageClassification(DyVMPreTrainedModel, VimForImageClassification):
    r"""
    Dynamic Vision Mamba with a linear classifier on the class token (https://huggingface.co/papers/2504.04787).

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

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool | None = None,
        output_merge_info: bool = False,
        return_dict: bool | None = None,
        kept_indices: Sequence[Tensor] | None = None,
        block_gates: Tensor | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> DyVMImageClassifierOutput | tuple:
        """
        Classify images.

        Args:
            pixel_values (`Tensor` of shape `(batch, channels, height, width)`): Normalised images.
            labels (`Tensor`, *optional*):
                Class numbers `(batch,)`, or soft targets `(batch, num_labels)` as mixup makes them.
            interpolate_pos_encoding, output_hidden_states, output_merge_info, return_dict, kept_indices, block_gates,
            generator:
                See [`DyVMModel`].

        Returns:
            [`DyVMImageClassifierOutput`]

        Raises:
            ValueError: As in [`DyVMModel`], or if soft labels have the wrong number of columns.
        """
        outputs = self.vim(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            kept_indices=kept_indices,
            block_gates=block_gates,
            generator=generator,
        )
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self._loss(logits, labels)
        if loss is not None and self.training:
            loss = loss + sum(ratio_losses(outputs, self.config).values())
        shared = {name: value for name, value in outputs.items() if name != "pooler_output"}
        output = DyVMImageClassifierOutput(loss=loss, logits=logits, **shared)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def patch_features(self, outputs: DyVMImageClassifierOutput) -> Tensor:
        """
        The patch tokens among the normalised tokens at the end, for distillation.

        Args:
            outputs ([`DyVMImageClassifierOutput`]): From this model.

        Returns:
            `Tensor` of shape `(batch, patches, hidden_size)`: In the order of `outputs.token_positions`.
        """
        return patch_features(outputs.last_hidden_state, outputs.cls_token_index)


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
    "DyVMPass",
    "DyVMPreTrainedModel",
]
