"""Whether a forecast fits a machine; and where it does not, the settings that would make it fit, found by forecasting
with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from llmprune.forecast.plan import StageCost
from llmprune.measure.room import Room

Stages = Sequence[StageCost]
Changed = Callable[[Sequence[str]], Stages | None]
"""The stages of a run with some settings changed; None if it cannot have them."""


@dataclass(frozen=True)
class Lack:
    """A stage for which there is too little."""

    stage: str
    what: Literal["memory", "disk"]
    needed_bytes: int
    """Of memory by this stage, of disk by this and those before it."""
    free_bytes: int
    setting: str | None = None
    """One that, by itself, makes the stage fit."""


@dataclass(frozen=True)
class Fit:
    """What a forecast needs beside what there is."""

    room: Room
    peak_memory_bytes: int
    disk_bytes: int
    lacks: tuple[Lack, ...]
    settings: tuple[str, ...]
    """Those that make all of it fit; where nothing does, those that come nearest."""
    stages: Stages
    """With these settings."""

    @property
    def fits(self) -> bool:
        """As it is."""
        return not self.lacks

    @property
    def can_fit(self) -> bool:
        """With its settings."""
        return not lacks_of(self.stages, self.room)

    def to_json(self) -> dict[str, Any]:
        return {
            "fits": self.fits,
            "peak_memory_bytes": self.peak_memory_bytes,
            "disk_bytes": self.disk_bytes,
            "room": asdict(self.room),
            "lacks": [asdict(lack) for lack in self.lacks],
            "parent_waits": [stage.stage for stage in self.stages if stage.parent_waits],
            "settings": list(self.settings),
            "fits_with_settings": self.can_fit,
            "peak_memory_bytes_with_settings": peak_memory_bytes(self.stages),
        }


def peak_memory_bytes(stages: Stages) -> int:
    """Of the stage that needs most."""
    return max((stage.peak_memory_bytes for stage in stages), default=0)


def fit_of(room: Room, settings: Sequence[str], changed: Changed) -> Fit:
    """Hold the stages that `changed` gives to the room; of `settings`, those that come first are tried first.

    `changed([])` are the stages as they are, and never None.
    """
    stages = changed([])
    assert stages is not None, "a run can have its own settings"
    lacks = tuple(_with_setting(lack, room, settings, changed) for lack in lacks_of(stages, room))
    taken, better = _enough(room, settings, changed)
    return Fit(room, peak_memory_bytes(stages), sum(s.disk_bytes for s in stages), lacks, tuple(taken), better)


def lacks_of(stages: Stages, room: Room) -> list[Lack]:
    """The stages that do not fit, in order."""
    found: list[Lack] = []
    written = 0
    for stage in stages:
        written += stage.disk_bytes
        if stage.peak_memory_bytes > room.memory_bytes:
            found.append(Lack(stage.stage, "memory", stage.peak_memory_bytes, room.memory_bytes))
        if stage.disk_bytes and written > room.disk_bytes:
            found.append(Lack(stage.stage, "disk", written, room.disk_bytes))
    return found


def _with_setting(lack: Lack, room: Room, settings: Sequence[str], changed: Changed) -> Lack:
    for setting in settings:
        stages = changed([setting])
        if stages is not None and all(
            (one.stage, one.what) != (lack.stage, lack.what) for one in lacks_of(stages, room)
        ):
            return replace(lack, setting=setting)
    return lack


def _enough(room: Room, settings: Sequence[str], changed: Changed) -> tuple[list[str], Stages]:
    """Settings that help, each on top of those before it, until everything fits, and the stages that come of them; of
    those that were enough, none that can be left out."""
    taken: list[str] = []
    stages = changed([])
    assert stages is not None
    for setting in settings:
        if not lacks_of(stages, room):
            break
        with_it = [*(one for one in taken if _key(one) != _key(setting)), setting]
        found = changed(with_it)
        if found is not None and _short(found, room) < _short(stages, room):
            taken, stages = with_it, found
    if lacks_of(stages, room):
        return taken, stages
    for setting in list(taken):
        without = [one for one in taken if one != setting]
        found = changed(without)
        if found is not None and not lacks_of(found, room):
            taken, stages = without, found
    return taken, stages


def _short(stages: Stages, room: Room) -> int:
    """Bytes that are lacking, of all stages together."""
    return sum(lack.needed_bytes - lack.free_bytes for lack in lacks_of(stages, room))


def _key(setting: str) -> str:
    return setting.partition("=")[0]
