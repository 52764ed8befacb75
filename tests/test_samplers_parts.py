"""What the samplers are made of: predictors, NSGA-II on arrays, level switches."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from landscape import SPACES, Landscape, space_of
from sklearn.svm import SVR

from llmprune.search.samplers import predictors
from llmprune.search.samplers.evopress import level_switch
from llmprune.search.samplers.nsga2 import front_ranks, nsga2
from llmprune.search.samplers.predictors import fit

SIXTY = Landscape(space_of(30))


def draws(landscape: Landscape, count: int) -> Any:
    options = landscape.guide.ladders.options_D
    return np.random.default_rng(5).integers(options, size=(count, len(options)))


def test_a_predictor_is_exact_where_the_table_is_right_up_to_scale() -> None:
    ladders = SIXTY.guide.ladders
    seen, unseen = draws(SIXTY, 60)[:40], draws(SIXTY, 60)[40:]
    predictor = fit(seen, 3.0 + 1.7 * ladders.nats(seen), ladders.nats, ladders.options_D)
    assert (predictor.model, predictor.of) == ("ridge", "residual")
    np.testing.assert_allclose(predictor.predict(unseen), 3.0 + 1.7 * ladders.nats(unseen), rtol=1e-9)


def test_a_predictor_learns_an_additive_loss_that_the_table_does_not_know() -> None:
    landscape = Landscape(space_of(4))
    truth, options = landscape.guide.ladders, landscape.guide.ladders.options_D
    seen, unseen = draws(landscape, 160)[:120], draws(landscape, 160)[120:]
    values = 3.0 + truth.nats(seen)
    predictor = fit(seen, values, lambda indices: np.random.default_rng(0).random(len(indices)), options)
    assert predictor.model == "ridge"
    error = np.abs(predictor.predict(unseen) - 3.0 - truth.nats(unseen)).mean()
    assert error < 0.02 * values.std()


def test_the_support_vectors_predict_as_scikit_learn_does() -> None:
    landscape = Landscape(space_of(4))
    options = landscape.guide.ladders.options_D
    seen, unseen = draws(landscape, 60)[:40], draws(landscape, 60)[40:]
    values = np.random.default_rng(1).normal(size=40)
    hot = predictors.one_hot(seen, options)
    distances = ((hot[:, None] - hot[None]) ** 2).sum(axis=2)
    oracle = SVR(C=predictors.SVR_C, epsilon=predictors.SVR_EPSILON, gamma=1 / distances.mean()).fit(hot, values)
    ours = predictors._svr(hot, values, options)(unseen)
    np.testing.assert_allclose(ours, oracle.predict(predictors.one_hot(unseen, options)), atol=1e-3)


def test_front_ranks_agree_with_their_definition() -> None:
    values = np.random.default_rng(0).integers(0, 12, size=(60, 2)).astype(float)
    values = np.unique(values, axis=0)
    left, expected = list(range(len(values))), np.zeros(len(values))
    rank = 0
    while left:
        front = [i for i in left if not any((values[j] <= values[i]).all() and j != i for j in left)]
        expected[front] = rank
        left, rank = [i for i in left if i not in front], rank + 1
    np.testing.assert_array_equal(front_ranks(values, len(values)), expected)


def test_nsga2_finds_the_front_of_a_small_space() -> None:
    landscape = Landscape(space_of(3, drop=False))
    ladders = landscape.guide.ladders

    def objectives(indices: Any) -> Any:
        return np.stack([ladders.nats(indices), -ladders.saving(indices)], axis=1)

    every = np.array(list(np.ndindex(*ladders.options_D)))
    all_values = objectives(every)
    front = all_values[front_ranks(all_values, 1) == 0]
    found = [
        nsga2(objectives, every[-1:], ladders.options_D, np.random.default_rng(1), population=300)[1] for _ in range(2)
    ]
    np.testing.assert_array_equal(*found)
    hit = (np.abs(front[:, None] - found[0][None]).max(axis=2) < 1e-12).any(axis=1)
    assert hit.mean() > 0.9


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(SPACES)), st.integers(0, 2**32 - 1), st.floats(0.0, 0.9))
def test_a_level_switch_keeps_the_budget_and_changes_something(size: str, seed: int, share: float) -> None:
    ladders = Landscape(SPACES[size]).guide.ladders
    rng = np.random.default_rng(seed)
    parent = rng.integers(ladders.options_D)
    if not ladders.attends(parent):
        parent[0] = ladders.options_D[0] - 1
    most = float(ladders.saving_DO.max(axis=1).sum())
    for needed in (float(ladders.saving(parent)), share * most):
        child = level_switch(parent, ladders, needed, rng)
        if child is None:
            continue
        assert (child != parent).any() and (child >= 0).all() and (child < ladders.options_D).all()
        assert ladders.attends(child)
        assert ladders.saving(child) >= needed - 1e-9
        # As slow as it may be, but for decisions that were lowered: none of those goes both ways.
        spare = ladders.saving(child) - needed
        fits = ladders.can_rise(child) & (ladders.rise_costs(child) <= spare)
        assert not (fits & (child >= parent)).any()


def test_a_level_switch_in_a_medium_space_nearly_always_succeeds() -> None:
    ladders, rng = SIXTY.guide.ladders, np.random.default_rng(0)
    parent = np.array(SIXTY.space.indices(SIXTY.guide.allocate(0.3)))
    children = [level_switch(parent, ladders, 0.3, rng) for _ in range(100)]
    changed = [int((child != parent).sum()) for child in children if child is not None]
    assert len(changed) > 95 and max(changed) <= 16 and np.median(changed) <= 6
