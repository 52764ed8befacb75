"""The study's journal file: opened and written so that a killed worker never costs more than its trial in flight."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.storages.journal._file import get_lock_file

from llmprune.core.errors import RunDirectoryError


def open_journal(path: Path) -> JournalStorage:
    """Open or create the journal, after cutting a torn last line off; several processes may have it open.

    Raises RunDirectoryError if a line before the last is damaged.
    """
    try:
        lock = _KernelLock(str(path))
        with get_lock_file(lock):
            cut_torn_line(path)
        return JournalStorage(_Journal(str(path), lock_obj=lock))
    except OSError as error:
        raise RunDirectoryError(f"cannot open the study {path}: {error.strerror or error}") from None


class _Journal(JournalFileBackend):
    """Reads under the lock too: a reader must not see a torn line's head before its repair and the next line's tail
    after it."""

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        with get_lock_file(self._lock):
            logs = list(super().read_logs(log_number_from))
        yield from logs


class _KernelLock(JournalFileOpenLock):
    """Lock of the journal that goes when its holder does, however it ends; who holds it finds whole lines only.

    Optuna's own locks are files: a killed process leaves one that others wait for, and Ctrl-C while one is released
    ends in a FileNotFoundError.
    """

    def __init__(self, journal: str) -> None:
        super().__init__(journal)
        self._journal = journal
        self._descriptor: int | None = None

    def acquire(self) -> bool:
        # Ctrl-C between here and the `try` of Optuna's context manager leaves the lock held, and this process would
        # wait for itself when it gives its trial back. Threads come one at a time: JournalStorage sees to that.
        self.release()
        self._descriptor = os.open(self._journal, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            # A worker killed while it wrote leaves a torn line, and what is appended to one cannot be read. Nobody
            # writes now, so what has no end here is never going to have one.
            _cut_tail(self._descriptor)
        except BaseException:
            self.release()
            raise
        return True

    def release(self) -> None:
        held, self._descriptor = self._descriptor, None
        if held is not None:
            os.close(held)


def _cut_tail(descriptor: int) -> None:
    """Cut off what follows the last line end; one byte is read when there is nothing to do."""
    end = size = os.fstat(descriptor).st_size
    step = 1
    while end > 0:
        start = max(0, end - step)
        found = os.pread(descriptor, end - start, start).rfind(b"\n")
        if found >= 0:
            end = start + found + 1
            break
        end, step = start, 4096
    if end < size:
        os.ftruncate(descriptor, end)


def cut_torn_line(path: Path) -> int:
    """Remove a last line that is no whole log; returns the bytes cut off. The caller holds the journal's lock.

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
