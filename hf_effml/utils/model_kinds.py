"""Which kind of model a folder or a repository holds, and the one sentence about a folder of another kind."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig


__all__ = ["check_model_type", "read_config_dict"]


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
    if Path(name_or_path).is_dir() and not (Path(name_or_path) / "config.json").is_file():
        raise ValueError(
            f"`{name_or_path}` holds no `config.json`, so no model; needed is {_listed(wanted)}. Give the folder or "
            "Hub id of one."
        )
    values, _ = read_config_dict(PreTrainedConfig.get_config_dict, wanted, name_or_path, **options)
    return values.get("model_type", "")


def read_config_dict(
    read: Callable[..., tuple[dict[str, Any], dict[str, Any]]],
    wanted: str | Sequence[str],
    name_or_path: Any,
    **options: Any,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a saved configuration and says so if it is that of another kind of model; one that names none passes.

    Args:
        read (`Callable`):
            The `get_config_dict` of a configuration's base class.
        wanted (`str` or `Sequence[str]`):
            The kinds that serve.
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
    if not isinstance(values, dict):
        raise OSError(_no_configuration(name_or_path))
    found = values.get("model_type")
    kinds = [wanted] if isinstance(wanted, str) else list(wanted)
    if found is not None and found not in kinds:
        classes = values.get("architectures")
        named = f" ({', '.join(map(str, classes))})" if isinstance(classes, list) and classes else ""
        raise ValueError(
            f"`{name_or_path}` holds a model of the kind {found!r}{named}; needed is {_listed(kinds)}. Give the "
            "folder or Hub id of one."
        )
    return values, unused


def _listed(kinds: str | Sequence[str]) -> str:
    names = [repr(kind) for kind in ([kinds] if isinstance(kinds, str) else kinds)]
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _no_configuration(name_or_path: Any) -> str:
    return (
        f"The `config.json` of `{name_or_path}` holds no configuration, which is a mapping from names to values. "
        "Get the folder again, or save the model once more."
    )
