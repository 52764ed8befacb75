"""SPDY's coefficient search (arXiv 2201.13096, as in ZipLM, arXiv 2302.04089): let the tables' scores be the variables.

Each layer and kind has a sensitivity coefficient that multiplies its estimated nats; the knapsack over the products is
solved at exactly the target's time. Two numbers a layer replace a choice a block, and every proposal is an optimum of
some table: what a search adds is only where the additive estimates are wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llmprune.architecture import BLOCK_KINDS
from llmprune.search.samplers.guide import Finished
from llmprune.search.samplers.guided import GuidedSampler, Proposal, Question
from llmprune.search.samplers.ladders import Floats, Indices

COEFFICIENTS = "spdy_log_coefficients"
"""User attribute: the natural logarithms of a trial's coefficients; for each layer, attention and FFN."""
TARGET = "spdy_target"
"""User attribute: the speed-up that they were drawn for."""
FIRST_STEP = 1.0
LEAST_STEP = 0.4
"""Standard deviations of a perturbed log-coefficient: at the first trial of a target, and in the end."""
SHARE_PERTURBED = 0.1
"""Of the coefficients, in one draw; SPDY's own share."""
REDRAWS = 10
WIDER = 1.2
"""A step too small to change the allocation grows by this factor at each redraw."""


class SpdySampler(GuidedSampler):
    """Random search around the best coefficients so far, which later trials and other workers read from the trials."""

    def propose(self, question: Question) -> Proposal | None:
        target, history = question.target, question.history
        tried = [t for t in history.finished if t.notes.get(TARGET) == target and COEFFICIENTS in t.notes]
        ones = np.zeros(self.guide.space.shape.layers * len(BLOCK_KINDS))
        plain = self._allocate(ones, question)
        if plain not in history.known and not any(_is_ones(trial) for trial in tried):
            return _proposal(plain, ones, target)
        best = _best(tried, [t for t in history.finished if t.indices == plain], ones, target)
        step = max(FIRST_STEP / np.sqrt(1 + len(tried)), LEAST_STEP)
        for _ in range(REDRAWS):
            chosen = question.rng.random(len(best)) < SHARE_PERTURBED
            chosen[question.rng.integers(len(best))] = True
            drawn = best + chosen * question.rng.normal(0.0, step, len(best))
            indices = self._allocate(drawn, question)
            if indices not in history.known:
                return _proposal(indices, drawn, target)
            step *= WIDER
        return None

    def _allocate(self, log_coefficients: Floats, question: Question) -> Indices:
        coefficients = dict(zip(self.guide.space.blocks(), np.exp(log_coefficients).tolist(), strict=True))
        found = self.guide.allocate(question.needed_saving, self.guide.allocator_with(coefficients.__getitem__))
        return self.guide.space.indices(found)


def _best(tried: Sequence[Finished], plain: Sequence[Finished], ones: Floats, target: float) -> Floats:
    """The coefficients of the best trial for the target; a queued allocation of the plain tables has ones."""
    scored = [(trial.rank(target), trial.notes[COEFFICIENTS]) for trial in tried]
    scored += [(trial.rank(target), ones) for trial in plain]
    _, best = min(scored, key=lambda pair: pair[0], default=(None, ones))
    return np.array(best, dtype=np.float64)


def _is_ones(trial: Finished) -> bool:
    return not any(trial.notes[COEFFICIENTS])


def _proposal(indices: Indices, log_coefficients: Floats, target: float) -> Proposal:
    notes: dict[str, Any] = {TARGET: target, COEFFICIENTS: [float(number) for number in log_coefficients]}
    return Proposal(indices, notes)
