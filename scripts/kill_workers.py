"""Kill workers of a search with SIGKILL, at random and again and again, and count what that cost.

    python scripts/kill_workers.py --trials 200 --every 1 --storage postgresql://...

Without --storage it starts a PostgreSQL server of its own (scripts/postgres.py); `--storage journal` is the run's file.
The run is the test-suite's tiny model; speeds are made up from sizes, all the rest is what `llmprune worker` does.
Every real evaluation is a line in a file that is only appended to, and so is every kill, before it is done.

Prints one JSON object: trials finished (and wanted), kills, evaluations begun, evaluations that began again because
their worker was killed, and the figures that have to be 0: architectures that were begun and are neither finished, nor
queued, nor refused by the model (`lost`), finished architectures that were evaluated again and evaluations of one
architecture by two workers that both lived (`evaluated_twice`), finished trials too many (`overshoot`) or too few
(`missing`). Trials of what was lost are told on stderr.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import optuna
import postgres
import torch
from optuna.trial import TrialState

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tiny import paired_by_bytes, tiny_recipe  # noqa: E402

from llmprune.core.recipe import Recipe  # noqa: E402
from llmprune.measure.record import Record  # noqa: E402
from llmprune.models.parent import load_parent  # noqa: E402
from llmprune.pipeline import commands  # noqa: E402
from llmprune.pipeline.judges import Judges  # noqa: E402
from llmprune.pipeline.prepare import prepare  # noqa: E402
from llmprune.pipeline.run import Run  # noqa: E402
from llmprune.pipeline.run_directory import RunDirectory  # noqa: E402
from llmprune.pipeline.searching import start_study  # noqa: E402
from llmprune.search import judging, study  # noqa: E402
from llmprune.search.workers.claims import known_trials  # noqa: E402
from llmprune.search.workers.reaping import WORKER  # noqa: E402
from llmprune.search.workers.storage import opened_storage  # noqa: E402
from llmprune.search.workers.studies import RUN  # noqa: E402
from llmprune.tables import block_tables  # noqa: E402

BEGUN, KILLED = "begun", "killed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--every", type=float, default=1.0, help="seconds between two kills")
    parser.add_argument("--kills", type=float, default=float("inf"), help="no more of them; default: until all is done")
    parser.add_argument("--judge-seconds", type=float, default=0.1, help="a nap in every evaluation, so kills hit one")
    parser.add_argument("--storage", help="URL, or journal; default: a PostgreSQL server of its own")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    # Forked workers may not use threads that the parent has started.
    torch.set_num_threads(1)
    study.SECONDS_BETWEEN_LOOKS = 0.1
    with tempfile.TemporaryDirectory() as directory, _storage(arguments.storage) as url:
        result = kill_workers(Path(directory), url, arguments)
    json.dump(result, sys.stdout, indent=2)
    print()
    sys.exit(any(result[figure] for figure in ("lost", "evaluated_twice", "overshoot", "missing")))


@contextmanager
def _storage(named: str | None) -> Iterator[str | None]:
    if named is None:
        with postgres.running() as url:
            yield url
    else:
        yield None if named == "journal" else named


def kill_workers(root: Path, url: str | None, arguments: argparse.Namespace) -> dict[str, Any]:
    """Search with workers that are killed; returns what is printed."""
    recipe = tiny_recipe(root)
    rules = recipe.search.model_copy(update={"trials": arguments.trials, "sampler": "random"})
    recipe = recipe.model_copy(
        update={
            "search": rules,
            # A space of 3^6 architectures.
            "space": recipe.space.model_copy(update={"ffn_step": 11}),
        }
    )
    log, path = root / "log", root / "run"
    log.touch()
    # What every worker would import anew after its fork.
    for module in ("alembic.command", "alembic.script", "psycopg", "sqlalchemy.dialects.postgresql.psycopg"):
        if url is not None:
            importlib.import_module(module)
    load_parent(recipe.model)
    # In a process of its own: a connection to a database must not be inherited.
    os.waitpid(_fork(lambda: _start(path, recipe, url)), 0)
    began, chance = time.monotonic(), random.Random(arguments.seed)
    workers = [_worker(path, url, log, arguments) for _ in range(arguments.workers)]
    kills, next_kill = 0, time.monotonic() + arguments.every
    while workers:
        time.sleep(0.02)
        # A worker that ends by itself has seen the last trial finished.
        workers = [pid for pid in workers if os.waitpid(pid, os.WNOHANG) == (0, 0)]
        # One that is still loading its model has nothing to lose.
        at_work = (
            [pid for pid in workers if pid in _begun_by(log)]
            if kills < arguments.kills and time.monotonic() >= next_kill
            else []
        )
        if at_work:
            victim = chance.choice(at_work)
            _append(log, KILLED, "-", victim)
            os.kill(victim, signal.SIGKILL)
            os.waitpid(victim, 0)
            kills += 1
            workers[workers.index(victim)] = _worker(path, url, log, arguments)
            next_kill = time.monotonic() + arguments.every
    seconds = time.monotonic() - began
    return {"kills": kills, "seconds": round(seconds, 1), **_count(path, url, log, arguments.trials)}


def _start(path: Path, recipe: Recipe, url: str | None) -> None:
    block_tables.measure_paired = paired_by_bytes
    with RunDirectory(path).locked():
        run = Run.start(path, recipe)
        run.storage = url
        with opened_storage(url, run.directory.journal) as storage:
            prepared = prepare(run)
            start_study(run, storage, prepared, Judges(run, prepared))


def _worker(path: Path, url: str | None, log: Path, arguments: argparse.Namespace) -> int:
    def body() -> None:
        real = judging.Judge.judge

        def judge(self: judging.Judge, architecture: Any, name: str) -> Record:
            _append(log, BEGUN, architecture.hash, os.getpid())
            time.sleep(arguments.judge_seconds)
            return real(self, architecture, name)

        judging.measure_paired = paired_by_bytes
        judging.Judge.judge = judge  # type: ignore[method-assign]
        commands.worker(Run.join(path, storage=url))

    return _fork(body)


def _fork(body: Callable[[], None]) -> int:
    """The PID of a process that runs `body`: importing torch anew after each kill would take longer than its life."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        body()
        code = 0
    finally:
        if code:
            sys.excepthook(*sys.exc_info())
        os._exit(code)


def _begun_by(log: Path) -> set[int]:
    lines = [line.split() for line in log.read_text().splitlines()]
    return {int(pid) for event, _, pid in lines if event == BEGUN}


def _append(log: Path, event: str, hash_: str, pid: int) -> None:
    """One write of a file opened to append: lines of several processes come whole, in the order of their writes."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    try:
        os.write(descriptor, f"{event} {hash_} {pid}\n".encode())
    finally:
        os.close(descriptor)


def _count(path: Path, url: str | None, log: Path, wanted: int) -> dict[str, Any]:
    key = RunDirectory(path).read_provenance()["study"]["run"]
    with opened_storage(url, RunDirectory(path).journal) as storage:
        (name,) = [found.study_name for found in storage.get_all_studies() if found.user_attrs.get(RUN) == key]
        trials = optuna.load_study(study_name=name, storage=storage).get_trials(deepcopy=False)
    with_record = [trial for trial in trials if trial.state == TrialState.COMPLETE and "record" in trial.user_attrs]
    finished = known_trials(trials)
    begun: dict[str, list[tuple[int, int]]] = {}
    killed: dict[int, int] = {}
    for number, line in enumerate(log.read_text().splitlines()):
        event, hash_, pid = line.split()
        if event == KILLED:
            killed[int(pid)] = number
        else:
            begun.setdefault(hash_, []).append((number, int(pid)))
    twice = sum(
        # The first of two was killed before the second began, and the one that was finished is the last.
        any(killed.get(pid, number + 1) > number for (_, pid), (number, _) in pairwise(times))
        or (hash_ in finished and finished[hash_].user_attrs[WORKER]["pid"] != times[-1][1])
        for hash_, times in begun.items()
    )
    queued = {trial.user_attrs.get("retry_of") for trial in trials if trial.state == TrialState.WAITING}
    waiting = {trial.user_attrs.get("hash") for trial in trials if trial.number in queued}
    failed = {trial.user_attrs["hash"] for trial in trials if "failed_because" in trial.user_attrs}
    lost = begun.keys() - finished.keys() - waiting - failed
    for trial in trials:
        if trial.user_attrs.get("hash") in lost:
            print(trial, file=sys.stderr)
    return {
        "trials": len(with_record),
        "wanted": wanted,
        "begun": sum(map(len, begun.values())),
        "begun_again_after_a_kill": sum(len(times) - 1 for times in begun.values()),
        "freed": sum("freed" in trial.user_attrs for trial in trials),
        "gave_way": sum("gave_way_to" in trial.user_attrs for trial in trials),
        "repeats": sum("repeats_trial" in trial.user_attrs for trial in trials),
        "still_queued": len(waiting),
        "cannot_run": len(failed),
        "lost": len(lost),
        "evaluated_twice": twice + len(with_record) - len(finished),
        "overshoot": max(0, len(finished) - wanted),
        "missing": max(0, wanted - len(finished)),
        "left_running": sum(trial.state == TrialState.RUNNING for trial in trials),
    }


if __name__ == "__main__":
    main()
