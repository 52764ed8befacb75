"""What all guided samplers share: they propose whole architectures, and never one that the study knows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial

from llmprune.search.samplers.guide import Guide, History
from llmprune.search.samplers.ladders import Indices, as_indices

FALLBACK_DRAWS = 200
"""One-rung moves tried for an unknown architecture, before a known one is proposed: a space may have no more."""


@dataclass(frozen=True)
class Question:
    """What one trial asks of a sampler: an architecture of most use at `target`.

    `needed_saving`: the estimated share of the parent's time that it should save for that, corrected by what was
    measured. `rng` is the trial's own: seeded by the sampler's seed and the trial's number.
    """

    history: History
    target: float
    needed_saving: float
    rng: np.random.Generator


@dataclass(frozen=True)
class Proposal:
    """An architecture, and what the trial is to remember of its making (JSON values, by user attribute)."""

    indices: Indices
    notes: Mapping[str, Any] = field(default_factory=dict)


class GuidedSampler(BaseSampler, ABC):
    """An Optuna sampler without a state of its own: a proposal follows from the stored trials, the guide, the seed and
    the trial's number, so any number of workers and restarts goes on where the study stands."""

    def __init__(self, guide: Guide, *, seed: int) -> None:
        self.guide = guide
        self.seed = seed % 2**32

    @abstractmethod
    def propose(self, question: Question) -> Proposal | None:
        """An architecture for the question; None, or one that is known, if no better idea is left."""

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The whole space: it is static."""
        return {d.name: IntDistribution(0, len(d.options) - 1) for d in self.guide.space.decisions}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """One index for every decision. Optuna does not ask for a queued trial, whose parameters are given."""
        history = History.of(study, self.guide, but=trial.number)
        target = history.target(self.guide, trial.number)
        needed = history.needed_saving(self.guide, target)
        question = Question(history, target, needed, np.random.default_rng([self.seed, trial.number]))
        proposal = self.propose(question)
        if proposal is None or proposal.indices in history.known:
            proposal = Proposal(self._neighbour(question))
        for key, value in proposal.notes.items():
            # As Optuna's own samplers store what they need again: a sampler is given no live trial.
            study._storage.set_trial_user_attr(trial._trial_id, key, value)
        return dict(zip(search_space, proposal.indices, strict=True))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """For a parameter that is none of the space's: anything."""
        seed = (self.seed + trial.number) % 2**32
        return RandomSampler(seed=seed).sample_independent(study, trial, param_name, param_distribution)

    def _neighbour(self, question: Question) -> Indices:
        """One rung off a random known architecture, itself unknown if one is found."""
        ladders, rng = self.guide.ladders, question.rng
        known = sorted(question.history.known) or [as_indices(ladders.options_D - 1)]
        found = known[0]
        for _ in range(FALLBACK_DRAWS):
            moved = ladders.one_rung_away(np.array(known[rng.integers(len(known))]), rng)
            if moved is not None and ladders.attends(moved):
                found = as_indices(moved)
                if found not in question.history.known:
                    break
        return found
