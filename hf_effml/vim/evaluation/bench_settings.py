"""What the benchmarks of this folder are told."""

from dataclasses import dataclass, field

from hf_effml.utils.benchmark import describe_run
from hf_effml.utils.report import Column, Report


@dataclass
class BenchSettings:
    """What to measure, and where."""

    batch_sizes: list[int] = field(default_factory=lambda: [1, 8], metadata={"help": "Batch sizes of the models."})
    threads: int = field(default=1, metadata={"help": "Threads of torch."})
    rounds: int = field(default=7, metadata={"help": "Interleaved rounds; medians of them are shown."})
    device: str = field(default="cpu", metadata={"help": "Where to run: cpu or cuda."})
    seed: int = field(default=0, metadata={"help": "Of weights and inputs."})
    output_dir: str = field(default="effml-bench", metadata={"help": "Folder for the numbers and the tables."})
    quick: bool = field(default=False, metadata={"help": "Tiny sizes, to see it run; the numbers mean nothing."})

    def __post_init__(self) -> None:
        if min(*self.batch_sizes, self.threads, self.rounds) < 1:
            raise ValueError("`batch_sizes`, `threads` and `rounds` must be at least 1.")

    def report(self, name: str, *settings: str) -> Report:
        """Begins a report.

        Args:
            name (`str`):
                Its name.
            settings (`str`):
                Names of settings that it keeps beside the machine.

        Returns:
            [`~hf_effml.utils.report.Report`]: without tables yet.
        """
        run = describe_run(seed=self.seed, rounds=self.rounds, threads=self.threads, device=self.device)
        kept = {key: getattr(self, key) for key in (*settings, "quick")}
        return Report(name, facts={"run": run, "settings": kept})


def timing_columns(*others: str) -> dict[str, Column]:
    """Declares the columns of a timing and more, under their own names.

    Args:
        others (`str`):
            Quantities beside the timing.

    Returns:
        `dict[str, Column]`: for a [`~hf_effml.utils.report.Report`].
    """
    return {name: Column(name.replace("_", " ")) for name in ("ms", "spread_ms", "cpu_ms", *others)}


__all__ = ["BenchSettings", "timing_columns"]
