"""The study's journal file: opened so that a killed run never costs more than the trial in flight."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import TrialState

from llmprune.errors import RunDirectoryError

WARM_START = "warm_start"
"""User attribute: the label of a trial that was queued as a starting point."""


def open_journal(path: Path) -> JournalStorage:
    """Open or create the journal, after cutting a torn last line off.

    The caller holds the run directory's lock, so no other process writes.
    Raises RunDirectoryError if a line before the last is damaged.
    """
    try:
        if path.exists():
            cut_torn_line(path)
        return JournalStorage(JournalFileBackend(str(path), lock_obj=_KernelLock(str(path))))
    except OSError as error:
        raise RunDirectoryError(f"cannot open the study {path}: {error.strerror or error}") from None


class _KernelLock(JournalFileOpenLock):
    """Lock of the journal that goes when its holder does, however it ends.

    Optuna's own locks are files: a killed process leaves one that others wait for, and Ctrl-C while one is released
    ends in a FileNotFoundError.
    """

    def __init__(self, journal: str) -> None:
        super().__init__(journal)
        self._journal = journal

    def acquire(self) -> bool:
        self._descriptor = os.open(self._journal, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        os.close(self._descriptor)


def cut_torn_line(path: Path) -> int:
    """Remove what a killed process wrote of its last line; returns the bytes cut off.

    Optuna cannot read a journal once something is appended to a torn line.
    Raises RunDirectoryError if the damage is not at the end: cutting there would lose finished trials.
    """
    whole = 0
    with path.open("r+b") as file:
        size = path.stat().st_size
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n") or not _is_log(line):
                if whole + len(line) < size:
                    raise RunDirectoryError(
                        f"{path} is damaged at line {number}, before its end; restore it from a backup, or move it "
                        "away to start the search again"
                    )
                break
            whole += len(line)
        if whole < size:
            file.truncate(whole)
    return size - whole


def _is_log(line: bytes) -> bool:
    try:
        log = json.loads(line)
    except ValueError:
        return False
    return isinstance(log, dict) and {"op_code", "worker_id"} <= log.keys()


def reap_dead_trials(study: optuna.Study) -> int:
    """Fail the trials that a killed process left running, and queue their parameters again; returns how many.

    The caller holds the run directory's lock, so a running trial has no process.
    """
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    for trial in running:
        study.tell(trial.number, state=TrialState.FAIL)
        # A queued trial has parameters that it had not asked for yet when its process went.
        if params := {**trial.system_attrs.get("fixed_params", {}), **trial.params}:
            label = {key: value for key, value in trial.user_attrs.items() if key == WARM_START}
            study.enqueue_trial(params, user_attrs=label)
    return len(running)
