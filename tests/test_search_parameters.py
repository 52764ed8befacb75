"""The search space as Optuna sees it: architectures to parameters and back."""

from __future__ import annotations

import optuna
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import IntDistribution
from tiny import tiny_space

from llmprune.architecture import Architecture
from llmprune.search.space import from_params, parameter_name, suggest, to_params

SPACE = tiny_space(layers=4, kv_groups=3, ffn_width=40, ffn_step=16)


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    choices = st.tuples(st.sampled_from(SPACE.kv_groups), st.sampled_from(SPACE.ffn_width))
    return Architecture.of([draw(choices) for _ in range(SPACE.shape.layers)])


@given(architectures())
def test_parameters_are_indices_that_read_back(architecture: Architecture) -> None:
    params = to_params(architecture, SPACE)
    assert from_params(params, SPACE) == architecture
    assert suggest(optuna.trial.FixedTrial(params), SPACE) == architecture  # type: ignore[arg-type]


@given(architectures(), architectures())
def test_parameters_are_in_order_of_size(one: Architecture, other: Architecture) -> None:
    params = [to_params(architecture, SPACE) for architecture in (one, other)]
    for (layer, kind, mine), (_, _, theirs) in zip(one.blocks(), other.blocks(), strict=True):
        name = parameter_name(layer, kind)
        assert (params[0][name] < params[1][name]) == (mine.units < theirs.units)


def test_every_trial_has_the_same_parameters() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    trials = []
    for _ in range(20):
        trial = study.ask()
        assert suggest(trial, SPACE) in SPACE
        trials.append(trial.distributions)
    names = [parameter_name(layer, kind) for layer, kind, _ in SPACE.shape.architecture.blocks()]
    static = dict(zip(names, [IntDistribution(0, 3), IntDistribution(0, 3)] * 4, strict=True))
    assert all(distributions == static for distributions in trials)
    assert list(static) == sorted(static), "dashboards sort parameters by name"
