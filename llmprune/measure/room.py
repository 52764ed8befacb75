"""How much memory and disk there is for a run, where a container may have less of them than its machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class Memory:
    """Bytes of a device or machine. `free` is what a process could still have."""

    total_bytes: int
    free_bytes: int
    limited: bool = False
    """Whether a control group gives less than the machine has."""


@dataclass(frozen=True)
class Room:
    """What a run may take: of the device that its models are on, and of the disk of its directory."""

    memory_bytes: int
    memory_of: str
    """"this machine" or "cuda:0"."""
    disk_bytes: int
    disk_of: str

    @classmethod
    def of(cls, device: torch.device, path: Path) -> Room:
        """What is free now, for models on `device` and a run directory at `path`, which need not be there."""
        where = "this machine" if device.type == "cpu" else str(device)
        return cls(device_memory(device).free_bytes, where, free_disk(path), str(path))


def device_memory(device: torch.device) -> Memory:
    """Memory of a device: a GPU's own, else the machine's."""
    if device.type != "cuda":
        return host_memory()
    free, total = torch.cuda.mem_get_info(device)
    return Memory(total, free)


def host_memory(cgroups: Path = CGROUPS, own: Path = OWN_CGROUP) -> Memory:
    """The machine's memory, or what the process's control group (a container, a batch job) leaves of it."""
    machine = psutil.virtual_memory()
    total, free = machine.total, machine.available
    for limit, used in _limits(cgroups, own):
        total, free = min(total, limit), min(free, max(0, limit - used))
    return Memory(total, free, limited=total < machine.total)


def free_disk(path: Path) -> int:
    """Bytes free where a file or directory is, or would be made."""
    return shutil.disk_usage(existing(path)).free


def existing(path: Path) -> Path:
    """A path, or the nearest directory above it that is there."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def processors(cgroups: Path = CGROUPS, own: Path = OWN_CGROUP) -> int:
    """How many processors this process may keep busy: by its affinity, and by the quota of its control groups (of
    version 2), a part of one counted as one."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        count = os.cpu_count() or 1
    for place in _places(cgroups, own):
        quota, _, period = _text(place / "cpu.max").partition(" ")
        if quota.isdigit() and period.isdigit():
            count = min(count, max(1, -(-int(quota) // int(period))))
    return count


def _limits(cgroups: Path, own: Path) -> Iterator[tuple[int, int]]:
    """Limit and use of the process's control groups and of those above them, in bytes: version 2's, and version 1's.

    Pages of files that nobody has open are counted as used, and are given back before the limit is met.
    """
    for place in _places(cgroups, own):
        for limit, used, idle in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            most, now = _text(place / limit), _text(place / used)
            if most.isdigit() and now.isdigit():
                yield int(most), int(now) - min(int(now), _statistic(place / "memory.stat", idle))


def _places(cgroups: Path, own: Path) -> Iterator[Path]:
    """Directories of the process's control groups and of those above them."""
    for root, group in _groups(cgroups, own):
        place = root / group
        yield place
        while place != root:
            place = place.parent
            yield place


def _groups(cgroups: Path, own: Path) -> Iterator[tuple[Path, str]]:
    """Where the files of a hierarchy are, and the process's group in it. In a container the group's name may be the
    host's: then the files of the container are the root's own."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if not controllers:
            yield cgroups, group.lstrip("/")
        elif "memory" in controllers.split(","):
            yield cgroups / "memory", group.lstrip("/")


def _text(file: Path) -> str:
    """A file's line; empty if it is not there."""
    try:
        return file.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _statistic(file: Path, name: str) -> int:
    lines = [line.split() for line in _text(file).splitlines()]
    return next((int(line[1]) for line in lines if line[0] == name), 0)
