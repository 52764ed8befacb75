"""What choices cost together. A score is of one block changed alone, and a child changes dozens: summed, scores of one
half of a layer may be far too high and those of the other too low, and a knapsack then takes from the wrong half. So
some choices are made in all layers at once, and the sums of their scores are held to what that really costs, as savings
of time are held to whole children."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from llmprune.choices.architecture import Architecture
from llmprune.choices.choice import AnyChoice, Assignment, Choice
from llmprune.choices.dimensions import BLOCK_KINDS
from llmprune.choices.kinds import by_kind
from llmprune.choices.space import Space
from llmprune.choices.vocabulary import VocabularyChoice
from llmprune.core.errors import ModelError
from llmprune.core.progress import Advance
from llmprune.tables.allocate import Scores
from llmprune.tables.watched import estimated_choices

FURTHEST = 4.0
"""How far from 1, either way, a factor may be: beyond that it is the tokens that are few."""


def together_architectures(space: Space, rungs: int) -> dict[Choice, Architecture]:
    """Children that make one choice in all layers: for each kind of choice so many of its ladder, evenly between its
    ends, without drops and the parent's own."""
    layers, found = range(space.shape.layers), {}
    for kind in BLOCK_KINDS:
        for _, own in by_kind(space.ladder(kind)[:-1]):
            # A type of weights adds an error of its own, which whole blocks tell.
            kept = [choice for choice in own if choice.units and choice in estimated_choices(space, kind)]
            count = min(rungs, len(kept))
            for place in (np.arange(count) + 0.5) * len(kept) / max(count, 1) - 0.5:
                choice = kept[round(place)]
                found[choice] = space.shape.architecture.with_choices((layer, choice) for layer in layers)
    return found


def together_factors(
    space: Space, delta_nats: Scores, rungs: int, score: Callable[[Architecture], float], advance: Advance
) -> dict[AnyChoice, float]:
    """By choice, what it costs where all layers make it, over the sum of its scores; 1 where nothing was tried.

    `score` gives nats a token of an architecture. Between the choices that are tried factors are interpolated in rows,
    for each kind of choice by itself; beyond them, and for drops, that of the nearest holds. Where rows leave and the
    rest is rounded, each of both costs counts by its own.
    """
    children = together_architectures(space, rungs)
    if not children:
        return _interpolated(space, {}, delta_nats)
    base, tried = score(space.shape.architecture), {}
    for done, (choice, architecture) in enumerate(children.items()):
        advance(done, len(children))
        summed = sum(delta_nats[layer, choice] for layer in range(space.shape.layers))
        factor = _factor(lambda one=architecture: score(one) - base, summed)  # type: ignore[misc]
        if factor is not None:
            tried[choice] = factor
    advance(len(children), len(children))
    return _interpolated(space, tried, delta_nats)


def _factor(lost: Callable[[], float], summed: float) -> float | None:
    """None where it says nothing: the child computes no numbers, or next to nothing was to be lost."""
    try:
        found = lost()
    except ModelError:
        return None
    if not (math.isfinite(found) and math.isfinite(summed)) or min(found, summed) <= 0:
        return None
    return min(max(found / summed, 1 / FURTHEST), FURTHEST)


def _interpolated(space: Space, tried: Mapping[Choice, float], delta_nats: Scores) -> dict[AnyChoice, float]:
    rows, factors = space.shape.rows, dict[AnyChoice, float]()
    # Of that there is one.
    factors |= dict.fromkeys(space.vocabulary, 1.0)
    for kind in BLOCK_KINDS:
        for _, own in by_kind(choice for choice in space.ladder(kind) if choice.stored is None):
            known = sorted((rows(choice), tried[choice]) for choice in own if choice in tried)
            sizes, values = [size for size, _ in known], [factor for _, factor in known]
            for choice in own:
                factors[choice] = float(np.interp(rows(choice), sizes, values)) if known else 1.0
        for choice in space.ladder(kind):
            if choice.stored is not None:
                factors[choice] = _of_both(choice, space, factors[choice.plain], tried, delta_nats)
    return factors


def _of_both(choice: Choice, space: Space, of_cut: float, tried: Mapping[Choice, float], delta_nats: Scores) -> float:
    """The factor of a choice that rounds what it leaves: the mean of the cut's own and the rounding's, by what each
    costs."""
    whole = choice.entered_as(space.shape)
    assert whole is not None, "it has a type of its own"
    of_rounding = tried.get(whole, 1.0)
    if whole == choice:
        return of_rounding
    cut, both = (sum(max(delta_nats[i, c], 0.0) for i in range(space.shape.layers)) for c in (choice.plain, choice))
    share = min(cut / both, 1.0) if both > 0 else 1.0
    return share * of_cut + (1.0 - share) * of_rounding


def weighed(scores: Scores, factors: Mapping[AnyChoice, float], at: Architecture) -> dict[Assignment, float]:
    """Scores of choices put alone into `at`, each by the factor of the deeper cut of the two: the choice, or what `at`
    has."""
    own = {(layer, choice.kind): choice for layer, choice in at.blocks()}

    def factor(layer: int, choice: AnyChoice) -> float:
        if isinstance(choice, VocabularyChoice):
            return factors[choice]
        there = own[layer, choice.kind]
        return factors[choice if choice.units <= there.units else there]

    return {(layer, choice): nats * factor(layer, choice) for (layer, choice), nats in scores.items()}
