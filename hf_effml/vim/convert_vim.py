"""Official Vim, R-MeeTo and DyVM checkpoints (`.pth` or safetensors) to folders for `from_pretrained`."""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.utils import logging

from hf_effml.utils.model_kinds import load_weights, state_dict_of

from .configuration_dyvm import DyVMConfig
from .configuration_vim import VimConfig
from .modeling_dyvm import DyVMForImageClassification
from .modeling_vim import VimForImageClassification, interpolate_positions


if TYPE_CHECKING:
    from transformers import BitImageProcessor


logger = logging.get_logger(__name__)

_IMAGENET_MEAN, _IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
_BICUBIC = 3
# Width -> token and block keep ratio of the scripts that made the released DyVM weights.
_DYVM_RATIOS = {192: (0.9, 0.8), 384: (0.7, 0.8), 768: (0.7, 0.7)}


def vim_image_processor(image_size: int = 224, crop_share: float = 0.875) -> "BitImageProcessor":
    """The evaluation transform of the official models.

    Shorter side to `image_size / crop_share`, bicubic, centre crop, ImageNet statistics.

    Args:
        image_size (`int`, *optional*, defaults to 224):
            Side of the crop in pixels.
        crop_share (`float`, *optional*, defaults to 0.875):
            Share of the shorter side that the crop keeps.

    Returns:
        `BitImageProcessor`: Save it beside the model; `AutoImageProcessor` then finds it.

    Example:

    ```python
    >>> from hf_effml.vim import vim_image_processor
    >>> vim_image_processor(224).size["shortest_edge"]
    256

    ```
    """
    # Imported here: without torchvision transformers warns at the import of this name, which a plain install need not
    # see.
    from transformers import BitImageProcessor

    return BitImageProcessor(
        size={"shortest_edge": round(image_size / crop_share)},
        crop_size={"height": image_size, "width": image_size},
        resample=_BICUBIC,
        image_mean=_IMAGENET_MEAN,
        image_std=_IMAGENET_STD,
    )


def read_official_checkpoint(source: str | Path, use_ema: bool = False) -> dict[str, Tensor]:
    """Read an official checkpoint without running code from it.

    Args:
        source (`str` or `Path`):
            A `.safetensors` file, or a `.pth` file: a state dict, or a training checkpoint that holds one. Pickles are
            read with `weights_only=True`, and of other classes only `argparse.Namespace` is allowed.
        use_ema (`bool`, *optional*, defaults to `False`):
            Take the moving average of the weights (`model_ema`).

    Returns:
        `dict[str, Tensor]`: The state dict with official keys, without a `module.` prefix.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no checkpoint, would run code, or holds no moving average that was asked for.
    """
    checkpoint = load_weights(source, [argparse.Namespace])
    key = "model_ema" if use_ema else "model"
    if use_ema and not (isinstance(checkpoint, dict) and isinstance(checkpoint.get(key), dict)):
        has = ", ".join(map(str, checkpoint))[:200] if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ValueError(f"{source} holds no `model_ema`; leave out use_ema. It has: {has}.")
    state = state_dict_of(checkpoint, source, (key, "state_dict"))
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def detect_vim_config(state: dict[str, Tensor], image_size: int = 224, **overrides: Any) -> VimConfig:
    """Work out the configuration from the shapes of an official state dict.

    Args:
        state (`dict[str, Tensor]`):
            State dict with official keys.
        image_size (`int`, *optional*, defaults to 224):
            Side in pixels that the position table is for.
        overrides:
            Fields of [`VimConfig`] that weights do not show, as `divide_output` or `cls_token_position="head"`; for a
            DyVM also those of [`DyVMConfig`], as `token_keep_ratio`.

    Returns:
        [`VimConfig`], or [`DyVMConfig`] where there are token predictors or gates.

    Raises:
        ValueError: If keys are missing, or no patch stride fits the position table at `image_size`.
    """
    needed = {
        "patch_embed.proj.weight": 4,
        "layers.0.mixer.A_log": 2,
        "layers.0.mixer.conv1d.weight": 3,
        "layers.0.mixer.dt_proj.weight": 2,
        "layers.0.mixer.in_proj.weight": 2,
        "norm_f.weight": 1,
    }
    missing = [key for key, axes in needed.items() if key not in state or state[key].dim() != axes]
    if missing:
        raise ValueError(
            f"This is no Vim checkpoint; missing or of another shape: {', '.join(missing)}. It starts with: "
            f"{list(state)[:5]}."
        )
    for key, axes in (("pos_embed", 3), ("head.weight", 2)):
        if key in state and state[key].dim() != axes:
            raise ValueError(f"`{key}` of a Vim has {axes} axes; got the shape {tuple(state[key].shape)}.")
    width, channels, patch_size, _ = state["patch_embed.proj.weight"].shape
    inner, states = state["layers.0.mixer.A_log"].shape
    position = "double" if "cls_token_head" in state else "middle" if "cls_token" in state else "none"
    fields: dict[str, Any] = {
        "image_size": image_size,
        "patch_size": patch_size,
        "num_channels": channels,
        "hidden_size": width,
        "num_hidden_layers": 1 + max(int(key.split(".")[1]) for key in state if key.startswith("layers.")),
        "state_size": states,
        "conv_kernel": state["layers.0.mixer.conv1d.weight"].shape[-1],
        "expand": inner // width,
        "time_step_rank": state["layers.0.mixer.dt_proj.weight"].shape[1],
        "use_conv_bias": "layers.0.mixer.conv1d.bias" in state,
        "use_bias": "layers.0.mixer.in_proj.bias" in state,
        "layer_scale_init_value": 1.0 if "layers.0.mixer.gamma" in state else None,
        "cls_token_position": position,
        "pooling": "mean" if position == "none" else "cls",
        "use_abs_pos_embed": "pos_embed" in state,
        "num_labels": state["head.weight"].shape[0] if "head.weight" in state else 0,
    }
    if "pos_embed" in state:
        patches = state["pos_embed"].shape[1] - {"none": 0, "double": 2}.get(position, 1)
        fields["patch_stride"] = _detect_stride(patches, image_size, patch_size)
    dyvm_fields = _detect_dyvm(state, fields["num_hidden_layers"])
    if not dyvm_fields:
        return VimConfig(**{**fields, **overrides})
    ratios = dict(zip(("token_keep_ratio", "block_keep_ratio"), _DYVM_RATIOS.get(width, (0.7, 0.8)), strict=True))
    assumed = {name: ratio for name, ratio in ratios.items() if name not in overrides}
    if assumed:
        logger.warning(
            f"The weights of a DyVM do not show how much it keeps; taking {assumed}. Pass them to change it."
        )
    return DyVMConfig(**{**fields, **dyvm_fields, **assumed, **overrides})


def _detect_dyvm(state: dict[str, Tensor], depth: int) -> dict[str, Any]:
    """The fields of a DyVM that its weights show; nothing for a plain Vim."""
    stages = len({key.split(".")[1] for key in state if key.startswith("score_predictors.")})
    gates = "layers.0.mixer.block_head.weight" in state
    if not stages and not gates:
        return {}
    return {
        "enable_token_pruning": stages > 0,
        "enable_block_selection": gates,
        "pruning_layers": [depth * (stage + 1) // (stages + 1) for stage in range(stages)],
    }


def _detect_stride(patches: int, image_size: int, patch_size: int) -> int:
    for stride in range(patch_size, 0, -1):
        if ((image_size - patch_size) // stride + 1) ** 2 == patches:
            return stride
    raise ValueError(
        f"No patch stride gives {patches} patches at `image_size` {image_size} with patches of {patch_size} pixels "
        f"(side {math.sqrt(patches):.2f}). Pass the image size that the checkpoint was trained for."
    )


def convert_vim_checkpoint(
    source: str | Path,
    output_dir: str | Path,
    use_ema: bool = False,
    trained_image_size: int = 224,
    image_size: int | None = None,
    patch_stride: int | None = None,
    id2label: dict[int, str] | None = None,
    **overrides: Any,
) -> VimForImageClassification:
    """Convert an official checkpoint to a folder with model, configuration and image processor.

    Args:
        source (`str` or `Path`):
            See [`read_official_checkpoint`].
        output_dir (`str` or `Path`):
            Folder to write.
        use_ema (`bool`, *optional*, defaults to `False`):
            Take the moving average of the weights.
        trained_image_size (`int`, *optional*, defaults to 224):
            Side in pixels that the checkpoint was trained for.
        image_size (`int`, *optional*):
            Side wanted, if another; the position table is interpolated.
        patch_stride (`int`, *optional*):
            Patch stride wanted, if another; the position table is interpolated.
        id2label (`dict[int, str]`, *optional*):
            Names of the classes.
        overrides:
            See [`detect_vim_config`].

    Returns:
        [`VimForImageClassification`] or [`DyVMForImageClassification`]: The converted model, also saved in
        `output_dir`.

    Raises:
        ValueError: If keys are missing or unexpected (they are listed), or sizes do not fit.

    Example:

    ```python
    >>> from hf_effml.vim import convert_vim_checkpoint
    >>> model = convert_vim_checkpoint("vim_t_midclstok_76p1acc.pth", "vim-tiny")  # doctest: +SKIP

    ```
    """
    state = read_official_checkpoint(source, use_ema)
    old = detect_vim_config(state, trained_image_size, **overrides)
    wanted = {"image_size": image_size or old.image_size, "patch_stride": patch_stride or old.patch_stride}
    config = type(old).from_dict({**old.to_dict(), **wanted, **({"id2label": id2label} if id2label else {})})
    dynamic = config.model_type == DyVMConfig.model_type
    model = DyVMForImageClassification(config) if dynamic else VimForImageClassification(config)
    if "pos_embed" in state:
        indices = model.vim._cls_indices(old.num_patches)
        state["pos_embed"] = interpolate_positions(state["pos_embed"], indices, old.grid_size, config.grid_size)
    names = {key: f"classifier.{key[5:]}" if key.startswith("head.") else f"vim.{key}" for key in state}
    try:
        report = model.load_state_dict({names[key]: value for key, value in state.items()}, strict=False)
    except RuntimeError as error:
        reason = str(error).partition("\n")[2].strip()[:300]
        raise ValueError(f"{source} does not fit a Vim of its own first block: {reason}") from error
    if report.missing_keys or report.unexpected_keys:
        raise ValueError(
            f"{source} does not fit a Vim. Missing: {report.missing_keys or 'none'}; unexpected: "
            f"{report.unexpected_keys or 'none'}. "
            "Variants with rotary positions or without a backward branch are not supported."
        )
    if isinstance(model.classifier, nn.Identity):
        config.num_labels = 0
    model.save_pretrained(output_dir)
    vim_image_processor(config.image_size).save_pretrained(output_dir)
    return model.eval()


__all__ = ["convert_vim_checkpoint", "detect_vim_config", "read_official_checkpoint", "vim_image_processor"]
