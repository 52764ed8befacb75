"""One run: the directory it lives in, the recipe it follows, and how it speaks to whoever started it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llmprune.core.budgets import parse_budget, parse_pick
from llmprune.core.progress import Show, silent
from llmprune.core.recipe import Recipe
from llmprune.pipeline.run_directory import RunDirectory
from llmprune.search.workers.storage import masked


@dataclass
class Run:
    """What every stage is given. The caller holds `directory.locked()`, unless the run is `joined`: then it only reads
    the directory."""

    directory: RunDirectory
    recipe: Recipe
    show: Show = silent
    storage: str | None = None
    """URL of the study's storage; None is the run's journal file. May hold a password."""
    workers: tuple[str, ...] = ()
    """Devices of the further processes that search together with this one."""
    joined: bool = False
    say: Callable[[str], None] = lambda line: None
    """Tells the user one line beside the steps that `show` draws."""

    @classmethod
    def start(cls, path: Path, recipe: Recipe, show: Show = silent) -> Run:
        """Begin a run, or continue the one that is there. Every rule that can be checked early is checked here."""
        parse_pick(recipe.export.pick)
        for budget in recipe.search.budgets:
            parse_budget(budget)
        directory = RunDirectory(path)
        directory.adopt(recipe)
        return cls(directory, recipe, show)

    @classmethod
    def open(cls, path: Path, show: Show = silent) -> Run:
        """Continue the run that is there, with its own recipe."""
        directory = RunDirectory(path)
        return cls(directory, directory.stored_recipe(), show)

    @classmethod
    def join(cls, path: Path, show: Show = silent, *, storage: str | None = None) -> Run:
        """Take part, as a worker, in the search of the run that is there or is copied from where it was started."""
        directory = RunDirectory(path)
        return cls(directory, directory.stored_recipe(), show, storage, joined=True)

    @property
    def speed(self) -> str:
        """The figure that is the search's second objective."""
        return self.recipe.search.axes.speed

    @property
    def place(self) -> str:
        """The storage, as may be shown and written down."""
        return self.directory.journal.name if self.storage is None else masked(self.storage)

    @property
    def place_of_run(self) -> str:
        """The storage and whose it is."""
        return f"{self.place} of {self.directory.path}"
