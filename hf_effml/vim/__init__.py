"""Vision Mamba and what the papers that make it faster add to it."""

from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification

from .backbone_dyvm import DyVMBackbone
from .backbone_vim import VimBackbone
from .configuration_dyvm import DyVMConfig
from .configuration_rmeeto import RMeeToVimConfig, merge_schedule, reduction_ratio
from .configuration_vim import VimConfig
from .convert_vim import convert_vim_checkpoint, vim_image_processor
from .evaluation.complexity import count_multiply_adds
from .evaluation.measure import evaluate_vim
from .evaluation.pictures import draw_patches
from .evaluation.visualize import visualize_merge, visualize_selection
from .losses import logit_divergence
from .modeling_dyvm import DyVMForImageClassification, DyVMModel
from .modeling_rmeeto import (
    RMeeToVimForImageClassification,
    RMeeToVimModel,
    apply_token_merging,
    remove_token_merging,
    token_merging,
)
from .modeling_vim import VimForImageClassification, VimModel
from .selective_scan import ScanStream, selective_scan, selective_scan_reference
from .token_reduction import MergeInfo, TokenPlan, bipartite_plan, compose, local_plan, random_plan
from .vit_merging import vit_merge_info


for _config, _model, _classifier in (
    (VimConfig, VimModel, VimForImageClassification),
    (RMeeToVimConfig, RMeeToVimModel, RMeeToVimForImageClassification),
    (DyVMConfig, DyVMModel, DyVMForImageClassification),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForImageClassification.register(_config, _classifier, exist_ok=True)
    # Saved folders carry these files and load where this package is not installed.
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModel")
    _classifier.register_for_auto_class("AutoModelForImageClassification")
for _config, _backbone in ((VimConfig, VimBackbone), (DyVMConfig, DyVMBackbone)):
    AutoBackbone.register(_config, _backbone, exist_ok=True)
    _backbone.register_for_auto_class("AutoBackbone")

__all__ = [
    "DyVMBackbone",
    "DyVMConfig",
    "DyVMForImageClassification",
    "DyVMModel",
    "MergeInfo",
    "RMeeToVimConfig",
    "RMeeToVimForImageClassification",
    "RMeeToVimModel",
    "ScanStream",
    "TokenPlan",
    "VimBackbone",
    "VimConfig",
    "VimForImageClassification",
    "VimModel",
    "apply_token_merging",
    "bipartite_plan",
    "compose",
    "convert_vim_checkpoint",
    "count_multiply_adds",
    "draw_patches",
    "evaluate_vim",
    "local_plan",
    "logit_divergence",
    "merge_schedule",
    "random_plan",
    "reduction_ratio",
    "remove_token_merging",
    "selective_scan",
    "selective_scan_reference",
    "token_merging",
    "vim_image_processor",
    "visualize_merge",
    "visualize_selection",
    "vit_merge_info",
]
