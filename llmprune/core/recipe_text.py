"""Recipes as text: read from YAML, overridden key by key, checked, written."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from llmprune.core.errors import MAX_MESSAGE, RecipeError, quoted, shortened
from llmprune.core.files import exists, expanded
from llmprune.core.recipe import Recipe
from llmprune.core.recipe_inputs import SourceRecipe
from llmprune.core.yaml_text import read_yaml, read_yaml_file

Section = TypeVar("Section", bound=BaseModel)

MAX_KEY = 60
"""Characters of a key that an error repeats; ours have fewer."""


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
    problems = error.errors(include_url=False)
    told: list[str] = []
    for problem in problems:
        told.append(f"{'.'.join(map(_key, problem['loc'])) or 'recipe'}: {_explain(problem)}")
        if sum(map(len, told)) > MAX_MESSAGE // 2 and len(told) < len(problems):
            told.append(f"and {len(problems) - len(told)} more")
            break
    return "; ".join(told)


def _key(part: int | str) -> str:
    plain = isinstance(part, int) or (part.isprintable() and len(part) <= MAX_KEY)
    return str(part) if plain else shortened(quoted(part), MAX_KEY)


def _explain(problem: Any) -> str:
    if problem["type"] == "extra_forbidden":
        return "unknown key"
    if problem["type"] == "missing":
        return "missing"
    # A rule about several keys says which values break it; the whole section would hide them.
    if "; got " in problem["msg"]:
        return str(problem["msg"])
    return f"{problem['msg']}, got {quoted(problem['input'])}"


def load_recipe(path: Path | str, overrides: list[str] | None = None) -> Recipe:
    """Read a YAML recipe and apply `key.sub=value` overrides. Raises RecipeError."""
    data = read_yaml_file(Path(path))
    if not isinstance(data, dict):
        raise RecipeError(f"{shortened(path)}: a recipe is a mapping of sections (model, data, ...)")
    return parse_recipe(apply_overrides(data, overrides or []), origin=shortened(path))


def apply_overrides(data: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """A copy of `data` with `key.sub=value` overrides; values are read as YAML. Raises RecipeError."""
    result: dict[str, Any] = {key: dict(value) if isinstance(value, dict) else value for key, value in data.items()}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise RecipeError(f"an override is key.sub=value, such as search.trials=100; got {quoted(override)}")
        value = read_yaml(text, f"the value of {_key(key)}")
        section, _, name = key.partition(".")
        if not name or "." in name:
            raise RecipeError(f"an override names section.key, such as search.trials; got {quoted(key)}")
        target = result.setdefault(section, {})
        if not isinstance(target, dict):
            raise RecipeError(f"{_key(section)} is not a section of a recipe; got {quoted(override)}")
        target[name] = value
    return result


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe with its local files named absolutely, so that a run resumes from any working directory."""

    def absolute(text: str) -> str:
        return str(expanded(text).resolve()) if exists(text) else text

    def found(sources: tuple[SourceRecipe, ...]) -> tuple[SourceRecipe, ...]:
        return tuple(s if s.path is None else s.model_copy(update={"path": absolute(s.path)}) for s in sources)

    texts = {"sources": found(recipe.data.sources), "unseen": found(recipe.data.unseen)}
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"path": absolute(recipe.model.path)}),
            "data": recipe.data.model_copy(update=texts),
            "vocabulary": recipe.vocabulary.model_copy(update={"keep_text": found(recipe.vocabulary.keep_text)}),
        }
    )


def to_yaml(recipe: Recipe) -> str:
    """The complete recipe, defaults included."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
