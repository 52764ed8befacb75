"""Sequential linear programming: the table is estimated anew at the best known child, and solved close to it."""

from __future__ import annotations

from dataclasses import replace

from llmprune.search.samplers.guide import Guide
from llmprune.search.samplers.guided import GuidedSampler, Proposal, Question
from llmprune.tables.allocate import Near

RADII = (4, 8, 2, 12)
"""Decisions that a proposal may change, in turn at one incumbent: what fails at one size may work at another."""
POOL = 6
"""Solutions of one knapsack that are raced against each other."""
APART = 2
"""Decisions in which any two of them differ at least."""
FROM = "slp_from"
"""User attribute of a trial: hash of the incumbent that it was proposed from."""


class SlpSampler(GuidedSampler):
    """Proposes the best of a diverse pool of knapsack solutions around the incumbent of the trial's target.

    The scores of the knapsack are the one-backward estimate at the incumbent itself, so that interactions with what is
    gone already are in them, and blocks may grow back; the trust region keeps the step where the estimate means
    something; the race decides among the pool on real children.
    """

    def __init__(self, guide: Guide, *, seed: int) -> None:
        super().__init__(guide, seed=seed)

    def propose(self, question: Question) -> Proposal | None:
        space, history = self.guide.space, question.history
        incumbent = history.best(question.target)
        if incumbent is not None and incumbent.holds(question.target):
            at = space.architecture(incumbent.indices)
        else:
            at = self.guide.allocate(question.needed_saving)
            if space.indices(at) not in history.known:
                return Proposal(space.indices(at))
        tried = sum(trial.notes.get(FROM) == at.hash for trial in history.finished)
        allocator = replace(self.guide.allocator, delta_nats=self.guide.estimate(at))
        wanted: dict[str, float] = {self.guide.phase: 1.0 / (1.0 - question.needed_saving)}
        # A size at which all is known leads on to the next.
        for turn in range(tried, tried + len(RADII)):
            near = Near(at, RADII[turn % len(RADII)])
            # As many more as are known already around here, so that some are left.
            pool = allocator.pool(wanted, count=POOL + min(tried, POOL), distance=APART, near=near)
            unknown = [found for found in pool if space.indices(found) not in history.known][:POOL]
            if unknown:
                best = self.guide.race(unknown) if len(unknown) > 1 else unknown[0]
                return Proposal(space.indices(best), {FROM: at.hash})
        return None
