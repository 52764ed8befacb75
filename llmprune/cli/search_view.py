"""What a search looks like while it runs: the best child so far at each target, and all trials as a small plot."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import plotille
from optuna.trial import FrozenTrial
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llmprune.cli.terminal import draft_text
from llmprune.core.budgets import Axes
from llmprune.measure.record import Record
from llmprune.search.front import non_dominated
from llmprune.search.trial_records import record_of

_OF_CHILDREN = ("nats a token lost", "x parent's PPL")
_OF_DRAFTS = ("disagreement", "parent with it")

WIDTH, HEIGHT = 60, 10
"""Characters of the plot, without its labels."""


@dataclass
class SearchView:
    """Drawn by rich beneath a search's bar; empty until a trial is there."""

    axes: Axes
    targets: Sequence[float]
    _records: dict[int, Record] = field(default_factory=dict)

    def look(self, trials: Sequence[FrozenTrial]) -> None:
        """Take note of finished trials, whoever has made them."""
        for trial in trials:
            if trial.number not in self._records:
                self._records[trial.number] = record_of(trial)

    def __rich__(self) -> RenderableType:
        found = [one for one in self._records.values() if one.is_finite]
        return Group(*self._drawn(found)) if found else Group()

    def _drawn(self, found: Sequence[Record]) -> Iterator[RenderableType]:
        yield self._best(found)
        # The parent alone is no plot.
        if max(map(self._speed, found)) > 1:
            yield Text(self._plot(found), style="dim")

    def _best(self, found: Sequence[Record]) -> Table:
        table = Table(box=None, padding=(0, 2))
        columns = _OF_DRAFTS if self.axes.quality == "disagreement" else _OF_CHILDREN
        for column in ("best at", "child", self._phase, *columns):
            table.add_column(column, justify="left" if column == "child" else "right")
        for target in sorted(self.targets):
            holding = [one for one in found if self._speed(one) >= target]
            if not holding:
                table.add_row(f"{target:g}x", "none yet", "", "", "")
                continue
            best = min(holding, key=lambda one: one.value(self.axes.quality))
            table.add_row(f"{target:g}x", best.id, f"{self._speed(best):.2f}x", *_cells(best))
        return table

    def _plot(self, found: Sequence[Record]) -> str:
        """What is lost against speed; what is far worse than the front is left out."""
        front = non_dominated(found, self.axes)
        highest = 1.25 * max(max(map(_lost, front)), 0.01)
        figure_lost = "disagreement" if front[0].draft else "nats lost"
        figure: Any = plotille.Figure()
        figure.width, figure.height, figure.color_mode, figure.origin = WIDTH, HEIGHT, "names", False
        figure.x_label, figure.y_label = f"{self._phase} speed-up", f"{figure_lost}, o on the front"
        figure.register_label_formatter(float, lambda value, chars, delta, left=False: f"{value:{chars}.2f}")
        figure.set_x_limits(min_=min(map(self._speed, found)) - 0.02, max_=max(map(self._speed, found)) + 0.02)
        figure.set_y_limits(min_=min(0.0, *map(_lost, found)), max_=highest)
        for records, marker in ((found, "."), (front, "o")):
            near = [one for one in records if _lost(one) <= highest]
            figure.scatter([self._speed(one) for one in near], [_lost(one) for one in near], marker=marker)
        return str(figure.show())

    @property
    def _phase(self) -> str:
        return self.axes.speed.removesuffix("_speedup")

    def _speed(self, record: Record) -> float:
        return record.value(self.axes.speed)


def _lost(record: Record) -> float:
    """Nats a token, or of a draft disagreement, on the text that trials are scored on."""
    return math.log(record.ppl_ratio) if record.draft is None else record.value("disagreement")


def _cells(record: Record) -> tuple[str, str]:
    if record.draft is None:
        return f"{_lost(record):+.3f}", f"{record.ppl_ratio:.2f}"
    return f"{_lost(record):.0%}", draft_text(record.draft)
