"""Scores pulled towards what the same choice costs in the mean layer."""

from __future__ import annotations

from statistics import fmean

import pytest
from conftest import Finished
from hypothesis import given
from hypothesis import strategies as st
from landscape import Landscape, space_of

from llmprune.pipeline.judges import Judges
from llmprune.pipeline.prepare import prepare
from llmprune.pipeline.run import Run
from llmprune.pipeline.searching import estimates_for, guide_for
from llmprune.tables.allocate import Allocator
from llmprune.tables.shrinkage import Shrinkage

SPACE = space_of(12)
WHOLE = SPACE.shape.architecture
SHARES = st.floats(0, 1)


def table(seed: int) -> dict:  # type: ignore[type-arg]
    return dict(Landscape(SPACE, seed).guide.allocator.delta_nats)


@given(SHARES, st.integers(0, 5))
def test_a_score_is_between_its_own_and_that_of_the_mean_layer(share: float, seed: int) -> None:
    scores = table(seed)
    shrunk = Shrinkage.of(scores, share).apply(scores, WHOLE)
    for (layer, choice), nats in shrunk.items():
        mean = fmean(scores[i, choice] for i in range(SPACE.shape.layers))
        assert nats == pytest.approx((1 - share) * scores[layer, choice] + share * mean)


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
