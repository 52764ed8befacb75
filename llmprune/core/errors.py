"""The errors a user can cause: each names the rule, the value and the fix. The CLI prints them and exits with 2."""

from __future__ import annotations

import reprlib

MAX_MESSAGE = 2_000
"""Characters of a whole message: what a user gave may be of any size, what is told of it may not."""

MAX_QUOTED = 200
"""Characters of one value that a message repeats."""


class LlmpruneError(ValueError):
    """Base of everything that the user's input can cause; never raised for a fault of ours."""

    def __init__(self, message: str) -> None:
        super().__init__(shortened(message, MAX_MESSAGE))


class RecipeError(LlmpruneError):
    """A recipe, or an override of it, that breaks a rule."""


class ModelError(LlmpruneError):
    """A parent model or checkpoint that cannot be read."""


class UnsupportedModelError(ModelError):
    """A parent that can be read, but not pruned: family, quantisation or layout."""


class VocabularyError(ModelError):
    """A vocabulary that cannot be cut, or not to so few rows."""


class DataError(LlmpruneError):
    """Text that cannot be read, or is too short for the splits asked for."""


class ArchitectureError(LlmpruneError):
    """Choices that do not fit the parent."""


class BudgetError(LlmpruneError):
    """A budget or pick that cannot be parsed, or that no child meets."""


class RunDirectoryError(LlmpruneError):
    """A run directory that is corrupt, in use, or lacks what a stage needs."""


class StorageError(LlmpruneError):
    """A study's storage that cannot be named, reached or joined. Never holds a password."""


class SearchError(LlmpruneError):
    """A search that cannot go on: no child at all can be judged."""


class OutOfMemoryError(LlmpruneError):
    """What a machine or device has no room for, with settings that take less."""


class ExportError(LlmpruneError):
    """A checkpoint that cannot be written, or that failed its proof."""


class PushError(LlmpruneError):
    """A checkpoint that must not, or cannot, be pushed to the Hub. Never holds a token."""


class TaskError(LlmpruneError):
    """An evaluation task that is unknown, or whose data is not at hand."""


def shortened(text: object, limit: int = MAX_QUOTED) -> str:
    """A text in at most `limit` characters: the middle of a longer one is left out, since its end may hold the fix."""
    text = str(text)
    if len(text) <= limit:
        return text
    mark = f" [... {len(text):,} characters ...] "
    head = (limit - len(mark)) * 2 // 3
    return text[:head] + mark + text[len(text) - (limit - len(mark) - head) :]


class _Bounded(reprlib.Repr):
    """A repr that looks at no more of a value than it shows, however deep or wide that is."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict = 4, 6
        self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = 12
        self.maxstring = self.maxlong = self.maxother = MAX_QUOTED

    def repr_int(self, number: int, level: int) -> str:
        # Python refuses to write thousands of digits.
        return super().repr_int(number, level) if number.bit_length() < 10_000 else "an integer of thousands of digits"


_bounded = _Bounded()


def quoted(value: object) -> str:
    """A value of the user's as a message repeats it: its repr, in at most MAX_QUOTED characters."""
    return shortened(_bounded.repr(value))
