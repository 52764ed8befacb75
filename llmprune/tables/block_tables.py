"""Block tables: for every choice of every block what it costs in quality (estimated) and saves in time (measured)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any

from llmprune.blocks.library import BlockLibrary
from llmprune.choices.architecture import Architecture
from llmprune.choices.choice import AnyChoice, Assignment
from llmprune.choices.dimensions import BLOCK_KINDS, WHOLE_MODEL
from llmprune.choices.space import Space
from llmprune.core.budgets import SIZE_METRICS
from llmprune.core.errors import ArchitectureError, RunDirectoryError
from llmprune.core.progress import Show
from llmprune.core.recipe import GgufType, TablesRecipe
from llmprune.data.tokens import Split
from llmprune.formats.gguf_limits import gguf_mixes
from llmprune.formats.served_size import served_size
from llmprune.measure.quality.perplexity import score
from llmprune.measure.quality.prefix import PrefixScorer
from llmprune.measure.speed.throughput import Speed, Workload, measure_paired, standard_errors
from llmprune.measure.speed.turns import timing
from llmprune.models.parent import Parent
from llmprune.models.surgery import prune, skeleton
from llmprune.models.waiting import with_children
from llmprune.tables.allocate import Allocator, Scores
from llmprune.tables.costs import CostTable, cost_table, probe_architectures
from llmprune.tables.estimate import estimate
from llmprune.tables.exact import exact_delta_nats, is_exact
from llmprune.tables.together import together_factors, weighed

CALIBRATE_AT = (1.3, 1.6)
"""Estimated speed-ups of the mixed children that the savings are scaled to."""


@dataclass(frozen=True)
class BlockTables:
    """`delta_nats` by (layer, choice), put alone into the parent; each layer's block influence; the cost table; and by
    choice what it costs where all layers make it, over the sum of its scores."""

    delta_nats: Scores
    influence: Sequence[float]
    costs: CostTable
    together: Mapping[AnyChoice, float]

    @cached_property
    def joint_nats(self) -> dict[Assignment, float]:
        """`delta_nats`, whose sums are what choices cost together."""
        return weighed(self.delta_nats, self.together, self.costs.space.shape.architecture)

    def nats_lost(self, architecture: Architecture) -> float:
        """What an architecture is estimated to lose."""
        return sum(self.joint_nats[key] for key in architecture.assignments())

    def to_json(self) -> dict[str, Any]:
        space = self.costs.space
        return {
            "space": space.to_json(),
            "delta_nats": [
                {kind: [self.delta_nats[layer, choice] for choice in space.ladder(kind)] for kind in BLOCK_KINDS}
                for layer in range(space.shape.layers)
            ],
            "vocabulary_nats": [self.delta_nats[WHOLE_MODEL, choice] for choice in space.vocabulary],
            "block_influence": list(self.influence),
            "time_saved_per_block": self.costs.to_json(),
            "together": {kind: [self.together[choice] for choice in row] for kind, row in space.ladders.items()},
        }

    @classmethod
    def read(cls, data: Any) -> BlockTables | None:
        """What `to_json` gave, without a model at hand; None if it was written before tables said what space they are
        of. Raises RunDirectoryError as `from_json` does."""
        if isinstance(data, dict) and "space" not in data:
            return None
        try:
            space = Space.from_json(data["space"])
        except (KeyError, TypeError, ArchitectureError) as error:
            raise RunDirectoryError(
                f"tables.json does not say its space ({type(error).__name__}: {error}); delete it and start again"
            ) from error
        return cls.from_json(space, data)

    @classmethod
    def from_json(cls, space: Space, data: Any) -> BlockTables:
        """Inverse of `to_json`. Raises RunDirectoryError on anything else."""
        try:
            delta_nats: dict[Assignment, float] = {
                (layer, choice): float(value)
                for layer, row in enumerate(data["delta_nats"])
                for kind in BLOCK_KINDS
                for choice, value in zip(space.ladder(kind), row[kind], strict=True)
            }
            of_vocabulary = zip(space.vocabulary, data.get("vocabulary_nats", []), strict=True)
            delta_nats |= {(WHOLE_MODEL, choice): float(value) for choice, value in of_vocabulary}
            influence = [float(value) for value in data["block_influence"]]
            costs = CostTable.from_json(space, data["time_saved_per_block"])
            together = {
                choice: float(value)
                for kind, row in space.ladders.items()
                for choice, value in zip(row, data["together"][kind], strict=True)
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RunDirectoryError(
                f"tables.json does not hold the tables of this run's space ({type(error).__name__}: {error}); "
                "delete it and start again"
            ) from error
        return cls(delta_nats, influence, costs, together)


def build_tables(
    parent: Parent,
    split: Split,
    library: BlockLibrary,
    workload: Workload,
    repeats: int,
    rules: TablesRecipe,
    *,
    show: Show,
) -> BlockTables:
    """Score choices on about `rules.tokens` tokens of `split`, measure time on whole children, and count sizes.

    Scores are the one-backward estimate, but for those that the rules want exact.

    Savings of time are measured one kind of block at a time; in children that mix them they add up to a little less,
    so they are scaled to what a few mixed children really save. Sizes add up exactly.
    """
    with show("estimating what each choice loses") as advance:
        estimated = estimate(parent, split, library, tokens=rules.tokens, caution=rules.caution, progress=advance)
    delta_nats, influence = dict(estimated.delta_nats), estimated.influence
    delta_nats |= {(WHOLE_MODEL, choice): 0.0 for choice in library.space.vocabulary[-1:]}
    if wanted := [key for key in library.space.assignments() if is_exact(key[1], library.space, rules)]:
        with show("scoring choices exactly") as advance:
            scored = split.head(split.first_windows(min(1.0, rules.tokens / split.tokens)))
            scorer = PrefixScorer(parent, library, scored)
            delta_nats |= exact_delta_nats(scorer, scored, library.space, wanted, advance, caution=rules.caution)
    with show("scoring what choices cost together") as advance:
        scored = split.head(split.first_windows(min(1.0, rules.tokens / split.tokens)))
        together = together_factors(
            library.space, delta_nats, rules.together, lambda one: _nats(parent, library, scored, one), advance
        )
    joint_nats = weighed(delta_nats, together, parent.shape.architecture)
    alone = workload.engine == "torch" or gguf_mixes(parent.model.config)
    whole_layers = library.space.size == "layer" and not alone
    probes = probe_architectures(library.space, whole_layers=whole_layers)
    measured: dict[AnyChoice, dict[str, float]] = {}
    errors: dict[AnyChoice, dict[str, float]] = {}
    with show("measuring what each choice saves") as advance:
        total = len(probes) + len(CALIBRATE_AT)
        for choice, architecture in probes.items():
            advance(len(measured), total)
            measured[choice], errors[choice] = _timed(parent, architecture, library, workload, repeats)
        costs = cost_table(library.space, measured, errors, whole_layers=whole_layers)
        shares: list[dict[str, float]] = []
        for speedup in CALIBRATE_AT:
            advance(len(measured) + len(shares), total)
            mixed = Allocator(joint_nats, costs).best({"decode": speedup})
            if mixed is not None:
                found = speedups_of(parent, mixed, library, workload, repeats)
                shares.append({c: _share(1 - 1 / found[c], 1 - costs.relative_time(mixed, c)) for c in found})
        advance(total, total)
    if shares:
        costs = costs.scaled({phase: median(share[phase] for share in shares) for phase in shares[0]})
    saving = {**costs.saving, **count_savings(parent, library.space, workload.gguf_type)}
    return BlockTables(delta_nats, influence, CostTable(library.space, saving), together)


def _nats(parent: Parent, library: BlockLibrary, split: Split, architecture: Architecture) -> float:
    """Nats a token of a child. Raises ModelError if it computes no numbers."""
    quality = with_children(parent.model, lambda: score(prune(parent, architecture, library), split))
    return quality.nats_per_token


def count_savings(parent: Parent, space: Space, gguf_type: GgufType | None = None) -> dict[str, dict[AnyChoice, float]]:
    """Share of each of the parent's sizes that a choice takes off, counted on children without weights; of the sizes
    of GGUF files if llama.cpp is what serves them.

    A size is a sum over blocks, though not always one in proportion to rows: the cache grows with KV groups alone, and
    a dropped block takes its norms along. (Where llama.cpp needs a zero block for one that is not there, the sum is a
    few rows off: once a child if its first layer has no attention, and for layers that lose both blocks.)
    """
    whole, last = parent.shape.architecture, parent.shape.layers - 1

    def sizes(architecture: Architecture) -> dict[str, int]:
        size = served_size(skeleton(parent, architecture), parent.shape, architecture, gguf_type)
        return {metric: getattr(size, metric) for metric in SIZE_METRICS}

    of_parent = sizes(whole)
    counted = {choice: sizes(whole.with_choice(last, choice)) for row in space.ladders.values() for choice in row}
    return {
        metric: {choice: 1.0 - own[metric] / of_parent[metric] for choice, own in counted.items()}
        for metric in SIZE_METRICS
    }


def _share(measured_saving: float, estimated_saving: float) -> float:
    # Beyond these, it is the timing that slipped.
    return min(max(measured_saving / estimated_saving, 0.5), 1.25) if estimated_saving > 0 else 1.0


def speedups_of(
    parent: Parent, architecture: Architecture, library: BlockLibrary, workload: Workload, repeats: int
) -> dict[str, float]:
    """Measured speed-ups of a child, by phase."""
    return _timed(parent, architecture, library, workload, repeats)[0]


def _timed(
    parent: Parent, architecture: Architecture, library: BlockLibrary, workload: Workload, repeats: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Measured speed-ups of a child, by phase, and their standard errors."""

    def timed() -> Speed:
        child = prune(parent, architecture, library)
        with timing(workload.device):
            return measure_paired(parent.model, [child], workload, repeats)[1][0]

    speed = with_children(parent.model, timed)
    found = {"decode": speed.decode_speedup.median, "prefill": speed.prefill_speedup.median}
    return found, standard_errors(speed, workload, repeats)
