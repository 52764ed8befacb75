"""Architectures drawn at random at an estimated speed-up."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from llmprune.choices.architecture import Architecture
from llmprune.tables.costs import CostTable

SPEED_TOLERANCE = 0.02
"""How far from a speed-up that was asked for an estimated one may be where a method picks the best of several."""
RANDOM_ATTEMPTS = 2000


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
        if near and architecture.attends:
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
