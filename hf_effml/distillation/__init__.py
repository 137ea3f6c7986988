"""Dataset distillation by trajectory matching: PAD, EDF and what they stand on."""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .bank.convert import export_pickled_bank, import_distilled_tensors, import_pickled_bank
from .bank.initialization import distilled_from_real
from .bank.trajectories import TrajectoryBank
from .class_activation import class_activation_map
from .configuration_convnet import ConvNetConfig
from .configuration_distilled_dataset import DistilledDatasetConfig
from .convert_convnet import convert_convnet_checkpoint
from .differentiable_augmentation import AugmentationSettings, augment, draw_augmentation
from .difficulty import easy_to_hard, score_difficulty
from .evaluation.cost import CostEstimate, estimate_cost
from .evaluation.measure import cross_architecture, evaluate_distilled
from .evaluation.protocols import EvaluationProtocol, get_protocol
from .evaluation.report import EvaluationReport
from .evaluation.training_sets import TrainingSet
from .flat_student import FlatStudent, build_student
from .gsam import GSAM
from .image_processing_zca import ZCAImageProcessor
from .matching import MatchingSettings, match_segment
from .modeling_convnet import ConvNetForImageClassification
from .modeling_distilled_dataset import DistilledDatasetModel
from .pad import DataCurriculum
from .publishing.sets import DistilledSet, load_distilled, save_distilled_dataset
from .publishing.tables import to_dataset
from .real_images import RealImageData, RealImages, load_real_images


AutoConfig.register(ConvNetConfig.model_type, ConvNetConfig, exist_ok=True)
AutoConfig.register(DistilledDatasetConfig.model_type, DistilledDatasetConfig, exist_ok=True)
AutoModel.register(DistilledDatasetConfig, DistilledDatasetModel, exist_ok=True)
AutoModelForImageClassification.register(ConvNetConfig, ConvNetForImageClassification, exist_ok=True)
AutoImageProcessor.register(
    ConvNetConfig, image_processor_classes={"pil": ZCAImageProcessor, "torchvision": ZCAImageProcessor}, exist_ok=True
)
# Saved folders carry these files and load where this package is not installed.
ConvNetConfig.register_for_auto_class()
ConvNetForImageClassification.register_for_auto_class("AutoModelForImageClassification")
DistilledDatasetConfig.register_for_auto_class()
DistilledDatasetModel.register_for_auto_class("AutoModel")
ZCAImageProcessor.register_for_auto_class("AutoImageProcessor")

__all__ = [
    "GSAM",
    "AugmentationSettings",
    "ConvNetConfig",
    "ConvNetForImageClassification",
    "CostEstimate",
    "DataCurriculum",
    "DistilledDatasetConfig",
    "DistilledDatasetModel",
    "DistilledSet",
    "EvaluationProtocol",
    "EvaluationReport",
    "FlatStudent",
    "MatchingSettings",
    "RealImageData",
    "RealImages",
    "TrainingSet",
    "TrajectoryBank",
    "ZCAImageProcessor",
    "augment",
    "build_student",
    "class_activation_map",
    "convert_convnet_checkpoint",
    "cross_architecture",
    "distilled_from_real",
    "draw_augmentation",
    "easy_to_hard",
    "estimate_cost",
    "evaluate_distilled",
    "export_pickled_bank",
    "get_protocol",
    "import_distilled_tensors",
    "import_pickled_bank",
    "load_distilled",
    "load_real_images",
    "match_segment",
    "save_distilled_dataset",
    "score_difficulty",
    "to_dataset",
]
