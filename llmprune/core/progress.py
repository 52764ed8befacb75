"""How long work tells what it does: a named step with a count, drawn by whoever runs the stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

_NOTE = "step: "

Advance = Callable[[int, int], None]
"""Called with (done, total)."""

Item = TypeVar("Item")

Show = Callable[[str], AbstractContextManager[Advance]]
"""Opens a step by its description."""


SEARCHING = "searching"
"""The step that has more to show than how far it is."""


@contextmanager
def silent(description: str) -> Iterator[Advance]:
    """A step that nobody watches."""
    yield lambda done, total: None


def naming_steps(show: Show) -> Show:
    """Notes on an error that ends a step which step it was: `step_of` reads it."""

    @contextmanager
    def step(description: str) -> Iterator[Advance]:
        with show(description) as advance:
            try:
                yield advance
            except Exception as error:
                error.add_note(_NOTE + description)
                raise

    return step


def step_of(error: BaseException) -> str:
    """The innermost step that an error ended; "" if it was in none."""
    notes = [note for note in getattr(error, "__notes__", []) if note.startswith(_NOTE)]
    return notes[0].removeprefix(_NOTE) if notes else ""


class Steps:
    """One progress over several loops, each of which counts from 0."""

    def __init__(self, total: int, progress: Advance | None) -> None:
        self._finished, self._total, self._progress = 0, total, progress

    def report(self, done: int, _total: int = 0) -> None:
        if self._progress is not None:
            self._progress(self._finished + done, self._total)

    def finish(self, steps: int) -> None:
        self._finished += steps

    def over(self, items: Sequence[Item]) -> Iterator[Item]:
        """Go through some items, each of them a step."""
        for done, item in enumerate(items):
            self.report(done)
            yield item
        self.report(len(items))
        self.finish(len(items))
