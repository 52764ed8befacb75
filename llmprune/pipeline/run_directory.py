"""A run directory: all that a run knows, each file whole or absent, one process at a time."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmprune.core.errors import RecipeError, RunDirectoryError
from llmprune.core.files import atomic_path, read_json, write_json
from llmprune.core.recipe import Recipe
from llmprune.core.recipe_text import load_recipe, to_yaml
from llmprune.measure.record import Front

# Changing one of these in mid-run would mix figures that do not compare; but for the keys that are `free`.
FIXED_SECTIONS = ("model", "data", "workload", "importance", "tables", "space", "vocabulary", "deploy")


@dataclass(frozen=True)
class RunDirectory:
    """The files of one run, by name."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def provenance(self) -> Path:
        return self.path / "provenance.json"

    @property
    def tokens(self) -> Path:
        return self.path / "tokens.safetensors"

    @property
    def resized(self) -> Path:
        """The parent with fewer rows, where its vocabulary was cut, and `resized.json` beside it."""
        return self.path / "resized"

    @property
    def resized_facts(self) -> Path:
        return self.path / "resized.json"

    @property
    def library(self) -> Path:
        return self.path / "library"

    @property
    def reach(self) -> Path:
        return self.path / "reach.json"

    @property
    def verify(self) -> Path:
        """What the parent's passes over several tokens take, for drafts."""
        return self.path / "verify.json"

    @property
    def own_text(self) -> Path:
        """What the parent has written so far, until all of it is in the tokens."""
        return self.path / "own-text"

    @property
    def tables(self) -> Path:
        return self.path / "tables.json"

    @property
    def seeds(self) -> Path:
        return self.path / "seeds.json"

    @property
    def scores(self) -> Path:
        return self.path / "scores"

    @property
    def journal(self) -> Path:
        return self.path / "study.journal"

    @property
    def front(self) -> Path:
        return self.path / "front.json"

    @property
    def baselines(self) -> Path:
        return self.path / "baselines.json"

    @property
    def baseline_scores(self) -> Path:
        return self.path / "baseline-scores.json"

    def library_of(self, importance: str) -> Path:
        """A baseline's own library."""
        return self.path / f"library-{importance}"

    def repair_of(self, child: str, what: str) -> Path:
        """What was done to a one-shot child since it was cut."""
        return self.path / "repairs" / f"{child}-{what}.safetensors"

    @property
    def teacher(self) -> Path:
        """What was stored of the parent's logits, while children learn from them."""
        return self.path / "teacher"

    @property
    def children(self) -> Path:
        return self.path / "children"

    @property
    def exits(self) -> Path:
        return self.path / "exits.json"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def draft(self) -> Path:
        return self.path / "draft"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def evaluations(self) -> Path:
        return self.path / "evaluations"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process; the kernel lets go when the process ends, however it ends.

        Raises RunDirectoryError if another process holds it, or the directory holds something else or cannot be made.
        """
        self._refuse_what_is_no_run()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise RunDirectoryError(f"cannot use {self.path} as a run directory: {error.strerror}") from None
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RunDirectoryError(
                    f"{self.path} is in use by another llmprune process; wait for it, or use another directory"
                ) from None
            yield
        finally:
            os.close(descriptor)

    def stored_recipe(self) -> Recipe:
        """The recipe that the run was made with. Raises RunDirectoryError if there is none."""
        if not self.recipe.is_file():
            raise RunDirectoryError(f"{self.path} is not a run directory (no recipe.yaml); start with llmprune search")
        try:
            return load_recipe(self.recipe)
        except RecipeError as error:
            raise RunDirectoryError(f"the run's recipe is damaged: {error}") from None

    def adopt(self, recipe: Recipe) -> None:
        """Store the recipe. Raises as `check_recipe` does."""
        self.check_recipe(recipe)
        if (adopted := self.provenance_to_adopt()) != self.read_provenance():
            write_json(self.provenance, adopted)
        with atomic_path(self.recipe) as temporary:
            temporary.write_text(to_yaml(recipe), encoding="utf-8")

    def check_recipe(self, recipe: Recipe) -> None:
        """Check that a recipe may start a run here, or continue the one that is here; nothing is written.

        Raises RunDirectoryError if a section differs on which stored figures depend, or if the directory holds
        something that is not a run. A run that failed before it made anything may go on with any recipe.
        """
        if self.recipe.is_file():
            stored = self.stored_recipe()
            for section in () if self.has_made_nothing() else FIXED_SECTIONS:
                old, new = (getattr(r, section).decisive() for r in (stored, recipe))
                changed = [f"{section}.{key}" for key in new if old[key] != new[key]]
                if changed:
                    raise RunDirectoryError(
                        f"{self.path} was made with another {', '.join(changed)}; its figures would not compare: "
                        "use another --out, or leave these as they were"
                    )
        self._refuse_what_is_no_run()

    def has_made_nothing(self) -> bool:
        """Whether all that is here was made in the first minutes, and is made again where its inputs changed: what a
        run leaves that failed while it loaded its model or cut its text."""
        if not self.path.is_dir():
            return True
        if any(not self._is_of_the_first_minutes(entry) for entry in self.path.iterdir()):
            return False
        # The trials of a study in a database leave no file here.
        return "study" not in _read_provenance(self.provenance)

    def _is_of_the_first_minutes(self, entry: Path) -> bool:
        if entry.is_symlink():
            return False
        if entry.is_dir():
            return not any(entry.iterdir())
        if entry == self.journal:
            return entry.stat().st_size == 0
        early = (self.recipe, self.provenance, self.tokens, self.reach, self.verify, self.path / ".lock")
        return entry in early or entry.suffix == ".tmp"

    def provenance_to_adopt(self) -> dict[str, Any]:
        """What a run that goes on here with its recipe's model knows of itself: where nothing was made, no figure is of
        the parent that was noted, nor of the dtype that was settled for it, and another may come."""
        provenance = _read_provenance(self.provenance)
        if self.has_made_nothing():
            provenance.pop("parent", None)
        return provenance

    def _refuse_what_is_no_run(self) -> None:
        if not self.path.is_dir() or self.recipe.is_file():
            return
        # A run that was killed before it had a recipe leaves these two.
        others = [entry for entry in self.path.iterdir() if entry.name != ".lock" and entry.suffix != ".tmp"]
        if others:
            raise RunDirectoryError(f"{self.path} exists and is not a run directory; use an empty or a new one")

    def is_done(self, stage: str, input_hash: str, *files: Path) -> bool:
        """Whether a stage's files were made from inputs with this hash."""
        return all(file.exists() for file in files) and self.read_provenance()["stages"].get(stage) == input_hash

    def mark_done(self, stage: str, input_hash: str) -> None:
        provenance = self.read_provenance()
        provenance["stages"][stage] = input_hash
        write_json(self.provenance, provenance)

    def write_front(self, front: Front) -> None:
        write_json(self.front, front.stored())

    def read_provenance(self) -> dict[str, Any]:
        return _read_provenance(self.provenance)

    def note(self, **facts: Any) -> None:
        """Add facts to the run's provenance."""
        write_json(self.provenance, {**self.read_provenance(), **facts})


def _read_provenance(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {"stages": {}}
    provenance = read_json(path)
    if not isinstance(provenance, dict) or "stages" not in provenance or not _all_mappings(provenance):
        raise RunDirectoryError(f"{path} is damaged; delete it, and the stages check their files again")
    return provenance


def _all_mappings(provenance: dict[str, Any]) -> bool:
    return all(isinstance(facts, dict) for facts in provenance.values())


def hash_of(*inputs: Any) -> str:
    """SHA-256, as hex, over the JSON of what a stage depends on."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def read_front(directory: RunDirectory) -> Front:
    """The front that is stored. Raises RunDirectoryError if there is none, it is damaged, or another llmprune's."""
    if not directory.front.is_file():
        raise RunDirectoryError(f"{directory.path} has no front yet; run llmprune front first")
    remedy = "delete it and run llmprune front again"
    front = Front.read(read_json(directory.front), directory.front, remedy)
    if any(record.test is None or record.usable is None for record in front.every):
        raise RunDirectoryError(f"{directory.front} is damaged: every record has test and usable; {remedy}")
    return front
