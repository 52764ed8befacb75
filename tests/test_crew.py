"""One command, several processes: who is started and how, what an end of one costs, and that none is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Llmprune
from test_cli import assert_one_error
from test_run import SEARCH
from tiny import contents

import llmprune.cli.leash
from llmprune.core.errors import RecipeError
from llmprune.measure.speed.turns import SHARED_BY
from llmprune.pipeline import crew
from llmprune.pipeline.commands import search
from llmprune.pipeline.crew import devices_of
from llmprune.pipeline.run import Run
from llmprune.pipeline.run_directory import RunDirectory
from llmprune.search.study import SearchOutcome
from llmprune.search.workers.liveness import Life, life_of
from llmprune.search.workers.storage import opened_storage

STAND_IN = f"""
import json, os, pathlib, runpy, sys, time
runpy.run_path({llmprune.cli.leash.__file__!r})["end_with_stdin"]()
log = pathlib.Path(sys.argv[2]) / f"worker-{{os.getpid()}}"
wanted = ("OMP_NUM_THREADS", "LLMPRUNE_STORAGE", "{SHARED_BY}")
note = lambda: log.write_text(json.dumps({{"argv": sys.argv[1:], **{{name: os.environ.get(name) for name in wanted}}}}))
"""
WORKS = """
try:
    note()
    time.sleep(60)
except KeyboardInterrupt:
    log.with_suffix(".ended").touch()
    sys.exit(130)
"""
"""Until it is interrupted."""


@pytest.fixture
def run(copied: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """One whose tables and study are not asked for."""
    monkeypatch.setattr(crew, "_sharing", lambda processes, judges: f"{processes} processes")
    run = Run.open(copied)
    run.workers, run.storage, run.say = ("cpu", "cpu"), "postgresql://me:secret@host/db", told.append
    told.clear()
    return run


told: list[str] = []


def workers_are(body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "COMMAND", (sys.executable, "-c", f"{STAND_IN}\n{body}"))


def search_is(body: Callable[[Callable[[], None]], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process does while its workers work; given how it looks after them."""

    def run_trials(run: Run, study: Any, judges: Any, report: Any, look: Callable[[], None]) -> SearchOutcome:
        body(look)
        return SearchOutcome(5, 2, 1.0, "trials", 0, {})

    monkeypatch.setattr(crew, "run_trials", run_trials)


def until(condition: Callable[[], Any], seconds: float = 30) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it does not come to that"
        time.sleep(0.02)
    return found


def logs(run: Path, suffix: str = "") -> list[Path]:
    return [path for path in run.glob("worker-*") if path.suffix == suffix and (suffix or path.stat().st_size)]


def together(run: Run) -> SearchOutcome:
    return crew.search_together(run, None, None, None)  # type: ignore[arg-type]


def test_workers_are_started_with_the_search_and_end_with_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    path = run.directory.path
    workers_are(WORKS, monkeypatch)
    search_is(lambda look: until(lambda: len(logs(path)) == 2) and None, monkeypatch)
    assert together(run) == SearchOutcome(5, 2, 1.0, "trials", 0, {})
    assert len(logs(path, ".ended")) == 2 and told == ["3 processes"]
    assert SHARED_BY not in os.environ
    for log in logs(path):
        started = json.loads(log.read_text())
        assert started["argv"] == ["worker", str(path), "--device", "cpu", "--leashed", "--quiet"]
        assert (started["OMP_NUM_THREADS"], started[SHARED_BY]) == ("1", "3")
        assert started["LLMPRUNE_STORAGE"] == run.storage and run.storage not in started["argv"]


@pytest.mark.parametrize(
    ("body", "ending"),
    [
        ("sys.exit('a line\\nerror: no memory is left\\n')", "ended: no memory is left"),
        ("os.kill(os.getpid(), 9)", "was killed (SIGKILL)"),
    ],
)
def test_a_worker_that_dies_is_told_of_and_ends_nothing(
    body: str, ending: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def looking(look: Callable[[], None]) -> None:
        until(lambda: look() or len(told) == 3)
        look()

    workers_are(body, monkeypatch)
    search_is(looking, monkeypatch)
    names = [f"worker {number} on cpu {ending}" for number in (2, 3)]
    assert sorted(together(run).lost_workers) == names
    assert sorted(told[1:]) == [f"{name}; the search goes on without it" for name in names]


def test_workers_that_found_nothing_more_to_do_are_not_lost(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    workers_are("note()", monkeypatch)
    search_is(lambda look: until(lambda: len(logs(run.directory.path)) == 2) and look(), monkeypatch)
    assert together(run).lost_workers == ()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_whatever_ends_the_search_ends_its_workers(
    error: type[BaseException], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(look: Callable[[], None]) -> None:
        until(lambda: len(logs(run.directory.path)) == 2)
        raise error

    workers_are(WORKS, monkeypatch)
    search_is(failing, monkeypatch)
    with pytest.raises(error):
        together(run)
    assert len(logs(run.directory.path, ".ended")) == 2


def test_a_worker_that_does_not_end_is_killed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "SECONDS_TO_END", 0.2)
    workers_are("signal = __import__('signal'); signal.signal(2, signal.SIG_IGN); note(); time.sleep(60)", monkeypatch)
    search_is(lambda look: until(lambda: len(logs(run.directory.path)) == 2) and None, monkeypatch)
    began = time.monotonic()
    together(run)
    assert time.monotonic() - began < 30


def test_a_search_without_workers_starts_none(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "_crew", None)
    assert search(Run.open(copied)).lost_workers == ()


@pytest.mark.parametrize(
    ("stated", "workers", "accepted"),
    [
        ("auto", "cpu,cpu", True),
        ("cpu", "cpu,cpu", True),
        ("cuda", "cpu,cpu", False),
        ("cuda:0,cuda:1", "cpu,cpu", False),
    ],
)
def test_the_recipe_may_not_have_the_parent_elsewhere(stated: str, workers: str, accepted: bool, copied: Path) -> None:
    recipe = Run.open(copied).recipe
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"device": stated})})
    if accepted:
        assert devices_of(workers, recipe) == ("cpu", "cpu")
        return
    with pytest.raises(RecipeError, match=f"first device of --workers, cpu, but model.device='{stated}'; name that"):
        devices_of(workers, recipe)


@pytest.mark.parametrize("workers", ["cuda:97,cuda:98", "cpu,cuda:0", "cuda:0,cuda:0", "abacus"])
def test_devices_that_cannot_be_used_are_one_error_before_anything_begins(
    workers: str, copied: Path, tmp_path: Path, llmprune: Llmprune
) -> None:
    before = contents(copied)
    assert_one_error(llmprune("search", copied, "search.trials=9", "--workers", workers), "--workers")
    recipe = copied / "recipe.yaml"
    assert_one_error(llmprune("compress", recipe, "--out", tmp_path / "new", "--workers", workers), "--workers")
    assert contents(copied) == before and not (tmp_path / "new").exists()


def test_a_forecast_is_of_one_process(copied: Path, llmprune: Llmprune) -> None:
    result = llmprune("search", copied, "--dry-run", "--workers", "cpu,cpu")
    assert_one_error(result, "a forecast is of one process; give --dry-run without --workers")


@pytest.fixture
def started(copied: Path) -> Iterator[subprocess.Popen[str]]:
    """`llmprune search RUN --workers cpu,cpu,cpu` as a user starts it, with more trials than anyone waits for."""
    with subprocess.Popen(
        [sys.executable, "-c", SEARCH, "search", str(copied), "search.trials=500", "--workers", "cpu,cpu,cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_kill_costs_a_trial_and_ctrl_c_ends_all(copied: Path, started: subprocess.Popen[str]) -> None:
    def at_work() -> set[int]:
        workers = [trial.user_attrs["worker"] for trial in trials(copied) if "worker" in trial.user_attrs]
        return {worker["pid"] for worker in workers if life_of(worker) is Life.ALIVE}

    until(lambda: started.poll() is not None or len(at_work()) == 3, 200)
    assert started.poll() is None, started.communicate()[1]
    killed, kept = sorted(at_work() - {started.pid})
    os.kill(killed, signal.SIGKILL)
    done = len(finished(copied))
    until(lambda: len(finished(copied)) > done + 6)
    started.send_signal(signal.SIGINT)
    _, err = started.communicate(timeout=90)
    assert started.returncode == 130 and "Traceback" not in err, err
    assert "on cpu was killed (SIGKILL); the search goes on without it" in err
    assert err.splitlines()[-1] == "interrupted; the same command continues where this one stopped"
    assert not psutil.pid_exists(kept)
    states = [trial.state.name for trial in trials(copied)]
    # What the killed one had was taken up by another, or is taken up by the next search.
    assert states.count("RUNNING") <= 1
    hashes = [trial.user_attrs["hash"] for trial in finished(copied)]
    assert len(set(hashes)) == len(hashes)


def trials(run: Path) -> list[Any]:
    directory = RunDirectory(run)
    with opened_storage(None, directory.journal) as storage:
        (study,) = storage.get_all_studies()
        return storage.get_all_trials(study._study_id)


def finished(run: Path) -> list[Any]:
    return [trial for trial in trials(run) if "record" in trial.user_attrs]
