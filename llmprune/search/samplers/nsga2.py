"""NSGA-II (Deb et al. 2002) over integer vectors with a cheap, vectorised objective: for searching on predictors.

Optuna's own NSGA-II asks for one trial at a time, which is right for real children and far too slow for 20,000 guesses.
Shapes: P candidates, D decisions; two objectives, both minimised.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from llmprune.search.samplers.ladders import Bools, Floats, Ints

CROSSOVER = 0.9
MUTATION = 0.02
"""Least chance of a decision to move a rung (DyNAS-T); with few decisions, one in D."""

Objectives = Callable[[Ints], Floats]


def nsga2(
    objectives: Objectives,
    start_PD: Ints,
    options_D: Ints,
    rng: np.random.Generator,
    *,
    population: int = 200,
    generations: int = 100,
) -> tuple[Ints, Floats]:
    """The last population with its objectives (P2), after population x generations evaluations.

    Options are in order of size, so mutation moves one rung. Crossover takes each decision from either parent: on
    ladders of a few rungs, simulated binary crossover rounds to the same.
    """
    members_PD = np.unique(start_PD, axis=0)
    values_P2 = objectives(members_PD)
    for _ in range(generations):
        members_PD, values_P2 = _survivors(members_PD, values_P2, population)
        children_PD = _offspring(members_PD, options_D, rng, population)
        members_PD, first = np.unique(np.concatenate([members_PD, children_PD]), axis=0, return_index=True)
        values_P2 = np.concatenate([values_P2, objectives(children_PD)])[first]
    return _survivors(members_PD, values_P2, population)


def front_ranks(values_P2: Floats, enough: int) -> Ints:
    """0 for what no other dominates, 1 once those are gone, and so on until `enough` have a rank; the rest is last."""
    order = np.lexsort((values_P2[:, 1], values_P2[:, 0]))
    ranks_P = np.full(len(values_P2), len(values_P2))
    ranked = rank = 0
    while ranked < min(enough, len(values_P2)):
        second = values_P2[order, 1]
        # Sorted by the first objective, a member is free if it beats all before it in the second.
        free = second < np.minimum.accumulate(np.concatenate([[np.inf], second[:-1]]))
        free[0] = True
        ranks_P[order[free]] = rank
        ranked += int(free.sum())
        order, rank = order[~free], rank + 1
    return ranks_P


def crowding(values_P2: Floats) -> Floats:
    """How far apart the neighbours of each member of one front are, summed over both objectives; ends are infinite."""
    distance_P = np.zeros(len(values_P2))
    for values_P in values_P2.T:
        order = np.argsort(values_P, kind="stable")
        span = values_P[order[-1]] - values_P[order[0]]
        distance_P[order[[0, -1]]] = np.inf
        if np.isfinite(span) and span > 0:
            distance_P[order[1:-1]] += (values_P[order[2:]] - values_P[order[:-2]]) / span
    return distance_P


def _survivors(members_PD: Ints, values_P2: Floats, population: int) -> tuple[Ints, Floats]:
    """The best by front, then by crowding, in that order."""
    ranks_P = front_ranks(values_P2, population)
    crowding_P = np.zeros(len(ranks_P))
    for rank in np.unique(ranks_P[ranks_P < len(ranks_P)]):
        in_front: Bools = ranks_P == rank
        crowding_P[in_front] = crowding(values_P2[in_front])
    kept = np.lexsort((-crowding_P, ranks_P))[:population]
    return members_PD[kept], values_P2[kept]


def _offspring(members_PD: Ints, options_D: Ints, rng: np.random.Generator, count: int) -> Ints:
    """Children of binary tournaments: uniform crossover, then one rung up or down here and there."""
    # Members stand in order, so the winner of a tournament is the lower position.
    mother_PD, father_PD = members_PD[rng.integers(len(members_PD), size=(2, count, 2)).min(axis=2)]
    shape = mother_PD.shape
    crossed = (rng.random((count, 1)) < CROSSOVER) & (rng.random(shape) < 0.5)
    moved = rng.random(shape) < max(MUTATION, 1.0 / shape[1])
    children_PD = np.where(crossed, father_PD, mother_PD) + moved * rng.choice((-1, 1), size=shape)
    return np.asarray(np.clip(children_PD, 0, options_D - 1))
