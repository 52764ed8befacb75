"""Recipes as text: read from YAML, overridden key by key, checked, written."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from llmprune.errors import RecipeError
from llmprune.recipe import Recipe, SourceRecipe

Section = TypeVar("Section", bound=BaseModel)


def parse_recipe(data: Any, *, origin: str) -> Recipe:
    """Validate a recipe's data; `origin` is the name that errors give it. Raises RecipeError."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"{origin}: {_problems(error)}. `llmprune schema` lists every key") from None


def parse_section(section: type[Section], values: dict[str, Any]) -> Section:
    """Validate one section that came from somewhere else than a recipe. Raises RecipeError."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise RecipeError(_problems(error)) from None


def _problems(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(str(part) for part in problem['loc']) or 'recipe'}: {_explain(problem)}"
        for problem in error.errors()
    )


def _explain(problem: Any) -> str:
    if problem["type"] == "extra_forbidden":
        return "unknown key"
    if problem["type"] == "missing":
        return "missing"
    return f"{problem['msg']}, got {problem['input']!r}"


def load_recipe(path: Path | str, overrides: list[str] | None = None) -> Recipe:
    """Read a YAML recipe and apply `key.sub=value` overrides. Raises RecipeError."""
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read recipe {path}: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path} is not YAML: {error}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections (model, data, ...)")
    return parse_recipe(apply_overrides(data, overrides or []), origin=str(path))


def apply_overrides(data: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """A copy of `data` with `key.sub=value` overrides; values are read as YAML. Raises RecipeError."""
    result: dict[str, Any] = {key: dict(value) if isinstance(value, dict) else value for key, value in data.items()}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise RecipeError(f"an override is key.sub=value, such as search.trials=100; got {override!r}")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"the value of {key} is not YAML: {error}") from None
        section, _, name = key.partition(".")
        if not name or "." in name:
            raise RecipeError(f"an override names section.key, such as search.trials; got {key!r}")
        target = result.setdefault(section, {})
        if not isinstance(target, dict):
            raise RecipeError(f"{section} is not a section of a recipe; got {override!r}")
        target[name] = value
    return result


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe with its local files named absolutely, so that a run resumes from any working directory."""

    def absolute(text: str) -> str:
        return str(Path(text).expanduser().resolve()) if Path(text).expanduser().exists() else text

    def found(sources: tuple[SourceRecipe, ...]) -> tuple[SourceRecipe, ...]:
        return tuple(s if s.path is None else s.model_copy(update={"path": absolute(s.path)}) for s in sources)

    texts = {"sources": found(recipe.data.sources), "unseen": found(recipe.data.unseen)}
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"path": absolute(recipe.model.path)}),
            "data": recipe.data.model_copy(update=texts),
        }
    )


def to_yaml(recipe: Recipe) -> str:
    """The complete recipe, defaults included."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
