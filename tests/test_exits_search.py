"""Rules for leaving, scored from stored figures: held to the model that has them, and to counting by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from exits_tiny import random_exits
from families import CASES, IDS, tiny_model, tokens, two_sources
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprune.core.budgets import parse_budget
from llmprune.core.recipe_exits import CRITERIA, ExitsRecipe
from llmprune.exits.costs import COUNTS, ExitCosts, measure_costs
from llmprune.exits.measuring import score_exits
from llmprune.exits.policy import confidences, estimate, follow, left_at, token_costs, worst_cost
from llmprune.exits.search import Trunk, baselines, beyond, non_dominated, search_rules, worth_measuring
from llmprune.exits.statistics import ExitStatistics, gather_statistics
from llmprune.exits.training import train_exits
from llmprune.measure.quality.perplexity import score
from llmprune.measure.speed.throughput import Workload
from llmprune.models.exits import with_exits
from llmprune.models.modeling_pruned import Criterion, ExitRules, ExitsCache

LAYERS = (1, 2, 3)


def invented(seed: int, windows: int = 3, positions: int = 30, exits: int = 3) -> ExitStatistics:
    """Statistics of no model: later exits agree more often."""
    generator = torch.Generator().manual_seed(seed)
    shape = windows, positions
    trunk_top = torch.randint(9, shape, generator=generator)
    wrong = torch.rand(exits, *shape, generator=generator) > torch.linspace(0.3, 0.9, exits)[:, None, None]
    figures = {name: torch.rand(exits, *shape, generator=generator) for name in ("gate", "top1", "margin", "entropy")}
    return ExitStatistics(
        tuple(range(1, exits + 1)),
        figures,
        torch.where(wrong, torch.randint(9, (exits, *shape), generator=generator), trunk_top),
        torch.rand(exits, *shape, generator=generator) + 2,
        trunk_top,
        torch.rand(*shape, generator=generator) + 1,
        torch.full((windows,), 1 / windows, dtype=torch.float64),
    )


def costs_of(call: float = 0.02, head: float = 0.2, gate: float = 0.001) -> ExitCosts:
    """Four layers that take a fifth of a step each, twice that for 16 tokens; keys and values a tenth of a layer."""
    one = np.array([0.2, 0.4, 0.6, 0.8])
    several = {n: 1 + (n - 1) / 15 for n in COUNTS}
    return ExitCosts(
        LAYERS,
        call,
        {n: tuple(float(v) for v in one * several[n]) for n in COUNTS},
        {n: tuple(float(v) for v in one * several[n] / 10) for n in COUNTS},
        {n: head * several[n] for n in COUNTS},
        0.005,
        gate,
    )


RULES = st.builds(
    lambda layers, criterion, thresholds, waiting, keys: ExitRules(
        layers, criterion, tuple(thresholds[: len(layers)]), waiting, keys
    ),
    st.sampled_from([(1,), (2,), (3,), (1, 2), (1, 3), (2, 3), (1, 2, 3)]),
    st.sampled_from(CRITERIA),
    st.lists(st.floats(0, 1.1), min_size=3, max_size=3),
    st.integers(1, 40),
    st.sampled_from(["exact", "propagated"]),
)


def by_hand(statistics: ExitStatistics, costs: ExitCosts, rules: ExitRules) -> tuple[float, float, list[int]]:
    """Nats and cost a token, and the depths, walking token by token as `ExitsCache.step` does."""
    places = [layer - 1 for layer in rules.layers]
    nats, spent, depths = [], [], []
    for w in range(statistics.trunk_nats_WN.shape[0]):
        waiting = [0] * len(places)
        for t in range(statistics.trunk_nats_WN.shape[1]):
            cost = costs.call + costs.run[1][places[0]]
            left = None
            for i, place in enumerate(places):
                cost += costs.gate if rules.criterion == "gate" else costs.head[1] + costs.figures
                if rules.criterion == "agreement":
                    before = None if i == 0 else statistics.top_EWN[places[i - 1], w, t]
                    sure = statistics.confidence["top1"][place, w, t] * (
                        before is not None and bool(before == statistics.top_EWN[place, w, t])
                    )
                else:
                    sure = statistics.confidence[rules.criterion][place, w, t]
                if waiting[i] < rules.waiting and bool(sure >= rules.thresholds[i]):
                    waiting[i] += 1
                    cost += costs.head[1] if rules.criterion == "gate" else 0
                    left = i
                    break
                last = places[i + 1] if i + 1 < len(places) else 3
                here, waiting[i] = waiting[i], 0
                if rules.keys == "exact":
                    cost += costs.layers_between(rules.layers[i], (*LAYERS, None)[last], 1 + here)
                else:
                    cost += costs.call + costs.run[1][last] - costs.run[1][place]
                    cost += costs.keys_between(rules.layers[i], (*LAYERS, None)[last], here) if here else 0
                if i + 1 < len(places):
                    waiting[i + 1] += here
            cost += costs.head[1] if left is None else 0
            nats.append(
                float(statistics.trunk_nats_WN[w, t] if left is None else statistics.nats_EWN[places[left], w, t])
            )
            spent.append(float(cost))
            depths.append(len(places) if left is None else left)
    return sum(nats) / len(nats), sum(spent) / len(spent), depths


@settings(deadline=None, max_examples=30)
@given(RULES, st.integers(0, 5))
def test_an_estimate_is_what_walking_through_the_text_gives(rules: ExitRules, seed: int) -> None:
    statistics, costs = invented(seed), costs_of()
    found = estimate(statistics, costs, rules)
    nats, spent, depths = by_hand(statistics, costs, rules)
    assert found.nats_per_token == pytest.approx(nats, abs=1e-6)
    assert found.mean_cost == pytest.approx(spent, abs=1e-9)
    shares = [depths.count(i) / len(depths) for i in range(len(rules.layers) + 1)]
    assert found.depths == pytest.approx(shares)
    scans = follow(rules, confidences(statistics, rules))
    # A hard limit: no token is dearer than the worst case, whatever the text.
    assert token_costs(costs, rules, scans).max() <= worst_cost(costs, rules, "early") + 1e-9


def test_drafts_that_are_always_right_cost_rounds_and_no_more() -> None:
    statistics, costs = invented(0, windows=1, positions=31), costs_of()
    right = replace(statistics, top_EWN=statistics.trunk_top_WN.expand(3, -1, -1))
    found = estimate(right, costs, ExitRules((1,), "gate", (0.0,), waiting=3, keys="exact"), "draft")
    first, deep = costs.call + 0.2, costs.call + 0.6 * (1 + 3 / 15) + costs.heads(4)
    # Seven rounds of three drafts and a token of the trunk; the last three tokens are two drafts and one more.
    last = 3 * first + 3 * costs.gate + 2 * costs.heads(1) + costs.call + 0.6 * (1 + 2 / 15) + costs.heads(3)
    whole = 7 * (4 * first + 3 * costs.gate + 3 * costs.heads(1) + deep) + last
    assert found.mean_cost == pytest.approx(whole / 31)
    assert found.nats_per_token == pytest.approx(float(statistics.trunk_nats_WN.double().mean()))
    assert found.depths == pytest.approx((23 / 31, 8 / 31))


@pytest.mark.parametrize("name", ["llama-gqa", "gpt_neox-parallel", "gemma2-gqa"])
def test_stored_figures_are_the_models_own(name: str) -> None:
    """With exact keys and values, scoring from stored figures is scoring the model."""
    trunk, split = tiny_model(CASES[IDS.index(name)]).requires_grad_(False), two_sources(16)
    tensors = random_exits(trunk)
    statistics = gather_statistics(trunk, tensors, LAYERS, split)
    assert statistics.trunk_nats == pytest.approx(score(trunk, split).nats_per_token, abs=1e-5)
    for criterion in CRITERIA:
        thresholds = [between(statistics.confident(criterion, 0, None)), between(statistics.confident(criterion, 2, 0))]
        rules = ExitRules((1, 3), criterion, tuple(thresholds), waiting=3, keys="exact")
        found = estimate(statistics, costs_of(), rules)
        scored = score_exits(with_exits(trunk, rules, tensors), split, prompt_tokens=0)
        assert scored.depths == pytest.approx(found.depths), criterion
        assert scored.quality.nats_per_token == pytest.approx(found.nats_per_token, abs=1e-5), criterion
        assert left_at(follow(rules, confidences(statistics, rules))).numel() == 5 * 15


def between(values: torch.Tensor) -> float:
    """A threshold that no rounding decides at."""
    ordered = values[values > 0].flatten().sort().values
    if not len(ordered):
        return 1.5
    middle = len(ordered) // 2
    return float(ordered[middle] + (ordered[middle - 1] if middle else 0)) / 2


def test_limits_on_the_mean_and_the_dearest_token_hold() -> None:
    trunk = Trunk("parent", 1.0, invented(1), costs_of())
    recipe = ExitsRecipe(trials=80)
    free = search_rules([trunk], recipe, [], trunk.statistics.trunk_nats)
    budgets = [parse_budget(text) for text in ("decode_speedup>=1.05", "worst_token_speedup>=0.6", "ppl_ratio<=2.5")]
    held = search_rules([trunk], recipe, budgets, trunk.statistics.trunk_nats)
    assert any(one.worst_token_speedup < 0.6 for one in free)
    assert held and all(
        one.decode_speedup >= 1.05
        and one.worst_token_speedup >= 0.6
        and math.exp(one.nats_per_token - trunk.statistics.trunk_nats) <= 2.5
        for one in held
    )
    assert search_rules([trunk], recipe, budgets, trunk.statistics.trunk_nats) == held
    assert search_rules([trunk], recipe, [parse_budget("decode_speedup>=50")], 0.0) == []


def test_the_search_finds_what_a_grid_does_not() -> None:
    trunk = Trunk("parent", 1.0, invented(2), costs_of())
    found = non_dominated(search_rules([trunk], ExitsRecipe(trials=200), [], 0.0))
    plain = list(baselines(trunk))
    assert {one.name for one in plain} == {"fixed", "grid"}
    front = [one for one in found if one.decode_speedup >= 1.1]
    by_grid = [one for one in plain if one.name == "grid" and one.decode_speedup >= 1.1]
    assert min(one.nats_per_token for one in front) <= min(one.nats_per_token for one in by_grid)
    agreeing = search_rules([trunk], ExitsRecipe(trials=40, criteria=("agreement",)), [], 0.0)
    assert agreeing and all(one.depths[0] == 0 and len(one.depths) == 3 for one in agreeing)
    useful = beyond(found, [trunk])
    assert all(one.decode_speedup > 1 or one.nats_per_token < trunk.statistics.trunk_nats for one in useful)
    chosen = worth_measuring(found, [trunk], 3)
    assert len(chosen) == 3 and len({str(one.rules) for one in chosen}) == 3
    assert all(one.decode_speedup > 1 for one in chosen if one.mode == "early")
    fixed = [one for one in plain if one.name == "fixed"]
    assert [one.worst_token_speedup for one in fixed] == [one.decode_speedup for one in fixed]


def test_a_second_trunk_is_searched_together_with_the_first() -> None:
    slow, fast = (Trunk(name, speed, invented(3), costs_of()) for name, speed in (("parent", 1.0), ("child", 1.5)))
    found = search_rules([slow, fast], ExitsRecipe(trials=60), [], 0.0)
    assert {one.trunk for one in found} == {"parent", "child"}
    assert {one.trunk for one in non_dominated(found) if one.decode_speedup > 1.4} == {"child"}


def test_training_brings_exits_closer_and_is_the_same_again() -> None:
    trunk = tiny_model(CASES[IDS.index("llama-gqa")]).requires_grad_(False)
    before = {name: value.clone() for name, value in trunk.state_dict().items()}
    trained = train_exits(trunk, [1, 3], tokens(6, 24), tokens(1, 24, seed=9)[0], 0.02)
    assert trained.tensors.keys() == {
        f"{layer}.{name}"
        for layer in (1, 3)
        for name in ("norm.weight", "adapter.weight", "adapter.bias", "gate.weight", "gate.bias")
    }
    assert all(trained.kl_trained[layer] <= trained.kl_solved[layer] for layer in (1, 3))
    assert trained.kl_trained[3] < trained.kl_trained[1]
    assert all(torch.equal(value, before[name]) for name, value in trunk.state_dict().items())
    assert not any(parameter.requires_grad for parameter in trunk.parameters())


@pytest.mark.parametrize("name", ["llama-gqa", "mistral-sliding"])
def test_every_part_is_timed_and_leaves_nothing_behind(name: str) -> None:
    trunk = tiny_model(CASES[IDS.index(name)]).requires_grad_(False)
    found = measure_costs(trunk, random_exits(trunk), LAYERS, Workload(1, 12, 4, "float32", 1, "cpu"), 1)
    assert ExitCosts.from_json(found.to_json()) == found
    assert found.run.keys() == found.store.keys() == found.head.keys() == set(COUNTS)
    for table in (found.run, found.store):
        assert all(list(row) == sorted(row) and len(row) == 4 for row in table.values())
    assert all(row[0] == 0 for row in found.store.values())
    assert found.keys_between(1, None, 0) == 0


def test_confidence_is_asked_of_exits_that_may_let_go_only() -> None:
    """A full room costs no check."""
    trunk = tiny_model(CASES[IDS.index("llama-gqa")]).requires_grad_(False)
    criterion: Criterion = "top1"
    model = with_exits(trunk, ExitRules((2,), criterion, (0.0,), waiting=1), random_exits(trunk))
    cache, asked = ExitsCache(model), []
    offer = cache.offer

    def counted(*args: Any) -> Any:
        asked.append(args[0])
        return offer(*args)

    cache.offer = counted  # type: ignore[method-assign]
    with torch.inference_mode():
        for token in tokens(1, 7)[0]:
            model(token[None, None], past_key_values=cache, use_cache=True)
    assert cache.left_at == [0, 1, 0, 1, 0, 1] and len(asked) == 3
