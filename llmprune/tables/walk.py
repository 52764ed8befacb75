"""A path of children, each a small step from the last, so that later steps know what earlier ones have taken away.

Additive tables are made once, at the parent, and their sums mislead as soon as blocks lean on each other. Here the
table is estimated anew at every step, at the child that the path has reached, and the knapsack may change only a few
decisions before the next estimate: sequential linear programming with a trust region. It is what greedy removal does
when it re-ranks after every block (SLEB, arXiv 2402.09025), over all choices at once and for one backward pass a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from llmprune.choices.architecture import Architecture
from llmprune.core.progress import Advance
from llmprune.tables.allocate import Allocator, Near, Scores
from llmprune.tables.costs import CostTable

CHANGED = 1 / 4
"""Share of the decisions that a step of a factor OF_STEP in speed-up may change. A longer step may change more of them
in proportion: with few to choose from it would have to empty whole blocks."""
OF_STEP = 1.06


def walk(
    estimate: Callable[[Architecture], Scores],
    costs: CostTable,
    phase: str,
    speedups: Sequence[float],
    *,
    step: float,
    progress: Advance,
) -> Iterator[tuple[float, Architecture]]:
    """For each of the estimated `speedups`, ascending, the child that the path reaches it with.

    `estimate` gives the nats a token of every choice, put alone into an architecture; it is asked once for every factor
    `step` (or less) in speed-up. Ends early if the space has nothing as fast.
    """
    decisions = len(costs.space.decisions)
    at, stops, left = costs.space.shape.architecture, stops_of(speedups, step), 1.0
    for done, reached in enumerate(stops):
        progress(done, len(stops))
        allocator, wanted = Allocator(estimate(at), costs), {phase: reached}
        radius = radius_of(reached / left, decisions)
        found = allocator.best(wanted, near=Near(at, radius)) or allocator.best(wanted)
        if found is None:
            return
        at, left = found, reached
        if reached in speedups:
            yield reached, at
    progress(len(stops), len(stops))


def radius_of(step: float, decisions: int) -> int:
    """How many of so many decisions a step of this factor in speed-up may change."""
    return max(2, round(min(1.0, CHANGED * math.log(step) / math.log(OF_STEP)) * decisions))


def estimates_of(speedups: Sequence[float], step: float) -> int:
    """How many estimates a path takes beside that at the parent, which the tables hold."""
    return len(stops_of(speedups, step)) - 1


def stops_of(speedups: Sequence[float], step: float) -> list[float]:
    """Speed-ups on the way, no two further apart than a factor `step`, the wanted ones among them."""
    stops, reached = [], 1.0
    for speedup in sorted(set(speedups)):
        while reached * step < speedup:
            reached *= step
            stops.append(reached)
        stops.append(speedup)
        reached = speedup
    return stops
