"""Sizes that a ladder climbs by."""

from __future__ import annotations

from llmprune.core.errors import ArchitectureError

_EVEN = 64
"""Channels that kernels and blocks of stored types like a width to be a multiple of."""


def rungs(name: str, step: int | float, full: int, *, drop: bool) -> list[int]:
    """Multiples of a step up to the parent's size, that size, and 0 if `drop`, ascending; a step below 1 is a share of
    the parent's size.

    Raises ArchitectureError, with the recipe's name of the step, unless it is from 1 to the parent's size.
    """
    count = step if isinstance(step, int) else step_of(step, full)
    if not 1 <= count <= full:
        raise ArchitectureError(f"{name} must be from 1 to the parent's {full}; got {step}")
    return sorted({*range(0 if drop else count, full, count), full})


def step_of(share: float, full: int) -> int:
    """The step that is a share of a size: one at the least, and even where it is large."""
    exact = share * full
    return max(1, round(exact)) if exact < _EVEN else round(exact / _EVEN) * _EVEN
