"""Samplers by name, on a landscape whose losses are known at once."""

from __future__ import annotations

import ast
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from landscape import SPACES, TARGETS, Landscape, space_of
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import TrialState

import llmprune.search.samplers
from llmprune.choices.architecture import Architecture
from llmprune.core.recipe import SearchRecipe
from llmprune.search.parameters import suggest, to_params
from llmprune.search.samplers.evopress import EvoPressSampler
from llmprune.search.samplers.guide import SLOWEST_DRAFT, Finished, History
from llmprune.search.samplers.guided import FALLBACK_DRAWS, GuidedSampler
from llmprune.search.samplers.linas import PREDICTED_BY, LinasSampler
from llmprune.search.samplers.make import GUIDED, OneRung, make_sampler
from llmprune.search.samplers.slp import FROM

SIXTY = Landscape(space_of(30))
NAMES = sorted(GUIDED)


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def sampler_of(name: str, landscape: Landscape, seed: int = 0) -> GuidedSampler:
    """Linas thinks after a dozen trials, and less: tests are short."""
    if name == "linas":
        return LinasSampler(landscape.guide, seed=seed, initial=10, generations=10)
    return GUIDED[name](landscape.guide, seed=seed)


def history_of(study: optuna.Study, landscape: Landscape) -> History:
    return History.of(study, landscape.guide, but=-1)


def nats_at_targets(landscape: Landscape, sampler: BaseSampler, trials: int) -> list[float]:
    study = landscape.study()
    landscape.run(study, sampler, trials)
    return [landscape.best(study, target) for target in TARGETS]


@pytest.mark.parametrize(("name", "gain"), [("evopress", 0.35), ("linas", 0.25), ("slp", 0.35)])
def test_with_sixty_decisions_a_guided_sampler_beats_chance(name: str, gain: float) -> None:
    sampler = (
        LinasSampler(SIXTY.guide, seed=0, initial=12, generations=40)
        if name == "linas"
        else GUIDED[name](SIXTY.guide, seed=0)
    )
    trials = 24
    guided = nats_at_targets(SIXTY, sampler, trials)
    chance = nats_at_targets(SIXTY, RandomSampler(seed=0), trials)
    assert all(mine < (1 - gain) * theirs for mine, theirs in zip(guided, chance, strict=True)), (guided, chance)


@pytest.mark.parametrize("name", NAMES)
def test_with_a_few_decisions_a_guided_sampler_beats_chance(name: str) -> None:
    landscape = Landscape(space_of(4), seed=3)
    guided = nats_at_targets(landscape, sampler_of(name, landscape), 24)
    chance = [nats_at_targets(landscape, RandomSampler(seed=seed), 24) for seed in range(3)]
    assert np.all(np.array(guided) <= np.mean(chance, axis=0)), (guided, chance)
    assert np.mean(guided) < 0.9 * np.mean(chance)


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
@pytest.mark.parametrize("name", NAMES)
def test_every_proposal_can_run_and_is_new(name: str, space: Any) -> None:
    landscape = Landscape(space)
    study = landscape.study()
    proposed = landscape.run(study, sampler_of(name, landscape), 16)
    for architecture in proposed:
        assert architecture in space
        space.shape.check(architecture)
    assert len(set(proposed)) == len(proposed)
    # Queued trials first, as they were queued.
    assert proposed[0] == space.shape.architecture


@pytest.mark.parametrize("name", NAMES)
def test_one_seed_gives_one_search_however_often_it_restarts(name: str) -> None:
    landscape = Landscape(space_of(4))
    whole = landscape.run(landscape.study(), sampler_of(name, landscape), 15)
    restarted = landscape.study()
    again = [a for _ in range(5) for a in landscape.run(restarted, sampler_of(name, landscape), 3)]
    other = landscape.run(landscape.study(), sampler_of(name, landscape, seed=1), 15)
    assert whole == again
    # The knapsacks of slp leave nothing to chance as long as there is something new around its incumbents.
    assert (whole == other) == (name == "slp")


@pytest.mark.parametrize("name", NAMES)
def test_two_workers_propose_no_architecture_twice(name: str) -> None:
    landscape = Landscape(space_of(4))
    storage = optuna.storages.InMemoryStorage()
    first = landscape.study(storage=storage)
    second = optuna.load_study(study_name=first.study_name, storage=storage)
    first.sampler, second.sampler = sampler_of(name, landscape), sampler_of(name, landscape)
    proposed = []
    for _ in range(10):
        trials = [first.ask(), second.ask()]
        # Both are in flight, with their parameters drawn, before either is judged.
        proposed += [suggest(trial, landscape.space) for trial in trials]
        for study, trial in zip((second, first), reversed(trials), strict=True):
            landscape.finish(study, trial)
    assert len(set(proposed)) == len(proposed) == len(history_of(first, landscape).finished)


@pytest.mark.parametrize("name", NAMES)
def test_a_space_without_anything_new_still_gets_an_answer(name: str) -> None:
    landscape = Landscape(space_of(4, size="small"))
    total = math.prod(len(decision.options) for decision in landscape.space.decisions)
    study = landscape.study()
    proposed = landscape.run(study, sampler_of(name, landscape), total + 3)
    assert len(set(proposed)) == total
    assert total < FALLBACK_DRAWS / 10


@pytest.mark.parametrize("name", NAMES)
def test_a_target_out_of_reach_is_approached(name: str) -> None:
    landscape = Landscape(space_of(3, drop=False))
    study = landscape.study()
    sampler = sampler_of(name, landscape)
    sampler.guide = landscape.guide_for([90.0])
    proposed = landscape.run(study, sampler, 14)
    assert len(set(proposed)) == len(proposed)
    smallest = landscape.space.architecture([0] * len(landscape.space.decisions))
    assert landscape.speedup(smallest) in [landscape.speedup(architecture) for architecture in proposed]


@pytest.mark.parametrize("name", NAMES)
def test_queued_trials_pass_untouched(name: str) -> None:
    landscape = Landscape(space_of(4))
    space, study = landscape.space, landscape.study(seeds=False)
    study.sampler = sampler_of(name, landscape)
    queued = space.architecture([1] * len(space.decisions))
    study.enqueue_trial(to_params(queued, space))
    study.enqueue_trial({space.decisions[0].name: 2})
    assert landscape.finish(study, study.ask()) == queued
    # What a partly fixed trial leaves open is the sampler's.
    assert space.indices(landscape.finish(study, study.ask()))[0] == 2
    assert FROM not in study.trials[0].user_attrs


@pytest.mark.parametrize("name", ["evopress", "slp"])
def test_proposals_hold_the_corrected_budget_and_so_the_measured_target(name: str) -> None:
    study = SIXTY.study()
    study.sampler = GUIDED[name](SIXTY.guide, seed=0)
    SIXTY.run(study, study.sampler, 3)
    for _ in range(10):
        history = history_of(study, SIXTY)
        trial = study.ask()
        target = SIXTY.guide.target_of(trial.number)
        architecture = SIXTY.finish(study, trial)
        saved = 1.0 - SIXTY.allocator.costs.relative_time(architecture, "decode")
        assert saved >= history.needed_saving(SIXTY.guide, target) - 1e-4
        assert target * 0.999 <= SIXTY.speedup(architecture)
        # Solutions of slp that must differ from each other may differ by being faster.
        assert SIXTY.speedup(architecture) < target * (1.1 if name == "slp" else 1.01)


def test_trials_look_about_the_best_draft_as_soon_as_one_pays() -> None:
    slow, fast = (Finished(i, (i,), 0.1, speedup, {}) for i, speedup in enumerate((2.0, 4.0)))
    guide, turns = SIXTY.guide, range(12)
    none_pays = History((slow, fast), frozenset())
    assert [none_pays.target(guide, turn) for turn in turns] == [guide.target_of(turn) for turn in turns]
    pays = History((replace(slow, draft_speedup=1.2), replace(fast, draft_speedup=1.4)), frozenset())
    aimed = [pays.target(guide, turn) for turn in turns]
    assert aimed[::2] == [guide.target_of(turn) for turn in range(6)], "all targets still have their turn"
    assert aimed[1::2] == pytest.approx([4.0, 4.6, 4.0 / 1.15] * 2)
    hardly = History((replace(slow, speedup=1.01, draft_speedup=1.001),), frozenset())
    assert min(hardly.target(guide, turn) for turn in turns) >= SLOWEST_DRAFT


def test_the_correction_is_what_was_measured_near_the_target() -> None:
    study = SIXTY.study()
    assert history_of(study, SIXTY).needed_saving(SIXTY.guide, 1.5) == pytest.approx(1 / 3)
    # The parent saves nothing, and says nothing.
    SIXTY.run(study, RandomSampler(seed=0), 1)
    assert history_of(study, SIXTY).needed_saving(SIXTY.guide, 1.5) == pytest.approx(1 / 3)
    SIXTY.run(study, RandomSampler(seed=0), 9)
    assert history_of(study, SIXTY).needed_saving(SIXTY.guide, 1.5) == pytest.approx(1 / 3 / SIXTY.measured)


def test_failed_broken_and_repeated_trials_teach_nothing_and_are_not_proposed_again() -> None:
    landscape = Landscape(space_of(4))
    space, study = landscape.space, landscape.study(seeds=False)
    study.sampler = RandomSampler(seed=0)
    good = landscape.finish(study, study.ask())
    broken: list[Architecture] = []
    for nats in (math.nan, math.inf, None):
        trial = study.ask()
        broken.append(suggest(trial, space))
        trial.set_user_attr("record", {**landscape.record(broken[-1]), "nats_per_token": nats})
        study.tell(trial, [1.0, 1.0])
    failed = study.ask()
    broken.append(suggest(failed, space))
    study.tell(failed, state=TrialState.FAIL)
    study.enqueue_trial(to_params(good, space))
    landscape.finish(study, study.ask())
    study.ask()
    history = history_of(study, landscape)
    assert [trial.indices for trial in history.finished] == [space.indices(good)]
    assert history.known == {space.indices(architecture) for architecture in [good, *broken]}
    assert not {*landscape.run(study, sampler_of("evopress", landscape), 8)} & {good, *broken}


def test_the_best_known_holds_the_target_or_comes_nearest() -> None:
    study = SIXTY.study()
    SIXTY.run(study, GUIDED["evopress"](SIXTY.guide, seed=0), 8)
    history = history_of(study, SIXTY)
    holding = [trial for trial in history.finished if trial.speedup >= 1.3 * 0.99]
    assert history.best(1.3) == min(holding, key=lambda trial: trial.loss)
    assert history.best(9.0) == max(history.finished, key=lambda trial: trial.speedup)
    assert History((), frozenset()).best(1.3) is None


def test_evopress_races_new_children_and_proposes_the_winner() -> None:
    raced: list[list[Architecture]] = []

    def last(candidates: Any) -> Architecture:
        raced.append(list(candidates))
        return raced[-1][-1]

    study = SIXTY.study()
    proposed = SIXTY.run(study, EvoPressSampler(replace(SIXTY.guide, race=last), seed=0, children=5), 9)
    assert [candidates[-1] for candidates in raced] == proposed[-len(raced) :]
    assert len(raced) > 2 and all(len(set(candidates)) == 5 for candidates in raced)


def test_linas_says_which_predictors_proposed_a_trial() -> None:
    landscape = Landscape(space_of(4))
    study = landscape.study()
    landscape.run(study, sampler_of("linas", landscape), 12)
    notes = [trial.user_attrs.get(PREDICTED_BY) for trial in study.trials]
    assert notes[:10] == [None] * 10
    # Times are a straight line in the table's estimate here: measured savings are 0.9 of it.
    assert notes[-1]["relative_time"] == "ridge of the residual, cross-validated MAPE 0.00%"
    assert "MAPE" in notes[-1]["nats_per_token"]


@pytest.mark.parametrize("name", ["nsga2", "nsga3", "tpe", "gp", "random", *NAMES])
def test_every_name_of_the_recipe_makes_a_sampler(name: str) -> None:
    recipe = SearchRecipe.model_validate({"sampler": name})
    sampler = make_sampler(recipe, draws=3, guide=SIXTY.guide)
    assert isinstance(sampler, BaseSampler)
    if name == "nsga2":
        assert isinstance(sampler, optuna.samplers.NSGAIISampler)
        assert isinstance(sampler._child_generation_strategy._mutation, OneRung)  # type: ignore[attr-defined]
    if name in GUIDED:
        with pytest.raises(AssertionError, match=f"search.sampler={name}"):
            make_sampler(recipe, draws=3, guide=None)
    else:
        assert make_sampler(recipe, draws=3, guide=None)


def test_one_rung_moves_by_one_and_stays_in_bounds() -> None:
    rng = np.random.RandomState(0)
    with pytest.warns(optuna.exceptions.ExperimentalWarning):
        mutation = OneRung()
    moved = {mutation.mutation(p, rng, None, np.array([0.0, 3.0])) for p in (0.0, 3.0) for _ in range(20)}  # type: ignore[arg-type]
    assert moved == {0.0, 1.0, 2.0, 3.0}


def test_scikit_learn_is_imported_only_by_who_predicts() -> None:
    package = Path(next(iter(llmprune.search.samplers.__path__)))
    for path in package.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            assert not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sklearn")), path.name
