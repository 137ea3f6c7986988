"""Optional packages: whether they work, and what to install when they do not."""

import json
import traceback
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from types import ModuleType
from urllib.parse import unquote, urlsplit


# import name -> (name on the package index, extra of hf-effml that installs it)
OPTIONAL_PACKAGES = {
    "causal_conv1d": ("causal-conv1d", "mamba"),
    "datasets": ("datasets", "data"),
    "evaluate": ("evaluate", "metrics"),
    "mamba_ssm": ("mamba-ssm", "mamba"),
    "matplotlib": ("matplotlib", "plot"),
    "peft": ("peft", "peft"),
    "sklearn": ("scikit-learn", "demo"),
    "timm": ("timm", "vision"),
    "torchvision": ("torchvision", "vision"),
}

# Top-level folders of the repository which only an installation puts inside the package.
MAPPED_FOLDERS = ("hf_effml.hub_cards", "hf_effml.scripts", "hf_effml.trainers")


def require(name: str) -> ModuleType:
    """Imports an optional package, or raises an `ImportError` that says which extra installs it.

    Args:
        name (`str`):
            A module of one of the `OPTIONAL_PACKAGES`, for example `"matplotlib.pyplot"`.

    Returns:
        `ModuleType`: the imported module.

    Example:

    ```python
    >>> from hf_effml.utils.imports import require

    >>> require("sklearn.datasets").load_digits().images.shape
    (1797, 8, 8)
    ```
    """
    package = name.partition(".")[0]
    project, extra = OPTIONAL_PACKAGES[package]
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise ImportError(_broken(package, error)) from error
        raise ImportError(f"`{project}` is needed here and is not installed. Run {how_to_install(extra)}.") from error
    # A torchvision built for another torch raises RuntimeError or AttributeError.
    except Exception as error:
        raise ImportError(_broken(package, error)) from error


def how_to_install(extra: str) -> str:
    """Says how to add an extra to the installation that is running.

    Args:
        extra (`str`):
            One of the extras of hf-effml, for example `"data"`.

    Returns:
        `str`: the command, of a checkout with the folder to run it in: from an index, another copy would replace it.
    """
    try:
        origin = json.loads(distribution("hf-effml").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        origin = {}
    if not origin.get("dir_info", {}).get("editable"):
        return f'`pip install "hf-effml[{extra}]"`'
    return f'`pip install -e ".[{extra}]"` in {unquote(urlsplit(origin["url"]).path)}'


@cache
def usable(name: str) -> bool:
    """Says whether a package is there and can be imported; being installed is not enough.

    Args:
        name (`str`):
            Name of the package or of one of its modules.

    Returns:
        `bool`: `True` when the import succeeds.
    """
    try:
        import_module(name)
    except Exception:
        return False
    return True


def torchvision_mismatch() -> tuple[str, str] | None:
    """Says in plain words that the installed torchvision was built for another torch.

    Returns:
        `tuple[str, str]` or `None`: what is wrong and what to run; `None` when the two fit or one of them is absent.
    """
    from packaging.requirements import Requirement

    try:
        torch_version, torchvision_version = version("torch"), version("torchvision")
    except PackageNotFoundError:
        return None
    for needed in map(Requirement, requires("torchvision") or []):
        if needed.name == "torch" and not needed.specifier.contains(torch_version, prereleases=True):
            reason = (
                f"torchvision {torchvision_version} needs torch{needed.specifier}, "
                f"but torch {torch_version} is installed"
            )
            remedy = (
                f'`pip install "torch=={torch_version.partition("+")[0]}" torchvision` to get the one that fits, '
                "or `pip uninstall torchvision`: only timm needs it"
            )
            return reason, remedy
    return None


def explain_failed_import(error: Exception) -> str | None:
    """Translates why a part of `hf_effml` could not be imported.

    Args:
        error (`Exception`):
            What the import raised.

    Returns:
        `str` or `None`: what is wrong and what to run, `None` when the error is best shown as it is.
    """
    if isinstance(error, ModuleNotFoundError) and error.name in MAPPED_FOLDERS:
        return (
            f"`{error.name}` is not installed: Python found a bare checkout of hf-effml. "
            "Run `pip install -e .` in the checkout, or leave its folder to use the installed package."
        )
    mismatch = torchvision_mismatch() if "torchvision" in "".join(traceback.format_exception(error)) else None
    if mismatch is None:
        return None
    reason, remedy = mismatch
    return f"{reason}, and so transformers cannot be imported. Run {remedy}."


def _broken(package: str, error: Exception) -> str:
    reason = f"{type(error).__name__}: {error}"
    mismatch = torchvision_mismatch() if package in ("timm", "torchvision") else None
    if mismatch is not None:
        reason = mismatch[0]
    return f"`{package}` is installed but cannot be imported ({reason}). `hf-effml env` shows what to do."
