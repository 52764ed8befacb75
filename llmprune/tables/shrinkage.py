"""Scores of single choices, pulled towards what the same choice costs in the layers on average.

A table of scores is used to choose dozens of changes at once, of thousands. What looks cheap in it is cheap in part
because of its few tokens, or of their kind; and what two deep cuts cost together is more than their sum. Both lead a
knapsack to take nearly all of a few blocks. Towards the average layer the table says less of layers, and as much as
before of how much to take: James and Stein's remedy for choosing among many noisy estimates (1961).

The average is the median: where one layer costs nearly all that a choice costs (the first, as a rule), the mean would
say of the others that they cost as much, and of that one that it costs little. What a choice costs in all layers
together stays what it was, so that the more such layers there are, the less is pulled.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from llmprune.choices.architecture import Architecture
from llmprune.choices.choice import AnyChoice, Assignment
from llmprune.choices.vocabulary import VocabularyChoice
from llmprune.tables.allocate import Scores


@dataclass(frozen=True)
class Shrinkage:
    """By choice, the weight of a layer's own score, and what is added to it."""

    own: Mapping[AnyChoice, float]
    common: Mapping[AnyChoice, float]

    @classmethod
    def of(cls, delta_nats: Scores, share: float) -> Shrinkage:
        """`delta_nats`: nats a token of every choice of every layer, put alone into the parent; `share` of each is what
        the choice costs in the median layer, but for a factor that leaves the sum over the layers as it is. 0 leaves
        scores alone."""
        layers: dict[AnyChoice, list[float]] = defaultdict(list)
        for (_, choice), nats in delta_nats.items():
            layers[choice].append(nats)
        weights = {
            # There is no other layer to be pulled to.
            choice: (1.0, 0.0) if isinstance(choice, VocabularyChoice) else _weights(nats, share)
            for choice, nats in layers.items()
        }
        return cls(
            {choice: own for choice, (own, _) in weights.items()}, {c: common for c, (_, common) in weights.items()}
        )

    def apply(self, delta_nats: Scores, at: Architecture) -> dict[Assignment, float]:
        """Scores of choices put alone into `at`, shrunk: a choice is pulled towards what the median layer loses between
        what `at` has there and the choice, so that what `at` has still costs 0 where it did."""
        there: dict[tuple[int, str], float] = {(i, choice.kind): self.common[choice] for i, choice in at.blocks()}
        return {
            # What is chosen once for a model has nothing in common with others.
            (i, choice): self.own[choice] * nats + self.common[choice] - there.get((i, choice.kind), 0.0)
            for (i, choice), nats in delta_nats.items()
        }


def _weights(nats: Sequence[float], share: float) -> tuple[float, float]:
    mean = fmean(nats)
    # What is below nothing is noise; and a median above the mean would pull more than `share`.
    middle = min(max(median(nats), 0.0), mean) if mean > 0 else mean
    mixed = (1.0 - share) * mean + share * middle
    if mixed <= 0:
        return 1.0 - share, share * mean
    scale = mean / mixed
    return scale * (1.0 - share), scale * share * middle
