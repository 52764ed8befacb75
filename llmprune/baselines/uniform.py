"""Uniform width: one number of KV groups and one FFN width for all layers (Minitron, arXiv 2407.14679, without the
training). Which units stay, and whether the rest is re-solved, is the library's affair. Where a space offers types of
weights, all attentions have one, all FFNs and the vocabulary: pruned first, and quantised then."""

from __future__ import annotations

from llmprune.baselines.given import Given
from llmprune.choices.architecture import Architecture
from llmprune.search.warm_starts import uniform_width
from llmprune.tables.draw import SPEED_TOLERANCE

NEAR = 4
"""Architectures of about the speed that are tried at the most: with types of weights there are dozens."""
FASTER = 3
"""Faster architectures that are tried at the most."""


def uniform(given: Given, speedup: float) -> Architecture | None:
    """The best on the search tokens of the uniform architectures within 2% of the speed-up - if there are none, the
    slowest that is faster - and of those beyond that the tables think better: only few widths lie near a speed, and a
    faster one may lose less. The fastest, where none is as fast."""
    every = uniform_width(given.tables.costs, given.phase, speedup)
    fast = [a for a in every if given.speedup(a) >= speedup * (1 - SPEED_TOLERANCE)]
    if not fast:
        return max(every, key=given.speedup)
    near = [a for a in fast if given.speedup(a) <= speedup * (1 + SPEED_TOLERANCE)] or [min(fast, key=given.speedup)]
    estimated = given.tables.nats_lost
    near = sorted(near, key=estimated)[:NEAR]
    least = min(map(estimated, near))
    better = sorted((a for a in fast if a not in near and estimated(a) < least), key=estimated)
    candidates = near + better[:FASTER]
    return candidates[0] if len(candidates) == 1 else given.best(candidates)
