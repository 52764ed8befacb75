"""Luck: what a search has to beat is the best of as many random architectures at the same speed."""

from __future__ import annotations

import random

from llmprune.baselines.given import Given
from llmprune.choices.architecture import Architecture
from llmprune.tables.draw import random_architecture


def best_of_random(given: Given, speedup: float) -> Architecture | None:
    """The best on the search tokens of `given.draws` random architectures at an estimated speed-up."""
    generator = random.Random(given.seed)
    drawn: list[Architecture] = []
    for _ in range(given.draws):
        architecture = random_architecture(given.tables.costs, given.phase, speedup, generator)
        if architecture is None:
            # Thousands of tries have failed: the next would fail as well.
            break
        drawn.append(architecture)
    return given.best(list(dict.fromkeys(drawn)))
