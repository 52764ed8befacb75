"""Uniform width: one number of KV groups and one FFN width for all layers (Minitron, arXiv 2407.14679, without the
training). Which units stay, and whether the rest is re-solved, is the library's affair."""

from __future__ import annotations

from llmprune.baselines.given import Given
from llmprune.choices.architecture import Architecture
from llmprune.search.warm_starts import uniform_width
from llmprune.tables.draw import SPEED_TOLERANCE


def uniform(given: Given, speedup: float) -> Architecture | None:
    """Of the uniform architectures within 2% of the speed-up, the best on the search tokens; if there are none, the
    slowest that is faster, or else the fastest."""
    every = uniform_width(given.tables.costs, given.phase, speedup)
    within = [a for a in every if abs(given.speedup(a) / speedup - 1.0) <= SPEED_TOLERANCE]
    if not within:
        faster = [a for a in every if given.speedup(a) > speedup]
        within = [min(faster, key=given.speedup) if faster else max(every, key=given.speedup)]
    return within[0] if len(within) == 1 else given.best(within)
