"""Block tables: for every choice of every block what it costs in quality (estimated) and saves in time (measured)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from llmprune.architecture import BLOCK_KINDS, Architecture, BlockKind, Space
from llmprune.blocks.library import BlockLibrary
from llmprune.blocks.sensitivity import block_influence, estimate_delta_nats
from llmprune.data.tokens import Split
from llmprune.errors import RunDirectoryError
from llmprune.measure.throughput import Workload, measure_paired
from llmprune.models.parent import Parent
from llmprune.models.surgery import prune
from llmprune.progress import Show
from llmprune.search.allocate import allocate
from llmprune.search.costs import CostTable, cost_table, probe_architectures

CALIBRATE_AT = (1.3, 1.6)
"""Estimated speed-ups of the mixed children that the savings are scaled to."""


@dataclass(frozen=True)
class BlockTables:
    """Estimated `delta_nats` by (layer, kind, units), each layer's block influence, and the cost table."""

    delta_nats: Mapping[tuple[int, BlockKind, int], float]
    influence: Sequence[float]
    costs: CostTable

    def to_json(self) -> dict[str, Any]:
        space = self.costs.space
        return {
            "estimated_delta_nats": [
                {kind: [self.delta_nats[layer, kind, u] for u in space.ladder(kind)] for kind in BLOCK_KINDS}
                for layer in range(space.shape.layers)
            ],
            "block_influence": list(self.influence),
            "time_saved_per_block": self.costs.to_json(),
        }

    @classmethod
    def from_json(cls, space: Space, data: Any) -> BlockTables:
        """Inverse of `to_json`. Raises RunDirectoryError on anything else."""
        try:
            delta_nats = {
                (layer, kind, units): float(value)
                for layer, row in enumerate(data["estimated_delta_nats"])
                for kind in BLOCK_KINDS
                for units, value in zip(space.ladder(kind), row[kind], strict=True)
            }
            influence = [float(value) for value in data["block_influence"]]
            costs = CostTable.from_json(space, data["time_saved_per_block"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RunDirectoryError(
                f"tables.json does not hold the tables of this run's space ({type(error).__name__}: {error}); "
                "delete it and start again"
            ) from error
        return cls(delta_nats, influence, costs)


def build_tables(
    parent: Parent, split: Split, library: BlockLibrary, workload: Workload, repeats: int, *, tokens: int, show: Show
) -> BlockTables:
    """Estimate quality on about `tokens` tokens of `split`, and measure time on whole children.

    Savings are measured one kind of block at a time; in children that mix them they add up to a little less, so
    the table is scaled to what a few mixed children really save.
    """
    with show("estimating what each choice loses") as advance:
        delta_nats = estimate_delta_nats(parent, split, library, tokens=tokens, progress=advance)
        influence = block_influence(parent, split, tokens=tokens)
    probes = probe_architectures(library.space)
    measured: dict[tuple[BlockKind, int], dict[str, float]] = {}
    with show("timing what each choice saves") as advance:
        total = len(probes) + len(CALIBRATE_AT)
        for probe, architecture in probes.items():
            advance(len(measured), total)
            measured[probe] = _speedups(parent, architecture, library, workload, repeats)
        costs = cost_table(library.space, measured)
        shares: list[dict[str, float]] = []
        for speedup in CALIBRATE_AT:
            advance(len(measured) + len(shares), total)
            mixed = allocate(delta_nats, costs, "decode", speedup)
            if mixed is not None:
                found = _speedups(parent, mixed, library, workload, repeats)
                shares.append({p: _share(1 - 1 / found[p], 1 - costs.relative_time(mixed, p)) for p in found})
        advance(total, total)
    if shares:
        costs = costs.scaled({phase: median(share[phase] for share in shares) for phase in shares[0]})
    return BlockTables(delta_nats, influence, costs)


def _share(measured_saving: float, estimated_saving: float) -> float:
    # Beyond these, it is the timing that slipped.
    return min(max(measured_saving / estimated_saving, 0.5), 1.25) if estimated_saving > 0 else 1.0


def _speedups(
    parent: Parent, architecture: Architecture, library: BlockLibrary, workload: Workload, repeats: int
) -> dict[str, float]:
    child = prune(parent, architecture, library)
    _, (speed,) = measure_paired(parent.model, [child], workload, repeats)
    return {"decode": speed.decode_speedup.median, "prefill": speed.prefill_speedup.median}
