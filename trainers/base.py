"""What all trainers share: the model card, where to resume, averages in the log, and which parameters decay."""

import copy
import json
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import MISSING, fields
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from hf_effml.hub import CardResult, write_card
from hf_effml.hub.results import merge_results
from hf_effml.hub.training_log import CURVE_NAME, draw_log
from hf_effml.methods import FOUNDATIONS, METHODS
from hf_effml.utils.files import remove_leftovers, write_text
from hf_effml.utils.imports import usable
from hf_effml.utils.processes import only_run_in
from hf_effml.utils.sources.class_labels import check_same_classes


logger = logging.get_logger(__name__)

# Arguments on where a run writes and how it reports; they did not shape the model.
_ABOUT_THE_RUN = (
    "accelerator_config",
    "dataloader_",
    "debug",
    "disable_tqdm",
    "eval_",
    "hub_",
    "logging_",
    "output_dir",
    "push_to_hub",
    "report_to",
    "resume_",
    "run_name",
    "save_",
)
# Of a configuration, what weights of another shape do not come from.
_NO_SHAPE = ("architectures", "auto_map", "dtype", "label2id", "transformers_version")
_SPEED_OF_EVALUATION = ("_runtime", "_per_second", "_time")


class EffMLTrainer(Trainer):
    """[`~transformers.Trainer`] with this package's model card and the model's own word on what decays.

    Subclasses say what they are: `_name` is the method's name in `hf_effml.methods`, `_paper` its arXiv id, `_tags`
    are tags for the Hub besides those listed there.

    Facts for the card that only the program knows, such as `evaluated_on`, `base_model` or measured `results`, go into
    the attribute `card_facts`. They are keyword arguments of [`~hf_effml.hub.ModelFolder`] and take precedence over
    what the trainer finds out by itself.

    The arguments are copied: what a trainer derives from model and data stays in `trainer.args`, and the caller's
    object serves for the next run.

    Example:

    ```python
    >>> trainer.card_facts["evaluated_on"] = "the test split of digits"  # doctest: +SKIP
    >>> trainer.push_to_hub()  # doctest: +SKIP
    ```
    """

    _name: str | None = None
    _paper: str | None = None
    _tags: Sequence[str] = ()

    def __init__(self, model: Any = None, args: TrainingArguments | None = None, *others: Any, **kwargs: Any):
        self.card_facts: dict[str, Any] = {}
        self._sums: dict[str, Tensor] = {}
        self._step_of_card: int | None = None
        super().__init__(model, copy.copy(args), *others, **kwargs)

    def find_checkpoint(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """Says where a run goes on from.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                Folder of a checkpoint, or `True` (`true` on a command line) for the newest complete one in
                `output_dir`; a checkpoint that the end of a process cut off is passed over.

        Returns:
            `str` or `None`: the folder; `None` to start anew.
        """
        found = last_complete_checkpoint(self.args.output_dir)
        if not resume_from_checkpoint or str(resume_from_checkpoint).lower() == "false":
            return None
        if str(resume_from_checkpoint).lower() != "true":
            if not _is_complete(Path(str(resume_from_checkpoint))):
                advice = f"The newest one of this run is `{found}`." if found else "Leave it out to start anew."
                raise ValueError(
                    f"`resume_from_checkpoint`: `{resume_from_checkpoint}` is no folder with a complete checkpoint. "
                    f"{advice}"
                )
            return str(resume_from_checkpoint)
        if found is None:
            logger.warning(f"`{self.args.output_dir}` holds no complete checkpoint; training starts anew.")
        return found

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Trains the model.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                See `find_checkpoint`.
            kwargs (`dict`, *optional*):
                Passed on to [`~transformers.Trainer.train`].

        Returns:
            `TrainOutput`: steps, loss and timings.

        Raises:
            ValueError: If the checkpoint is of a model of another kind, shape or classes, or another run is at work.
        """
        checkpoint = self.find_checkpoint(resume_from_checkpoint)
        saved = {} if checkpoint is None else _saved_config(checkpoint)
        _check_same_model(checkpoint, saved, self.model.config)
        _announce_end(checkpoint, self.args.max_steps)
        alone = self.is_world_process_zero()
        with only_run_in(self.args.output_dir) if alone else nullcontext():
            if alone:
                # Of runs that were killed while they wrote.
                remove_leftovers(self.args.output_dir)
            try:
                return super().train(resume_from_checkpoint=checkpoint, **kwargs)
            except KeyboardInterrupt as error:
                error.add_note(_how_to_go_on(self.args.output_dir))
                raise
            except RuntimeError as error:
                if checkpoint is None or "loading state_dict" not in str(error):
                    raise
                raise ValueError(_other_shape(checkpoint, saved, self.model.config)) from error

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Creates the repository and keeps the pickled arguments, which hold paths and maybe a token, out of it.

        Args:
            args (`tuple`):
                Passed on to [`~transformers.Trainer.init_hf_repo`].
            kwargs (`dict`):
                Passed on as well.
        """
        super().init_hf_repo(*args, **kwargs)
        if self.is_world_process_zero():
            ignored = Path(self.args.output_dir, ".gitignore")
            lines = ignored.read_text(encoding="utf-8").splitlines() if ignored.exists() else []
            if "training_args.bin" not in lines:
                write_text(ignored, "\n".join([*lines, "training_args.bin", ""]))

    def average_in_log(self, values: Mapping[str, Tensor]) -> None:
        """Adds values of a training step to what `log` averages. Nothing waits for the device before that.

        Args:
            values (`Mapping[str, Tensor]`):
                Scalars by name, the same names in every step.
        """
        count = torch.ones_like(next(iter(values.values())))
        for name, value in (*values.items(), ("count", count)):
            self._sums[name] = self._sums.get(name, 0) + value.detach().float()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the means of `average_in_log` since the last time, over all processes, to what training logs.

        Args:
            logs (`dict[str, float]`):
                The values to log.
        """
        if "loss" in logs and self._sums:
            sums = self.accelerator.reduce(torch.stack(list(self._sums.values()))).tolist()
            means = {name: total / sums[-1] for name, total in zip(self._sums, sums, strict=True)}
            logs |= {name: mean for name, mean in means.items() if name != "count"}
            self._sums = {}
        super().log(logs, *args, **kwargs)

    def create_model_card(
        self,
        model_name: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        finetuned_from: str | None = None,
        dataset: str | None = None,
        dataset_tags: str | list[str] | None = None,
    ) -> None:
        """Writes the model's card into the output folder. Results that were added to the card of this step stay.

        Args:
            model_name (`str`, *optional*):
                Name of the model. Defaults to the repository it is pushed to, or the folder's name.
            license (`str`, *optional*):
                License of the weights, a keyword of the Hub. The card names none unless it is given.
            tags (`str` or `list[str]`, *optional*):
                Further tags.
            finetuned_from (`str`, *optional*):
                Hub id of the model that training started from. Defaults to where the model was loaded from.
            dataset (`str`, *optional*):
                Name of the data that the results in the log were measured on.
            dataset_tags (`str` or `list[str]`, *optional*):
                Hub ids of the training data.
        """
        if not self.is_world_process_zero():
            return
        output_dir, history = Path(self.args.output_dir), self.state.log_history
        paper_tags = [f"arxiv:{self._paper}"] if self._paper else []
        facts = {
            "config": None if (output_dir / "config.json").exists() else self.model.config.to_dict(),
            "method": next((method.key for method in (*METHODS, *FOUNDATIONS) if method.name == self._name), None),
            "results": _evaluation_results(history),
            "evaluated_on": dataset,
            "command": _command_line(),
            "arguments": _changed_arguments(self.args),
            "base_model": finetuned_from or self.model.config.name_or_path or None,
            "datasets": _as_list(dataset_tags),
            "data": {"splits": self._count_examples()} | self.card_facts.get("data", {}),
            "history": history,
            "license": license,
            "tags": [*self._tags, *_as_list(tags), *paper_tags],
        }
        facts |= self.card_facts | {"data": facts["data"]}
        if self._step_of_card == self.state.global_step:
            # It is still the same model.
            merge_results(output_dir, facts["results"] or [], facts["evaluated_on"])
            facts["results"] = None
        self._step_of_card = self.state.global_step
        if usable("matplotlib"):
            draw_log(history, output_dir / CURVE_NAME, title="Course of the training")
        write_card(output_dir, self.hub_model_id or model_name, **facts)

    def _count_examples(self) -> dict[str, int]:
        """Sizes of the data, as far as they have one."""
        splits = {"training": self.train_dataset, "evaluation": self.eval_dataset}
        return {name: len(split) for name, split in splits.items() if hasattr(split, "__len__")}

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names the parameters that weight decay applies to: the usual ones less the model's `no_weight_decay()`.

        Args:
            model (`nn.Module`):
                The model, bare or wrapped (DDP, PEFT, `torch.compile`).

        Returns:
            `list[str]`: parameter names.
        """
        excluded = set()
        for prefix, module in model.named_modules():
            if hasattr(type(module), "no_weight_decay"):
                excluded |= {f"{prefix}.{name}".lstrip(".") for name in module.no_weight_decay()}
        return [name for name in super().get_decay_parameter_names(model) if name not in excluded]


def last_complete_checkpoint(folder: str | Path) -> str | None:
    """Finds the newest checkpoint of a run that was written to its end.

    Args:
        folder (`str` or `Path`):
            The run's `output_dir`.

    Returns:
        `str` or `None`: the checkpoint's folder.
    """
    # Others, such as `checkpoint-best`, are somebody's copies.
    numbered = (path for path in Path(folder).glob("checkpoint-*") if re.fullmatch(r"checkpoint-[0-9]+", path.name))
    checkpoints = sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]))
    return next((str(path) for path in reversed(checkpoints) if _is_complete(path)), None)


def _how_to_go_on(folder: str | Path) -> str:
    checkpoint = last_complete_checkpoint(folder)
    if checkpoint is None:
        return "There is no checkpoint yet to go on from; `--save_steps` says how often one is written."
    return f"The same command with `--resume_from_checkpoint true` goes on from `{checkpoint}`."


def _saved_config(checkpoint: str) -> dict[str, Any]:
    """The configuration in a checkpoint; empty where it has none, as that of an adapter."""
    path = Path(checkpoint, "config.json")
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _check_same_model(checkpoint: str | None, saved: Mapping[str, Any], config: Any) -> None:
    """Refuses what would be loaded without a word, and mean something else."""
    if saved.get("model_type", config.model_type) != config.model_type:
        raise ValueError(
            f"`resume_from_checkpoint`: `{checkpoint}` holds a `{saved['model_type']}`; this run trains a "
            f"`{config.model_type}`. Choose another `output_dir`, or leave the option out to start anew."
        )
    names = saved.get("id2label") or {}
    if len(names) == len(config.id2label or {}):
        known = [names[number] for number in sorted(names, key=int)]
        check_same_classes(f"The checkpoint `{checkpoint}` and the model that goes on from it", known, config)


def _announce_end(checkpoint: str | None, max_steps: int) -> None:
    """Says that there is nothing left to train, where the results would look as if there had been."""
    if checkpoint is None or max_steps <= 0:
        return
    step = json.loads(Path(checkpoint, "trainer_state.json").read_text(encoding="utf-8")).get("global_step", 0)
    if step >= max_steps:
        logger.warning(f"`{checkpoint}` is at step {step} of `max_steps={max_steps}`: nothing is left to train.")


def _other_shape(checkpoint: str, saved: Mapping[str, Any], config: Any) -> str:
    now = json.loads(config.to_json_string(use_diff=False))
    names = [name for name in saved if name in now and saved[name] != now[name] and name not in _NO_SHAPE]
    what = ", ".join(f"`{name}` was {str(saved[name])[:80]} and is {str(now[name])[:80]}" for name in names)
    return (
        f"`resume_from_checkpoint`: the weights of `{checkpoint}` do not fit this model"
        f"{f': {what}' if what else ''}. Give the options and data of then, or leave it out to start anew."
    )


def _is_complete(checkpoint: Path) -> bool:
    """Whether the state, which the Trainer writes last, is there and whole."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    return True


def _as_list(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _evaluation_results(log_history: Sequence[dict[str, Any]]) -> list[CardResult]:
    """The last evaluation, beside the one at step 0 if there was one (`eval_on_start=True`)."""
    evaluations = [entry for entry in log_history if any(key.startswith("eval_") for key in entry)]
    if not evaluations:
        return []
    first = evaluations[0] if evaluations[0].get("step") == 0 and len(evaluations) > 1 else {}
    results = []
    for key, value in evaluations[-1].items():
        if key.startswith("eval_") and not key.endswith(_SPEED_OF_EVALUATION):
            metric = key.removeprefix("eval_")
            results.append(CardResult(metric.replace("_", " ").capitalize(), value, first.get(key), metric))
    return results


def _command_line() -> list[str] | None:
    """The command that runs this program, unless it is a notebook or a test."""
    program, spec = Path(sys.argv[0]).name, getattr(sys.modules["__main__"], "__spec__", None)
    if program == "hf-effml":
        return sys.argv
    if spec is not None and spec.name.startswith("hf_effml"):
        return ["python", "-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]]
    return (
        ["python", *sys.argv] if program.endswith(".py") and not program.endswith(("_launcher.py", "__.py")) else None
    )


def _changed_arguments(args: TrainingArguments) -> dict[str, Any]:
    """The arguments that shaped the training and are not at their defaults."""
    changed = {}
    for field in fields(args):
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        value = getattr(args, field.name)
        # The base class turns some defaults of None into False or an empty list.
        is_default = value == default or (not value and not default)
        if not is_default and not field.name.startswith(_ABOUT_THE_RUN):
            changed[field.name] = value.value if isinstance(value, Enum) else value
    return changed
