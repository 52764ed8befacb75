"""The records that trials carry."""

from __future__ import annotations

from collections.abc import Iterable

from optuna.trial import FrozenTrial

from llmprune.measure.record import Record

RECORD = "record"
"""Trial's user attribute: what was measured of its child; a trial that repeats another has none."""


def record_of(trial: FrozenTrial, place: str = "the study") -> Record:
    """The record of a trial that has one. Raises RunDirectoryError, naming `place`, if another llmprune wrote it."""
    remedy = "use another --out, since its figures and newer ones do not mix"
    return Record.read(trial.user_attrs[RECORD], f"the record of trial {trial.number} in {place}", remedy)


def check_records(trials: Iterable[FrozenTrial], place: str) -> None:
    """Raises as `record_of` does: found out before the first trial rather than by a sampler behind it."""
    for trial in trials:
        record_of(trial, place)
