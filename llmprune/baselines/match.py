"""Children at one measured speed: measure until one is there, or two lie on both sides, and interpolate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from llmprune.baselines.given import Aim
from llmprune.choices.architecture import Architecture
from llmprune.measure.record import QUOTED, Record

RULE = 2
"""Of how methods are chosen and settled on: what was settled under another one does not compare."""
AT = 0.01
"""How near a measured speed-up counts as the one asked for."""
CLOSE = 0.05
"""Two children that bracket the target no wider than this are not closed in on further."""
REFINEMENTS = 4
STEP = 1.01


@dataclass(frozen=True)
class Settled:
    """What a method loses at a measured speed-up: one child there, or two about it, the slower first."""

    nats_lost: float
    children: tuple[Record, ...]
    shares: tuple[float, ...] = (1.0,)
    """Of each child in an interpolated figure."""

    def quoted(self) -> dict[str, dict[str, float | None]]:
        """Nats lost on each split that is quoted of the children, by its name, interpolated in the same shares; None
        where they are infinite."""
        return {
            name: {"nats_lost": self._mixed([child.quoted[name].nats_lost for child in self.children])}
            for name in QUOTED
            if all(name in child.quoted for child in self.children)
        }

    def _mixed(self, losses: Sequence[float]) -> float | None:
        if not all(map(math.isfinite, losses)):
            return None
        return sum(share * lost for share, lost in zip(self.shares, losses, strict=True))

    @property
    def is_interpolated(self) -> bool:
        return len(self.children) > 1


def settle(records: Iterable[Record], parent_nats: float, speed: str, target: float) -> Settled | None:
    """Nats lost at exactly `target`: those of the nearest child if its speed-up is within 1%, else linear in the
    logarithm of the speed-up between the nearest child on each side; those of a faster child if it loses less still.
    None if no child is as fast."""
    by_speed = sorted(records, key=lambda record: record.value(speed))
    found = _at(by_speed, parent_nats, speed, target)
    faster = (record for record in by_speed if record.value(speed) >= target)
    best = min(faster, key=lambda record: record.nats_per_token, default=None)
    if found is None or best is None or best.nats_per_token - parent_nats >= found.nats_lost:
        return found
    return Settled(best.nats_per_token - parent_nats, (best,))


def _at(by_speed: Sequence[Record], parent_nats: float, speed: str, target: float) -> Settled | None:
    """The same of the children next to the target alone."""
    nearest = min(by_speed, key=lambda record: _gap(record.value(speed), target), default=None)
    if nearest is None:
        return None
    if _gap(nearest.value(speed), target) <= AT:
        return Settled(nearest.nats_per_token - parent_nats, (nearest,))
    slower = [record for record in by_speed if record.value(speed) < target]
    faster = [record for record in by_speed if record.value(speed) > target]
    if not slower or not faster:
        return None
    low, high = slower[-1], faster[0]
    share = math.log(target / low.value(speed)) / math.log(high.value(speed) / low.value(speed))
    nats = (1.0 - share) * low.nats_per_token + share * high.nats_per_token
    return Settled(nats - parent_nats, (low, high), (1.0 - share, share))


def close_in(
    aim: Aim,
    estimate: Callable[[Architecture], float],
    measure: Callable[[Architecture], float],
    target: float,
    measured: dict[Architecture, float],
) -> None:
    """Measure children, into `measured`, until `settle` has what it needs or the method offers nothing new.

    `measured` holds the parent, with a speed-up of 1, and whatever was measured before. The first aim is at the target;
    the next are corrected by how far the measured speed-ups are from the estimated ones.
    """
    refinements = 0
    for attempt in range(1000):
        low, high = _bracket(measured, target)
        if any(_gap(speed, target) <= AT for speed in measured.values()):
            return
        if high is None:
            # From the second aim on a little further, since it is a child on the other side that is missing.
            overshoot = STEP ** (2 * attempt - 1) if attempt else 1.0
            aims = _upwards(aim, estimate(low), estimate(low) * target / measured[low] * overshoot)
        elif refinements < REFINEMENTS and measured[high] > measured[low] * (1 + CLOSE):
            refinements += 1
            aims = _between(aim, estimate(low), estimate(high), _share(measured, low, high, target))
        else:
            return
        found = next((architecture for architecture in aims if architecture not in measured), None)
        if found is None:
            return
        measured[found] = measure(found)


def _gap(speed: float, target: float) -> float:
    return abs(speed / target - 1.0)


def _bracket(measured: Mapping[Architecture, float], target: float) -> tuple[Architecture, Architecture | None]:
    """The fastest that is slower than the target, and the slowest that is faster, if any."""
    slower = [architecture for architecture, speed in measured.items() if speed <= target]
    faster = [architecture for architecture, speed in measured.items() if speed > target]
    low = max(slower, key=lambda architecture: measured[architecture])
    return low, min(faster, key=lambda architecture: measured[architecture], default=None)


def _share(measured: Mapping[Architecture, float], low: Architecture, high: Architecture, target: float) -> float:
    return math.log(target / measured[low]) / math.log(measured[high] / measured[low])


def _upwards(aim: Aim, floor: float, wanted: float) -> Iterator[Architecture]:
    """What a method offers at an estimated speed-up, and beyond it in growing steps; where it has nothing, half-way
    back to `floor`, again and again."""
    offers: Sequence[float] = [wanted * STEP ** (2**step - 1) for step in range(10)]
    for speedup in offers:
        architecture = aim(speedup)
        if architecture is None:
            break
        yield architecture
    else:
        return
    for _ in range(4):
        wanted = math.sqrt(wanted * floor)
        architecture = aim(wanted)
        if architecture is not None:
            yield architecture


def _between(aim: Aim, low: float, high: float, share: float) -> Iterator[Architecture]:
    """What a method offers between two estimated speed-ups: at a share of the way (on a log scale), then around it."""
    if low >= high:
        return
    middle = low * (high / low) ** share
    for step in range(int(math.log(high / low) / math.log(STEP)) + 1):
        for speedup in dict.fromkeys((middle * STEP**step, middle / STEP**step)):
            architecture = aim(speedup) if low < speedup < high else None
            if architecture is not None:
                yield architecture
