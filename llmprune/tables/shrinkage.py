"""Scores of single choices, pulled towards what the same choice costs in the layers on average.

A table of scores is used to choose dozens of changes at once, of thousands. What looks cheap in it is cheap in part
because of its few tokens, or of their kind; and what two deep cuts cost together is more than their sum. Both lead a
knapsack to take nearly all of a few blocks. Towards the average layer the table says less of layers, and as much as
before of how much to take: James and Stein's remedy for choosing among many noisy estimates (1961).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from llmprune.choices.architecture import Architecture
from llmprune.choices.choice import Choice
from llmprune.tables.allocate import Scores


@dataclass(frozen=True)
class Shrinkage:
    """`share` of every score is what its choice costs in the mean layer of the parent; 0 leaves scores alone."""

    share: float
    mean_nats: Mapping[Choice, float]

    @classmethod
    def of(cls, delta_nats: Scores, share: float) -> Shrinkage:
        """`delta_nats`: nats a token of every choice of every layer, put alone into the parent."""
        layers: dict[Choice, list[float]] = defaultdict(list)
        for (_, choice), nats in delta_nats.items():
            layers[choice].append(nats)
        return cls(share, {choice: fmean(nats) for choice, nats in layers.items()})

    def apply(self, delta_nats: Scores, at: Architecture) -> dict[tuple[int, Choice], float]:
        """Scores of choices put alone into `at`, shrunk: a choice is pulled towards what the mean layer loses between
        what `at` has there and the choice, so that what `at` has still costs 0 where it did."""
        own = {(layer, choice.kind): self.mean_nats[choice] for layer, choice in at.blocks()}
        return {
            (layer, choice): (1.0 - self.share) * nats + self.share * (self.mean_nats[choice] - own[layer, choice.kind])
            for (layer, choice), nats in delta_nats.items()
        }
