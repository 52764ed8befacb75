"""What each block choice saves, measured on whole children: an additive table that proposes, and never reports."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmprune.choices.architecture import Architecture
from llmprune.choices.choice import AnyChoice, Assignment, Choice, attends
from llmprune.choices.dimensions import BLOCK_KINDS, WHOLE_MODEL, BlockKind
from llmprune.choices.kinds import by_kind
from llmprune.choices.space import Space

PROBES_PER_KIND = 6
"""A drop, if there is one, and sizes."""
LEAST_ERROR = 1e-6
"""Of a saving, as a share of the largest."""


@dataclass(frozen=True)
class CostTable:
    """Share of the parent's time (or size) that one block takes off with each choice, relative to a full block; or the
    vocabulary.

    `saving[column][choice]`: 0 for the parent's own, most for a drop. A column is a phase or a metric of size.
    """

    space: Space
    saving: Mapping[str, Mapping[AnyChoice, float]]

    def option_saving(self, column: str, option: Iterable[Assignment]) -> float:
        """Share of the parent that an option of a decision saves, in one column of the table."""
        return sum(self.saving[column][choice] for _, choice in option)

    def relative_time(self, architecture: Architecture, phase: str) -> float:
        """Estimated time of a child, as a share of the parent's."""
        saved = sum(self.saving[phase][choice] for _, choice in architecture.assignments())
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
            phase: {kind: [row[choice] for choice in ladder] for kind, ladder in self.space.ladders.items()}
            for phase, row in self.saving.items()
        }

    @classmethod
    def from_json(cls, space: Space, data: Mapping[str, Any]) -> CostTable:
        return cls(
            space,
            {
                phase: {
                    choice: float(value)
                    for kind, ladder in space.ladders.items()
                    for choice, value in zip(ladder, data[phase][kind], strict=True)
                }
                for phase in data
            },
        )


def probe_architectures(space: Space, *, whole_layers: bool = False) -> dict[AnyChoice, Architecture]:
    """Children that differ from the parent in one kind of block, by the same choice in all layers; or in the
    vocabulary.

    The drop, which is no small size, and some sizes, the smallest and the largest among them; the rest is interpolated,
    since time is close to linear in rows. Every kind of choice has a ladder of its own: its rows may save other work
    than those of another. Dropping every attention would leave no model: there the first layer stays whole (and with
    one layer, there is nothing to probe).

    `whole_layers`: in a space of whole layers whose engine runs no child with a lone block gone, all layers but the
    first leave whole; it is timed once for each of their blocks.
    """
    probes: dict[AnyChoice, Architecture] = {}
    if whole_layers:
        shorter = space.shape.architecture.without_layers(range(1, space.shape.layers))
        return {ladder[0]: shorter for kind in BLOCK_KINDS for ladder in _ladders(space, kind)}
    for ladder in (ladder for kind in BLOCK_KINDS for ladder in _ladders(space, kind)):
        drops, sizes = _drops_and_sizes(ladder)
        count = min(PROBES_PER_KIND - len(drops), len(sizes))
        positions = np.linspace(0, len(sizes) - 1, count).round().astype(int)
        for choice in (*drops, *(sizes[position] for position in positions)):
            layers = range(_first_changed(choice), space.shape.layers)
            if layers:
                probes[choice] = space.shape.architecture.with_choices((layer, choice) for layer in layers)
    for vocabulary in space.vocabulary[:-1]:
        probes[vocabulary] = space.shape.architecture.with_choice(WHOLE_MODEL, vocabulary)
    return probes


def cost_table(
    space: Space,
    speedups: Mapping[AnyChoice, Mapping[str, float]],
    errors: Mapping[AnyChoice, Mapping[str, float]] | None = None,
    *,
    whole_layers: bool = False,
) -> CostTable:
    """From the measured speed-ups (by phase) of the probes, and their standard errors if they are known, to savings a
    block.

    Time is close to linear in rows, and a mild choice saves less than a timing may be off: so savings are shrunk
    towards a line, the more the less sure they are (see `shrunk_to_line`). A drop is on no line of sizes: norm and
    launches go with it, on a GPU most of what a small block takes. It saves what was measured of it alone, which says
    nothing of sizes. Savings are kept monotone in rows, for the choices of each kind among themselves, and no fewer
    rows cost time; but another type of weights may: one that is slow to unpack has a saving below 0. Of `whole_layers`,
    each block counts half.
    """
    saving: dict[str, dict[AnyChoice, float]] = {}
    for phase in next(iter(speedups.values())):
        saving[phase] = {ladder[-1]: 0.0 for ladder in space.ladders.values()}
        for vocabulary in space.vocabulary[:-1]:
            saving[phase][vocabulary] = 1.0 - 1.0 / speedups[vocabulary][phase]
        for ladder in (ladder for kind in BLOCK_KINDS for ladder in _ladders(space, kind)):
            measured: dict[Choice, float] = {}
            unsure: dict[Choice, float] = {}
            for choice in (choice for choice in ladder if choice in speedups):
                time, blocks = 1.0 / speedups[choice][phase], _blocks_changed(space, choice, whole_layers=whole_layers)
                measured[choice] = (1.0 - time) / blocks
                if errors:
                    unsure[choice] = errors[choice][phase] * time**2 / blocks
            saving[phase] |= _savings(space, ladder, measured, unsure)
    return CostTable(space, saving)


def _savings(
    space: Space, ladder: Sequence[Choice], measured: Mapping[Choice, float], errors: Mapping[Choice, float]
) -> dict[AnyChoice, float]:
    """What every choice of a ladder saves, from what its probes do, and from their standard errors if there are any."""
    drops, sizes = _drops_and_sizes(ladder)
    rows, full = space.shape.rows, space.shape.rows(space.shape.full(ladder[0].kind))
    # In the ladder's order: of two with as many rows the later one counts, in every process.
    probes = [choice for choice in sizes if choice in measured]
    savings = [measured[choice] for choice in probes]
    if errors and probes:
        unsure = [errors[choice] for choice in probes]
        savings = shrunk_to_line([full - rows(choice) for choice in probes], savings, unsure)
    points = dict(zip(map(rows, probes), savings, strict=True))
    if ladder[0].stored is None:
        points[full] = 0.0
    probed = sorted(points)
    # A timing slip must not make a smaller block look slower than a larger one.
    monotone = np.maximum.accumulate([points[size] for size in reversed(probed)])[::-1]
    found: dict[AnyChoice, float] = {choice: float(np.interp(rows(choice), probed, monotone)) for choice in sizes}
    for drop in drops:
        found[drop] = max(measured.get(drop, 0.0), float(monotone[0]))
    return found


def shrunk_to_line(x: Sequence[float], y: Sequence[float], errors: Sequence[float]) -> list[float]:
    """Measured `y` at `x` > 0, with standard errors, each drawn to the line through the origin that fits them all.

    Slopes `y_i / x_i ~ N(t_i, (errors_i / x_i)^2)`, `t_i ~ N(slope, spread^2)`: what the slopes scatter beyond their
    errors is the spread, and each is drawn to their mean by its share of noise (a random-effects mean, DerSimonian and
    Laird, 1986). So steps that are really there stay, and noise goes: a mild choice has most of it.
    """
    x_P, y_P = np.array(x, dtype=np.float64), np.array(y, dtype=np.float64)
    scale = float(np.abs(y_P / x_P).max())
    if scale == 0:
        return [0.0] * len(y)
    slopes_P = y_P / x_P / scale
    # An error of 0 would leave nothing to weigh by.
    noise_P = np.maximum(np.array(errors, dtype=np.float64) / x_P / scale, LEAST_ERROR) ** 2
    weights_P = 1.0 / noise_P
    scatter = float((weights_P * (slopes_P - np.average(slopes_P, weights=weights_P)) ** 2).sum())
    freedom = float(weights_P.sum() - (weights_P**2).sum() / weights_P.sum())
    spread2 = max(0.0, (scatter - (len(slopes_P) - 1)) / freedom) if len(slopes_P) > 1 else 0.0
    mean = np.average(slopes_P, weights=1.0 / (noise_P + spread2))
    drawn_P = slopes_P + noise_P / (noise_P + spread2) * (mean - slopes_P)
    return [float(found) for found in scale * x_P * drawn_P]


def _ladders(space: Space, kind: BlockKind) -> list[list[Choice]]:
    """The choices below the parent's, ascending, each kind of choice apart."""
    return [own for _, own in by_kind(space.ladder(kind)[:-1])]


def _drops_and_sizes(ladder: Sequence[Choice]) -> tuple[list[Choice], list[Choice]]:
    """The drop, if the ladder has one, and the choices that keep something."""
    return [choice for choice in ladder if not choice.units], [choice for choice in ladder if choice.units]


def _blocks_changed(space: Space, choice: Choice, *, whole_layers: bool) -> int:
    """How many blocks a probe has changed."""
    return 2 * (space.shape.layers - 1) if whole_layers else space.shape.layers - _first_changed(choice)


def _first_changed(choice: Choice) -> int:
    return 1 if choice.kind == "attention" and not attends([choice]) else 0
