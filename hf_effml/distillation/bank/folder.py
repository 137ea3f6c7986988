"""The folder of a bank while its experts are trained: what may go on there, and when it is complete."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree
from typing import Any

from hf_effml.utils.files import remove_leftovers
from hf_effml.utils.processes import holding, is_held

from .files import BANK_NAME, different_settings, expert_name, identifying, read_bank, read_header, write_bank


__all__ = ["BankFolder"]

_UNFINISHED = "unfinished"
_POLL_SECONDS = 0.1


class BankFolder:
    """A folder that a bank is made in, by one process or by several at once.

    Args:
        path (`str` or `Path`):
            The folder.
        metadata (`Mapping`):
            What becomes `bank.json`.
    """

    def __init__(self, path: str | Path, metadata: Mapping[str, Any]):
        self.path, self.metadata = Path(path), metadata

    def missing_experts(self, resume: bool, overwrite: bool) -> list[int]:
        """Says which experts are to be trained; changes nothing.

        Args:
            resume (`bool`):
                Whether a bank that is there may be continued.
            overwrite (`bool`):
                Whether it will be deleted.

        Returns:
            `list[int]`: their numbers.

        Raises:
            ValueError: If what is there must be neither continued nor deleted; the message says why.
        """
        if self._is_in_use():
            raise ValueError(
                f"Another run is training experts in `{self.path}`. Wait for its end, or choose another `output_dir`."
            )
        there = sorted(path.name for path in self.path.glob("expert-*.safetensors"))
        everyone = {number: expert_name(number) for number in range(self.metadata["num_experts"])}
        description = self.path / BANK_NAME
        if overwrite:
            return list(everyone)
        remedy = "Choose another `output_dir`, or delete that bank by `overwrite_output_dir`"
        self._check_unfinished(remedy)
        if not (there or description.exists()):
            return list(everyone)
        if not resume:
            raise ValueError(f"`{self.path}` holds a bank already. {remedy}, or continue it by `resume=True`.")
        if not description.exists():
            raise ValueError(f"`{self.path}` holds `{there[0]}` without a `{BANK_NAME}`. {remedy}.")
        if differences := different_settings(read_bank(description), self.metadata):
            raise ValueError(
                f"The bank in `{self.path}` was made with other settings: {'; '.join(differences)}. {remedy}."
            )
        if foreign := sorted(set(there) - set(everyone.values())):
            raise ValueError(
                f"`{self.path}` holds `{foreign[0]}`, which is none of the {len(everyone)} experts asked for. "
                f"{remedy}, or raise `num_experts`."
            )
        return [number for number, name in everyone.items() if name not in there]

    def prepare(self, overwrite: bool) -> None:
        """Leaves in the folder what is continued, and writes what the bank will be.

        Args:
            overwrite (`bool`):
                Whether to delete a bank that is there.
        """
        unfinished = self.path / _UNFINISHED
        if overwrite:
            for path in [self.path / BANK_NAME, *self.path.glob("expert-*.safetensors")]:
                path.unlink(missing_ok=True)
            rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.path)
        remove_leftovers(unfinished)
        write_bank(self.path, self.metadata)

    @property
    def settings(self) -> dict[str, Any]:
        """What an unfinished expert must have been trained with to be continued here."""
        return identifying(self.metadata)

    @contextmanager
    def at_work(self, process: int) -> Iterator[None]:
        """Shows others that a process is training here, for as long as it does.

        Args:
            process (`int`):
                Its number.
        """
        with holding(self._lock(process)):
            yield

    def unfinished(self, expert: int) -> Path:
        """Names the file that an expert's state is kept in during training.

        Args:
            expert (`int`):
                Its number.

        Returns:
            `Path`: the file, which may not exist.
        """
        return self.path / _UNFINISHED / expert_name(expert)

    def finish(self, shares: Sequence[Sequence[int]]) -> None:
        """Waits until all experts are there, then adds their histories to `bank.json`.

        Args:
            shares (`Sequence[Sequence[int]]`):
                The experts that each process trains.

        Raises:
            RuntimeError: If a process has ended without training its experts.
        """
        paths = [self.path / expert_name(number) for number in range(self.metadata["num_experts"])]
        # The experts of other processes may take longer than a collective operation waits.
        while not all(path.exists() for path in paths):
            for process, share in enumerate(shares):
                self._check_process(process, share)
            time.sleep(_POLL_SECONDS)
        # Every process does this, and writes the same.
        write_bank(self.path, {**self.metadata, "history": [read_header(path).get("history") or [] for path in paths]})
        rmtree(self.path / _UNFINISHED, ignore_errors=True)

    def _lock(self, process: int) -> Path:
        return self.path / _UNFINISHED / f"process-{process}.lock"

    def _is_in_use(self) -> bool:
        return any(map(is_held, (self.path / _UNFINISHED).glob("process-*.lock")))

    def _check_process(self, process: int, share: Sequence[int]) -> None:
        """Complains if a process has ended whose experts are missing; it has written them if it ended well."""
        if is_held(self._lock(process)):
            return
        missing = [expert_name(number) for number in share if not (self.path / expert_name(number)).exists()]
        if missing:
            raise RuntimeError(
                f"Process {process} has ended before it had trained `{missing[0]}` ({len(missing)} of its "
                f"{len(share)} experts are missing in `{self.path}`), so this one gives up waiting. The error that it "
                "ended with is in its output. Start again with the same arguments: what is finished is kept."
            )

    def _check_unfinished(self, remedy: str) -> None:
        """Also where `bank.json` is gone: a state says itself with which settings it was made."""
        for path in sorted((self.path / _UNFINISHED).glob("expert-*.safetensors")):
            settings = read_header(path).get("settings")
            if settings is None and (self.path / BANK_NAME).exists():
                # Of an earlier version, for which that file speaks.
                continue
            if differences := different_settings(settings or {}, self.metadata):
                raise ValueError(
                    f"The unfinished `{path.name}` in `{self.path}` was made with other settings: "
                    f"{'; '.join(differences)}. {remedy}."
                )
