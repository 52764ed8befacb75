"""What a child has to beat: uniform width, depth by block influence, and luck, at about the same measured speed."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from contextlib import suppress

from llmprune.architecture import Architecture
from llmprune.errors import ModelError
from llmprune.progress import Advance
from llmprune.search.costs import CostTable
from llmprune.search.evaluate import Judge
from llmprune.search.warm_starts import depth_by_influence, uniform_width

SPEED_TOLERANCE = 0.02
RANDOM_ATTEMPTS = 2000


def baseline_architectures(
    judge: Judge,
    influence: Sequence[float],
    costs: CostTable,
    phase: str,
    speedup: float,
    *,
    draws: int,
    seed: int,
    progress: Advance,
) -> dict[str, Architecture]:
    """One architecture a method at an estimated `speedup`; where a method offers several, the best on `judge`'s tokens.

    uniform: one KV group count and FFN width for all layers, the best of those within 2% of the speed, or the nearest.
    shortgpt: whole layers dropped, least block influence first. random: the best of `draws` random architectures
    within 2% of the speed. A method that cannot reach the speed is left out.
    """
    generator = random.Random(seed)
    offered: dict[str, list[Architecture | None]] = {
        "uniform": _nearest(uniform_width(costs, phase, speedup), costs, phase, speedup),
        "shortgpt": [depth_by_influence(influence, costs, phase, speedup)],
        "random": [random_architecture(costs, phase, speedup, generator) for _ in range(draws)],
    }
    total, done = sum(len(architectures) for architectures in offered.values()), 0
    chosen: dict[str, Architecture] = {}
    for name, architectures in offered.items():
        losses: dict[Architecture, float] = {}
        for architecture in architectures:
            done += 1
            progress(done, total)
            if architecture is not None:
                # A child whose logits are NaN is no baseline.
                with suppress(ModelError):
                    losses[architecture] = judge.score(architecture).nats_per_token
        if losses:
            chosen[name] = min(losses, key=losses.__getitem__)
    return chosen


def _nearest(
    uniform: Sequence[Architecture], costs: CostTable, phase: str, speedup: float
) -> list[Architecture | None]:
    within = [a for a in uniform if abs(costs.speedup(a, phase) / speedup - 1.0) <= SPEED_TOLERANCE]
    return [*(within or uniform[:1])]


def random_architecture(costs: CostTable, phase: str, speedup: float, generator: random.Random) -> Architecture | None:
    """An architecture drawn uniformly from those of the space within 2% of an estimated speed-up.

    Decisions are drawn independently, each option weighted by exp(-tilt * saving) with the tilt that makes the expected
    time right (which leaves architectures of equal time equally likely), and a draw outside the 2% is rejected.
    None if no draw of many fits: the ladders' steps are too coarse.
    """
    space = costs.space
    savings = [[costs.option_saving(phase, option) for option in decision.options] for decision in space.decisions]
    tilt = _tilt(savings, 1.0 - 1.0 / speedup)
    weights = [_weights(row, tilt) for row in savings]
    for _ in range(RANDOM_ATTEMPTS):
        architecture = space.architecture([generator.choices(range(len(row)), row)[0] for row in weights])
        near = abs(costs.speedup(architecture, phase) / speedup - 1.0) <= SPEED_TOLERANCE
        if near and any(layer.attention.kv_groups for layer in architecture.layers):
            return architecture
    return None


def _weights(savings: Sequence[float], tilt: float) -> list[float]:
    top = max(savings, key=lambda saving: -tilt * saving)
    return [math.exp(-tilt * (saving - top)) for saving in savings]


def _tilt(savings: Sequence[Sequence[float]], needed: float) -> float:
    """The tilt at which the expected saving of a draw is `needed` (a share of the parent's time), by bisection."""

    def expected_saving(tilt: float) -> float:
        rows = [(_weights(row, tilt), row) for row in savings]
        return sum(sum(w * s for w, s in zip(*row, strict=True)) / sum(row[0]) for row in rows)

    # Savings are shares of the parent's time over all decisions: the steepest tilt must tell single blocks apart.
    low, high = -100.0 * len(savings), 100.0 * len(savings)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_saving(middle) > needed else (low, middle)
    return (low + high) / 2
