"""One trainer per method."""

from hf_effml.utils.augmentation import Augmentation, MixupCollator
from hf_effml.utils.image_data import ImageData, load_image_data, load_image_processor

from .dyvm import DyVMTrainer, DyVMTrainingArguments
from .rmeeto import MergeWarmupCallback, RMeeToTrainer, RMeeToTrainingArguments, distillation_loss
from .token_router import TokenRouterTrainer, TokenRouterTrainingArguments
from .vim import VimTrainer, VimTrainingArguments


__all__ = [
    "Augmentation",
    "DyVMTrainer",
    "DyVMTrainingArguments",
    "ImageData",
    "MergeWarmupCallback",
    "MixupCollator",
    "RMeeToTrainer",
    "RMeeToTrainingArguments",
    "TokenRouterTrainer",
    "TokenRouterTrainingArguments",
    "VimTrainer",
    "VimTrainingArguments",
    "distillation_loss",
    "load_image_data",
    "load_image_processor",
]
