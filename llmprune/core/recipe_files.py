"""The recipes that come with llmprune: in the checkout's recipes/, which the wheel carries inside the package."""

from __future__ import annotations

import shutil
from pathlib import Path

from llmprune.core.errors import RecipeError, quoted

DEFAULT_RECIPE = "default"
LLAMACPP_RECIPE = "llamacpp"
GENERAL_RECIPES = (DEFAULT_RECIPE, LLAMACPP_RECIPE)
"""Those for a child that stands alone, of any model; `draft` is for one that its parent decodes with, the others are
for the model of the demo."""


def recipe_directory() -> Path:
    """Where the recipes lie: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent.parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def recipe_names() -> list[str]:
    return sorted(path.stem for path in recipe_directory().glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """The file of a recipe that comes with llmprune. Raises RecipeError."""
    path = recipe_directory() / f"{name.removesuffix('.yaml')}.yaml"
    if not path.is_file():
        raise RecipeError(f"no recipe is called {quoted(name)}; there are: {', '.join(recipe_names())}")
    return path


def copy_recipe(name: str, to: Path) -> Path:
    """Copy a recipe to a file or into a directory. Raises RecipeError rather than replace a file."""
    source = recipe_path(name)
    target = to / source.name if to.is_dir() else to
    if target.exists():
        raise RecipeError(f"{target} exists; name another file")
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise RecipeError(f"cannot write {target}: {error.strerror}") from None
    return target
