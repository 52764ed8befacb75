"""The additive knapsack of Puzzle (arXiv 2411.19146): least summed estimated nats at an estimated speed-up."""

from __future__ import annotations

from llmprune.baselines.given import Given
from llmprune.choices.architecture import Architecture
from llmprune.tables.allocate import Allocator


def milp(given: Given, speedup: float) -> Architecture | None:
    """One solution of the tables, which no whole child corrects; None if the space is not as fast."""
    return Allocator(given.tables.delta_nats, given.tables.costs).best({given.phase: speedup})
