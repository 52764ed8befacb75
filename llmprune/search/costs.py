"""What each block choice saves, measured on whole children: an additive table that proposes, and never reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmprune.architecture import BLOCK_KINDS, Architecture, BlockKind, Space

PROBES_PER_KIND = 4


@dataclass(frozen=True)
class CostTable:
    """Share of the parent's time that one block of each size takes off, relative to a full block.

    `saving[phase][kind]` is aligned with `space.ladder(kind)`: 0 at the parent's size, largest at 0.
    """

    space: Space
    saving: Mapping[str, Mapping[BlockKind, Sequence[float]]]

    def block_saving(self, phase: str, kind: BlockKind, units: int) -> float:
        return float(np.interp(units, self.space.ladder(kind), self.saving[phase][kind]))

    def relative_time(self, architecture: Architecture, phase: str) -> float:
        """Estimated time of a child, as a share of the parent's."""
        saved = sum(self.block_saving(phase, kind, choice.units) for _, kind, choice in architecture.blocks())
        return max(1.0 - saved, 0.01)

    def speedup(self, architecture: Architecture, phase: str) -> float:
        """Estimated speed-up of a child over the parent."""
        return 1.0 / self.relative_time(architecture, phase)

    def scaled(self, factors: Mapping[str, float]) -> CostTable:
        """The table with every saving of a phase multiplied by that phase's factor."""
        saving = {
            phase: {kind: tuple(factors[phase] * value for value in self.saving[phase][kind]) for kind in BLOCK_KINDS}
            for phase in self.saving
        }
        return CostTable(self.space, saving)

    def to_json(self) -> dict[str, Any]:
        return {phase: {kind: list(self.saving[phase][kind]) for kind in BLOCK_KINDS} for phase in self.saving}

    @classmethod
    def from_json(cls, space: Space, data: Mapping[str, Any]) -> CostTable:
        return cls(space, {phase: {kind: tuple(data[phase][kind]) for kind in BLOCK_KINDS} for phase in data})


def probe_architectures(space: Space) -> dict[tuple[BlockKind, int], Architecture]:
    """Children that differ from the parent in one kind of block, by the same choice in all layers.

    A few rungs of the ladder, 0 (or the lowest) among them; the rest is interpolated, since time is close to linear
    in width. Dropping every attention would leave no model: there the first layer stays whole (and with one layer,
    there is nothing to probe).
    """
    probes = {}
    for kind in BLOCK_KINDS:
        ladder = space.ladder(kind)[:-1]
        count = min(PROBES_PER_KIND, len(ladder))
        for position in np.linspace(0, len(ladder) - 1, count).round().astype(int):
            units = ladder[position]
            if _first_changed(kind, units) == space.shape.layers:
                continue
            architecture = space.shape.architecture
            for layer in range(_first_changed(kind, units), space.shape.layers):
                architecture = architecture.with_units(layer, kind, units)
            probes[kind, units] = architecture
    return probes


def cost_table(space: Space, speedups: Mapping[tuple[BlockKind, int], Mapping[str, float]]) -> CostTable:
    """From the measured speed-ups (by phase) of the probes to savings a block. Savings are kept monotone in size."""
    saving: dict[str, dict[BlockKind, Sequence[float]]] = {}
    for phase in next(iter(speedups.values())):
        saving[phase] = {}
        for kind in BLOCK_KINDS:
            points = {space.shape.units(kind): 0.0}
            for (probe_kind, units), measured in speedups.items():
                if probe_kind == kind:
                    changed = space.shape.layers - _first_changed(kind, units)
                    points[units] = (1.0 - 1.0 / measured[phase]) / changed
            sizes = sorted(points)
            # A timing slip must not make a smaller block look slower than a larger one.
            monotone = np.maximum.accumulate([points[size] for size in reversed(sizes)])[::-1]
            saving[phase][kind] = tuple(np.interp(space.ladder(kind), sizes, np.maximum(monotone, 0.0)).tolist())
    return CostTable(space, saving)


def _first_changed(kind: BlockKind, units: int) -> int:
    return 1 if kind == "attention" and units == 0 else 0
