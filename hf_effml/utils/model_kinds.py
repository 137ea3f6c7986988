"""What a folder of a model and a file of weights hold, and what is said if it is something else."""

import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    PreTrainedConfig,
)


__all__ = [
    "NamesWhatFails",
    "check_model_type",
    "check_task",
    "load_weights",
    "read_config_dict",
    "state_dict_of",
]

_TASKS = {
    "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING,
    "AutoModelForImageClassification": MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
}
# What the names of all weights may begin with.
_WRAPPERS = ("model.", "net.")
_LFS_POINTER = b"version https://git-lfs"
_WEB_PAGE = re.compile(rb"\s*<(!doctype|html|head|\?xml)", re.IGNORECASE)


def check_model_type(name_or_path: str | Path, wanted: str | Sequence[str], **options: Any) -> str:
    """Reads which kind of model a folder or repository holds, before anything of it is loaded.

    Args:
        name_or_path (`str` or `Path`):
            Folder or Hub id.
        wanted (`str` or `Sequence[str]`):
            The kinds that serve, as `model_type` of `config.json` names them: `"vim"`, `"token_router"` and so on.
        options (`dict`, *optional*):
            `revision`, `token`, `cache_dir` and so on, as for [`~transformers.PreTrainedConfig.get_config_dict`].

    Returns:
        `str`: the kind found.

    Raises:
        ValueError: If it is of another kind; the message names both.
        OSError: If there is no `config.json`, or it holds no configuration.

    Example:

    ```python
    >>> from hf_effml import ConvNetConfig
    >>> from hf_effml.utils.model_kinds import check_model_type

    >>> ConvNetConfig().save_pretrained("my-convnet")
    >>> check_model_type("my-convnet", ["convnet", "vim"])
    'convnet'

    ```
    """
    return _config_of(name_or_path, wanted, _listed(wanted), **options).get("model_type", "")


def check_task(name_or_path: str | Path, auto_class: str, **options: Any) -> str:
    """Reads whether a folder or repository holds a model for a task, before anything of it is loaded.

    Args:
        name_or_path (`str` or `Path`):
            Folder or Hub id.
        auto_class (`str`):
            What is to load it: `"AutoModelForCausalLM"` or `"AutoModelForImageClassification"`.
        options (`dict`, *optional*):
            As for [`check_model_type`].

    Returns:
        `str`: the kind found.

    Raises:
        ValueError: If it is of a kind that this class does not know, and brings no code of its own.
        OSError: If there is no `config.json`, or it holds no configuration.

    Example:

    ```python
    >>> from hf_effml import ConvNetConfig
    >>> from hf_effml.utils.model_kinds import check_task

    >>> ConvNetConfig().save_pretrained("my-convnet")
    >>> check_task("my-convnet", "AutoModelForCausalLM")
    Traceback (most recent call last):
    ValueError: `my-convnet` holds a model of the kind 'convnet'; needed is one for `AutoModelForCausalLM`. ...

    ```
    """
    values = _config_of(name_or_path, None, f"a model for `{auto_class}`", **options)
    found, own_code = values.get("model_type", ""), values.get("auto_map")
    known = found in CONFIG_MAPPING and CONFIG_MAPPING[found] in _TASKS[auto_class]
    if not known and not (isinstance(own_code, Mapping) and auto_class in own_code):
        raise ValueError(
            f"`{name_or_path}` holds a model of the kind {found!r}; needed is one for `{auto_class}`. Give the folder "
            "or Hub id of one."
        )
    return found


def _config_of(
    name_or_path: str | Path, wanted: str | Sequence[str] | None, needed: str, **options: Any
) -> dict[str, Any]:
    folder = Path(name_or_path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(
            f"`{name_or_path}` holds no `config.json`, so no model; needed is {needed}. Give the folder or Hub id of "
            "one."
        )
    try:
        values, _ = read_config_dict(PreTrainedConfig.get_config_dict, wanted, name_or_path, **options)
    except OSError as error:
        if folder.exists():
            raise
        reason = " ".join(str(error).split())
        raise OSError(
            f"`{name_or_path}` is no folder here, and not found on the Hub or not open to you: {reason}"
        ) from error
    return values


def read_config_dict(
    read: Callable[..., tuple[dict[str, Any], dict[str, Any]]],
    wanted: str | Sequence[str] | None,
    name_or_path: Any,
    **options: Any,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a saved configuration and says so if it is that of another kind of model; one that names none passes.

    Args:
        read (`Callable`):
            The `get_config_dict` of a configuration's base class.
        wanted (`str` or `Sequence[str]`, *optional*):
            The kinds that serve; all of them if left out.
        name_or_path (`str` or `Path`):
            Folder, file or Hub id.
        options (`dict`, *optional*):
            Passed on to `read`.

    Returns:
        `tuple[dict, dict]`: what `read` returns: the values, and the options that it did not use.

    Raises:
        ValueError: If it is of another kind; the message names both.
        OSError: If the file holds no configuration.
    """
    try:
        values, unused = read(name_or_path, **options)
    except (TypeError, AttributeError) as error:  # of `"model_type" in None` and the like
        raise OSError(_no_configuration(name_or_path)) from error
    except OSError as error:
        # What transformers makes of text that is no JSON.
        if isinstance(error.__context__, ValueError):
            raise OSError(_no_configuration(name_or_path)) from error
        raise
    if not isinstance(values, dict):
        raise OSError(_no_configuration(name_or_path))
    found = values.get("model_type")
    kinds = [wanted] if isinstance(wanted, str) else wanted
    if found is not None and kinds is not None and found not in kinds:
        classes = values.get("architectures")
        named = f" ({', '.join(map(str, classes))})" if isinstance(classes, list) and classes else ""
        raise ValueError(
            f"`{name_or_path}` holds a model of the kind {found!r}{named}; needed is {_listed(kinds)}. Give the "
            "folder or Hub id of one."
        )
    return values, unused


class NamesWhatFails:
    """A mixin for models, before `PreTrainedModel`: weights that do not load are named.

    Saved folders do without it where this package is not installed.
    """

    @classmethod
    def from_pretrained(cls, name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Loads a saved model; weights that are damaged or have other shapes are named.

        Args:
            name_or_path (`str` or `Path`):
                Folder or Hub id.
            args, kwargs (`tuple`, `dict`, *optional*):
                As for [`~transformers.PreTrainedModel.from_pretrained`].

        Returns:
            The model, in evaluation mode.

        Raises:
            ValueError: If the folder holds another kind of model, or weights that cannot be loaded.
        """
        try:
            return super().from_pretrained(name_or_path, *args, **kwargs)  # type: ignore[misc]
        except SafetensorError as error:
            for path in sorted(Path(name_or_path).glob("*.safetensors")):
                _refuse_stand_ins(path)
            raise ValueError(f"The weights of `{name_or_path}` are damaged: {error}. Get the folder again.") from error
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            raise ValueError(
                f"The weights of `{name_or_path}` have other shapes than its configuration says; the report above "
                "lists them. Pass fields that go with them, or `ignore_mismatched_sizes=True` to start these weights "
                "anew."
            ) from error


def load_weights(path: str | Path, allowed: Sequence[type] = ()) -> Any:
    """Reads a file of tensors without running code from it.

    Args:
        path (`str` or `Path`):
            A safetensors file, or a pickle of torch, of which nothing but tensors, numbers and lists is read.
        allowed (`Sequence[type]`, *optional*):
            Further classes that a pickle may hold.

    Returns:
        `Any`: what it holds, on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is the pointer to a file, a web page, damaged, or would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file `{path}`. Download the weights first and pass their path.")
    start = _refuse_stand_ins(path)
    try:
        if path.suffix == ".safetensors" or start[8:9] == b"{":
            return load_file(path)
        with torch.serialization.safe_globals(list(allowed)):
            # Files of torch before 1.6 are no archives and cannot be mapped into memory.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except UnpicklingError as error:
        raise ValueError(
            f"`{path}` holds more than tensors and lists, which could run code when it is opened, or is damaged. It "
            "cannot be read safely and was not opened. Get the file from its authors again, or ask them for plain "
            "tensors, best as safetensors."
        ) from error
    except Exception as error:  # a damaged file may fail in any way
        reason = str(error).partition("\n")[0] or "it ends too early"
        raise ValueError(f"`{path}` is damaged, or no file of torch: {reason}. Get it again.") from error


def _refuse_stand_ins(path: Path) -> bytes:
    """The beginning of a file, unless it is that of what is often found in its place."""
    with path.open("rb") as file:
        start = file.read(512)
    if start.startswith(_LFS_POINTER):
        raise ValueError(
            f"`{path}` is the pointer that Git LFS keeps in place of a file, not the weights. Run `git lfs pull` in "
            "its repository, or download the file itself."
        )
    if _WEB_PAGE.match(start):
        raise ValueError(
            f"`{path}` is a web page, not weights: the link that it was saved from leads to a page. Download the file "
            "itself."
        )
    return start


def state_dict_of(content: Any, source: Any, levels: Sequence[str] = ("state_dict",)) -> dict[str, Any]:
    """Finds the weights in what a training program saved.

    Args:
        content (`Any`):
            A state dict, or a dictionary that holds one.
        source (`str` or `Path`):
            Where it is from, for messages.
        levels (`Sequence[str]`, *optional*, defaults to `("state_dict",)`):
            Keys that a state dict may lie under, Lightning's by default.

    Returns:
        `dict[str, Any]`: the state dict, without the `module.` and `model.` of wrappers.

    Raises:
        ValueError: If it is none.
    """
    for level in levels:
        if isinstance(content, Mapping) and isinstance(content.get(level), Mapping):
            content = content[level]
    if not isinstance(content, Mapping):
        raise ValueError(f"{source} is no state dict of tensors; it holds a {type(content).__name__}.")
    wrong = next((name for name in content if not isinstance(name, str)), None)
    if wrong is not None:
        raise ValueError(
            f"{source} is no state dict: the names of weights are text, one of its keys is {wrong!r}. It may be the "
            "state of an optimizer; pass the `state_dict()` of the model."
        )
    state = {name.removeprefix("module."): value for name, value in content.items()}
    for prefix in _WRAPPERS:
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _listed(kinds: str | Sequence[str]) -> str:
    names = [repr(kind) for kind in ([kinds] if isinstance(kinds, str) else kinds)]
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _no_configuration(name_or_path: Any) -> str:
    return (
        f"The `config.json` of `{name_or_path}` holds no configuration, which is a mapping from names to values. "
        "Get the folder again, or save the model once more."
    )
