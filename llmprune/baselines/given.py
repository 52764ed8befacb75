"""What a baseline works with, and the two shapes it may have: a path of architectures, or an answer to a speed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from llmprune.blocks.library import BlockLibrary
from llmprune.choices.architecture import Architecture
from llmprune.choices.space import Space
from llmprune.core.recipe import Phase
from llmprune.models.parent import Parent
from llmprune.tables.block_tables import BlockTables

Nats = Callable[[Sequence[Architecture]], list[float]]
"""Nats a token of each architecture on the search tokens; infinite for a child that computes no numbers."""

Aim = Callable[[float], Architecture | None]
"""A method's architecture for an estimated speed-up, None where it has none; past its end, a path gives its last."""

Path = Iterator[Architecture]
"""Architectures from the parent on, in order of estimated speed-up; each may cost much to find."""


@dataclass(frozen=True)
class Given:
    """What every method is given: the same tables, tokens and children as the search, and its own block library."""

    parent: Parent
    library: BlockLibrary
    tables: BlockTables
    phase: Phase
    """The speed that counts."""
    draws: int
    """How many architectures luck may draw."""
    seed: int
    nats: Nats
    remember: Callable[[Architecture], None] = lambda architecture: None
    """Told of a child whose variants are scored next: they may start where they part from it."""

    @property
    def space(self) -> Space:
        return self.library.space

    def speedup(self, architecture: Architecture) -> float:
        """Estimated speed-up."""
        return self.tables.costs.speedup(architecture, self.phase)

    def best(self, architectures: Sequence[Architecture]) -> Architecture | None:
        """The one that loses least on the search tokens, the first of equals; None if none computes numbers."""
        losses = self.nats(architectures) if architectures else []
        least = min(losses, default=math.inf)
        return None if math.isinf(least) else architectures[losses.index(least)]


def along(path: Path, speedup: Callable[[Architecture], float]) -> Aim:
    """Aim along a path: the first architecture on it whose estimated speed-up is at most 1% short of what is asked.

    The path is followed no further than that, and remembered.
    """
    walked: list[Architecture] = []

    def aim(wanted: float) -> Architecture | None:
        for architecture in walked:
            if speedup(architecture) >= 0.99 * wanted:
                return architecture
        for architecture in path:
            walked.append(architecture)
            if speedup(architecture) >= 0.99 * wanted:
                return architecture
        return walked[-1] if walked else None

    return aim
