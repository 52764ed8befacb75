"""Which study of a storage is this run's: made by `search`, joined by workers, one for each kind of hardware."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import optuna
from optuna.storages import BaseStorage

from llmprune.core.errors import StorageError
from llmprune.search.workers.claims import known_trials

RUN, HASHES, HARDWARE = "run", "hashes", "hardware"
"""User attributes of a study: the run whatever the hardware, the hash of each input by name, the fingerprint."""

TRIALS = "trials"
"""User attribute of a study: how many architectures its workers finish together."""

READY = "warm_starts_queued"
"""User attribute of a study that `search` has set up, so that workers may join."""

_FIXES = {
    "parent": "give the worker the same model files (model.path)",
    "calibration tokens": "copy tokens.safetensors from the run directory of llmprune search",
    "search tokens": "copy tokens.safetensors from the run directory of llmprune search",
    "library": "copy library/ from the run directory of llmprune search",
}
_COPY_RECIPE = "copy recipe.yaml from the run directory of llmprune search"


class StudyFacts(NamedTuple):
    """What all trials of a study have in common."""

    name: str
    run: str
    hashes: Mapping[str, str]
    hardware: Mapping[str, str | int]

    def write(self, study: optuna.Study, trials: int) -> None:
        """Write these, and the trial budget, into the study's attributes."""
        wanted = {RUN: self.run, HASHES: dict(self.hashes), HARDWARE: dict(self.hardware)}
        set_attributes(study, {**wanted, TRIALS: trials})


class Candidate(NamedTuple):
    """A study of a run as its storage knows it."""

    name: str
    hashes: Mapping[str, str]
    hardware: Mapping[str, str | int]
    finished_trials: int


def set_attributes(study: optuna.Study, wanted: Mapping[str, Any]) -> None:
    """Set user attributes of a study, those that differ: each write is a line in a journal."""
    stored = study.user_attrs
    for key, value in wanted.items():
        if stored.get(key) != value:
            study.set_user_attr(key, value)


def studies_of_run(storage: BaseStorage, run: str) -> list[Candidate]:
    """The studies of one run that are ready for workers, each on hardware of its own."""
    return [
        Candidate(
            study.study_name,
            study.user_attrs[HASHES],
            study.user_attrs[HARDWARE],
            len(known_trials(storage.get_all_trials(study._study_id, deepcopy=False))),
        )
        for study in storage.get_all_studies()
        if study.user_attrs.get(RUN) == run and study.user_attrs.get(READY)
    ]


def on_this_hardware(found: Sequence[Candidate], hardware: Mapping[str, str | int], place: str) -> Candidate:
    """The study that a worker on `hardware` may join. Raises StorageError if there is none."""
    for candidate in found:
        if candidate.hardware == hardware:
            return candidate
    there = found[0].hardware
    differing = [
        f"{key} {there.get(key)!r} there, {hardware.get(key)!r} here"
        for key in {**there, **hardware}
        if there.get(key) != hardware.get(key)
    ]
    raise StorageError(
        f"the study in {place} was measured on other hardware ({'; '.join(differing)}), and speeds of two kinds do not "
        "compare; work on hardware like that, or copy the run directory and start a study here with llmprune search"
    )


def check_inputs(candidate: Candidate, inputs: Iterable[tuple[str, str]]) -> None:
    """Compare a worker's own inputs, (name, hash) in the order in which they cost time, with the study's.

    Raises StorageError, naming the first that differs and what to do.
    """
    for name, own in inputs:
        known = candidate.hashes.get(name)
        if known != own:
            raise StorageError(
                f"the {name} of a worker must be the study's, got {own[:12]} for {str(known)[:12]}; "
                f"{_FIXES.get(name, _COPY_RECIPE)}"
            )


def elsewhere(found: Sequence[Candidate], hardware: Mapping[str, str | int]) -> int:
    """How many finished trials of a run come from other hardware."""
    return sum(candidate.finished_trials for candidate in found if candidate.hardware != hardware)
