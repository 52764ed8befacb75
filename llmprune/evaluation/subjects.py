"""Which models an evaluation is about: the checkpoints named, and the parent they were pruned from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from llmprune.core.errors import ModelError, RunDirectoryError
from llmprune.core.files import expanded, read_json, sha256_file
from llmprune.core.progress import Show
from llmprune.core.recipe import Recipe
from llmprune.core.recipe_inputs import ModelRecipe
from llmprune.core.recipe_text import parse_recipe, parse_section
from llmprune.measure.resized import Resized
from llmprune.measure.value import newer_schema
from llmprune.models.checkpoint import METADATA_FILE
from llmprune.models.loading import load_model, locate, stored_dtype
from llmprune.models.placement import resolve_device
from llmprune.pipeline.run_directory import RunDirectory
from llmprune.publish.contents import EVALUATION_FILE

# What a model computes depends on these files; not on what we or others write beside them.
_SUFFIXES = (".json", ".safetensors", ".py", ".model", ".jinja", ".txt")
_NOT_OF_THE_MODEL = (METADATA_FILE, EVALUATION_FILE)

Role = Literal["parent", "child", "model"]


@dataclass(frozen=True, eq=False)
class Subject:
    """A model to evaluate; its weights are read when they are first asked for."""

    name: str
    role: Role
    recipe: ModelRecipe
    identity: str
    """SHA-256 over its files, or repository and commit on the Hub."""
    directory: Path | None
    """Of a checkpoint on disk."""

    @cached_property
    def loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Raises ModelError."""
        return load_model(self.recipe)

    def load(self, show: Show) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The same, shown the first time."""
        if "loaded" in self.__dict__:
            return self.loaded
        with show(f"loading {self.name}"):
            return self.loaded

    @property
    def device(self) -> str:
        """Where it will be. Raises ModelError if that cannot be used here."""
        return str(resolve_device(self.recipe.device))

    @property
    def id(self) -> str | None:
        """If it is a child of ours, and no older than ids."""
        metadata = _metadata(self.directory)
        return None if metadata is None or "id" not in metadata else str(metadata["id"])

    @property
    def hash(self) -> str | None:
        """Of its architecture, if it is a child of ours."""
        metadata = _metadata(self.directory)
        return None if metadata is None else str(metadata["hash"])


def find_subjects(
    models: Sequence[str], parent: str | None, *, device: str, dtype: str, say: Callable[[str], None]
) -> list[Subject]:
    """The parent, if it is known, and then the checkpoints in the order named, all to be loaded in one dtype.

    A run directory stands for its export. The parent is the one named, or else the one that the checkpoints or their
    runs name; if it is not here, `say` tells so. With dtype "auto" it is the checkpoints' own, which must agree.
    Raises ModelError, RunDirectoryError or RecipeError.
    """
    recipes = [_checkpoint(model) for model in models]
    if dtype == "auto":
        dtypes = {recipe.path: stored_dtype(recipe) for recipe in recipes}
        if len({*dtypes.values()}) > 1:
            listed = ", ".join(f"{path} in {found}" for path, found in dtypes.items())
            raise ModelError(f"models side by side must be in one dtype, but there are {listed}; name one with --dtype")
        dtype = dtypes[recipes[0].path]

    def subject(name: str, role: Role, recipe: ModelRecipe) -> Subject:
        recipe = parse_section(ModelRecipe, {**recipe.model_dump(), "dtype": dtype, "device": device})
        place = expanded(recipe.path)
        return Subject(name, role, recipe, identity_of(recipe), place if place.is_dir() else None)

    found: Subject | None = None
    if parent is not None:
        found = subject(parent, "parent", ModelRecipe(path=parent))
    else:
        implied = _implied_parent(recipes, models, say)
        try:
            if implied is not None:
                found = subject(implied.path, "parent", implied)
        except ModelError as error:
            say(f"no comparison with the parent: {error}")
    role: Role = "model" if found is None else "child"
    rest = [subject(name, role, recipe) for name, recipe in zip(models, recipes, strict=True)]
    every = rest if found is None else [found, *rest]
    # Who names a model twice, or the parent among its children, asks for it once.
    return list({one.identity: one for one in reversed(every)}.values())[::-1]


def run_of(directory: Path | None) -> RunDirectory | None:
    """The run that a checkpoint lies in."""
    if directory is None:
        return None
    runs = (RunDirectory(place) for place in directory.resolve().parents)
    return next((run for run in runs if run.recipe.is_file()), None)


def recipe_in(directory: Path | None) -> Recipe | None:
    """The recipe that a checkpoint of ours carries: local files are names in it, without a place."""
    metadata = _metadata(directory)
    if directory is None or metadata is None or "recipe" not in metadata:
        return None
    return parse_recipe(metadata["recipe"], origin=str(directory / METADATA_FILE))


def identity_of(recipe: ModelRecipe) -> str:
    """SHA-256 over a model's files, or its repository and commit on the Hub. Raises ModelError."""
    place, gguf_file = locate(recipe.path)
    if gguf_file:
        files = [Path(place) / gguf_file]
    elif Path(place).is_dir():
        files = [
            file
            for file in sorted(Path(place).iterdir())
            if file.suffix in _SUFFIXES and file.name not in _NOT_OF_THE_MODEL and file.is_file()
        ]
    else:
        return f"{place}@{_commit(recipe)}"
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {sha256_file(file)}\n".encode())
    if recipe.tokenizer is not None:
        digest.update(f"tokenizer {recipe.tokenizer}".encode())
    return digest.hexdigest()


def _checkpoint(model: str) -> ModelRecipe:
    run = RunDirectory(Path(model).expanduser())
    if not run.recipe.is_file():
        locate(model)
        return ModelRecipe(path=model)
    export = _export(run)
    if not (export / "config.json").is_file():
        raise RunDirectoryError(f"{model} has exported no checkpoint yet; run llmprune export {model} first")
    return ModelRecipe(path=str(export))


def _export(run: RunDirectory) -> Path:
    to = run.stored_recipe().export.to
    return Path(to) if to else run.export


def _implied_parent(
    recipes: Sequence[ModelRecipe], models: Sequence[str], say: Callable[[str], None]
) -> ModelRecipe | None:
    known: dict[str, ModelRecipe] = {}
    for model, recipe in zip(models, recipes, strict=True):
        run = RunDirectory(Path(model).expanduser())
        own = run if run.recipe.is_file() else run_of(Path(recipe.path))
        directory = expanded(recipe.path)
        if own is not None and (metadata := _metadata(directory)) is not None:
            # Children of another vocabulary or hidden size were cut from the parent that has it.
            found = own.stored_recipe().model
            if "resized" in metadata and (own.resized / "config.json").is_file():
                found = found.model_copy(update={"path": str(own.resized), "revision": None, "tokenizer": None})
            known[found.path] = found
        elif (carried := recipe_in(directory)) is not None:
            # A checkpoint may be a stranger's: what it names is neither fetched nor trusted.
            if _has_fewer_rows(directory):
                say(f"no comparison with the parent: {model} has another vocabulary than {carried.model.path}")
            elif _is_cached(carried.model):
                known[carried.model.path] = carried.model.model_copy(update={"trust_remote_code": False})
            else:
                say(
                    f"no comparison with the parent: {model} was pruned from {carried.model.path}, which is not a Hub "
                    "model in the cache; name it with --parent"
                )
    if len(known) > 1:
        raise ModelError(f"these models have several parents: {', '.join(known)}; name one with --parent")
    if not known and not any(_metadata(Path(recipe.path)) for recipe in recipes):
        say("no comparison with a parent: none is known; name one with --parent")
    return next(iter(known.values()), None)


def _metadata(directory: Path | None) -> dict[str, object] | None:
    if directory is None or not (directory / METADATA_FILE).is_file():
        return None
    file = directory / METADATA_FILE
    data = read_json(file)
    if not isinstance(data, dict) or "hash" not in data:
        raise ModelError(f"{file} is damaged; export the checkpoint again")
    if problem := newer_schema(data.get("figures")):
        raise ModelError(f"{file} {problem}")
    return data


def _has_fewer_rows(directory: Path) -> bool:
    """Whether a child of ours has another vocabulary than the model it was made of: their tokens do not compare."""
    told = (_metadata(directory) or {}).get("resized")
    if told is None:
        return False
    try:
        resized = Resized.from_json(told)
    except ValueError as error:
        raise ModelError(f"{directory / METADATA_FILE} is damaged ({error}); export the checkpoint again") from None
    return resized.chosen.rows != resized.whole.rows


def _commit(recipe: ModelRecipe, *, fetch: bool = True) -> str:
    """The commit of a Hub model that is, or comes to be, in the cache. Raises ModelError."""
    try:
        file = cached_file(recipe.path, "config.json", revision=recipe.revision, local_files_only=not fetch)
    except (OSError, ValueError) as error:
        cause = " ".join(str(error).split())
        raise ModelError(f"cannot find model {recipe.path}: {cause:.300}") from error
    return Path(str(file)).parent.name


def _is_cached(recipe: ModelRecipe) -> bool:
    # A bare name, and a path, are those of a local file; what lies in this directory by that name may be another.
    if recipe.path.count("/") != 1 or Path(recipe.path).exists():
        return False
    try:
        return bool(_commit(recipe, fetch=False))
    except ModelError:
        return False
