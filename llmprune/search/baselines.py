"""What a child has to beat: uniform width, depth by block influence, and luck, at about the same measured speed."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from contextlib import suppress

from llmprune.architecture import BLOCK_KINDS, Architecture, BlockKind
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

    Blocks are drawn independently, each choice weighted by exp(-tilt * saving) with the tilt that makes the expected
    time right (which leaves architectures of equal time equally likely), and a draw outside the 2% is rejected.
    None if no draw of many fits: the ladders' steps are too coarse.
    """
    space, tilt = costs.space, _tilt(costs, phase, 1.0 - 1.0 / speedup)
    weights = {kind: _weights(costs, phase, kind, tilt) for kind in BLOCK_KINDS}
    for _ in range(RANDOM_ATTEMPTS):
        architecture = Architecture.of(
            (
                generator.choices(space.kv_groups, weights["attention"])[0],
                generator.choices(space.ffn_width, weights["ffn"])[0],
            )
            for _ in range(space.shape.layers)
        )
        near = abs(costs.speedup(architecture, phase) / speedup - 1.0) <= SPEED_TOLERANCE
        if near and any(layer.attention.kv_groups for layer in architecture.layers):
            return architecture
    return None


def _weights(costs: CostTable, phase: str, kind: BlockKind, tilt: float) -> list[float]:
    savings = [costs.block_saving(phase, kind, units) for units in costs.space.ladder(kind)]
    return [math.exp(-tilt * costs.space.shape.layers * (saving - max(savings))) for saving in savings]


def _tilt(costs: CostTable, phase: str, needed: float) -> float:
    """The tilt at which the expected saving of a draw is `needed` (a share of the parent's time), by bisection."""

    def expected_saving(tilt: float) -> float:
        total = 0.0
        for kind in BLOCK_KINDS:
            weights = _weights(costs, phase, kind, tilt)
            savings = [costs.block_saving(phase, kind, units) for units in costs.space.ladder(kind)]
            total += sum(w * s for w, s in zip(weights, savings, strict=True)) / sum(weights)
        return total * costs.space.shape.layers

    low, high = -100.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_saving(middle) > needed else (low, middle)
    return (low + high) / 2
