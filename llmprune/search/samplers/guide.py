"""What guided samplers know: the tables, the speed-ups to aim at, and what the study's trials have measured so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import median
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from llmprune.choices.architecture import Architecture
from llmprune.choices.dimensions import BlockKind
from llmprune.choices.space import Space
from llmprune.choices.vocabulary import VocabularyChoice
from llmprune.core.budgets import Axes
from llmprune.measure.record import Record
from llmprune.search.samplers.ladders import Indices, Ladders
from llmprune.search.trial_records import RECORD, record_of
from llmprune.tables.allocate import Allocator, Scores

HOLDS_WITHIN = 0.01
"""A measured speed-up this share below a target still holds it: paired medians are no more exact."""
NEAREST_TRIALS = 9
"""From how many trials, nearest in speed, the estimated speed-up is corrected."""
LEAST_SAVING = 0.02
"""Below this share of the parent's time, the ratio of measured to estimated saving is timing noise."""
RATIO_LIMITS = (0.5, 1.5)
MOST_SAVING = 0.99
NEAR_BEST_DRAFT = (1.0, 1.15, 1 / 1.15)
"""What trials that look for a better draft aim at, in turn, over the speed of the best one: to agree more there, and
which speed is best at all."""
SLOWEST_DRAFT = 1.05

Race = Callable[[Sequence[Architecture]], Architecture]
Estimate = Callable[[Architecture], Scores]


@dataclass(frozen=True)
class Guide:
    """What guided samplers know besides the trials.

    `allocator`: the tables, and the knapsack over them. `axes`: the objectives. `targets`: the speed-ups aimed at, in
    turn. `race`: the best of several candidates, which the caller scores on growing slices of
    the same tokens. `estimate`: the nats of the tables anew, for one change of any block of an architecture.
    """

    allocator: Allocator
    axes: Axes
    targets: tuple[float, ...]
    race: Race
    estimate: Estimate

    def __post_init__(self) -> None:
        assert self.targets and min(self.targets) > 1, f"targets are speed-ups above 1, one at least: {self.targets}"

    @property
    def space(self) -> Space:
        return self.allocator.costs.space

    @property
    def phase(self) -> str:
        """Whose speed-up is the objective."""
        return self.axes.speed.removesuffix("_speedup")

    @cached_property
    def ladders(self) -> Ladders:
        return Ladders.of(self.allocator, self.phase)

    def target_of(self, trial_number: int) -> float:
        return self.targets[trial_number % len(self.targets)]

    def allocate(self, saving: float, allocator: Allocator | None = None) -> Architecture:
        """The allocation of least estimated loss that saves a share of the parent's time, or comes nearest to it.

        `allocator`: another one over the same space, with other scores.
        """
        allocator = allocator or self.allocator
        wanted: dict[str, float] = {self.phase: 1.0 / (1.0 - saving)}
        return allocator.best(wanted) or allocator.nearest(wanted)

    def allocator_with(self, factor: Callable[[tuple[int, BlockKind]], float]) -> Allocator:
        """The allocator with each block's estimated nats multiplied by a factor of its own."""
        factors = {block: factor(block) for block in self.space.blocks()}
        scores = {
            (i, c): nats if isinstance(c, VocabularyChoice) else factors[i, c.kind] * nats
            for (i, c), nats in self.allocator.delta_nats.items()
        }
        return replace(self.allocator, delta_nats=scores)


@dataclass(frozen=True)
class Finished:
    """One measured architecture. `notes`: the trial's user attributes."""

    number: int
    indices: Indices
    loss: float
    """The first objective's value."""
    speedup: float
    notes: Mapping[str, Any]
    draft_speedup: float = 1.0
    """Of the parent with it as its draft; 1 where it is none, or does not pay."""

    @classmethod
    def of(cls, trial: FrozenTrial, indices: Indices, record: Record, axes: Axes) -> Finished:
        """Both objectives as measured."""
        as_draft = 1.0 if record.draft is None else record.draft.speedup
        loss, speedup = record.value(axes.quality), record.value(axes.speed)
        return cls(trial.number, indices, loss, speedup, trial.user_attrs, as_draft)

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.speedup) and self.speedup > 0

    def holds(self, target: float) -> bool:
        return self.speedup >= target * (1.0 - HOLDS_WITHIN)

    def rank(self, target: float) -> tuple[bool, float]:
        """Sort key: what holds the target comes first, least loss first; then what misses it by least."""
        return (False, self.loss) if self.holds(target) else (True, target - self.speedup)


@dataclass(frozen=True)
class History:
    """A study's trials, as a sampler sees them.

    `finished`: measured architectures, each once, by number. `known`: all that were ever proposed, also those that
    failed, run in another worker or wait in the queue: to propose them again would be a trial wasted.
    """

    finished: tuple[Finished, ...]
    known: frozenset[Indices]

    @classmethod
    def of(cls, study: optuna.Study, guide: Guide, *, but: int) -> History:
        """Everything in the study except the trial with number `but`, which is being sampled."""
        finished: dict[Indices, Finished] = {}
        known = set()
        for trial in study.get_trials(deepcopy=False):
            indices = None if trial.number == but else _indices(trial, guide.space)
            if indices is None:
                continue
            known.add(indices)
            record = _record(trial)
            if record is not None and (one := Finished.of(trial, indices, record, guide.axes)).is_finite:
                finished.setdefault(indices, one)
        return cls(tuple(finished.values()), frozenset(known))

    def best(self, target: float) -> Finished | None:
        """The least loss among those whose measured speed-up holds the target; if none does, the nearest in speed."""
        return min(self.finished, key=lambda trial: trial.rank(target), default=None)

    def target(self, guide: Guide, trial_number: int) -> float:
        """The guide's targets in turn; once there is a draft that pays, a speed near the best one's every other time:
        which speed is worth most cannot be known before."""
        best = max(self.finished, key=lambda trial: trial.draft_speedup, default=None)
        if best is None or best.draft_speedup <= 1.0:
            return guide.target_of(trial_number)
        turn, aims_at_draft = divmod(trial_number, 2)
        if aims_at_draft:
            return max(SLOWEST_DRAFT, best.speedup * NEAR_BEST_DRAFT[turn % len(NEAR_BEST_DRAFT)])
        return guide.target_of(turn)

    def needed_saving(self, guide: Guide, target: float) -> float:
        """The *estimated* share of the parent's time to save, so that the *measured* speed-up is `target`.

        What the target needs, divided by the median of measured / estimated saving over the finished trials that are
        nearest in measured speed (on a log scale); uncorrected as long as there are none.
        """
        if not self.finished:
            return _saving_at(target)
        estimated = guide.ladders.saving(np.array([trial.indices for trial in self.finished]))
        ratios = [
            (abs(math.log(trial.speedup / target)), _saving_at(trial.speedup) / share)
            for trial, share in zip(self.finished, estimated.tolist(), strict=True)
            if share >= LEAST_SAVING
        ]
        nearest = [ratio for _, ratio in sorted(ratios)[:NEAREST_TRIALS]]
        ratio = float(np.clip(median(nearest or [1.0]), *RATIO_LIMITS))
        return min(_saving_at(target) / ratio, MOST_SAVING)


def _saving_at(speedup: float) -> float:
    """Share of the parent's time that a child of this speed-up saves."""
    return 1.0 - 1.0 / speedup


def _indices(trial: FrozenTrial, space: Space) -> Indices | None:
    """A trial's options, also of one that still waits; None as long as it does not have them all."""
    params = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
    chosen = tuple(params.get(decision.name, -1) for decision in space.decisions)
    legal = (0 <= index < len(d.options) for index, d in zip(chosen, space.decisions, strict=True))
    return chosen if all(legal) else None


def _record(trial: FrozenTrial) -> Record | None:
    """What was measured; None for a trial that failed, repeats another, computes no numbers or is not done."""
    if trial.state is not TrialState.COMPLETE or RECORD not in trial.user_attrs:
        return None
    record = record_of(trial)
    return record if record.is_finite else None
