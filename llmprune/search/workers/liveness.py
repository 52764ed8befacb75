"""Who works on a trial, and whether that process is still there."""

from __future__ import annotations

import hashlib
import os
import platform
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.storages._heartbeat import BaseHeartbeat, is_heartbeat_enabled

from llmprune.search.workers.storage import HEARTBEAT_SECONDS, UNREACHABLE

BEAT = "beat"
"""Trial's user attribute: counts up while its worker lives, on storages for which Optuna has no heartbeat."""

# Start times are read from the kernel's clock ticks; the same process may read them a little apart.
_START_TOLERANCE_S = 2.0

Worker = dict[str, Any]
"""host and pid_space (hashes), pid, started (seconds since the epoch), session: one process of one host, for good,
and one search in it."""


class Life(Enum):
    """What one process can tell of another from here."""

    ALIVE = "alive"
    GONE = "gone"
    UNKNOWN = "unknown"


# Sessions of this process that are at work.
_sessions: set[str] = set()


@contextmanager
def at_work() -> Iterator[Worker]:
    """This process as a worker, for as long as the body runs. Nothing in it names the machine or its user."""
    pid, session = os.getpid(), secrets.token_hex(4)
    _sessions.add(session)
    try:
        yield {**_place(), "pid": pid, "started": psutil.Process(pid).create_time(), "session": session}
    finally:
        _sessions.discard(session)


def life_of(worker: Worker) -> Life:
    """Whether a worker's process is there: known on its own host only, and among processes that see each other."""
    here = _place()
    if any(worker[key] != here[key] for key in here):
        return Life.UNKNOWN
    if worker["pid"] == os.getpid():
        return Life.ALIVE if worker["session"] in _sessions else Life.GONE
    try:
        process = psutil.Process(worker["pid"])
        same = abs(process.create_time() - worker["started"]) < _START_TOLERANCE_S
        # A killed process whose parent has not asked for its end is no worker any more.
        return Life.ALIVE if same and process.status() != psutil.STATUS_ZOMBIE else Life.GONE
    except psutil.NoSuchProcess:
        return Life.GONE


@cache
def _place() -> dict[str, str]:
    """A host and the PID namespace: a container has one of its own, and sees no process of another."""
    try:
        machine = Path("/etc/machine-id").read_text(encoding="ascii").strip()
    except OSError:
        machine = ""
    try:
        pid_space = str(Path("/proc/self/ns/pid").readlink())
    except OSError:  # not Linux
        pid_space = ""
    return {"host": _hash(f"{platform.node()} {machine}"), "pid_space": _hash(pid_space)}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class Pulse:
    """Tells the storage, while its body runs, that the worker of a trial lives.

    A database has Optuna's heartbeat. A journal has none, and Optuna's gRPC proxy none even before a database: there
    an attribute of the trial counts up.
    """

    def __init__(self, storage: BaseStorage, trial_id: int) -> None:
        self._storage, self._trial_id = storage, trial_id
        self._beats = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def beat(self) -> None:
        """One sign of life. Raises UpdateFinishedTrialError once the trial was taken from this worker."""
        if is_heartbeat_enabled(self._storage):
            assert isinstance(self._storage, BaseHeartbeat)
            self._storage.record_heartbeat(self._trial_id)
        else:
            self._beats += 1
            self._storage.set_trial_user_attr(self._trial_id, BEAT, self._beats)

    def _run(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            try:
                self.beat()
            except UpdateFinishedTrialError:
                return  # The worker finds out when it tells its result.
            except UNREACHABLE:
                continue  # A storage that is away for a moment; if it stays away, telling the result fails.
