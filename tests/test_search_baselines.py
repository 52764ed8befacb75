"""What a child has to beat: at the same estimated speed, the best each method offers, and luck without favour."""

from __future__ import annotations

import random
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import linear_costs, tiny_space

from llmprune.architecture import Architecture
from llmprune.search.baselines import SPEED_TOLERANCE, baseline_architectures, random_architecture
from llmprune.search.warm_starts import depth_by_influence, uniform_width

CHI_SQUARE_15_AT_999_PERMILLE = 37.7


class Scores:
    """Stands in for a judge: loses what leaves, and remembers whom it scored."""

    def __init__(self) -> None:
        self.scored: list[Architecture] = []

    def score(self, architecture: Architecture) -> Any:
        self.scored.append(architecture)
        return SimpleNamespace(nats_per_token=-sum(choice.units for _, choice in architecture.blocks()))


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


def test_each_method_offers_its_best() -> None:
    space = tiny_space(layers=4, ffn_step=8)
    costs, influence = linear_costs(space, attention=0.1, ffn=0.1), [0.9, 0.1, 0.5, 0.2]
    judge, seen = Scores(), []
    found = baseline_architectures(
        judge,  # type: ignore[arg-type]
        influence,
        costs,
        "decode",
        1.3,
        draws=7,
        seed=3,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert list(found) == ["uniform", "shortgpt", "random"]
    assert found["shortgpt"] == depth_by_influence(influence, costs, "decode", 1.3)
    by_distance = uniform_width(costs, "decode", 1.3)
    within = [a for a in by_distance if abs(costs.speedup(a, "decode") / 1.3 - 1) <= SPEED_TOLERANCE] or by_distance[:1]
    assert found["uniform"] == min(within, key=lambda architecture: judge.score(architecture).nats_per_token)
    drawn = judge.scored[len(within) + 1 :][:7]
    assert found["random"] == min(drawn, key=lambda architecture: judge.score(architecture).nats_per_token)
    total = len(within) + 1 + 7
    assert seen == [(done, total) for done in range(1, total + 1)]


def test_a_method_that_cannot_reach_the_speed_is_left_out() -> None:
    costs = linear_costs(tiny_space(layers=2), attention=0.1, ffn=0.1)
    found = baseline_architectures(
        Scores(),  # type: ignore[arg-type]
        [0.1, 0.2],
        costs,
        "decode",
        9.0,
        draws=2,
        seed=0,
        progress=lambda done, total: None,
    )
    assert list(found) == ["uniform"]
