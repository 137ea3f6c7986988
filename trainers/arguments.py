"""Which values of `TrainingArguments` make no sense in any training, said before anything is loaded."""

import json
import math
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments


__all__ = ["EffMLTrainingArguments"]

# Least and most that each may be; transformers looks at some of them in the middle of a run, and at others never.
_RANGES: dict[str, tuple[float, float]] = {
    "per_device_train_batch_size": (1, math.inf),
    "per_device_eval_batch_size": (1, math.inf),
    "gradient_accumulation_steps": (1, math.inf),
    "num_train_epochs": (0, math.inf),
    "learning_rate": (0, math.inf),
    "weight_decay": (0, math.inf),
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "adam_epsilon": (0, math.inf),
    "max_grad_norm": (0, math.inf),
    "warmup_steps": (0, math.inf),
    "label_smoothing_factor": (0, 1),
    "logging_steps": (0, math.inf),
    "save_steps": (0, math.inf),
    "eval_steps": (0, math.inf),
    "save_total_limit": (1, math.inf),
    "dataloader_num_workers": (0, math.inf),
    "seed": (0, 2**32 - 1),
    "data_seed": (0, 2**32 - 1),
}
_WHOLE = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "max_steps",
    "save_total_limit",
    "dataloader_num_workers",
    "seed",
    "data_seed",
)


@dataclass
class EffMLTrainingArguments(TrainingArguments):
    """[`~transformers.TrainingArguments`] that refuse impossible values by name.

    Raises:
        ValueError: If a number is outside of what it can be.
        TypeError: If it is no number.

    Example:

    ```python
    >>> from hf_effml.trainers.arguments import EffMLTrainingArguments

    >>> EffMLTrainingArguments("out", per_device_train_batch_size=-4)
    Traceback (most recent call last):
    ValueError: `per_device_train_batch_size` must be at least 1; got -4.

    ```
    """

    def __post_init__(self) -> None:
        if self.output_dir is not None and not str(self.output_dir).strip():
            raise ValueError("`output_dir` must name a folder; got an empty text.")
        for name in dict.fromkeys((*_RANGES, *_WHOLE)):
            value = getattr(self, name)
            if value is not None:
                _check(name, value)
        if self.report_to is None:  # type: ignore[has-type]
            # The type allows it, what reads it does not.
            self.report_to = "none"
        for name in self._VALID_DICT_FIELDS:
            _check_dictionary(name, getattr(self, name))
        super().__post_init__()


def _check_dictionary(name: str, value: Any) -> None:
    """What begins with a brace is read as JSON by transformers, which does not say of which argument."""
    try:
        if isinstance(value, str) and value.startswith("{"):
            json.loads(value)
    except ValueError as error:
        raise ValueError(f"`{name}` must be JSON, as in '{{\"min_lr\": 1e-6}}'; got {value!r} ({error}).") from error


def _check(name: str, value: Any) -> None:
    kind = "a whole number" if name in _WHOLE else "a number"
    if isinstance(value, str | bool) or not isinstance(value, int if name in _WHOLE else (int, float)):
        raise TypeError(f"`{name}` must be {kind}; got {value!r}.")
    if name == "max_steps" and value == 0:
        # transformers reads it as -1.
        raise ValueError("`max_steps` must be at least 1, or -1 for all of `num_train_epochs`; got 0.")
    least, most = _RANGES.get(name, (-1, math.inf))
    if not least <= value <= most:
        allowed = f"from {least} to {most}" if most < math.inf else f"at least {least}"
        raise ValueError(f"`{name}` must be {allowed}; got {value}.")
