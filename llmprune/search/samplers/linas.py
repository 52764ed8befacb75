"""LINAS of DyNAS-T (arXiv 2205.10358): search on predictors that every measured trial makes better."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from llmprune.search.samplers.guide import Guide, History
from llmprune.search.samplers.guided import GuidedSampler, Proposal, Question
from llmprune.search.samplers.ladders import Bools, Floats, Indices, Ints
from llmprune.search.samplers.nsga2 import nsga2
from llmprune.search.samplers.predictors import Predictor, fit
from llmprune.tables.draw import random_architecture

NOISE = 0.7
"""Standard deviation of the log-normal factors that a drawn allocation's scores are multiplied by."""
PREDICTED_BY = "linas_predictors"
"""User attribute: which regressions proposed a trial, with their cross-validated errors."""
FASTEST = 1.15
"""The front is searched up to this multiple of the fastest target."""
NO_CANDIDATE = 1e6
"""Objectives of what must not be proposed: worse than any child, and finite."""


@dataclass(frozen=True)
class Predicted:
    """The last population of a search on predictors: nats per token and speed-up are predictions."""

    indices_PD: Ints
    nats_P: Floats
    speedup_P: Floats
    notes: dict[str, str]

    def best(self, target: float, known: frozenset[Indices]) -> Indices | None:
        """Of the unknown, the least nats among those that reach the target; else the fastest."""
        rows = enumerate(map(tuple, self.indices_PD.tolist()))
        unknown = [(row, indices) for row, indices in rows if indices not in known]
        if not unknown:
            return None

        def rank(entry: tuple[int, Indices]) -> tuple[bool, float]:
            row, _ = entry
            reaches = self.speedup_P[row] >= target
            return (False, self.nats_P[row]) if reaches else (True, -self.speedup_P[row])

        return min(unknown, key=rank)[1]


class LinasSampler(GuidedSampler):
    """An initial population of the study's seeds and draws near the targets; then, for every trial, predictors of nats
    and time, NSGA-II over 20,000 predictions, and the member of its last population that helps most at the target."""

    def __init__(self, guide: Guide, *, seed: int, initial: int = 24, generations: int = 100) -> None:
        """`initial`: measured architectures before the first fit (50 in the paper, of more trials than we have).
        `generations`: of 200 predictions each."""
        super().__init__(guide, seed=seed)
        self.initial = initial
        self.generations = generations
        # Only saves repeating a search that follows from the same trials.
        self._last: tuple[tuple[int, ...], Predicted] | None = None

    def propose(self, question: Question) -> Proposal | None:
        history = question.history
        if len(history.finished) < self.initial:
            return self._draw(question)
        predicted = self._predicted(history)
        indices = predicted.best(question.target, history.known)
        return None if indices is None else Proposal(indices, {PREDICTED_BY: predicted.notes})

    def _draw(self, question: Question) -> Proposal | None:
        """Near the target's speed: any architecture, or the allocation of the tables under noise, at equal odds.

        The first tell the predictors what each option does, the second what good neighbourhoods look like.
        """
        guide, rng = self.guide, question.rng
        space, costs = guide.space, guide.allocator.costs
        if rng.random() < 0.5:
            speedup = 1.0 / (1.0 - question.needed_saving)
            drawn = random_architecture(costs, guide.phase, speedup, random.Random(int(rng.integers(2**32))))
        else:
            drawn = guide.allocate(question.needed_saving, guide.allocator_with(lambda _: rng.lognormal(0.0, NOISE)))
        return None if drawn is None else Proposal(space.indices(drawn))

    def _predicted(self, history: History) -> Predicted:
        """The search on what is finished; the same for every trial that asks before the next one finishes."""
        key = tuple(trial.number for trial in history.finished)
        if self._last is None or self._last[0] != key:
            rng = np.random.default_rng([self.seed, len(key)])
            self._last = key, search_predicted(history, self.guide, rng, generations=self.generations)
        return self._last[1]


def search_predicted(history: History, guide: Guide, rng: np.random.Generator, *, generations: int) -> Predicted:
    """Fit both predictors to the finished trials, then search on them, from those and the tables' allocations."""
    ladders = guide.ladders
    trials_SD = np.array([trial.indices for trial in history.finished])
    nats, time = predictors(history, guide)
    least_time = 1.0 / (FASTEST * max(guide.targets))

    def objectives(indices_PD: Ints) -> Floats:
        time_P = time.predict(indices_PD)
        impossible: Bools = ~ladders.attends(indices_PD) | (time_P < least_time)
        values_P2 = np.stack([nats.predict(indices_PD), time_P], axis=1)
        return np.where(impossible[:, None], NO_CANDIDATE, values_P2)

    allocated = [guide.allocate(history.needed_saving(guide, target)) for target in guide.targets]
    start_PD = np.concatenate([trials_SD, [guide.space.indices(architecture) for architecture in allocated]])
    members_PD, values_P2 = nsga2(objectives, start_PD, ladders.options_D, rng, generations=generations)
    possible = values_P2[:, 0] < NO_CANDIDATE
    return Predicted(
        members_PD[possible],
        values_P2[possible, 0],
        1.0 / np.maximum(values_P2[possible, 1], 0.01),
        {guide.axes.quality: _describe(nats), "relative_time": _describe(time)},
    )


def predictors(history: History, guide: Guide) -> tuple[Predictor, Predictor]:
    """Of nats per token, and of the child's time as a share of the parent's (1 / speed-up): both nearly additive."""
    ladders = guide.ladders
    trials_SD = np.array([trial.indices for trial in history.finished])
    nats_S = np.array([trial.loss for trial in history.finished])
    time_S = np.array([1.0 / trial.speedup for trial in history.finished])
    return (
        fit(trials_SD, nats_S, ladders.nats, ladders.options_D),
        fit(trials_SD, time_S, lambda indices_PD: 1.0 - ladders.saving(indices_PD), ladders.options_D),
    )


def _describe(predictor: Predictor) -> str:
    return f"{predictor.model} of the {predictor.of}, cross-validated MAPE {predictor.mape:.2%}"
