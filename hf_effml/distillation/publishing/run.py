"""How a distillation went, as far as others need it to judge a set or to make it again."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hf_effml.distillation.evaluation.training_sets import as_training_set
from hf_effml.utils.benchmark import describe_run


__all__ = ["DistillationRun", "peak_memory_so_far"]


@dataclass(frozen=True)
class DistillationRun:
    """What only the program or trainer knows that made a set; what is not known is left out.

    Args:
        steps (`int`, *optional*):
            Steps of the distillation.
        selected (`Mapping`, *optional*):
            Which of them the set is from (`step`) and why (`rule`), with what it was chosen by.
        arguments (`Mapping`, *optional*):
            Arguments that shaped the run.
        seed (`int`, *optional*):
            Seed of the run.
        command (`str`, *optional*):
            Command line of the run.
        processes (`int`, *optional*):
            On how many processes.
        seconds (`float`, *optional*):
            How long it took.
        peak_memory_bytes (`int`, *optional*):
            Most memory that it held.
        device (`torch.device` or `str`, *optional*):
            Where it ran; this machine's processor or GPU is then named.
    """

    steps: int | None = None
    selected: Mapping[str, Any] | None = None
    arguments: Mapping[str, Any] | None = None
    seed: int | None = None
    command: str | None = None
    processes: int | None = None
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    device: torch.device | str | None = None

    @classmethod
    def of_trainer(cls, trainer: Any, arguments: Mapping[str, Any], command: str | None) -> "DistillationRun":
        """Gathers what a trainer knows about its run.

        Args:
            trainer ([`TrajectoryMatchingTrainer`]):
                The trainer.
            arguments (`Mapping`):
                Arguments that shaped the run.
            command (`str`, *optional*):
                Command line of the run.

        Returns:
            [`DistillationRun`]
        """
        args, state = trainer.args, trainer.state
        runtimes = [entry["train_runtime"] for entry in state.log_history if "train_runtime" in entry]
        return cls(
            steps=state.global_step,
            selected=_selected(trainer),
            arguments=arguments,
            seed=args.seed,
            command=command,
            processes=args.world_size,
            seconds=runtimes[-1] if runtimes else None,
            peak_memory_bytes=peak_memory_so_far(args.device),
            device=args.device,
        )

    def to_dict(self) -> dict[str, Any]:
        """What is known, with the machine and its versions in place of the device.

        Returns:
            `dict`
        """
        found = {key: value for key, value in asdict(self).items() if key != "device"}
        if self.seconds is not None:
            found["seconds"] = round(self.seconds, 1)
        if self.device is not None:
            run = describe_run(seed=self.seed or 0, device=self.device)
            found |= {
                "device": run["processor"] if run["device"] == "cpu" else run["device"],
                "versions": {name: number for name, number in run["versions"].items() if number},
                "date": run["date"],
            }
        return found


def peak_memory_so_far(device: torch.device | str) -> int | None:
    """The most memory that this process has held: of a GPU its tensors, otherwise all of the process.

    Args:
        device (`torch.device` or `str`):
            Where it computes.

    Returns:
        `int` or `None`: bytes; `None` where the system does not tell.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        from resource import RUSAGE_SELF, getrusage
    except ImportError:
        return None
    # Linux counts in KiB.
    return getrusage(RUSAGE_SELF).ru_maxrss * 1024


def _selected(trainer: Any) -> dict[str, Any]:
    """Which step the images are from, and why."""
    args, state = trainer.args, trainer.state
    ended = state.global_step >= args.max_steps
    chosen = state.best_global_step if args.load_best_model_at_end and ended else None
    if not chosen:
        return {"step": state.global_step, "rule": "the last one"}
    found = {"step": chosen, "rule": f"best {args.metric_for_best_model} of all evaluations"}
    if args.metric_for_best_model in ("accuracy", "eval_accuracy") and trainer.eval_dataset is not None:
        own = trainer.accelerator.unwrap_model(trainer.model)
        rules = args.protocol().for_set(as_training_set(own)).to_dict()
        images, seeds = len(trainer.eval_dataset), args.eval_seeds
        found |= {"accuracy": state.best_metric, "images": images, "seeds": seeds, "protocol": rules}
    return found
