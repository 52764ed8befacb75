"""What a space can reach at all: its smallest child and its half-sized one, timed before anything is known of blocks.

How fast a child is depends on its sizes alone, so these keep the first units of each block and repair nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from llmprune.choices.architecture import Architecture
from llmprune.choices.choice import Choice, Kept, attends
from llmprune.choices.dimensions import BlockKind
from llmprune.choices.space import Decision, Space
from llmprune.core.budgets import parse_budget, parse_pick
from llmprune.core.errors import RecipeError
from llmprune.core.recipe import Recipe
from llmprune.measure.speed.throughput import Speed, Workload, measure_paired
from llmprune.measure.speed.turns import timing
from llmprune.models.parent import Parent
from llmprune.models.surgery import prune
from llmprune.models.waiting import with_children

PHASES = ("decode", "prefill")
REFUSED_BEYOND = 1.1
"""A target that is out of reach by no more than this factor may be so by a slip of timing: a warning, no error."""
REPEATS = 2
"""Enough: a speed-up is a median over all tokens of all repeats."""


@dataclass(frozen=True)
class PhaseReach:
    """Measured speed-ups of two children that say nothing of quality."""

    fastest: float
    """Of the smallest child that the space holds."""
    halved: float
    """Of a child whose every block is about half as large as the parent's (with space.size=layer: of every other
    layer)."""

    @property
    def untouched_share(self) -> float:
        """Share of the parent's time that the smallest child still takes, whatever is chosen: embedding, output, last
        norm, and what each call costs."""
        return min(1.0, 1.0 / self.fastest)

    def to_json(self) -> dict[str, float]:
        return {**asdict(self), "untouched_share": self.untouched_share}


Reach = Mapping[str, PhaseReach]
"""By phase, "decode" and "prefill"."""


def measure_reach(parent: Parent, space: Space, workload: Workload) -> Reach:
    """Time the space's smallest and half-sized children beside the parent, in the workload's engine."""
    with timing(workload.device):
        _, (fastest, half) = time_ends(parent, space, workload, REPEATS)
    return {phase: PhaseReach(_median(fastest, phase), _median(half, phase)) for phase in PHASES}


def time_ends(parent: Parent, space: Space, workload: Workload, repeats: int) -> tuple[Speed, list[Speed]]:
    """Speed of the parent, and of the space's smallest and half-sized children beside it; the caller has the device to
    itself."""
    repairs = FirstUnits(parent)

    def timed() -> tuple[Speed, list[Speed]]:
        children = [prune(parent, architecture, repairs) for architecture in (smallest(space), halved(space))]
        return measure_paired(parent.model, children, workload, repeats)

    return with_children(parent.model, timed)


def reach_to_json(reach: Reach) -> dict[str, Any]:
    return {phase: of_phase.to_json() for phase, of_phase in reach.items()}


def reach_from_json(data: Any) -> Reach:
    """Inverse of `reach_to_json`. Raises KeyError, TypeError or ValueError on anything else."""
    return {phase: PhaseReach(float(data[phase]["fastest"]), float(data[phase]["halved"])) for phase in PHASES}


def described(reach: Reach) -> str:
    """What the space can reach, in one line."""
    told = (
        f"{phase} up to {of_phase.fastest:.2f}x ({of_phase.halved:.2f}x with every block halved), since no choice "
        f"touches {of_phase.untouched_share:.0%} of its time"
        for phase, of_phase in reach.items()
    )
    return "within reach of this space, measured: " + "; ".join(told)


def check_reach(reach: Reach, recipe: Recipe) -> list[str]:
    """Warnings about targets, budgets and picks that are barely out of reach. Raises RecipeError, naming the fix, on
    one that is so by more than timing can be wrong."""
    warnings = []
    for key, phase, wanted in _wanted(recipe):
        of_phase = reach[phase]
        if wanted <= of_phase.fastest:
            continue
        told = (
            f"{key} asks for {wanted:g}x in {phase}, and the smallest child of this space was timed at "
            f"{of_phase.fastest:.2f}x: no choice touches {of_phase.untouched_share:.0%} of its time (embedding, output "
            f"and what each call costs); every block halved gives {of_phase.halved:.2f}x"
        )
        if wanted > REFUSED_BEYOND * of_phase.fastest:
            raise RecipeError(f"{told}. {_fix(key, of_phase, recipe)}, or give the space smaller choices")
        warnings.append(f"{told}, so it may not be reached")
    return warnings


def _wanted(recipe: Recipe) -> Iterable[tuple[str, str, float]]:
    """The key, phase and speed-up of everything that a run aims at or must hold."""
    for target in recipe.search.targets:
        yield "search.targets", recipe.search.phase, target
    limits = [("export.pick", budget) for budget in parse_pick(recipe.export.pick).budgets]
    limits += [("search.budgets", parse_budget(text)) for text in recipe.search.budgets]
    for key, budget in limits:
        phase = budget.metric.removesuffix("_speedup")
        if phase in PHASES and budget.relation == ">=":
            yield key, phase, budget.limit


def _fix(key: str, reach: PhaseReach, recipe: Recipe) -> str:
    if key != "search.targets":
        return f"Lower {key}"
    within = [f"{target:g}" for target in recipe.search.targets if target <= reach.fastest]
    # Where none is within, a target that costs less than every block's half.
    return f"Set search.targets=[{','.join(within) or f'{max(1.01, 0.5 * (1 + reach.halved)):.2f}'}]"


def smallest(space: Space) -> Architecture:
    """The child of the space with the least work: every choice the smallest, but for one attention that has to stay."""
    indices = [0] * len(space.decisions)
    if not space.architecture(indices).attends:
        first = space.decisions[0].options
        indices[0] = next(i for i, option in enumerate(first) if attends(choice for _, choice in option))
    return space.architecture(indices)


def nearly_whole(space: Space) -> Architecture:
    """The child of the space that has one decision a step below the parent's."""
    indices = [len(decision.options) - 1 for decision in space.decisions]
    changed = next(i for i, last in enumerate(indices) if last)
    indices[changed] -= 1
    return space.architecture(indices)


def halved(space: Space) -> Architecture:
    """The child of the space whose every block keeps about half of its rows, but something; or every other layer."""
    if space.size == "layer":
        return space.architecture([0 if i % 2 else len(d.options) - 1 for i, d in enumerate(space.decisions)])
    return space.architecture([_nearest_half(space, decision) for decision in space.decisions])


def _nearest_half(space: Space, decision: Decision) -> int:
    blocks = [[choice for _, choice in option if isinstance(choice, Choice)] for option in decision.options]
    if not blocks[-1]:
        # The vocabulary: no block.
        return len(blocks) - 1
    rows = [sum(map(space.shape.rows, option)) for option in blocks]
    kept = [i for i, count in enumerate(rows) if count]
    return min(kept, key=lambda i: abs(rows[i] - rows[-1] / 2))


def _median(speed: Speed, phase: str) -> float:
    return (speed.decode_speedup if phase == "decode" else speed.prefill_speedup).median


class FirstUnits:
    """Repairs of a child that is only timed: the first units stay, the output projection is cut to them."""

    def __init__(self, parent: Parent) -> None:
        self._parent = parent

    def kept(self, layer: int, choice: Choice) -> Kept:
        return choice.kept({}, self._parent.shape)

    def norm_squares(self, layer: int, name: str) -> None:
        return None

    def input_squares(self, layer: int, kind: BlockKind) -> None:
        return None

    def head_squares(self) -> None:
        return None

    def output(self, layer: int, choice: Choice, weight_DI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return weight_DI[:, : self._parent.shape.inputs(choice)], self._parent.output_bias(layer, choice.kind)
