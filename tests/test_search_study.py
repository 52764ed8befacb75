"""The search loop, with a judge that knows the answer at once."""

from __future__ import annotations

import math
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.exceptions import ExperimentalWarning
from optuna.study import StudyDirection
from optuna.trial import TrialState
from tiny import linear_costs, record_of, tiny_space

from llmprune.choices.architecture import Architecture
from llmprune.choices.ffn import FfnChoice
from llmprune.choices.space import Space
from llmprune.core.errors import RecipeError
from llmprune.core.recipe import OPTUNA_SAMPLERS, SearchRecipe
from llmprune.core.recipe_text import parse_section
from llmprune.measure.value import SCHEMA
from llmprune.search.reward import HARD, SOFT
from llmprune.search.reward import reward as mnas_reward
from llmprune.search.samplers.make import OneRung, make_sampler
from llmprune.search.study import SearchOutcome, finished_trials, open_study, records, run_study
from llmprune.search.trial_records import record_of as record_in
from llmprune.search.workers.storage import open_journal

SPACE = tiny_space(layers=3)
STARTS = [
    ("parent", SPACE.shape.architecture),
    ("half", Architecture.of([(1, 16)] * 3)),
    ("shallow", Architecture.of([(2, 32), (0, 0), (2, 32)])),
]


@dataclass
class FakeJudge:
    """What leaves costs quality and saves time; architectures that cannot run are refused, as surgery does."""

    space: Space = SPACE
    seen: list[str] = field(default_factory=list)
    interrupt_at: int | None = None
    nats_of: Callable[[Architecture], float] = lambda architecture: sum(
        1 / (1 + layer + choice.units) for layer, choice in architecture.blocks()
    )

    def judge(self, architecture: Architecture, name: str) -> Any:
        if len(self.seen) == self.interrupt_at:
            raise KeyboardInterrupt
        self.space.shape.check(architecture)
        self.seen.append(architecture.hash)
        return record_of(
            architecture,
            self.nats_of(architecture),
            linear_costs(self.space).speedup(architecture, "decode"),
            name=name,
        )


def run(
    journal: Path,
    judge: FakeJudge,
    *,
    starts: Any = (),
    report: Any = None,
    **rules: Any,
) -> tuple[optuna.Study, SearchOutcome]:
    recipe = SearchRecipe(**{"population": 4, "trials": 8, "sampler": "random", **rules})
    study = open_study(open_journal(journal), "study", recipe)
    return study, run_study(study, judge, recipe, judge.space, starts, report)  # type: ignore[arg-type]


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "study.journal"


@pytest.mark.parametrize("sampler", ["nsga2", "nsga3", "tpe", "gp", "random"])
def test_every_sampler_runs_to_the_end_and_on(sampler: str, journal: Path) -> None:
    # More trials than any sampler draws at random before it starts to think; resumed in the middle.
    rules = {"sampler": sampler, "budgets": ["decode_speedup>=1.1"], "starts": STARTS}
    judge = FakeJudge()
    for trials in (6, 13):
        study, outcome = run(journal, judge, trials=trials, **rules)
        assert (outcome.finished_trials, outcome.stopped_by) == (trials, "trials")
    assert len(judge.seen) == len(set(judge.seen)) == len(records(study)) == 13
    assert not study.get_trials(states=(TrialState.RUNNING, TrialState.WAITING))


def test_a_trial_keeps_its_record_and_is_told_both_objectives(journal: Path) -> None:
    reported: list[tuple[Any, Any]] = []
    study, _ = run(journal, FakeJudge(), report=lambda *told: reported.append(told), objective="decode")
    assert [len(finished) for finished, _ in reported] == list(range(1, 9))
    assert [record for _, record in reported] == records(study)
    for trial in finished_trials(study):
        record = record_in(trial)
        architecture = SPACE.architecture([trial.params[decision.name] for decision in SPACE.decisions])
        assert trial.values == [record.nats_per_token, record.decode_speedup.median]
        assert trial.user_attrs["hash"] == record.hash == architecture.hash
        assert trial.user_attrs["architecture"] == architecture.to_json()
        assert trial.user_attrs["record"]["schema"] == SCHEMA
        assert record.name == f"trial-{trial.number}"


def test_the_second_objective_is_the_recipes(journal: Path) -> None:
    study, _ = run(journal, FakeJudge(), objective="prefill")
    assert {trial.values[1] for trial in finished_trials(study)} == {1.0}
    assert study.metric_names == ["nats a token", "prefill speed-up"]


@pytest.mark.parametrize("sampler", OPTUNA_SAMPLERS)
@pytest.mark.parametrize("reward", ["mnas-soft", "mnas-hard"])
def test_a_reward_is_the_only_objective_and_is_maximised(reward: str, sampler: str, journal: Path) -> None:
    judge, rules = FakeJudge(), {"reward": reward, "sampler": sampler, "targets": [1.3]}
    for trials in (6, 11):
        study, outcome = run(journal, judge, trials=trials, starts=STARTS, **rules)
        assert (outcome.finished_trials, outcome.stopped_by) == (trials, "trials")
    assert study.directions == [StudyDirection.MAXIMIZE]
    assert study.metric_names == [reward]
    assert len(judge.seen) == len(set(judge.seen)) == 11
    w = SOFT if reward == "mnas-soft" else HARD
    worth = {}
    for trial in finished_trials(study):
        worth[trial.number] = mnas_reward(record_in(trial), phase="decode", target=1.3, w=w)
        assert trial.values == [worth[trial.number]]
    assert worth[study.best_trial.number] == max(worth.values())


@pytest.mark.parametrize("rules", [{"targets": [1.2, 1.5], "sampler": "tpe"}, {"targets": [1.2], "sampler": "slp"}])
@pytest.mark.parametrize("reward", ["mnas-soft", "mnas-hard"])
def test_a_reward_is_for_one_target_and_one_of_optuna_s_samplers(reward: str, rules: dict[str, Any]) -> None:
    message = (
        rf"reward={reward} rewards one target with one of Optuna's samplers \(nsga2, nsga3, tpe, gp, random\); "
        rf"got targets={re.escape(str(rules['targets']))}, sampler={rules['sampler']}"
    )
    with pytest.raises(RecipeError, match=message):
        parse_section(SearchRecipe, {"reward": reward, **rules})
    assert parse_section(SearchRecipe, rules).reward == "front"


def test_a_resumed_search_goes_on_counting_and_draws_anew(journal: Path) -> None:
    judge = FakeJudge()
    _, first = run(journal, judge, trials=5)
    _, second = run(journal, judge, trials=5)
    _, third = run(journal, judge, trials=9)
    counts = [(o.finished_trials, o.new_trials, o.stopped_by) for o in (first, second, third)]
    assert counts == [(5, 5, "trials"), (5, 0, "trials"), (9, 4, "trials")]
    assert len(set(judge.seen)) == len(judge.seen) == 9


def test_two_searches_with_one_seed_propose_alike(tmp_path: Path) -> None:
    seen = []
    for name in ("a", "b"):
        judge = FakeJudge()
        run(tmp_path / name, judge, sampler="nsga2", seed=4)
        seen.append(judge.seen)
    assert seen[0] == seen[1]


def test_what_is_known_is_not_judged_again(journal: Path) -> None:
    # One layer of 2 x 2 choices, of which two lack attention: the search runs dry.
    space = tiny_space(layers=1, kv_groups=1, ffn_step=32)
    judge = FakeJudge(space)
    study, outcome = run(journal, judge, trials=3, budgets=["params<=20"])
    assert (outcome.finished_trials, outcome.stopped_by) == (2, "no new proposals")
    assert len(judge.seen) == 2
    told = study.get_trials(states=(TrialState.COMPLETE,))
    first = {trial.user_attrs["hash"]: trial for trial in finished_trials(study)}
    repeats = [trial for trial in told if "repeats_trial" in trial.user_attrs]
    assert len(told) == len(repeats) + 2 and len(repeats) > 10
    for trial in repeats:
        known = first[trial.user_attrs["hash"]]
        assert trial.user_attrs["repeats_trial"] == known.number
        assert (trial.values, trial.constraints) == (known.values, known.constraints)


def test_an_architecture_that_cannot_run_is_a_failed_trial_with_its_reason(journal: Path) -> None:
    starts = [("blind", Architecture.of([(0, 32)] * 3)), *STARTS]
    study, outcome = run(journal, FakeJudge(), trials=3, starts=starts)
    (failed,) = study.get_trials(states=(TrialState.FAIL,))
    assert "keeps attention in at least one layer" in failed.user_attrs["failed_because"]
    assert outcome.finished_trials == 3


@pytest.mark.parametrize("nats", [math.inf, math.nan])
def test_a_child_without_a_finite_loss_is_a_failed_trial(nats: float, journal: Path) -> None:
    judge = FakeJudge(nats_of=lambda architecture: nats if architecture == STARTS[1][1] else 1.0)
    study, _ = run(journal, judge, trials=2, starts=STARTS)
    (failed,) = study.get_trials(states=(TrialState.FAIL,))
    assert failed.user_attrs["failed_because"] == "the child computes no finite loss"


def test_budgets_are_constraints_of_every_trial(journal: Path) -> None:
    study, _ = run(journal, FakeJudge(), budgets=["decode_speedup>=1.2", "params<=70"], starts=STARTS)
    for trial in finished_trials(study):
        record = record_in(trial)
        slow, large = trial.constraints["decode_speedup>=1.2"], trial.constraints["params<=70"]
        assert (slow <= 0) == (record.decode_speedup.median >= 1.2)
        assert (large <= 0) == (record.params <= 70)
    assert 0 < len(study.best_trials) < 8
    assert all(max(trial.constraints.values()) <= 0 for trial in study.best_trials)


def test_minutes_stop_a_search_and_a_resumed_one_has_them_anew(journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    class Slow(FakeJudge):
        def judge(self, architecture: Architecture, name: str) -> Any:
            record = super().judge(architecture, name)
            now[0] += 25
            return record

    for done in (3, 6):
        _, outcome = run(journal, Slow(), trials=50, minutes=1)
        assert (outcome.finished_trials, outcome.stopped_by, outcome.seconds) == (done, "minutes", 75)


def test_warm_starts_come_first_and_are_queued_once(journal: Path) -> None:
    judge = FakeJudge()
    for trials in (2, 5):
        study, _ = run(journal, judge, trials=trials, starts=STARTS)
    assert judge.seen[:3] == [architecture.hash for _, architecture in STARTS]
    labels = [trial.user_attrs.get("warm_start") for trial in study.trials]
    assert labels[:3] == ["parent", "half", "shallow"] and not any(labels[3:])


@pytest.mark.parametrize("queued", [0, 1, 2, 3])
def test_a_session_that_died_while_queueing_is_completed(
    queued: int, journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Counter[str]()
    enqueue, mark = optuna.Study.enqueue_trial, optuna.Study.set_user_attr

    def die_after(method: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if calls["queued"] == queued:
                raise KeyboardInterrupt
            calls["queued"] += 1
            return method(*args, **kwargs)

        return wrapper

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(optuna.Study, "enqueue_trial", die_after(enqueue))
        patch.setattr(optuna.Study, "set_user_attr", die_after(mark))
        run(journal, FakeJudge(), starts=STARTS)
    judge = FakeJudge()
    study, _ = run(journal, judge, trials=4, starts=STARTS)
    assert judge.seen[:3] == [architecture.hash for _, architecture in STARTS]
    labels = Counter(trial.user_attrs.get("warm_start") for trial in study.trials)
    assert [labels[label] for label, _ in STARTS] == [1, 1, 1]


@pytest.mark.parametrize("judged", [0, 1, 4])
def test_an_interrupted_session_gives_its_trial_back_and_that_is_judged(judged: int, journal: Path) -> None:
    judge = FakeJudge(interrupt_at=judged)
    with pytest.raises(KeyboardInterrupt):
        run(journal, judge, starts=STARTS)
    trials = open_study(open_journal(journal), "study", SearchRecipe(sampler="random")).trials
    (given_back,) = [trial for trial in trials if trial.state == TrialState.FAIL]
    (again,) = [trial for trial in trials if trial.user_attrs.get("retry_of") == given_back.number]
    assert again.system_attrs["fixed_params"] == given_back.params
    assert again.user_attrs.get("warm_start") == given_back.user_attrs.get("warm_start")
    judge.interrupt_at = None
    study, outcome = run(journal, judge, starts=STARTS)
    assert (outcome.finished_trials, outcome.new_trials) == (8, 8 - judged)
    assert given_back.user_attrs["hash"] in judge.seen
    assert len(set(judge.seen)) == len(judge.seen) == 8
    assert not study.get_trials(states=(TrialState.RUNNING, TrialState.WAITING))


def test_mutation_moves_one_rung_and_stays_on_the_ladder() -> None:
    sampler = make_sampler(SearchRecipe(sampler="nsga2"), draws=0, guide=None)
    assert isinstance(sampler, optuna.samplers.NSGAIISampler)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        mutation = OneRung()
    study, bounds, random = optuna.create_study(), np.array([0.0, 3.0]), np.random.RandomState(0)
    for value in (0.0, 1.0, 3.0):
        found = {mutation.mutation(value, random, study, bounds) for _ in range(40)}
        assert found == {max(value - 1, 0.0), min(value + 1, 3.0)}


def test_children_of_the_evolutionary_sampler_stay_near_their_seeds(tmp_path: Path) -> None:
    space = tiny_space(layers=6, kv_groups=4, ffn_width=96, ffn_step=8)
    whole = space.shape.architecture
    starts = [(str(i), whole.with_choice(i, FfnChoice(88))) for i in range(4)]
    judge = FakeJudge(space)
    rules = SearchRecipe(sampler="nsga2", population=4, trials=12)
    study = open_study(open_journal(tmp_path / "journal"), "near", rules)
    run_study(study, judge, rules, space, starts)  # type: ignore[arg-type]
    assert len(records(study)) == 12
    for record in records(study):
        rungs = [
            len(space.ladder(choice.kind)) - 1 - space.ladder(choice.kind).index(choice)
            for _, choice in record.architecture.blocks()
        ]
        assert max(rungs) <= 4, "a block far from every seed: chance chose its size"
