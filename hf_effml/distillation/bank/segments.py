"""Which stretch of which expert's trajectory a step of distillation matches."""

from typing import Any

import torch
from torch.utils.data import Dataset

from hf_effml.distillation.flat_student import seed_from

from .trajectories import TrajectoryBank


__all__ = ["TrajectorySegments", "collate_segments"]


class TrajectorySegments(Dataset):
    """The segments of experts' trajectories that training matches, each drawn from the seed and its number alone.

    Args:
        bank ([`~hf_effml.distillation.bank.trajectories.TrajectoryBank`]):
            The experts.
        args ([`~hf_effml.TrajectoryMatchingTrainingArguments`]):
            Which epochs, how many steps, and the seed.
        per_step (`int`):
            Segments of a step over all processes.
    """

    def __init__(self, bank: TrajectoryBank, args: Any, per_step: int):
        self.bank, self._args, self._per_step = bank, args, per_step

    def __len__(self) -> int:
        """Number of segments of the whole training."""
        return self._args.max_steps * self._per_step

    def choose(self, number: int) -> tuple[int, int, int]:
        """Says which segment comes when, without reading it.

        Args:
            number (`int`):
                Number of the segment from the beginning of training.

        Returns:
            `tuple[int, int, int]`: expert, start epoch, and the seed of the student's batches and augmentations.
        """
        seed = self._args.seed
        lap, place = divmod(number, len(self.bank))
        order = torch.Generator().manual_seed(seed_from(seed, "experts", lap))
        expert = int(torch.randperm(len(self.bank), generator=order)[place])
        starts = torch.Generator().manual_seed(seed_from(seed, "start", number))
        end = self._args.last_start_epoch(number // self._per_step)
        start = int(torch.randint(self._args.min_start_epoch, end, (), generator=starts))
        return expert, start, seed_from(seed, "segment", number)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Reads a segment."""
        expert, epoch, seed = self.choose(number)
        start, target = self.bank.pair(expert, epoch, self._args.expert_epochs)
        return {"starts": start, "targets": target, "seeds": seed}


def collate_segments(segments: list[dict[str, Any]]) -> dict[str, Any]:
    """Makes a batch of segments; seeds stay plain numbers, which need no device.

    Args:
        segments (`list[dict]`):
            From [`TrajectorySegments`].

    Returns:
        `dict[str, Any]`: `starts` and `targets` of shape `(segments, parameters)`, and `seeds`.
    """
    return {
        "starts": torch.stack([segment["starts"] for segment in segments]),
        "targets": torch.stack([segment["targets"] for segment in segments]),
        "seeds": [segment["seeds"] for segment in segments],
    }
