"""What each block choice saves, measured on whole children: an additive table that proposes, and never reports."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmprune.choices.architecture import Architecture
from llmprune.choices.choice import Choice, attends
from llmprune.choices.dimensions import BLOCK_KINDS, BlockKind
from llmprune.choices.kinds import by_kind
from llmprune.choices.space import Assignment, Space

PROBES_PER_KIND = 6


@dataclass(frozen=True)
class CostTable:
    """Share of the parent's time (or size) that one block takes off with each choice, relative to a full block.

    `saving[column][choice]`: 0 for the parent's own, most for a drop. A column is a phase or a metric of size.
    """

    space: Space
    saving: Mapping[str, Mapping[Choice, float]]

    def option_saving(self, column: str, option: Iterable[Assignment]) -> float:
        """Share of the parent that an option of a decision saves, in one column of the table."""
        return sum(self.saving[column][choice] for _, choice in option)

    def relative_time(self, architecture: Architecture, phase: str) -> float:
        """Estimated time of a child, as a share of the parent's."""
        saved = sum(self.saving[phase][choice] for _, choice in architecture.blocks())
        return max(1.0 - saved, 0.01)

    def speedup(self, architecture: Architecture, phase: str) -> float:
        """Estimated speed-up of a child over the parent."""
        return 1.0 / self.relative_time(architecture, phase)

    def scaled(self, factors: Mapping[str, float]) -> CostTable:
        """The table with every saving of a phase multiplied by that phase's factor."""
        return CostTable(
            self.space,
            {phase: {c: factors[phase] * value for c, value in row.items()} for phase, row in self.saving.items()},
        )

    def to_json(self) -> dict[str, Any]:
        """By phase and kind, the savings in the order of the ladder."""
        return {
            phase: {kind: [row[choice] for choice in self.space.ladder(kind)] for kind in BLOCK_KINDS}
            for phase, row in self.saving.items()
        }

    @classmethod
    def from_json(cls, space: Space, data: Mapping[str, Any]) -> CostTable:
        return cls(
            space,
            {
                phase: {
                    choice: float(value)
                    for kind in BLOCK_KINDS
                    for choice, value in zip(space.ladder(kind), data[phase][kind], strict=True)
                }
                for phase in data
            },
        )


def probe_architectures(space: Space) -> dict[Choice, Architecture]:
    """Children that differ from the parent in one kind of block, by the same choice in all layers.

    Some rungs of the ladder, the lowest among them; the rest is interpolated, since time is close to linear
    in rows. Every kind of choice has a ladder of its own: its rows may save other work than those of another. Dropping
    every attention would leave no model: there the first layer stays whole (and with one layer, there is nothing to
    probe).
    """
    probes = {}
    for ladder in (ladder for kind in BLOCK_KINDS for ladder in _ladders(space, kind)):
        count = min(PROBES_PER_KIND, len(ladder))
        for position in np.linspace(0, len(ladder) - 1, count).round().astype(int):
            choice = ladder[position]
            layers = range(_first_changed(choice), space.shape.layers)
            if layers:
                probes[choice] = space.shape.architecture.with_choices((layer, choice) for layer in layers)
    return probes


def cost_table(space: Space, speedups: Mapping[Choice, Mapping[str, float]]) -> CostTable:
    """From the measured speed-ups (by phase) of the probes to savings a block. Savings are kept monotone in rows, for
    the choices of each kind among themselves."""
    rows = space.shape.rows
    saving: dict[str, dict[Choice, float]] = {}
    for phase in next(iter(speedups.values())):
        saving[phase] = {space.shape.full(kind): 0.0 for kind in BLOCK_KINDS}
        for ladder in (ladder for kind in BLOCK_KINDS for ladder in _ladders(space, kind)):
            points = {rows(space.shape.full(ladder[0].kind)): 0.0}
            # In the ladder's order: of two with as many rows the later one counts, in every process.
            for choice in (own for own in ladder if own in speedups):
                changed = space.shape.layers - _first_changed(choice)
                points[rows(choice)] = (1.0 - 1.0 / speedups[choice][phase]) / changed
            sizes = sorted(points)
            # A timing slip must not make a smaller block look slower than a larger one.
            monotone = np.maximum.accumulate([points[size] for size in reversed(sizes)])[::-1]
            for choice in ladder:
                saving[phase][choice] = float(np.interp(rows(choice), sizes, np.maximum(monotone, 0.0)))
    return CostTable(space, saving)


def _ladders(space: Space, kind: BlockKind) -> list[list[Choice]]:
    """The choices below the parent's, ascending, each kind of choice apart."""
    return [own for _, own in by_kind(space.ladder(kind)[:-1])]


def _first_changed(choice: Choice) -> int:
    return 1 if choice.kind == "attention" and not attends([choice]) else 0
