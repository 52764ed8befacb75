"""A path of children, each a small step from the last, so that later steps know what earlier ones have taken away.

Additive tables are made once, at the parent. Their sums mislead as soon as blocks lean on each other, most for depth
(ALGORITHMS: an additive score picked a depth cut that an iterative ranking beat by far). Here the table is estimated
anew at every step, at the child that the path has reached, and the knapsack may change only a few decisions before
the next estimate: sequential linear programming with a trust region, the way greedy removal (SLEB, arXiv 2402.09025)
re-ranks after every block, but over all choices at once and for one backward pass a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from llmprune.architecture import Architecture
from llmprune.search.allocate import Allocator, Near, Scores
from llmprune.search.costs import CostTable

STEP = 1.06
"""Factor in speed-up from one estimate to the next."""
CHANGED_A_STEP = 1 / 4
"""Share of the decisions that a step may change."""

Estimate = Callable[[Architecture], Scores]
"""Estimated nats a token of every choice, put alone into an architecture (see `estimate_delta_nats`)."""


def path(
    estimate: Estimate, costs: CostTable, phase: str, speedups: Sequence[float], *, step: float = STEP
) -> Iterator[tuple[float, Architecture]]:
    """For each of the estimated `speedups`, ascending, the child that the path reaches it with.

    Ends early if the space has nothing as fast.
    """
    space = costs.space
    radius = max(2, round(CHANGED_A_STEP * len(space.decisions)))
    at, reached = space.shape.architecture, 1.0
    for speedup in sorted(speedups):
        while reached < speedup:
            # Equal steps, none longer than `step`, the last of which ends at the speed-up.
            left = speedup / reached
            reached *= left if left <= step else min(step, left ** (1 / 2)) if left < step**2 else step
            allocator, wanted = Allocator(estimate(at), costs), {phase: reached}
            found = allocator.best(wanted, near=Near(at, radius)) or allocator.best(wanted)
            if found is None:
                return
            at = found
        yield speedup, at
