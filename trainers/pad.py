"""PAD: experts on data of fitting difficulty, and a loss on deep layers only."""

from dataclasses import dataclass, field
from typing import Any

from transformers.utils import logging

from hf_effml.distillation.pad import describe_depth

from .trajectory_matching import TrajectoryMatchingTrainer
from .trajectory_matching_arguments import TrajectoryMatchingTrainingArguments


logger = logging.get_logger(__name__)


@dataclass
class PADTrainingArguments(TrajectoryMatchingTrainingArguments):
    """How to distil with PAD; what is not said here is as in [`TrajectoryMatchingTrainingArguments`].

    The paper's share of shallow parameters to leave out: none at one image per class, 0.25 at 10, 0.5 or 0.75 at 500
    and more. `mask="loss"` is what the authors' later code does in place of it.

    Args:
        mask (`"none"`, `"depth"` or `"loss"`, *optional*, defaults to `"depth"`):
            Which parameters the loss leaves out.
        drop_ratio (`float`, *optional*, defaults to 0.25):
            Share of the parameters that it leaves out.
    """

    mask: str = field(default="depth", metadata={"help": "Parameters to leave out: depth, loss or none."})
    drop_ratio: float = field(default=0.25, metadata={"help": "Share of the parameters that the loss leaves out."})


class PADTrainer(TrajectoryMatchingTrainer):
    """Distils a data set with PAD (https://huggingface.co/papers/2408.03360).

    PAD has two filters. The experts saw easy images first and hard ones later: that is in the bank, see
    [`DataCurriculum`]. The matching loss leaves out the shallow share of the parameters: that is in the arguments.

    Args:
        model ([`DistilledDatasetModel`]):
            The synthetic set.
        args ([`PADTrainingArguments`]):
            How to train.
        bank ([`TrajectoryBank`]):
            Experts that were trained with a curriculum; without one, half of the method is off, which is said.
        kwargs (`dict`, *optional*):
            Further arguments of [`TrajectoryMatchingTrainer`].

    Example:

    ```python
    >>> args = PADTrainingArguments("pad-cifar10", max_start_epoch=20, drop_ratio=0.25)  # doctest: +SKIP
    >>> PADTrainer(distilled_from_real(data, bank, 10), args, bank=bank).train()  # doctest: +SKIP
    ```
    """

    _name = "PAD"
    _paper = "2408.03360"
    _method = "pad"

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.bank.metadata.get("curriculum") is None:
            logger.warning(
                "The experts of this bank saw all images in every epoch, so PAD's selection by difficulty is off and "
                "only its loss is left. Train experts with `DataCurriculum` for both."
            )
        if self.args.mask == "depth":
            student = self.derivatives.student
            logger.info(describe_depth(student.names, student.shapes, self.args.drop_ratio))
