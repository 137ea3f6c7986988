"""Vision Mamba (Vim): a plain stack of bidirectional Mamba blocks, and its image classifier."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.utils import ModelOutput

from .classification_loss import classification_loss
from .configuration_vim import VimConfig
from .vim_blocks import (
    VimBlock,
    VimConvolution,
    VimMixer,
    VimPatchEmbeddings,
    VimRMSNorm,
    VimTimeStep,
)
from .vim_run import TokenReducer, VimRun


try:
    from hf_effml.utils.model_kinds import NamesWhatFails
except ImportError:  # a saved folder where the package is not installed

    class NamesWhatFails:  # type: ignore[no-redef]
        """Adds nothing."""


# Files keep the official names; `load_state_dict` takes them, too.
for _model_type in ("vim", "rmeeto_vim", "dyvm"):
    _names = [WeightRenaming(f"mixer.dt_proj{b}.bias", f"mixer.time_step{b}.bias") for b in ("", "_b")]
    register_checkpoint_conversion_mapping(_model_type, _names, overwrite=True)


@dataclass
class VimModelOutput(ModelOutput):
    """Output of [`VimModel`].

    Args:
        last_hidden_state (`Tensor` of shape `(batch, tokens, hidden_size)`):
            Normalised tokens, class token(s) in their place.
        pooler_output (`Tensor` of shape `(batch, hidden_size)`):
            The feature that a head reads.
        hidden_states (`tuple[Tensor, ...]`, *optional*):
            `num_hidden_layers + 1` tensors `(batch, tokens, hidden_size)`: the embeddings, then the residual stream
            after every block. When tokens are merged their number differs from block to block.
        cls_token_index (`Tensor` of shape `(batch, class tokens)`):
            Where the class token(s) stand in `last_hidden_state`; the other rows are the patches.
        merge_info (`MergeInfo`, *optional*):
            What token merging did, with `output_merge_info=True` on a merged model.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    cls_token_index: Tensor | None = None
    merge_info: Any = None


@dataclass
class VimImageClassifierOutput(ModelOutput):
    """Output of [`VimForImageClassification`].

    Args:
        loss (`Tensor` of shape `()`, *optional*):
            Mean loss, when `labels` are given: the cross-entropy, unless `config.problem_type` says otherwise.
        logits (`Tensor` of shape `(batch, num_labels)`):
            Scores before the softmax.
        hidden_states (`tuple[Tensor, ...]`, *optional*):
            As in [`VimModelOutput`].
        merge_info (`MergeInfo`, *optional*):
            As in [`VimModelOutput`].
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    merge_info: Any = None


def interpolate_positions(positions: Tensor, cls_indices: list[int], old_grid: tuple, new_grid: tuple) -> Tensor:
    """Resize a position table to another patch grid, bicubic, in float32.

    The rows of the class token(s) are taken out where they really stand, kept as they are, and put back at their place
    in the new sequence; a row in the middle goes to the new middle.

    Args:
        positions (`Tensor` of shape `(1, patches + class tokens, hidden_size)`):
            The table.
        cls_indices (`list[int]`):
            Rows of the class token(s): `[]`, `[0]`, `[patches // 2]` or `[0, patches + 1]`.
        old_grid (`tuple[int, int]`):
            Rows and columns of patches of the table.
        new_grid (`tuple[int, int]`):
            Rows and columns wanted.

    Returns:
        `Tensor` of shape `(1, new patches + class tokens, hidden_size)`: The resized table; the same object if the
        grids agree.
    """
    if tuple(old_grid) == tuple(new_grid):
        return positions
    patch_rows = [row for row in range(positions.shape[1]) if row not in cls_indices]
    grid = positions[:, patch_rows].float().unflatten(1, tuple(old_grid)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=tuple(new_grid), mode="bicubic", align_corners=False)
    patches = grid.flatten(2).mT.to(positions.dtype)
    cls_rows = [positions[:, index : index + 1] for index in cls_indices]
    if len(cls_rows) == 2:
        return torch.cat([cls_rows[0], patches, cls_rows[1]], dim=1)
    if not cls_rows:
        return patches
    place = 0 if cls_indices[0] == 0 else patches.shape[1] // 2
    return torch.cat([patches[:, :place], cls_rows[0], patches[:, place:]], dim=1)


class VimPreTrainedModel(NamesWhatFails, PreTrainedModel):
    """Initialisation and loading shared by all Vim classes."""

    config_class = VimConfig
    base_model_prefix = "vim"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _no_split_modules = ["VimBlock"]
    _keep_in_fp32_modules_strict = ["A_log", "A_b_log", "mixer.D", "mixer.D_b", "time_step"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As the official constructors do. Every module fills only its own parameters.

        transformers skips one that has none, or whose own were all loaded, even where its children miss theirs.
        """
        super()._init_weights(module)
        config = self.config
        if isinstance(module, nn.Linear) and hasattr(module, "init_scale"):
            self._init_projection(module)
        elif isinstance(module, VimTimeStep):
            self._init_time_step(module)
        elif isinstance(module, VimMixer):
            states = torch.arange(1, config.state_size + 1, dtype=torch.float32, device=module.A_log.device)
            for A_log, D in ((module.A_log, module.D), (module.A_b_log, module.D_b)):
                init.copy_(A_log, states.log().expand_as(A_log))
                init.ones_(D)
            if module.gamma is not None:
                init.constant_(module.gamma, float(config.layer_scale_init_value))
        elif isinstance(module, VimConvolution):
            bound = 1 / math.sqrt(module.kernel_size[0])
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.Conv2d):
            # `init.lecun_normal_` truncates at 2 instead of two deviations and comes out 14 % too wide.
            std = module.weight[0].numel() ** -0.5 / 0.87962566
            init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        elif isinstance(module, VimRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, VimEncoder):
            for name in ("cls_token", "cls_token_head", "cls_token_tail", "pos_embed"):
                if getattr(module, name, None) is not None:
                    init.trunc_normal_(getattr(module, name), std=config.initializer_range)

    def _init_projection(self, projection: nn.Linear) -> None:
        config = self.config
        bound = projection.init_scale / math.sqrt(projection.in_features)
        if getattr(projection, "init_steps", False):
            bound = config.time_step_rank**-0.5 * config.time_step_scale
            if config.time_step_init_scheme == "constant":
                init.constant_(projection.weight, bound)
                return
        init.uniform_(projection.weight, -bound, bound)

    def _init_time_step(self, time_step: VimTimeStep) -> None:
        """Step sizes log-uniform between `time_step_min` and `time_step_max` after the softplus."""
        config = self.config
        if not time_step.init_steps:
            init.zeros_(time_step.bias)
            return
        low, high = math.log(config.time_step_min), math.log(config.time_step_max)
        step = torch.empty_like(time_step.bias).uniform_(low, high).exp().clamp(min=config.time_step_floor)
        init.copy_(time_step.bias, step + torch.log(-torch.expm1(-step)))

    def _as_dict(self, return_dict: bool | None) -> bool:
        """Whether to return a `ModelOutput`; `torch.jit.trace` takes tuples only."""
        return self.config.return_dict and not torch.jit.is_tracing() if return_dict is None else return_dict

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that are trained without weight decay: class token(s), positions, and all vectors.

        The matrices `A_log` and `A_b_log` are decayed, as in the official runs: their authors mark them
        otherwise, but their optimiser never reads the mark.
        """
        tables = ("cls_token", "cls_token_head", "cls_token_tail", "pos_embed")
        return {name for name, p in self.named_parameters() if p.dim() < 2 or name.rsplit(".", 1)[-1] in tables}


class VimEncoder(VimPreTrainedModel):
    """Embeddings and blocks, shared by [`VimModel`] and [`VimBackbone`]."""

    block_class: type[VimBlock] = VimBlock

    def __init__(self, config: VimConfig):
        # Fields may have been assigned since it was made, as `from_pretrained` does.
        try:
            config.validate()
        except StrictDataclassError as error:
            raise ValueError(str(error.__cause__ or error)) from error
        super().__init__(config)
        width = config.hidden_size
        self.patch_embed = VimPatchEmbeddings(config)
        names = {"none": [], "double": ["cls_token_head", "cls_token_tail"]}.get(
            config.cls_token_position, ["cls_token"]
        )
        for name in names:
            setattr(self, name, nn.Parameter(torch.empty(1, 1, width)))
        tokens = config.num_patches + config.num_class_tokens
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, width)) if config.use_abs_pos_embed else None
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        depth = config.num_hidden_layers
        rates = [config.drop_path_rate * i / max(depth - 1, 1) for i in range(depth - 1)] + [config.drop_path_rate]
        self.layers = nn.ModuleList(self.block_class(config, rate) for rate in rates)

    def get_input_embeddings(self) -> nn.Module:
        """The patch projection."""
        return self.patch_embed

    def begin_run(self, stream: Tensor, class_positions: tuple[int, ...], **decisions: Any) -> VimRun:
        """Start a forward pass through the blocks; a model of a method that changes it says how here.

        Args:
            stream (`Tensor` of shape `(batch, tokens, hidden_size)`):
                Tokens before block 0.
            class_positions (`tuple[int, ...]`):
                Where the class token(s) are among them.
            decisions (`dict`, *optional*):
                What the caller of `forward` passed beside its named arguments. Nothing here looks at it.

        Returns:
            [`VimRun`]
        """
        return VimRun(self.config, stream, class_positions)

    def _cls_indices(self, patches: int) -> list[int]:
        places = {"none": [], "head": [0], "middle": [patches // 2], "double": [0, patches + 1]}
        return places[self.config.cls_token_position]

    def _grid(self, pixel_values: Tensor) -> tuple[int, int]:
        config = self.config
        rows, columns = ((n - config.patch_size) // config.patch_stride + 1 for n in pixel_values.shape[-2:])
        return rows, columns

    def _embed(self, pixel_values: Tensor, interpolate_pos_encoding: bool) -> tuple[Tensor, tuple[int, ...]]:
        """Pixels to the residual stream before block 0, and the places of the class token(s) in it."""
        self._check_pixels(pixel_values, interpolate_pos_encoding)
        tokens = self.patch_embed(pixel_values)
        batch, patches, _ = tokens.shape
        position = self.config.cls_token_position
        if position == "double":
            ends = (token.expand(batch, -1, -1) for token in (self.cls_token_head, self.cls_token_tail))
            head, tail = ends
            tokens = torch.cat([head, tokens, tail], dim=1)
        elif position != "none":
            place = self._cls_indices(patches)[0]
            tokens = torch.cat([tokens[:, :place], self.cls_token.expand(batch, -1, -1), tokens[:, place:]], dim=1)
        if self.pos_embed is not None:
            old_indices = self._cls_indices(self.config.num_patches)
            grid = self._grid(pixel_values)
            tokens = tokens + interpolate_positions(self.pos_embed, old_indices, self.config.grid_size, grid)
        tokens = self.dropout(tokens).contiguous()
        return (tokens.float() if self.config.residual_in_fp32 else tokens), tuple(self._cls_indices(patches))

    def _check_pixels(self, pixel_values: Tensor, interpolate_pos_encoding: bool) -> None:
        config = self.config
        if pixel_values.dim() != 4 or pixel_values.shape[1] != config.num_channels:
            raise ValueError(
                f"`pixel_values` must be (batch, {config.num_channels}, height, width); got "
                f"{tuple(pixel_values.shape)}."
            )
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"`pixel_values` must be floating point; got {pixel_values.dtype}. Normalise the images with the "
                "image processor."
            )
        height, width = pixel_values.shape[-2:]
        if min(height, width) < config.patch_size:
            raise ValueError(f"Images of {height}x{width} pixels are smaller than `patch_size` {config.patch_size}.")
        expected = config.image_size if not isinstance(config.image_size, int) else [config.image_size] * 2
        if [height, width] != list(expected) and not interpolate_pos_encoding:
            raise ValueError(
                f"Images of {height}x{width} pixels do not match `image_size` {expected[0]}x{expected[1]}. Resize "
                "them, or pass interpolate_pos_encoding=True."
            )


class VimModel(VimEncoder):
    r"""Vision Mamba without a head (https://huggingface.co/papers/2401.09417).

    Example:

    ```python
    >>> import torch
    >>> from hf_effml import VimConfig, VimModel
    >>> model = VimModel(VimConfig(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2))
    >>> model(torch.zeros(1, 3, 32, 32)).last_hidden_state.shape
    torch.Size([1, 17, 32])

    ```
    """

    output_class: type[VimModelOutput] = VimModelOutput

    def __init__(self, config: VimConfig):
        super().__init__(config)
        self.norm_f = VimRMSNorm(config.hidden_size, config.layer_norm_eps)
        # Set by `apply_token_merging`, also on a model that was loaded as a plain Vim.
        self.token_reducer: TokenReducer | None = None
        self.post_init()

    def begin_run(self, stream: Tensor, class_positions: tuple[int, ...], **decisions: Any) -> VimRun:
        """See [`VimEncoder`]; the `token_reducer` starts the pass if there is one."""
        if self.token_reducer is not None:
            return self.token_reducer.begin(stream, class_positions)
        return super().begin_run(stream, class_positions, **decisions)

    def forward(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool | None = None,
        output_merge_info: bool = False,
        return_dict: bool | None = None,
        **decisions: Any,
    ) -> VimModelOutput | tuple:
        """Encode images.

        Args:
            pixel_values (`Tensor` of shape `(batch, channels, height, width)`):
                Normalised images.
            interpolate_pos_encoding (`bool`, *optional*, defaults to `False`):
                Accept other sizes than `config.image_size`.
            output_hidden_states (`bool`, *optional*):
                Also return the residual stream after every block.
            output_merge_info (`bool`, *optional*, defaults to `False`):
                Also return what token merging did.
            return_dict (`bool`, *optional*):
                `False` returns a plain tuple.
            decisions (`dict`, *optional*):
                Passed on to `begin_run`: a [`DyVMModel`] takes its decisions from there, a plain Vim nothing.

        Returns:
            [`VimModelOutput`], or the `output_class` of a method's model.

        Raises:
            ValueError: If images have the wrong shape, size or type, or decisions the wrong shape.
        """
        keep_all = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        stream, class_positions = self._embed(pixel_values, interpolate_pos_encoding)
        run = self.begin_run(stream, class_positions, **decisions)
        all_states = [stream]
        for block, layer in enumerate(self.layers):
            stream = run.step(block, layer, stream)
            if keep_all:
                all_states.append(stream)
        stream, class_rows = self.norm_f(stream), run.class_rows()
        output = self.output_class(
            last_hidden_state=stream,
            pooler_output=run.pool(stream, class_rows),
            hidden_states=tuple(all_states) if keep_all else None,
            cls_token_index=class_rows,
            **run.report(detailed=output_merge_info),
        )
        return output if self._as_dict(return_dict) else output.to_tuple()


class VimForImageClassification(VimPreTrainedModel):
    r"""Vision Mamba with a linear classifier on the class token (https://huggingface.co/papers/2401.09417).

    Example:

    ```python
    >>> import torch
    >>> from hf_effml import VimConfig, VimForImageClassification
    >>> config = VimConfig(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_labels=10)
    >>> model = VimForImageClassification(config)
    >>> model(torch.zeros(2, 3, 32, 32)).logits.shape
    torch.Size([2, 10])

    ```
    """

    model_class: type[VimModel] = VimModel

    def __init__(self, config: VimConfig):
        super().__init__(config)
        self.vim = self.model_class(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels else nn.Identity()
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool | None = None,
        output_merge_info: bool = False,
        return_dict: bool | None = None,
        **decisions: Any,
    ) -> VimImageClassifierOutput | tuple:
        """Classify images.

        Args:
            pixel_values (`Tensor` of shape `(batch, channels, height, width)`):
                Normalised images.
            labels (`Tensor`, *optional*):
                Class numbers `(batch,)`, or soft targets `(batch, num_labels)` as mixup makes them; with another
                `config.problem_type`, see [`~hf_effml.vim.classification_loss.classification_loss`].
            interpolate_pos_encoding, output_hidden_states, output_merge_info, return_dict, decisions:
                See [`VimModel`].

        Returns:
            [`VimImageClassifierOutput`], or what a method's model returns.

        Raises:
            ValueError: As in [`VimModel`], or if labels have the wrong shape or are none of the model's.
        """
        outputs = self.vim(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            output_hidden_states=output_hidden_states,
            output_merge_info=output_merge_info,
            return_dict=True,
            **decisions,
        )
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self._loss(logits, labels, outputs)
        output = self._output(loss, logits, outputs)
        return output if self._as_dict(return_dict) else output.to_tuple()

    def _loss(self, logits: Tensor, labels: Tensor, outputs: VimModelOutput) -> Tensor:
        return classification_loss(logits, labels, self.config)

    def _output(self, loss: Tensor | None, logits: Tensor, outputs: VimModelOutput) -> VimImageClassifierOutput:
        return VimImageClassifierOutput(loss, logits, outputs.hidden_states, outputs.merge_info)


__all__ = [
    "VimEncoder",
    "VimForImageClassification",
    "VimImageClassifierOutput",
    "VimModel",
    "VimModelOutput",
    "VimPreTrainedModel",
    "interpolate_positions",
]
