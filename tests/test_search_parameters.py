"""The search space as Optuna sees it: architectures to parameters and back."""

from __future__ import annotations

from typing import get_args

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import IntDistribution
from tiny import tiny_space

from llmprune.choices.architecture import Architecture
from llmprune.choices.space import Space
from llmprune.core.errors import ArchitectureError
from llmprune.core.recipe import SpaceSize
from llmprune.search.parameters import suggest, to_params

SIZES: tuple[SpaceSize, ...] = get_args(SpaceSize)
SPACES = {size: tiny_space(layers=4, kv_groups=3, ffn_width=40, ffn_step=16, size=size) for size in SIZES}
spaces = st.sampled_from(list(SPACES.values()))


def architectures(space: Space) -> st.SearchStrategy[Architecture]:
    options = (st.integers(0, len(decision.options) - 1) for decision in space.decisions)
    return st.tuples(*options).map(space.architecture)


@given(spaces, st.data())
def test_parameters_are_indices_that_read_back(space: Space, data: st.DataObject) -> None:
    architecture = data.draw(architectures(space))
    params = to_params(architecture, space)
    assert tuple(params.values()) == space.indices(architecture)
    assert suggest(optuna.trial.FixedTrial(params), space) == architecture  # type: ignore[arg-type]


@given(spaces, st.data())
def test_parameters_are_in_order_of_size(space: Space, data: st.DataObject) -> None:
    mine, theirs = (to_params(data.draw(architectures(space)), space) for _ in range(2))
    rows = space.shape.rows
    for decision in space.decisions:
        sizes = [sum(rows(choice) for _, choice in option) for option in decision.options]
        one, other = mine[decision.name], theirs[decision.name]
        # Two KV groups with two query heads each have as many rows as three with one.
        assert one == other or (one < other) == (sizes[one] < sizes[other]) or sizes[one] == sizes[other]


def test_what_the_space_does_not_hold_has_no_parameters() -> None:
    with pytest.raises(ArchitectureError, match=r"layer_000\.ffn has no option .*'ffn_width': 20"):
        to_params(Architecture.of([(3, 20)] * 4), SPACES["medium"])


@pytest.mark.parametrize("size", SIZES)
def test_every_trial_has_the_same_parameters(size: SpaceSize) -> None:
    space = SPACES[size]
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    trials = []
    for _ in range(20):
        trial = study.ask()
        assert suggest(trial, space) in space
        trials.append(trial.distributions)
    static = {decision.name: IntDistribution(0, len(decision.options) - 1) for decision in space.decisions}
    assert all(distributions == static for distributions in trials)
    assert list(static) == sorted(static), "dashboards sort parameters by name"


def test_the_parameters_of_a_medium_space_keep_their_names() -> None:
    """Journals of earlier searches are read by them."""
    params = to_params(Architecture.of([(3, 40), (0, 0), (1, 16), (2, 32)]), SPACES["medium"])
    assert params == {
        **{"layer_000.attention": 3, "layer_000.ffn": 3, "layer_001.attention": 0, "layer_001.ffn": 0},
        **{"layer_002.attention": 1, "layer_002.ffn": 1, "layer_003.attention": 2, "layer_003.ffn": 2},
    }
