"""Recipes: named settings of a program, all of a method's in one file."""

from pathlib import Path
from typing import Any

from .commands import scripts_folder
from .settings import read_yaml


def recipe_file(program: str | Path) -> Path:
    """Names the file of a program's recipes: that of the method for `train_<method>`, else that of its own name.

    Args:
        program (`str` or `Path`):
            The program's file.

    Returns:
        `Path`: the file, which need not exist.
    """
    return scripts_folder() / "recipes" / f"{Path(program).stem.removeprefix('train_')}.yaml"


def read_recipes(program: str | Path) -> dict[str, dict[str, Any]]:
    """Reads the recipes of a program.

    A file maps names of recipes to settings, with one sentence under `about`. What several recipes have in common is
    under a name that begins with an underscore, and taken over by YAML's merge key.

    Args:
        program (`str` or `Path`):
            The program's file, or the name of its method: `"pad"`.

    Returns:
        `dict[str, dict]`: settings by name, in the order of the file; empty where there are none.

    Example:

    ```python
    >>> from hf_effml.cli.recipes import read_recipes

    >>> read_recipes("scripts/train_vim.py")["smoke"]["image_size"]
    16

    ```
    """
    path = recipe_file(program)
    if not path.is_file():
        return {}
    content = read_yaml(path)
    return {name: settings for name, settings in content.items() if not name.startswith("_")}
