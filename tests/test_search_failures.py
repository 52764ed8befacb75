"""Trials that come to nothing: two tries, a reason that stays, and an end when nothing can be judged."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import pytest
from conftest import Llmprune
from optuna.trial import TrialState, create_trial
from test_search_study import STARTS, FakeJudge, run
from tiny import tiny_recipe, tiny_space

from llmprune.choices.architecture import Architecture
from llmprune.core.errors import BudgetError, ModelError, SearchError
from llmprune.core.recipe import SearchRecipe
from llmprune.core.recipe_text import to_yaml
from llmprune.pipeline import commands
from llmprune.search.failures import FAILURES_IN_A_ROW, counted_reasons, told
from llmprune.search.judging import Judge
from llmprune.search.study import finished_trials, open_study, work
from llmprune.search.workers.claims import failed_trials
from llmprune.search.workers.reaping import MAX_DEATHS, MAX_TRIES, why_failed
from llmprune.search.workers.storage import open_journal

HALF = STARTS[1][1]
OUT_OF_MEMORY = "OutOfMemoryError: no room for 2 GiB"


class OutOfMemoryError(RuntimeError):
    """As torch's."""


@dataclass
class Raising(FakeJudge):
    """Raises what `raises` has for an architecture and its try, counted from 1."""

    raises: Callable[[Architecture, int], BaseException | None] = lambda architecture, tries: None
    tries: Counter[str] = field(default_factory=Counter)

    def judge(self, architecture: Architecture, name: str) -> Any:
        self.tries[architecture.hash] += 1
        error = self.raises(architecture, self.tries[architecture.hash])
        if error is not None:
            raise error
        return super().judge(architecture, name)


def without_memory(architecture: Architecture, tries: int) -> BaseException | None:
    return OutOfMemoryError("no room for 2 GiB")


def but_half(architecture: Architecture, tries: int) -> BaseException | None:
    return without_memory(architecture, tries) if architecture == HALF else None


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "study.journal"


def test_what_raises_twice_fails_with_its_reason_and_the_search_goes_on(journal: Path) -> None:
    judge = Raising(raises=but_half)
    study, outcome = run(journal, judge, trials=5, starts=STARTS)
    assert (outcome.finished_trials, outcome.new_trials, outcome.stopped_by) == (5, 5, "trials")
    assert (outcome.failed_trials, outcome.failed_because) == (1, {OUT_OF_MEMORY: 1})
    assert judge.tries[HALF.hash] == MAX_TRIES
    first, second = study.get_trials(states=(TrialState.FAIL,))
    assert (first.user_attrs["raised"], "failed_because" in first.user_attrs) == (OUT_OF_MEMORY, False)
    assert (second.user_attrs["retry_of"], second.user_attrs["tries"]) == (first.number, 1)
    assert second.user_attrs["failed_because"] == OUT_OF_MEMORY
    assert first.user_attrs["warm_start"] == second.user_attrs["warm_start"] == "half"
    # Another session finds the failure there, and does not try again.
    _, again = run(journal, judge, trials=6, starts=STARTS)
    assert (again.finished_trials, again.failed_because, judge.tries[HALF.hash]) == (6, {OUT_OF_MEMORY: 1}, MAX_TRIES)


def test_what_raises_once_is_judged_at_its_second_try(journal: Path) -> None:
    judge = Raising(raises=lambda architecture, tries: without_memory(architecture, tries) if tries == 1 else None)
    _, outcome = run(journal, judge, trials=4, starts=STARTS)
    assert (outcome.finished_trials, outcome.failed_trials, outcome.failed_because) == (4, 0, {})
    assert set(judge.tries.values()) == {2}


def test_tries_are_counted_across_sessions_and_an_interrupt_is_none(journal: Path) -> None:
    def raises(architecture: Architecture, tries: int) -> BaseException | None:
        if architecture != HALF:
            return None
        return KeyboardInterrupt() if tries in (1, 3) else OutOfMemoryError("no room for 2 GiB")

    judge = Raising(raises=raises)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(journal, judge, trials=5, starts=STARTS)
    _, outcome = run(journal, judge, trials=5, starts=STARTS)
    assert (outcome.finished_trials, outcome.failed_because) == (5, {OUT_OF_MEMORY: 1})
    assert judge.tries[HALF.hash] == 4


def test_a_long_reason_is_cut(journal: Path) -> None:
    judge = Raising(raises=lambda a, _: RuntimeError("x" * 5000) if a == HALF else None)
    _, outcome = run(journal, judge, trials=3, starts=STARTS)
    (reason,) = outcome.failed_because
    assert reason.startswith("RuntimeError: xxx") and len(reason) == 200


def test_a_sampler_that_proposes_a_failure_again_is_not_heard(journal: Path) -> None:
    judge = Raising(raises=but_half)
    study, _ = run(journal, judge, trials=2, starts=STARTS[:2])
    params = next(t.params for t in study.trials if t.user_attrs.get("failed_because"))
    recipe = SearchRecipe(sampler="random", population=4, trials=3)
    study = open_study(open_journal(journal), "study", recipe)

    class Stubborn(optuna.samplers.RandomSampler):
        def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> Any:
            return params[name]

    study.sampler = Stubborn()
    study.set_user_attr("trials", recipe.trials)
    outcome = work(study, judge, recipe, judge.space)  # type: ignore[arg-type]
    assert (outcome.stopped_by, outcome.new_trials, outcome.failed_trials) == ("no new proposals", 0, 1)
    assert judge.tries[HALF.hash] == MAX_TRIES
    gave_way = [trial for trial in study.trials if "gave_way_to" in trial.user_attrs]
    assert len(gave_way) > 10


@pytest.mark.parametrize(
    ("error", "reason"), [(OutOfMemoryError("no room for 2 GiB"), OUT_OF_MEMORY), (ModelError("NaN"), "NaN")]
)
def test_a_search_that_judges_nothing_ends_with_the_reason(error: Exception, reason: str, journal: Path) -> None:
    judge = Raising(raises=lambda *_: error)
    told = rf"{FAILURES_IN_A_ROW} trials in a row .* because of: {reason}; mend that"
    with pytest.raises(SearchError, match=told) as caught:
        run(journal, judge, trials=50, starts=STARTS)
    assert ("a lower data.seq_len or workload.batch" in str(caught.value)) == (reason == OUT_OF_MEMORY)
    assert judge.tries.total() == FAILURES_IN_A_ROW


def test_starting_points_outlive_a_session_that_judged_nothing(journal: Path) -> None:
    judge = Raising(raises=without_memory)
    for _ in range(2):
        with pytest.raises(SearchError):
            run(journal, judge, trials=9, starts=STARTS)
    judge.raises = lambda *_: None
    study, outcome = run(journal, judge, trials=9, starts=STARTS)
    assert outcome.finished_trials == 9
    labels = Counter(trial.user_attrs.get("warm_start") for trial in finished_trials(study))
    assert [labels[label] for label, _ in STARTS] == [1, 1, 1]
    assert not {architecture.hash for _, architecture in STARTS} & failed_trials(study.trials).keys()


def test_a_success_begins_the_count_anew_and_impossible_children_are_not_counted(journal: Path) -> None:
    blind = [(f"blind-{i}", Architecture.of([(0, 16 * (i >> j & 1)) for j in range(4)])) for i in range(1, 12)]
    space = tiny_space(layers=4)
    whole = [("parent", space.shape.architecture)]
    _, outcome = run(journal, FakeJudge(space), trials=1, starts=[*blind, *whole])
    assert (outcome.finished_trials, outcome.failed_trials) == (1, len(blind))
    assert "keeps attention in at least one layer" in "".join(outcome.failed_because)

    calls = iter(range(10**6))
    judge = FakeJudge(nats_of=lambda _: 1.0 if next(calls) % FAILURES_IN_A_ROW == 9 else math.nan)
    _, outcome = run(journal.with_name("other"), judge, trials=3)
    assert outcome.finished_trials == 3
    assert outcome.failed_because["the child computes no finite loss"] == 27


def test_reasons_are_counted_by_architecture_and_told_in_a_few_lines() -> None:
    def failed(hash_: str, reason: str) -> Any:
        return create_trial(state=TrialState.FAIL, user_attrs={"hash": hash_, "failed_because": reason})

    killer = {"hash": "k", "freed": "its worker is gone", "deaths": MAX_DEATHS - 1}
    trials = [
        *(failed(hash_, reason) for hash_, reason in zip("aabcdefg", "xxxyyyvw", strict=True)),
        create_trial(state=TrialState.FAIL, user_attrs={"hash": "h", "raised": "x", "freed": "released"}),
        create_trial(state=TrialState.FAIL, user_attrs=killer),
        create_trial(state=TrialState.COMPLETE, value=1.0, user_attrs={"hash": "g", "record": {}}),
    ]
    because = counted_reasons(trials)
    assert because == {"y": 3, "x": 2, "v": 1, why_failed(trials[-2]): 1}
    assert told(because) == ["7 trials failed:", "  3 x y", "  2 x x", "  1 x v", "  1 for other reasons"]
    assert told({}) == []


def test_the_commands_say_what_failed(llmprune: Llmprune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(to_yaml(tiny_recipe(tmp_path)), encoding="utf-8")
    judged, victims = Judge.judge, list[str]()

    def raises(self: Judge, architecture: Architecture, name: str) -> Any:
        if architecture != self.parent.shape.architecture:
            victims.append(architecture.hash)
            if architecture.hash == victims[0]:
                raise OutOfMemoryError("no room for 2 GiB")
        return judged(self, architecture, name)

    def ends_here(*_: Any) -> Any:
        raise BudgetError("far enough")

    monkeypatch.setattr(Judge, "judge", raises)
    monkeypatch.setattr(commands, "make_front", ends_here)
    lines = ["1 trial failed:", f"  1 x {OUT_OF_MEMORY}"]
    # Enough for every starting point, behind which the second try is queued.
    compressed = llmprune("compress", recipe, "--out", tmp_path / "run", "search.trials=6")
    assert compressed.code == 2 and compressed.err.splitlines()[-3:] == [*lines, "error: far enough"]
    assert victims.count(victims[0]) == MAX_TRIES
    printed = llmprune("search", tmp_path / "run", "--quiet")
    assert (printed.code, printed.out.splitlines()[1:]) == (0, lines)
    found = llmprune("search", tmp_path / "run", "--quiet", "--json").json
    assert (found["failed_trials"], found["failed_because"]) == (1, {OUT_OF_MEMORY: 1})
