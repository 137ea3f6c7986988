"""The bank of trajectories: the parameters of many networks, epoch by epoch, in one file per network."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.utils import logging

from hf_effml.distillation.flat_student import FlatStudent, build_student, student_config
from hf_effml.distillation.image_processing_zca import ZCAImageProcessor

from .checks import check_range, compare_student, in_words
from .files import BANK_NAME, bank_fingerprint, expert_name, mean_accuracies, read_bank, read_header


__all__ = ["PROCESSOR_FILES", "TrajectoryBank"]

logger = logging.get_logger(__name__)

_PROCESSOR_NAME = "preprocessor_config.json"
PROCESSOR_FILES = (_PROCESSOR_NAME, "zca.safetensors")
_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class TrajectoryBank:
    """Parameters of expert networks after their epochs, read row by row from safetensors files.

    A row is all parameters of one network in the order of `module.parameters()`; see [`FlatStudent`]. Load a bank with
    [`~TrajectoryBank.from_pretrained`]; [`~hf_effml.trainers.expert.ExpertTrainer`] makes one.

    Args:
        folder (`str` or `Path`):
            The folder with `bank.json`.
        repo_id (`str`, *optional*):
            Data set repository on the Hub that the other files are fetched from when they are needed.
        revision (`str`, *optional*):
            Its commit.
        token (`str` or `bool`, *optional*):
            Access token for it.

    Example:

    ```python
    >>> from hf_effml import TrajectoryBank

    >>> bank = TrajectoryBank.from_pretrained("digits-bank")  # doctest: +SKIP
    >>> start, target = bank.pair(expert=0, start_epoch=3, expert_epochs=2)  # doctest: +SKIP
    ```
    """

    def __init__(
        self,
        folder: str | Path,
        repo_id: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
    ):
        self.folder = Path(folder)
        self.metadata: dict[str, Any] = read_bank(self.folder / BANK_NAME)
        self.repo_id, self.revision, self._token = repo_id, revision, token
        self._shapes = [tuple(entry["shape"]) for entry in self.metadata["parameters"]]
        self._rows = {epoch: row for row, epoch in enumerate(self.epochs)}
        self._fingerprint = bank_fingerprint(self.metadata)
        self._handles: dict[int, Any] = {}
        self._told = False
        if repo_id is None:
            self._check_files()

    @classmethod
    def from_pretrained(
        cls, folder_or_hub_id: str | Path, revision: str | None = None, token: str | bool | None = None
    ) -> "TrajectoryBank":
        """Opens a bank; nothing but its description is read, or fetched, before it is needed.

        Args:
            folder_or_hub_id (`str` or `Path`):
                A folder, or the id of a data set repository on the Hub.
            revision (`str`, *optional*):
                Branch, tag or commit of the repository.
            token (`str` or `bool`, *optional*):
                Access token; the stored one by default.

        Returns:
            [`TrajectoryBank`]

        Raises:
            FileNotFoundError: If there is no bank of that name.
            ValueError: If the folder is not complete, or holds what does not belong to it.
        """
        name = str(folder_or_hub_id)
        if Path(name).is_dir():
            if not (Path(name) / BANK_NAME).is_file():
                raise FileNotFoundError(f"`{name}` holds no bank of trajectories: it has no `{BANK_NAME}`.")
            return cls(name)
        try:
            path = hf_hub_download(name, BANK_NAME, repo_type="dataset", revision=revision, token=token)
        except LocalEntryNotFoundError as error:
            raise FileNotFoundError(
                f"`{name}` is no folder here and not in the cache, and the Hub cannot be reached to look for it there."
            ) from error
        except (EntryNotFoundError, HFValidationError, RepositoryNotFoundError) as error:
            raise FileNotFoundError(
                f"`{name}` is no folder, and no data set on the Hub that has a `{BANK_NAME}` and that you may read. "
                "`hf-effml train expert --output_dir FOLDER` makes a bank."
            ) from error
        # The folder of a file in the cache is named by the commit; all other files come from the same one.
        return cls(Path(path).parent, name, Path(path).parent.name, token)

    def __len__(self) -> int:
        return self.metadata["num_experts"]

    def __repr__(self) -> str:
        where = self.repo_id or self.folder
        sizes = f"{len(self)} experts, {len(self.epochs)} epochs, {self.num_parameters} parameters"
        return f"TrajectoryBank({str(where)!r}: {sizes})"

    def __getstate__(self) -> dict[str, Any]:
        # Handles of open files do not travel to other processes.
        return {**self.__dict__, "_handles": {}}

    @property
    def epochs(self) -> list[int]:
        """The epochs whose parameters it holds, ascending; 0 is before training."""
        return self.metadata["epochs"]

    @property
    def num_parameters(self) -> int:
        """Number of parameters of one network."""
        return sum(math.prod(shape) for shape in self._shapes)

    @property
    def student_config(self) -> PreTrainedConfig:
        """Configuration of the networks."""
        return student_config(self.metadata["student"])

    @property
    def label_names(self) -> list[str] | None:
        """Names of the classes that the networks tell apart, in the order of their numbers; `None` if not recorded."""
        return (self.metadata.get("dataset") or {}).get("label_names")

    @property
    def image_processor(self) -> ZCAImageProcessor | None:
        """What turns images into the pixels that the experts were trained on; `None` if nobody stored it."""
        if self.repo_id is not None:
            for name in PROCESSOR_FILES:
                self._fetch(name, required=False)
        if not (self.folder / _PROCESSOR_NAME).is_file():
            return None
        return ZCAImageProcessor.from_pretrained(self.folder)

    def mean_accuracy(self, split: str = "validation") -> dict[int, float]:
        """Average accuracy of the experts, which shows what there is to be matched in which epochs.

        Args:
            split (`str`, *optional*, defaults to `"validation"`):
                `"train"` or `"validation"`.

        Returns:
            `dict[int, float]`: accuracy by epoch, where it was measured.
        """
        return {epoch: mean for epoch, (mean, _) in mean_accuracies(self.metadata, split).items()}

    def read(self, expert: int, epochs: int | Sequence[int]) -> Tensor:
        """Reads rows of an expert, and nothing else.

        Args:
            expert (`int`):
                Number of the expert.
            epochs (`int` or `Sequence[int]`):
                Which epochs; -1 is the last one kept.

        Returns:
            `Tensor` of shape `(epochs, parameters)`: float32, in memory of its own.

        Raises:
            IndexError: If there is no such expert.
            ValueError: If an epoch was not kept, the file is damaged, or a value that is read is not finite.
        """
        rows = [self._row(epoch) for epoch in ([epochs] if isinstance(epochs, int) else epochs)]
        trajectory = self._open(expert)
        result = torch.empty(len(rows), self.num_parameters)
        for index, row in enumerate(rows):
            result[index] = trajectory[row]
        # A sum costs next to nothing, and is not finite if one of its terms is not.
        if not result.sum().isfinite() and not result.isfinite().all():
            raise ValueError(
                f"`trajectory` in `{self.folder / expert_name(expert)}` holds values that are not finite. Load or "
                "train that expert again."
            )
        return result

    def pair(self, expert: int, start_epoch: int, expert_epochs: int) -> tuple[Tensor, Tensor]:
        """Reads where a student starts and where it should arrive.

        Args:
            expert (`int`):
                Number of the expert.
            start_epoch (`int`):
                Epoch of the start.
            expert_epochs (`int`):
                Epochs from there to the target.

        Returns:
            `tuple[Tensor, Tensor]`: two vectors of `num_parameters` numbers.

        Raises:
            ValueError: If one of the two epochs was not kept.
        """
        start, target = self.read(expert, [start_epoch, start_epoch + expert_epochs])
        return start, target

    def network(self, expert: int, epoch: int = -1) -> nn.Module:
        """Builds an expert.

        Args:
            expert (`int`):
                Number of the expert.
            epoch (`int`, *optional*, defaults to -1):
                After which epoch; -1 is the last one kept.

        Returns:
            `nn.Module`: the network in evaluation mode. Batch normalisation uses statistics of the batch, because a
            bank has no others.
        """
        parameters = self.read(expert, epoch)[0]
        return FlatStudent(build_student(self.student_config)).load(parameters).requires_grad_(True)

    def check_student(self, student: FlatStudent) -> None:
        """Checks that a student can follow these trajectories.

        Args:
            student ([`FlatStudent`]):
                The student.

        Raises:
            ValueError: If its architecture is another one; the message names both.
        """
        wrong, doubtful = compare_student(self.metadata, student)
        if wrong:
            raise ValueError(
                f"The student, a {type(student.module).__name__}, is no match for the bank's networks: "
                f"{'; '.join(wrong)}. Build it from `bank.student_config`, or train experts of its kind."
            )
        if doubtful:
            logger.warning_once(f"The student differs from the bank's networks: {'; '.join(doubtful)}.")

    def check_preprocessing(self, fingerprint: str, allow_mismatch: bool = False) -> None:
        """Checks that images were preprocessed as those of the experts.

        Args:
            fingerprint (`str`):
                `fingerprint` of the image processor.
            allow_mismatch (`bool`, *optional*, defaults to `False`):
                Go on with other images all the same; that is only logged.

        Raises:
            ValueError: If they were not.
        """
        ours = self.metadata.get("preprocessing")
        if ours is None:
            logger.warning_once("The bank does not say how its images were preprocessed; make sure yours are alike.")
        elif ours != fingerprint:
            message = (
                f"The bank's images were preprocessed in another way (`{ours}`) than these (`{fingerprint}`): other "
                "size, whitening or training images."
            )
            if not allow_mismatch:
                raise ValueError(
                    f"{message} Preprocess with `bank.image_processor`, or allow the mismatch if you mean it."
                )
            logger.warning_once(message)

    def check_range(self, max_start_epoch: int, expert_epochs: int, min_start_epoch: int = 0) -> None:
        """Checks that there are parameters for every start that can be drawn and for its target.

        Args:
            max_start_epoch (`int`):
                Starts are drawn from below this epoch.
            expert_epochs (`int`):
                Epochs from a start to its target.
            min_start_epoch (`int`, *optional*, defaults to 0):
                The first start.

        Raises:
            ValueError: If there are not; the message has the largest `max_start_epoch` that is possible.
        """
        check_range(self.epochs, max_start_epoch, expert_epochs, min_start_epoch)

    def push_to_hub(self, repo_id: str, **options: Any) -> CommitInfo:
        """Uploads the bank with its card to a data set repository.

        Args:
            repo_id (`str`):
                Where it goes: `namespace/name`. The repository is created when it does not exist.
            options (`dict`, *optional*):
                As for [`~hf_effml.hub.push_folder`]: `private`, `revision`, `create_pr`, `commit_message`, `token`.

        Returns:
            `huggingface_hub.CommitInfo`: the commit.

        Raises:
            ValueError: If a file of the bank is damaged, or something else speaks against publishing it.
        """
        from .card import push_bank

        return push_bank(self, repo_id, **options)

    def check_expert(self, expert: int) -> None:
        """Checks that an expert's file is there, fetching it if need be, and holds what the bank says.

        Args:
            expert (`int`):
                Number of the expert.

        Raises:
            IndexError: If there is no such expert.
            ValueError: If its file is damaged, not finite, or belongs to another bank.
        """
        for epoch in self.epochs:
            self.read(expert, epoch)

    def _check_files(self) -> None:
        """Looks at names and sizes only, so that opening a large bank takes no time."""
        wanted = {expert_name(expert) for expert in range(len(self))}
        there = {path.name: path.stat().st_size for path in self.folder.glob("expert-*.safetensors")}
        if missing := sorted(wanted - there.keys()):
            raise ValueError(
                f"The bank `{self.folder}` is not complete: {_listed(missing)} of {len(self)} experts missing. "
                "Continue its training with the same arguments, or copy what is missing."
            )
        if foreign := sorted(there.keys() - wanted):
            raise ValueError(
                f"`{self.folder}` holds files that do not belong to its bank of {len(self)} experts: "
                f"{_listed(foreign)}. Move them away."
            )
        least = len(self.epochs) * self.num_parameters * 2
        if short := sorted(name for name, size in there.items() if size < least):
            raise ValueError(f"{_listed(short)} in `{self.folder}` is too short for its trajectory. Load it again.")

    def _fetch(self, name: str, required: bool = True) -> None:
        try:
            hf_hub_download(self.repo_id, name, repo_type="dataset", revision=self.revision, token=self._token)
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError as error:
            if required:
                raise ValueError(f"The bank `{self.repo_id}` is not complete: it has no `{name}`.") from error

    def _open(self, expert: int) -> Any:
        """The trajectory of an expert, of which nothing is read yet."""
        if not 0 <= expert < len(self):
            raise IndexError(f"`expert` must be from 0 to {len(self) - 1}; got {expert}.")
        if expert not in self._handles:
            name = expert_name(expert)
            if self.repo_id is not None:
                self._fetch(name)
            self._handles[expert] = self._checked(self.folder / name)
        return self._handles[expert].get_slice("trajectory")

    def _checked(self, path: Path) -> Any:
        try:
            handle = safe_open(path, framework="pt")
            trajectory = handle.get_slice("trajectory")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"`{path}` is no trajectory, or damaged: {error}. Load or train it again.") from error
        shape, dtype = tuple(trajectory.get_shape()), trajectory.get_dtype()
        wanted = (len(self.epochs), self.num_parameters)
        if shape != wanted or dtype not in _TYPES:
            raise ValueError(
                f"`{path}` must hold {wanted} floating-point numbers as its bank says; got {shape} {dtype}."
            )
        bank = read_header(path).get("bank")
        if bank not in (None, self._fingerprint):
            raise ValueError(
                f"`{path}` belongs to a bank with other settings. Move it away and train that expert again."
            )
        if dtype != "F32" and not self._told:
            self._told = True
            logger.info(f"The bank is stored as {_TYPES[dtype]}; what is read of it becomes float32.")
        return handle

    def _row(self, epoch: int) -> int:
        epoch = self.epochs[-1] if epoch == -1 else epoch
        if epoch not in self._rows:
            raise ValueError(f"The bank has no parameters of epoch {epoch}; it keeps {in_words(self.epochs)}.")
        return self._rows[epoch]


def _listed(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"`{'`, `'.join(names[:most])}`{more}"
