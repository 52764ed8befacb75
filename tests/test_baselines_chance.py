"""Random architectures at a speed: luck without favour."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from tiny import linear_costs, tiny_space

from llmprune.tables.draw import SPEED_TOLERANCE, random_architecture

CHI_SQUARE_15_AT_999_PERMILLE = 37.7


@pytest.mark.parametrize("speedup", [1.1, 1.3, 2.0])
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_random_architectures_are_within_2_percent_of_the_speed(phase: str, speedup: float) -> None:
    space = tiny_space(layers=8, kv_groups=3, ffn_width=96, ffn_step=8)
    costs, generator = linear_costs(space, attention=0.04, ffn=0.07), random.Random(0)
    for _ in range(50):
        found = random_architecture(costs, phase, speedup, generator)
        assert found is not None and found in space
        space.shape.check(found)
        assert abs(costs.speedup(found, phase) / speedup - 1) <= SPEED_TOLERANCE


def test_architectures_of_equal_cost_are_equally_likely() -> None:
    # Every rung saves a tenth: 16 architectures of two layers save three, and nothing else is near.
    costs, generator = linear_costs(tiny_space(layers=2), attention=0.2, ffn=0.2), random.Random(1)
    drawn: Counter[Any] = Counter(random_architecture(costs, "decode", 1 / 0.7, generator) for _ in range(800))
    assert None not in drawn and len(drawn) == 16
    assert sum((count - 50) ** 2 / 50 for count in drawn.values()) < CHI_SQUARE_15_AT_999_PERMILLE


def test_chance_never_leaves_a_model_without_attention() -> None:
    # All of the attention must go but for one group: half of what is that fast has none at all.
    costs, generator = linear_costs(tiny_space(layers=2, kv_groups=1), attention=0.4, ffn=0.01), random.Random(2)
    for _ in range(50):
        found = random_architecture(costs, "decode", 1 / 0.59, generator)
        assert found is not None and any(layer.attention.kv_groups for layer in found.layers)


def test_a_speed_that_the_steps_do_not_hit_has_no_random_architecture() -> None:
    costs = linear_costs(tiny_space(layers=2), attention=0.2, ffn=0.2)
    assert random_architecture(costs, "decode", 1 / 0.75, random.Random(0)) is None
    assert random_architecture(costs, "decode", 60.0, random.Random(0)) is None
