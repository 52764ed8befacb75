"""EvoPress (arXiv 2410.14649): level switches of the best known child, at equal time, raced against each other."""

from __future__ import annotations

import numpy as np

from llmprune.search.samplers.guide import Guide
from llmprune.search.samplers.guided import GuidedSampler, Proposal, Question
from llmprune.search.samplers.ladders import Bools, Indices, Ints, Ladders, as_indices

SLACK = 1e-9
"""Share of the parent's time: rounding of sums."""
CHILDREN = 16
"""Level switches that are raced for one proposal, lambda in the paper."""
ATTEMPTS_PER_CHILD = 10


class EvoPressSampler(GuidedSampler):
    """A (1, lambda) evolution for each target, whose incumbent is the study's best known there.

    As in the paper: `children` (lambda) level switches of the incumbent, which the guide's race narrows down on growing
    slices of tokens. The survivor is the trial, scored in full: only there is it compared with the incumbent, so a
    lucky score in the race expires. Unlike the paper, where a level costs parameters, a switch keeps the estimated
    time, corrected by what was measured. Without an incumbent that holds the target, the allocation of the tables is
    the first proposal.
    """

    def __init__(self, guide: Guide, *, seed: int, children: int = CHILDREN) -> None:
        super().__init__(guide, seed=seed)
        self.children = children

    def propose(self, question: Question) -> Proposal | None:
        space, history = self.guide.space, question.history
        incumbent = history.best(question.target)
        if incumbent is not None and incumbent.holds(question.target):
            start = incumbent.indices
        else:
            start = space.indices(self.guide.allocate(question.needed_saving))
            if start not in history.known:
                return Proposal(start)
        children = self._children(np.array(start), question)
        if len(children) < 2:
            return Proposal(children[0]) if children else None
        return Proposal(space.indices(self.guide.race([space.architecture(child) for child in children])))

    def _children(self, start: Ints, question: Question) -> list[Indices]:
        """Different unknown children, in the order of their making."""
        children: dict[Indices, None] = {}
        for _ in range(ATTEMPTS_PER_CHILD * self.children):
            switched = level_switch(start, self.guide.ladders, question.needed_saving, question.rng)
            if switched is not None and (child := as_indices(switched)) not in question.history.known:
                children[child] = None
                if len(children) == self.children:
                    break
        return list(children)


def level_switch(indices_D: Ints, ladders: Ladders, needed_saving: float, rng: np.random.Generator) -> Ints | None:
    """A child that differs in min(U1, U2) switches, U uniform in {1, 2, 3}, and saves at least `needed_saving`.

    A switch raises one decision by a rung and lowers another. Rungs differ in time, so afterwards more decisions are
    lowered until the budget holds, then raised as long as one fits: the child is as slow as it may be. No decision
    goes both ways, so the child differs from its parent. None if this draw cannot hold the budget or cannot move.
    """
    child_D = indices_D.copy()
    raised_D, lowered_D = (np.zeros(len(child_D), dtype=np.bool_) for _ in range(2))
    for _ in range(min(rng.integers(1, 4, size=2))):
        _move(child_D, +1, ladders.can_rise(child_D) & ~lowered_D, raised_D, rng)
        _move(child_D, -1, ladders.can_fall(child_D) & ~raised_D, lowered_D, rng)
    # Each round moves a rung in one direction, so both loops end.
    while ladders.saving(child_D) < needed_saving - SLACK:
        if not _move(child_D, -1, ladders.can_fall(child_D) & ~raised_D, lowered_D, rng):
            return None
    moving = True
    while moving:
        fits_D = ladders.rise_costs(child_D) <= ladders.saving(child_D) - needed_saving + SLACK
        moving = _move(child_D, +1, ladders.can_rise(child_D) & fits_D & ~lowered_D, raised_D, rng)
    return child_D if (raised_D | lowered_D).any() else None


def _move(child_D: Ints, step: int, candidates_D: Bools, moved_D: Bools, rng: np.random.Generator) -> bool:
    """Move one random candidate in place, and mark it; False if there is none."""
    candidates = np.flatnonzero(candidates_D)
    if not len(candidates):
        return False
    decision = rng.choice(candidates)
    child_D[decision] += step
    moved_D[decision] = True
    return True
