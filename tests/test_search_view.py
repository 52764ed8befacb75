"""What a person sees of a search on a terminal while it runs."""

from __future__ import annotations

import io
import math

import optuna
import pytest
from conftest import Finished
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console

from llmprune.cli import terminal
from llmprune.cli.search_view import SearchView
from llmprune.core.budgets import Axes
from llmprune.core.progress import SEARCHING
from llmprune.measure.record import Record
from llmprune.measure.speed.throughput import Spread
from llmprune.pipeline.run import Run
from llmprune.pipeline.run_directory import read_front
from llmprune.search.trial_records import RECORD


def trial(number: int, record: Record) -> FrozenTrial:
    made = optuna.create_trial(state=TrialState.COMPLETE, values=[1.0, 1.0], user_attrs={RECORD: record.stored()})
    made.number = number
    return made


def drawn(view: SearchView) -> str:
    target = Console(file=io.StringIO(), width=120)
    target.print(view)
    assert isinstance(target.file, io.StringIO)
    return target.file.getvalue()


AXES = Axes("nats_per_token", "decode_speedup")


@pytest.fixture
def some(finished_run: Finished) -> list[Record]:
    """Three records whose speed and nats are known."""
    record = read_front(Run.join(finished_run.path).directory).parent
    return [
        record.model_copy(
            update={
                "id": f"{number:016x}",
                "ppl_ratio": math.exp(lost),
                "nats_per_token": 3 + lost,
                "decode_speedup": Spread(speed, speed, speed),
            }
        )
        for number, (speed, lost) in enumerate([(1.0, 0.0), (1.32, 0.9), (1.31, 0.8), (1.6, 2.5)])
    ]


def test_the_best_at_each_target_is_told(some: list[Record]) -> None:
    view = SearchView(AXES, (1.3, 1.5, 2.0))
    assert drawn(view).strip() == ""
    view.look([trial(number, record) for number, record in enumerate(some)])
    lines = [line.split() for line in drawn(view).splitlines()]
    assert ["1.3x", f"{2:016x}", "1.31x", "+0.800", "2.23"] in lines
    assert ["1.5x", f"{3:016x}", "1.60x", "+2.500", "12.18"] in lines
    assert ["2x", "none", "yet"] in lines
    assert "decode speed-up" in drawn(view) and "o on the front" in drawn(view)


def test_a_child_of_no_numbers_is_not_drawn(some: list[Record]) -> None:
    view = SearchView(AXES, (1.3,))
    view.look(
        [trial(0, some[1].model_copy(update={"ppl_ratio": math.inf, "nats_per_token": math.inf, "ppl": math.inf}))]
    )
    assert drawn(view).strip() == ""


def test_a_trial_that_is_there_is_read_once(some: list[Record], monkeypatch: pytest.MonkeyPatch) -> None:
    view, first, second = (
        SearchView(AXES, (1.3,)),
        trial(0, some[0]),
        trial(1, some[1]),
    )
    view.look([first])
    first.user_attrs.clear()
    view.look([first, second])
    assert f"{1:016x}" in drawn(view)


def test_it_stands_beneath_the_bar_of_a_search_alone(some: list[Record], monkeypatch: pytest.MonkeyPatch) -> None:
    target = Console(file=io.StringIO(), width=120, force_terminal=True)
    monkeypatch.setattr(terminal, "error_console", lambda: target)
    view = SearchView(AXES, (1.3,))
    view.look([trial(1, some[1])])
    show = terminal.shown(quiet=False, searching=view)
    assert isinstance(target.file, io.StringIO)
    with show("timing"):
        pass
    assert f"{1:016x}" not in target.file.getvalue()
    with show(SEARCHING):
        pass
    assert f"{1:016x}" in target.file.getvalue()
