"""The study's journal file: opened so that a killed run never costs more than the trial in flight."""

from __future__ import annotations

import json
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from llmprune.errors import RunDirectoryError


def open_journal(path: Path) -> JournalStorage:
    """Open or create the journal, after cutting a torn last line off.

    The caller holds the run directory's lock, so no other process writes: a journal lock that is still there was
    left by a killed process. Raises RunDirectoryError if a line before the last is damaged.
    """
    lock = path.with_name(path.name + ".lock")
    lock.unlink(missing_ok=True)
    try:
        if path.exists():
            cut_torn_line(path)
        return JournalStorage(JournalFileBackend(str(path)))
    except OSError as error:
        raise RunDirectoryError(f"cannot open the study {path}: {error.strerror or error}") from None


def cut_torn_line(path: Path) -> int:
    """Remove what a killed process wrote of its last line; returns the bytes cut off.

    Optuna cannot read a journal once something is appended to a torn line.
    Raises RunDirectoryError if the damage is not at the end: cutting there would lose finished trials.
    """
    whole = 0
    with path.open("r+b") as file:
        size = path.stat().st_size
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n") or not _is_json(line):
                if whole + len(line) < size:
                    raise RunDirectoryError(
                        f"{path} is damaged at line {number}, before its end; restore it from a backup, or move it "
                        "away to start the search again"
                    )
                break
            whole += len(line)
        file.truncate(whole)
    return size - whole


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def reap_dead_trials(study: optuna.Study) -> int:
    """Fail the trials that a killed process left running, and queue their parameters again; returns how many.

    The caller holds the run directory's lock, so a running trial has no process.
    """
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    for trial in running:
        study.tell(trial.number, state=TrialState.FAIL)
        if trial.params:
            study.enqueue_trial(dict(trial.params))
    return len(running)
