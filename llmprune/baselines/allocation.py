"""The additive knapsack of Puzzle (arXiv 2411.19146): least summed estimated nats at an estimated speed-up; over the
whole space, or over the types of weights alone."""

from __future__ import annotations

from dataclasses import replace

from llmprune.baselines.given import Given
from llmprune.choices.architecture import Architecture
from llmprune.choices.choice import Choice
from llmprune.choices.dimensions import BLOCK_KINDS
from llmprune.tables.allocate import Allocator


def milp(given: Given, speedup: float) -> Architecture | None:
    """One solution of the tables, which no whole child corrects; None if the space is not as fast."""
    return Allocator(given.tables.delta_nats, given.tables.costs).best({given.phase: speedup})


def bits(given: Given, speedup: float) -> Architecture | None:
    """Every block whole, each in the type that the tables would have it, held to what types cost together: how far
    quantising goes without pruning. None if no types are offered, or all in the smallest are not as fast."""
    space = given.space

    def whole(choice: Choice) -> bool:
        return choice == (choice.entered_as(space.shape) if choice.stored else space.shape.full(choice.kind))

    attention, ffn = (tuple(filter(whole, space.ladder(kind))) for kind in BLOCK_KINDS)
    types = replace(space, attention=attention, ffn=ffn)
    if all(len(ladder) == 1 for ladder in types.ladders.values()):
        return None
    return Allocator(given.tables.joint_nats, replace(given.tables.costs, space=types)).best({given.phase: speedup})
