"""How long work tells what it does: a named step with a count, drawn by whoever runs the stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Advance = Callable[[int, int], None]
"""Called with (done, total)."""

Show = Callable[[str], AbstractContextManager[Advance]]
"""Opens a step by its description."""


@contextmanager
def silent(description: str) -> Iterator[Advance]:
    """A step that nobody watches."""
    yield lambda done, total: None
