"""Block tables: for every choice of every block what it costs in quality (estimated) and saves in time (measured)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmprune.architecture import BLOCK_KINDS, BlockKind, Space
from llmprune.blocks.library import BlockLibrary
from llmprune.blocks.sensitivity import block_influence, estimate_delta_nats
from llmprune.data.tokens import Split
from llmprune.errors import RunDirectoryError
from llmprune.measure.throughput import Workload, measure_paired
from llmprune.models.parent import Parent
from llmprune.models.surgery import prune
from llmprune.progress import Show
from llmprune.search.costs import CostTable, cost_table, probe_architectures


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
    """Estimate quality on about `tokens` tokens of `split`, and measure time on whole children of the space's rungs."""
    with show("estimating what each choice loses") as advance:
        delta_nats = estimate_delta_nats(parent, split, library, tokens=tokens, progress=advance)
        influence = block_influence(parent, split, tokens=tokens)
    speedups = {}
    probes = probe_architectures(library.space)
    with show("timing what each choice saves") as advance:
        for done, (probe, architecture) in enumerate(probes.items(), start=1):
            child = prune(parent, architecture, library)
            _, (speed,) = measure_paired(parent.model, [child], workload, repeats)
            speedups[probe] = {"decode": speed.decode_speedup.median, "prefill": speed.prefill_speedup.median}
            advance(done, len(probes))
    return BlockTables(delta_nats, influence, cost_table(library.space, speedups))
