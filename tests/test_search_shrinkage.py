"""Scores pulled towards what the same choice costs in the median layer."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean

import pytest
from conftest import Finished
from hypothesis import given
from hypothesis import strategies as st
from landscape import Landscape, space_of

from llmprune.choices.dimensions import BLOCK_KINDS
from llmprune.pipeline.judges import Judges
from llmprune.pipeline.prepare import prepare
from llmprune.pipeline.run import Run
from llmprune.pipeline.searching import estimates_for, guide_for
from llmprune.tables.allocate import Allocator, Scores
from llmprune.tables.shrinkage import Shrinkage

SPACE = space_of(12)
WHOLE = SPACE.shape.architecture
SHARES = st.floats(0, 1)


def table(seed: int) -> dict:  # type: ignore[type-arg]
    return dict(Landscape(SPACE, seed).guide.allocator.delta_nats)


@given(SHARES, st.integers(0, 5))
def test_what_a_choice_costs_in_all_layers_stays(share: float, seed: int) -> None:
    scores = table(seed)
    shrunk = Shrinkage.of(scores, share).apply(scores, WHOLE)
    for kind in BLOCK_KINDS:
        for choice in SPACE.ladder(kind):
            own, found = ([many[i, choice] for i in range(SPACE.shape.layers)] for many in (scores, shrunk))
            slack = 1e-9 * max(map(abs, own))
            assert abs(sum(found) - sum(own)) <= slack * len(own)
            # No layer passes another, and none leaves the span of all.
            assert sorted(range(len(own)), key=own.__getitem__) == sorted(
                range(len(own)),
                key=lambda i, own=own, found=found: (round(found[i], 12), own[i]),  # type: ignore[misc]
            )
            assert min(own) - slack <= min(found) and max(found) <= max(own) + slack


def costing(nats: Callable[[int], float]) -> Scores:
    """Every choice but the parent's own costs so much in a layer."""
    whole = set(WHOLE.blocks())
    every = [(i, choice) for i in range(SPACE.shape.layers) for kind in BLOCK_KINDS for choice in SPACE.ladder(kind)]
    return {key: 0.0 if key in whole else nats(key[0]) for key in every}


def test_layers_that_are_alike_but_for_noise_become_alike() -> None:
    scores = costing(lambda layer: 1.0 + 0.1 * (-1) ** layer)
    shrunk = Shrinkage.of(scores, 0.75).apply(scores, WHOLE)
    found = [nats for key, nats in shrunk.items() if scores[key]]
    assert max(found) - min(found) == pytest.approx(0.25 * 0.2)


@pytest.mark.parametrize("nothing", [0.0, -1e-4, 1e-6])
def test_a_layer_that_costs_nearly_all_is_not_shared_out(nothing: float) -> None:
    """As the first attention of OPT and SmolLM3: the others are worth nothing, and must not seem to cost as much."""
    scores = costing(lambda layer: nothing if layer else 0.3)
    shrunk = Shrinkage.of(scores, 0.75).apply(scores, WHOLE)
    for (layer, _), nats in ((key, nats) for key, nats in shrunk.items() if scores[key]):
        assert nats == pytest.approx(0.3, rel=0.01) if layer == 0 else abs(nats) < 5e-4


@given(SHARES, st.integers(0, 5), st.randoms(use_true_random=False))
def test_what_an_architecture_has_still_costs_nothing_there(share: float, seed: int, random) -> None:  # type: ignore[no-untyped-def]
    at = SPACE.architecture([random.randrange(1, len(d.options)) for d in SPACE.decisions])
    parents, own = table(seed), dict.fromkeys(at.blocks(), 0.0)
    shrunk = Shrinkage.of(parents, share).apply({**table(seed + 1), **own}, at)
    assert all(shrunk[key] == 0.0 for key in at.blocks())


def test_without_a_share_scores_are_left_alone() -> None:
    scores = table(0)
    assert Shrinkage.of(scores, 0.0).apply(scores, WHOLE) == scores


def test_of_layers_that_are_alike_a_knapsack_takes_alike() -> None:
    """Deeper cuts cost ever more here, so with nothing known of single layers no two differ by more than a rung; with
    all that a table says, some blocks lose nearly all and others nothing."""
    spread: dict[float, list[int]] = {0.0: [], 0.75: [], 1.0: []}
    for seed in range(6):
        allocator = Landscape(SPACE, seed).guide.allocator
        for share, found in spread.items():
            scores = Shrinkage.of(allocator.delta_nats, share).apply(allocator.delta_nats, WHOLE)
            child = Allocator(scores, allocator.costs).best({"decode": 1.3})
            assert child is not None
            rungs = [SPACE.ffn.index(layer.ffn) for layer in child.layers]
            found.append(max(rungs) - min(rungs))
    assert max(spread[1.0]) <= 1
    assert fmean(spread[0.75]) < 0.8 * fmean(spread[0.0])


def test_a_run_searches_with_shrunk_scores_and_keeps_its_table_as_it_was(finished_run: Finished) -> None:
    run = Run.open(finished_run.path)
    share = run.recipe.tables.shrinkage
    assert share > 0
    prepared = prepare(run)
    nats, whole = prepared.tables.joint_nats, prepared.space.shape.architecture
    assert prepared.scores == Shrinkage.of(nats, share).apply(nats, whole)
    assert prepared.scores != nats
    guide = guide_for(run, prepared, Judges(run, prepared), estimates_for(run, prepared))
    assert guide is not None and guide.allocator.delta_nats == prepared.scores
