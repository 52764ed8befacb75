"""The processes of one search on one machine: this one, and a worker for each further device."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import IO

import optuna
import torch

from llmprune.core.errors import RecipeError, quoted, shortened
from llmprune.core.recipe import Recipe
from llmprune.measure.speed.turns import SHARED_BY
from llmprune.models.placement import named_devices
from llmprune.pipeline.judges import Judges
from llmprune.pipeline.run import Run
from llmprune.pipeline.searching import run_trials
from llmprune.search.study import Report, SearchOutcome

COMMAND = (sys.executable, "-m", "llmprune")
SECONDS_TO_END = 60
"""What a worker has to give its trial back before it is killed. It looks up between two operations of torch."""


def devices_of(workers: str, recipe: Recipe) -> tuple[str, ...]:
    """The devices that a search in several processes names, the first being its own.

    Raises ModelError as `named_devices` does, RecipeError if the recipe has the parent elsewhere.
    """
    devices = named_devices(workers, "--workers")
    first, stated = devices[0], recipe.model.device
    if stated not in ("auto", first.type, str(first)):
        raise RecipeError(
            f"a search computes on the first device of --workers, {first}, but model.device={quoted(stated)}; name "
            "that one first, or give model.device=auto"
        )
    return tuple(map(str, devices))


def search_together(run: Run, study: optuna.Study, judges: Judges, report: Report | None) -> SearchOutcome:
    """`run_trials`, here and in a worker for each further device of the run, which ends when this does.

    A worker that dies ends nothing: that is said at once, and is in the outcome.
    """
    if not run.workers:
        return run_trials(run, study, judges, report)
    if run.workers[0] == "cpu":
        run.say(_sharing(1 + len(run.workers), judges))
    with _crew(run) as crew:
        lost: dict[str, str] = {}

        def look() -> None:
            for number, worker in enumerate(crew, start=2):
                if (ending := worker.ending) and (name := f"worker {number} on {worker.device}") not in lost:
                    lost[name] = ending
                    run.say(f"{name} {ending}; the search goes on without it")

        outcome = run_trials(run, study, judges, report, look)
        look()
    return replace(outcome, lost_workers=tuple(f"{name} {ending}" for name, ending in lost.items()))


def _sharing(processes: int, judges: Judges) -> str:
    gigabytes = sum(weight.nbytes for weight in judges.stock.parent.model.parameters()) / 1e9
    threads = torch.get_num_threads()
    return (
        f"{processes} processes search on this CPU: each holds the parent ({gigabytes:.2g} GB), scores with "
        f"{max(1, threads // processes)} of {threads} threads, and times with all, one at a time"
    )


@contextmanager
def _crew(run: Run) -> Iterator[list[_Worker]]:
    crew: list[_Worker] = []
    with _cpu_shared_by(1 + len(run.workers)):
        try:
            for device in run.workers:
                crew.append(_Worker.start(run, device))
            yield crew
        finally:
            for worker in crew:
                worker.let_go()
            for worker in crew:
                worker.wait()


@contextmanager
def _cpu_shared_by(processes: int) -> Iterator[None]:
    """Here and in what is started here."""
    before = os.environ.get(SHARED_BY)
    os.environ[SHARED_BY] = str(processes)
    try:
        yield
    finally:
        del os.environ[SHARED_BY]
        if before is not None:
            os.environ[SHARED_BY] = before


@dataclass(frozen=True)
class _Worker:
    device: str
    process: subprocess.Popen[bytes]
    errors: IO[bytes]

    @classmethod
    def start(cls, run: Run, device: str) -> _Worker:
        where = ["worker", str(run.directory.path), "--device", device]
        # Its hardware must be the study's, and torch's threads are part of that.
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        if run.storage is not None:
            # Others read command lines, and it may hold a password.
            environment["LLMPRUNE_STORAGE"] = run.storage
        errors = tempfile.TemporaryFile()  # noqa: SIM115 - open for as long as the worker lives
        process = subprocess.Popen(
            [*COMMAND, *where, "--leashed", "--quiet"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )
        return cls(device, process, errors)

    @property
    def ending(self) -> str | None:
        """How it ended, in at most 200 characters; None if it works, or has found nothing more to do."""
        code = self.process.poll()
        if not code:
            return None
        if code < 0:
            return f"was killed ({signal.Signals(-code).name})"
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), f"exit code {code}")
        return shortened(f"ended: {last.removeprefix('error: ')}")

    def let_go(self) -> None:
        """It interrupts itself."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def wait(self) -> None:
        try:
            self.process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.errors.close()
