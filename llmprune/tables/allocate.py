"""Choose an option for every decision at once: the multiple-choice knapsack of Puzzle (arXiv 2411.19146), by HiGHS."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from llmprune.choices.architecture import Architecture
from llmprune.choices.choice import Assignment, attends
from llmprune.choices.space import Space
from llmprune.tables.costs import CostTable

TOLERANCE = 1e-4
"""By how much, relatively, a solution may miss a ratio: the solver's own tolerance, and no more."""
SECONDS = 20.0

Scores = Mapping[Assignment, float]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Near:
    """A trust region: at most `radius` decisions differ from `architecture`."""

    architecture: Architecture
    radius: int


@dataclass(frozen=True)
class Allocator:
    """The knapsack of one pair of tables: estimated nats a choice costs, and share of the parent's time it saves."""

    delta_nats: Scores
    costs: CostTable

    def best(
        self,
        wanted: Mapping[str, float],
        *,
        near: Near | None = None,
        apart: Sequence[Architecture] = (),
        distance: int = 1,
    ) -> Architecture | None:
        """The architecture with the least summed nats that reaches what is wanted; None if the space has none.

        `wanted` maps a column of the cost table ("decode", "prefill", "params", ...) to the least ratio of parent to
        child. One option a decision; at least one layer keeps attention; at least `distance` decisions differ from
        each of `apart`. The ratios are checked again on the solution: the solver's constraints hold up to a tolerance
        of 1e-6 of the parent, and estimated ratios end at 100.
        """
        count = len(self._space.decisions)
        limits = [LinearConstraint(self._savings(c)[None, :], 1.0 - 1.0 / r, np.inf) for c, r in wanted.items()]
        if near is not None:
            limits.append(LinearConstraint(self._marked(near.architecture)[None, :], count - near.radius, np.inf))
        limits += [LinearConstraint(self._marked(other)[None, :], 0, count - distance) for other in apart]
        found = self._solve(self._scores, limits)
        if found is None or any(self.costs.speedup(found, c) < r * (1 - TOLERANCE) for c, r in wanted.items()):
            return None
        return found

    def pool(
        self, wanted: Mapping[str, float], *, count: int, distance: int, near: Near | None = None
    ) -> list[Architecture]:
        """The best architecture, then again and again the best that differs from all before in `distance` decisions
        (Hamming cuts); fewer than `count` if the space ends."""
        pool: list[Architecture] = []
        while len(pool) < count and (found := self.best(wanted, near=near, apart=pool, distance=distance)):
            pool.append(found)
        return pool

    def nearest(self, wanted: Mapping[str, float]) -> Architecture:
        """For what no architecture reaches: the one whose worst gap, as a share of the parent, is smallest."""
        limits = [
            LinearConstraint(np.append(self._savings(c), 1.0)[None, :], 1.0 - 1.0 / r, np.inf)
            for c, r in wanted.items()
        ]
        found = self._solve(np.zeros_like(self._scores), limits, with_gap=True)
        assert found is not None, "with a gap, every architecture is feasible"
        return found

    @property
    def _space(self) -> Space:
        return self.costs.space

    @cached_property
    def _variables(self) -> list[tuple[int, tuple[Assignment, ...]]]:
        """One binary variable for every option of every decision: (decision, what the option assigns)."""
        return [(i, option) for i, decision in enumerate(self._space.decisions) for option in decision.options]

    @cached_property
    def _scores(self) -> Floats:
        return np.array([sum(self.delta_nats[a] for a in option) for _, option in self._variables])

    def _savings(self, column: str) -> Floats:
        return np.array([self.costs.option_saving(column, option) for _, option in self._variables])

    def _marked(self, architecture: Architecture) -> Floats:
        """1 at the options that an architecture has."""
        indices = self._space.indices(architecture)
        marked = [decision.options[i] for decision, i in zip(self._space.decisions, indices, strict=True)]
        return np.array([float(option == marked[owner]) for owner, option in self._variables])

    def _solve(
        self, objective: Floats, limits: Sequence[LinearConstraint], *, with_gap: bool = False
    ) -> Architecture | None:
        """Minimise over the binaries; with a gap, one continuous variable more, which alone is minimised."""
        owners = [owner for owner, _ in self._variables]
        count, extra = len(owners), int(with_gap)
        one_each = csr_array(
            (np.ones(count), (owners, range(count))), shape=(len(self._space.decisions), count + extra)
        )
        attend = [float(attends(choice for _, choice in option)) for _, option in self._variables] + [0.0] * extra
        with _no_stdout():
            solution = milp(
                np.append(objective, np.ones(extra)),
                integrality=np.append(np.ones(count), np.zeros(extra)),
                bounds=Bounds(0, np.append(np.ones(count), np.full(extra, np.inf))),
                constraints=[
                    LinearConstraint(one_each, 1, 1),
                    LinearConstraint(np.array(attend)[None, :], 1, np.inf),
                    *limits,
                ],
                options={"time_limit": SECONDS, "mip_rel_gap": 1e-4},
            )
        if solution.x is None:
            return None
        chosen = [option for (_, option), x in zip(self._variables, solution.x, strict=False) if x > 0.5]
        return self._space.shape.architecture.with_choices(a for option in chosen for a in option)


@contextmanager
def _no_stdout() -> Iterator[None]:
    """HiGHS prints a line of its own now and then, whatever it is told, and stdout is for results."""
    sys.stdout.flush()
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(nowhere)
        os.close(kept)
