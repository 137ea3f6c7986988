"""One trainer per method."""

from hf_effml.utils.augmentation import Augmentation, MixupCollator
from hf_effml.utils.image_data import ImageData, load_image_data, load_image_processor

from .dyvm import DyVMTrainer, DyVMTrainingArguments
from .edf import EDFTrainer, EDFTrainingArguments
from .expert import ExpertTrainer, ExpertTrainingArguments
from .pad import PADTrainer, PADTrainingArguments
from .rmeeto import MergeWarmupCallback, RMeeToTrainer, RMeeToTrainingArguments
from .token_router import TokenRouterTrainer, TokenRouterTrainingArguments
from .trajectory_matching import TrajectoryMatchingTrainer
from .trajectory_matching_arguments import TrajectoryMatchingTrainingArguments
from .vim import VimTrainer, VimTrainingArguments


__all__ = [
    "Augmentation",
    "DyVMTrainer",
    "DyVMTrainingArguments",
    "EDFTrainer",
    "EDFTrainingArguments",
    "ExpertTrainer",
    "ExpertTrainingArguments",
    "ImageData",
    "MergeWarmupCallback",
    "MixupCollator",
    "PADTrainer",
    "PADTrainingArguments",
    "RMeeToTrainer",
    "RMeeToTrainingArguments",
    "TokenRouterTrainer",
    "TokenRouterTrainingArguments",
    "TrajectoryMatchingTrainer",
    "TrajectoryMatchingTrainingArguments",
    "VimTrainer",
    "VimTrainingArguments",
    "load_image_data",
    "load_image_processor",
]
