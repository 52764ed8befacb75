"""Sizes that a ladder climbs by."""

from __future__ import annotations

from llmprune.core.errors import ArchitectureError


def rungs(name: str, step: int, full: int, *, drop: bool) -> list[int]:
    """Multiples of a step up to the parent's size, that size, and 0 if `drop`, ascending.

    Raises ArchitectureError, with the recipe's name of the step, unless it is from 1 to the parent's size.
    """
    if not 1 <= step <= full:
        raise ArchitectureError(f"{name} must be from 1 to the parent's {full}; got {step}")
    return sorted({*range(0 if drop else step, full, step), full})
