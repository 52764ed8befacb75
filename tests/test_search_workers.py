"""One contract for every storage: several workers, each architecture once, the exact number of trials, none lost."""

from __future__ import annotations

import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState
from test_search_study import SPACE, STARTS, FakeJudge

from llmprune.choices.architecture import Architecture
from llmprune.core.recipe import SearchRecipe
from llmprune.search import study
from llmprune.search.parameters import suggest
from llmprune.search.study import finished_trials, join_study, open_study, prepare_study, run_study, work
from llmprune.search.workers import liveness, reaping
from llmprune.search.workers.liveness import Life, at_work, life_of
from llmprune.search.workers.reaping import MAX_DEATHS, Reaper, ask, free
from llmprune.search.workers.storage import close_storage, open_storage

RULES = SearchRecipe(population=4, trials=12, sampler="random")


@dataclass
class Place:
    """A storage that several workers open, each for itself, and a study of this test in it."""

    url: str | None
    journal: Path
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    storages: list[BaseStorage] = field(default_factory=list)

    def storage(self) -> BaseStorage:
        self.storages.append(open_storage(self.url, self.journal))
        return self.storages[-1]

    def start(self, rules: SearchRecipe = RULES, starts: Any = STARTS) -> optuna.Study:
        started = open_study(self.storage(), self.name, rules)
        prepare_study(started, rules, SPACE, starts)
        return started

    def join(self, rules: SearchRecipe = RULES) -> optuna.Study:
        return join_study(self.storage(), self.name, rules)


@pytest.fixture(params=["journal", "postgres", "proxy"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    url = None if request.param == "journal" else request.getfixturevalue(f"{request.param}_url")
    made = Place(url, tmp_path / "study.journal")
    yield made
    for storage in made.storages:
        close_storage(storage)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "SECONDS_BETWEEN_LOOKS", 0.05)


def states(of: optuna.Study) -> Counter[str]:
    return Counter(trial.state.name for trial in of.get_trials(deepcopy=False))


def begin(of: optuna.Study, worker: Any = None) -> FrozenTrial:
    """A trial that is in flight; without a worker, one that is dead already has it."""
    with at_work() as dead:
        trial, _ = ask(of, worker or dead)
    suggest(trial, SPACE)
    return of.get_trials()[trial.number]


def waiting(of: optuna.Study) -> list[FrozenTrial]:
    return of.get_trials(states=(TrialState.WAITING,))


def in_threads(bodies: list[Callable[[], Any]]) -> list[Any]:
    """What they return, begun at the same moment."""
    barrier = threading.Barrier(len(bodies))

    def body(i: int) -> Any:
        barrier.wait(10)
        return bodies[i]()

    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(body, range(len(bodies))))


def test_workers_share_the_budget_exactly_and_judge_nothing_twice(place: Place) -> None:
    place.start()
    # All are made to propose alike, so that claims collide.
    judges = [FakeJudge() for _ in range(3)]
    joined = [place.join() for _ in judges]
    for one in joined:
        one.sampler = optuna.samplers.RandomSampler(seed=0)
    outcomes = in_threads(
        [lambda s=s, j=j: work(s, j, RULES, SPACE) for s, j in zip(joined, judges, strict=True)]  # type: ignore[misc]
    )
    seen = [hash_ for judge in judges for hash_ in judge.seen]
    assert len(seen) == len(set(seen)) == len(finished_trials(joined[0])) == RULES.trials
    assert [outcome.finished_trials for outcome in outcomes] == [RULES.trials] * 3
    assert sum(outcome.new_trials for outcome in outcomes) == RULES.trials
    assert {architecture.hash for _, architecture in STARTS} <= set(seen)
    assert states(joined[0])["RUNNING"] == 0


def test_a_raised_budget_is_every_workers(place: Place) -> None:
    run_study(place.start(), FakeJudge(), RULES, SPACE, STARTS)  # type: ignore[arg-type]
    more = RULES.model_copy(update={"trials": 14})
    place.start(more)
    assert work(place.join(), FakeJudge(), RULES, SPACE).new_trials == 2  # type: ignore[arg-type]


def test_a_worker_waits_for_the_last_trial_and_takes_it_up_if_its_worker_dies(place: Place) -> None:
    rules = RULES.model_copy(update={"trials": 3})
    with at_work() as other:
        last = begin(place.start(rules), other)
        with ThreadPoolExecutor(1) as pool:
            judge = FakeJudge()
            working = pool.submit(work, place.join(), judge, rules, SPACE)  # type: ignore[arg-type]
            while len(judge.seen) < 2:
                time.sleep(0.02)
            time.sleep(0.3)
            assert not working.done() and len(judge.seen) == 2
            # The other's session ends, as far as anyone can see.
            liveness._sessions.discard(other["session"])
            assert working.result(20).finished_trials == 3
    assert judge.seen[2] == STARTS[0][1].hash
    assert place.join().trials[last.number].state == TrialState.FAIL


def test_what_a_dead_worker_had_is_queued_once_whoever_reaps(place: Place) -> None:
    lost = begin(place.start(starts=()))
    reapers = [Reaper(place.join()) for _ in range(3)]
    in_threads([reaper.reap for reaper in reapers])
    after = place.join()
    assert after.trials[lost.number].state == TrialState.FAIL
    (again,) = waiting(after)
    assert again.system_attrs["fixed_params"] == lost.params
    assert again.user_attrs["retry_of"] == lost.number
    for reaper in reapers:
        reaper.reap()
    assert len(waiting(after)) == 1


def test_a_reaper_that_dies_before_it_queued_loses_nothing(place: Place) -> None:
    lost = begin(place.start())
    assert free(place.join(), lost, "its worker is gone")
    assert not free(place.join(), lost, "its worker is gone"), "only one may"
    after = place.join()
    assert len(waiting(after)) == len(STARTS) - 1
    Reaper(place.join()).reap()
    assert [trial.user_attrs.get("retry_of") for trial in waiting(after)] == [None, None, lost.number]
    assert waiting(after)[-1].user_attrs["warm_start"] == "parent"


def test_a_second_successor_is_dropped_by_whoever_asks(place: Place) -> None:
    started = place.start(starts=())
    lost = begin(started)
    for _ in range(2):
        started.enqueue_trial(lost.params, user_attrs={"retry_of": lost.number})
    with at_work() as me:
        first, _ = ask(place.join(), me)
        second, _ = ask(place.join(), me)
    assert started.trials[first.number].user_attrs["retry_of"] == lost.number
    assert "retry_of" not in started.trials[second.number].user_attrs
    assert not waiting(started)


@pytest.mark.parametrize("suggested", [0, 1, 2])
def test_a_queued_trial_in_flight_keeps_all_its_parameters(place: Place, suggested: int) -> None:
    started, queued = place.start(starts=()), {"x": 3, "y": 7}
    started.enqueue_trial(queued)
    with at_work() as dead:
        trial, _ = ask(started, dead)
    for name in list(queued)[:suggested]:
        trial.suggest_int(name, 0, 9)
    Reaper(place.join()).reap()
    (again,) = waiting(started)
    assert again.system_attrs["fixed_params"] == queued


def test_a_trial_that_proposed_nothing_is_failed_only(place: Place) -> None:
    started = place.start(starts=())
    with at_work() as dead:
        ask(started, dead)
    Reaper(place.join()).reap()
    assert states(started) == {"FAIL": 1}


def test_a_trial_whose_worker_died_before_it_gave_its_name_is_freed(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = place.start(starts=())
    started._storage.create_new_trial(started._study_id)
    monkeypatch.setattr(reaping, "NAMELESS_SECONDS", 0.05)
    reaper = Reaper(place.join())
    reaper.reap()
    assert states(started) == {"RUNNING": 1}
    time.sleep(0.1)
    reaper.reap()
    assert states(started) == {"FAIL": 1}


def test_a_worker_of_another_host_lives_as_long_as_it_is_heard(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    started = place.start(starts=())
    with at_work() as here:
        foreign = {**here, "host": "elsewhere"}
    assert life_of(foreign) is Life.UNKNOWN
    trial, pulse = ask(started, foreign)
    suggest(trial, SPACE)
    observer = place.join()
    monkeypatch.setattr(reaping, "GRACE_SECONDS", 0.5)
    if place.url is not None and place.url.startswith("postgresql"):
        observer._storage._backend.grace_period = 0.5  # type: ignore[attr-defined]
    reaper = Reaper(observer)
    for _ in range(8):
        pulse.beat()
        reaper.reap()
        time.sleep(0.1)
    assert states(started) == {"RUNNING": 1}
    time.sleep(0.7)
    reaper.reap()
    assert states(started) == {"FAIL": 1, "WAITING": 1}
    with pytest.raises(UpdateFinishedTrialError):
        trial.set_user_attr("hash", "too late")


def test_a_worker_whose_trial_was_taken_goes_on_with_the_next(place: Place) -> None:
    started = place.start(RULES.model_copy(update={"trials": 3}))

    class Slow(FakeJudge):
        def judge(self, architecture: Architecture, name: str) -> Any:
            if not self.seen:
                other = place.join()
                (mine,) = other.get_trials(states=(TrialState.RUNNING,))
                assert free(other, mine, "its worker is gone")
            return super().judge(architecture, name)

    judge = Slow()
    outcome = work(started, judge, RULES, SPACE)  # type: ignore[arg-type]
    assert (outcome.finished_trials, outcome.new_trials) == (3, 3)
    assert judge.seen.count(STARTS[0][1].hash) == 2, "nobody has the figures of the first time"


def test_what_kills_its_worker_each_time_is_given_up(place: Place) -> None:
    started = place.start(starts=STARTS[:1])
    for _ in range(MAX_DEATHS):
        begin(started)
        Reaper(started).reap()
    assert states(started) == {"FAIL": MAX_DEATHS}


def test_a_starting_point_without_a_place_is_kept(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = RULES.model_copy(update={"trials": 1})
    started = place.start(rules)
    judge = FakeJudge()
    with at_work() as other, ThreadPoolExecutor(1) as pool:
        first = begin(started, other)
        for key, value in {"hash": STARTS[0][1].hash, "judging": True}.items():
            started._storage.set_trial_user_attr(first._trial_id, key, value)
        # This worker saw a place free a moment before the other took it.
        looks = iter([True])
        monkeypatch.setattr(study, "has_room", lambda *_: next(looks, False))
        working = pool.submit(work, place.join(), judge, rules, SPACE)  # type: ignore[arg-type]
        while states(started)["FAIL"] == 0:
            time.sleep(0.02)
        started.set_user_attr("trials", 0)
        working.result(20)
    assert not judge.seen
    assert {trial.user_attrs["warm_start"] for trial in waiting(started)} == {"half", "shallow"}


def test_life_of_a_process(tmp_path: Path) -> None:
    with at_work() as me:
        assert life_of(me) is Life.ALIVE
        assert life_of({**me, "pid_space": "a container"}) is Life.UNKNOWN
        assert life_of({**me, "pid": 1, "started": me["started"]}) is Life.GONE, "a number that was given again"
        assert life_of({**me, "pid": 2**22 + 1}) is Life.GONE
    assert life_of(me) is Life.GONE
