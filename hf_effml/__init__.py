"""Efficient-ML methods as Hugging Face components.

Importing the package registers its models with the Auto classes of transformers.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .comp_dd import *  # noqa: F403
    from .distillation import *  # noqa: F403
    from .token_router import *  # noqa: F403
    from .trainers import *  # noqa: F403
    from .utils.augmentation import *  # noqa: F403
    from .utils.image_data import *  # noqa: F403
    from .vim import *  # noqa: F403

__version__ = "0.1.0"
__all__ = ["__version__"]

_PUBLIC = ("vim", "token_router", "distillation", "comp_dd", "trainers", "utils.augmentation", "utils.image_data")


def _load_public_names() -> None:
    """Takes over what the subpackages and modules list in their `__all__`; their import registers the models."""
    for name in _PUBLIC:
        try:
            module = import_module(f"hf_effml.{name}")
        except (ImportError, RuntimeError) as error:
            from .utils.imports import explain_failed_import

            explanation = explain_failed_import(error)
            if explanation is None:
                raise
            raise ImportError(explanation) from error
        globals().update({public: getattr(module, public) for public in module.__all__})
        __all__.extend(module.__all__)


def __getattr__(name: str) -> Any:
    if not name.startswith("_") and __all__ == ["__version__"]:
        _load_public_names()
        if name in globals():
            return globals()[name]
    raise AttributeError(f"module 'hf_effml' has no attribute '{name}'")


# The console script answers `--help` and `env` in a tenth of a second, also where torch or transformers is broken.
if Path(sys.argv[0]).stem != "hf-effml":
    _load_public_names()
