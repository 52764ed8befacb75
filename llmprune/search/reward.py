"""MnasNet's reward (arXiv 1807.11626): quality and speed in one number, for single-objective samplers.

The paper maximises `accuracy * (latency / target latency) ** w`. A language model has no accuracy: quality is
`exp(parent's nats per token - child's)`, the parent's perplexity over the child's: 1 for the parent, towards 0 as the
child gets worse. A factor in quality is thus a difference in nats. Latency is the child's measured time as a share of
the parent's (1 / speed-up).
"""

from __future__ import annotations

from typing import NamedTuple

from optuna.study import StudyDirection

from llmprune.core.recipe import Phase, SearchRecipe
from llmprune.measure.record import Record


class Exponents(NamedTuple):
    """`w` of the reward: of children that hold the target (`within`), and of slower ones (`beyond`); both <= 0."""

    within: float
    beyond: float


SOFT = Exponents(-0.07, -0.07)
"""The paper's soft target: half the time is worth a factor 1.05 everywhere. Calibrated on accuracies, where that is
much; here it is 0.05 nats per token, less than pruning costs, so the parent wins: take a steeper exponent, such as -1,
which gives 0.69 nats for half the time."""
HARD = Exponents(0.0, -1.0)
"""The paper's hard target: speed beyond the target earns nothing, and time beyond it is paid in proportion."""


def reward(record: Record, *, phase: Phase, target: float, w: Exponents) -> float:
    """How good a measured child is for a target speed-up: higher is better, and above 0.

    `quality * (target / measured speed-up) ** w`, where the quotient is latency over the target's latency.
    """
    assert target > 0, f"a target is a speed-up above 0, got {target}"
    quality = 1.0 / record.ppl_ratio
    late = target / record.value(f"{phase}_speedup")
    return float(quality * late ** (w.within if late <= 1.0 else w.beyond))


def directions_of(recipe: SearchRecipe) -> list[StudyDirection]:
    """Nats per token (of a draft, disagreement) down and the measured speed-up up; or the reward up."""
    if recipe.reward == "front":
        return [StudyDirection.MINIMIZE, StudyDirection.MAXIMIZE]
    return [StudyDirection.MAXIMIZE]


def names_of(recipe: SearchRecipe) -> list[str]:
    """What the values of a trial are called, one a direction."""
    if recipe.reward != "front":
        return [recipe.reward]
    return ["disagreement" if recipe.objective == "draft" else "nats a token", f"{recipe.phase} speed-up"]


def values_of(record: Record, recipe: SearchRecipe) -> list[float]:
    """What a trial with this record is told, one value a direction."""
    if recipe.reward == "front":
        return [record.value(figure) for figure in recipe.axes]
    w = SOFT if recipe.reward == "mnas-soft" else HARD
    return [reward(record, phase=recipe.phase, target=recipe.targets[0], w=w)]
