"""A space's decisions as arrays, so that samplers can weigh thousands of candidates without building one.

Shapes: D decisions, O options of the longest ladder, P candidates. A candidate is a row of D indices (see
`search/parameters.py`); the arrays of shape DO are filled up with the last option's value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from llmprune.choices.choice import attends
from llmprune.tables.allocate import Allocator

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Indices = tuple[int, ...]
Entry = TypeVar("Entry", bound=np.generic)


@dataclass(frozen=True)
class Ladders:
    """The additive tables by decision and option."""

    options_D: Ints
    """How many options each decision has."""
    nats_DO: Floats
    """Estimated nats per token that an option costs."""
    saving_DO: Floats
    """Estimated share of the parent's time that an option saves."""
    attends_DO: Bools
    """Whether an option leaves attention in some layer."""

    @classmethod
    def of(cls, allocator: Allocator, phase: str) -> Ladders:
        decisions = allocator.costs.space.decisions
        longest = max(len(decision.options) for decision in decisions)
        rows = [[*d.options, *[d.options[-1]] * (longest - len(d.options))] for d in decisions]
        return cls(
            np.array([len(decision.options) for decision in decisions]),
            np.array([[sum(allocator.delta_nats[a] for a in option) for option in row] for row in rows]),
            np.array([[allocator.costs.option_saving(phase, option) for option in row] for row in rows]),
            np.array([[attends(choice for _, choice in option) for option in row] for row in rows]),
        )

    def nats(self, indices_PD: Ints) -> Floats:
        """Summed estimate of each candidate, in nats per token over the parent."""
        return np.asarray(_look_up(self.nats_DO, indices_PD).sum(axis=-1))

    def saving(self, indices_PD: Ints) -> Floats:
        """Estimated share of the parent's time that each candidate saves."""
        return np.asarray(_look_up(self.saving_DO, indices_PD).sum(axis=-1))

    def attends(self, indices_PD: Ints) -> Bools:
        """Whether each candidate keeps attention in at least one layer: a model without it is none."""
        return np.asarray(_look_up(self.attends_DO, indices_PD).any(axis=-1))

    def can_rise(self, indices_D: Ints) -> Bools:
        """Which decisions of a candidate have an option above."""
        return indices_D < self.options_D - 1

    def can_fall(self, indices_D: Ints) -> Bools:
        """Which decisions of a candidate have an option below that leaves attention somewhere."""
        attends_D = _look_up(self.attends_DO, indices_D)
        below_D = _look_up(self.attends_DO, np.maximum(indices_D - 1, 0))
        last_D = attends_D & ~below_D if attends_D.sum() == 1 else np.zeros_like(attends_D)
        return (indices_D > 0) & ~last_D

    def rise_costs(self, indices_D: Ints) -> Floats:
        """Share of the parent's time that one rung up costs, for each decision of a candidate."""
        above_D = np.minimum(indices_D + 1, self.options_D - 1)
        return _look_up(self.saving_DO, indices_D) - _look_up(self.saving_DO, above_D)

    def one_rung_away(self, indices_D: Ints, rng: np.random.Generator) -> Ints | None:
        """A random candidate that differs by one rung in one decision; None if there is none."""
        moves = [(int(d), 1) for d in np.flatnonzero(self.can_rise(indices_D))]
        moves += [(int(d), -1) for d in np.flatnonzero(self.can_fall(indices_D))]
        if not moves:
            return None
        decision, step = moves[rng.integers(len(moves))]
        moved = indices_D.copy()
        moved[decision] += step
        return moved


def _look_up(table_DO: NDArray[Entry], indices: Ints) -> NDArray[Entry]:
    return table_DO[np.arange(len(table_DO)), indices]


def as_indices(indices_D: Ints) -> Indices:
    """Hashable, and what Optuna stores: plain integers."""
    return tuple(int(index) for index in indices_D)
