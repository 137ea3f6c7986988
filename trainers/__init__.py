"""One trainer per method."""

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
    "DyVMTrainer",
    "DyVMTrainingArguments",
    "EDFTrainer",
    "EDFTrainingArguments",
    "ExpertTrainer",
    "ExpertTrainingArguments",
    "MergeWarmupCallback",
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
]
