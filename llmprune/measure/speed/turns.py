"""Turns of the processes of one host: many may score at a time, one may time, and not while others score.

A speed that is measured beside another process's work is not the model's. The locks are the kernel's (`flock`), on
files in the system's temporary directory (or in $LLMPRUNE_TURNS), one pair for each device, whatever number a process
knows it by: a process that ends lets go, however it ends. Processes meet only where they see the same directory, so
containers have to share it.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import torch

from llmprune.core.errors import RunDirectoryError

DIRECTORY = "LLMPRUNE_TURNS"
"""Environment variable: where the lock files are, if not in the system's temporary directory."""

SHARED_BY = "LLMPRUNE_SHARED_BY"
"""Environment variable: how many processes score on the CPU together; each does it with its share of torch's threads,
and times with all of them."""


@contextmanager
def scoring(device: str) -> Iterator[None]:
    """Work on a device such as "cpu" or "cuda:1" beside others that do the same, never beside one that times."""
    with _turn(device, fcntl.LOCK_SH), _share_of_threads(device):
        yield


def timing(device: str) -> AbstractContextManager[None]:
    """Have this device to oneself. Not inside `scoring`: two that wait for each other never end."""
    return _turn(device, fcntl.LOCK_EX)


@contextmanager
def _share_of_threads(device: str) -> Iterator[None]:
    threads, processes = torch.get_num_threads(), int(os.environ.get(SHARED_BY, "1"))
    if device != "cpu" or processes == 1:
        yield
        return
    torch.set_num_threads(max(1, threads // processes))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _turn(device: str, mode: int) -> Iterator[None]:
    """Who waits for the room holds the gate, so that those who score cannot pass one who waits to time for ever."""
    name = _name_of(device)
    room = _open(name, "room")
    try:
        gate = _open(name, "gate")
        try:
            fcntl.flock(gate, fcntl.LOCK_EX)
            fcntl.flock(room, mode)
        finally:
            os.close(gate)
        yield
    finally:
        os.close(room)


def _name_of(device: str) -> str:
    """What every process calls a device: CUDA_VISIBLE_DEVICES gives a GPU another number, but no other UUID."""
    if device.startswith("cuda") and torch.cuda.is_available():
        return f"cuda-{torch.cuda.get_device_properties(device).uuid}"
    return device.replace(":", "-")


def _open(name: str, part: str) -> int:
    """A descriptor of a lock file that every user of the host can lock: that needs to read it, no more."""
    path = Path(os.environ.get(DIRECTORY) or tempfile.gettempdir()) / f"llmprune-{name}.{part}"
    try:
        # Linux refuses O_CREAT on another user's file in a sticky directory, so who finds the file only opens it.
        with suppress(FileNotFoundError):
            return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        # Whatever the umask took away.
        os.fchmod(descriptor, 0o644)
        return descriptor
    except OSError as error:
        raise RunDirectoryError(
            f"workers of one host take turns through {path}, which cannot be opened: {error.strerror}; "
            f"remove it, or set {DIRECTORY} to a directory that all of them share"
        ) from None
