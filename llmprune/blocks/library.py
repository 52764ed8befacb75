"""The block library: for every block the order in which units leave, and the output projection of every choice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from llmprune.architecture import BLOCK_KINDS, AttentionChoice, BlockChoice, BlockKind, ParentShape
from llmprune.blocks.importance import flap_scores, removal_order
from llmprune.blocks.layer_files import LayerRepairs, finished_layers, layer_keys, layer_path, read_layer, store_layer
from llmprune.blocks.refit import flap_bias, refit_nested
from llmprune.blocks.statistics import BlockStatistics, collect_statistics, statistics_bytes
from llmprune.data.tokens import Split
from llmprune.errors import ArchitectureError, ModelError, RecipeError
from llmprune.models.parent import Parent
from llmprune.models.rows import input_columns
from llmprune.progress import Advance, Steps
from llmprune.recipe import ImportanceRecipe
from llmprune.space import Space


@dataclass(frozen=True, eq=False)
class BlockLibrary:
    """What pruning needs to know of every block, for every choice on the space's ladders; tensors are on the CPU."""

    space: Space
    layers: tuple[LayerRepairs, ...]

    def kept_units(self, layer: int, choice: BlockChoice) -> Tensor:
        """Indices of the units that a choice keeps, ascending: (units,) int64. Smaller choices keep subsets.

        Raises ArchitectureError if the choice is not on the ladder.
        """
        order = self._tensors(layer, choice)[f"{choice.kind}/order"]
        return order[len(order) - choice.units :].sort().values

    def kept_queries(self, layer: int, choice: BlockChoice) -> Tensor | None:
        """Query heads that a choice keeps of each kept KV group, counted within it, ascending: (kv_groups,
        queries_per_group) int64; None if all stay. Raises ArchitectureError if the choice is not on the ladder."""
        if not isinstance(choice, AttentionChoice) or choice.queries_per_group is None:
            return None
        order_KQ = self._tensors(layer, choice)["attention/query_order"]
        kept_KQ = order_KQ[:, order_KQ.shape[1] - choice.queries_per_group :].sort(dim=1).values
        return kept_KQ[self.kept_units(layer, choice)]

    def output(self, layer: int, choice: BlockChoice) -> tuple[Tensor, Tensor | None]:
        """Weight (D, inputs of the kept units) and bias (D,) of the output projection, in the parent's dtype.

        The bias is None where the parent has none. Do not write into either: they may be views of a mapped file.
        Raises ArchitectureError unless the choice is on the ladder; it is neither a drop nor the parent's.
        """
        tensors = self._tensors(layer, choice)
        assert choice in _refitted(self.space, choice.kind), f"{choice} has no output projection of its own"
        name = f"{choice.kind}/{_label(choice)}"
        return tensors[f"{name}/weight"], tensors.get(f"{name}/bias")

    def fluctuation(self, layer: int, kind: BlockKind) -> tuple[Tensor, Tensor]:
        """Of a library ordered by "flap": the units' standardised scores (U,), and the mean (I,) of the inputs of the
        output projection, both float64. Raises ArchitectureError if the layer is not the parent's."""
        tensors = self._tensors(layer, self.space.shape.full(kind))
        return tensors[f"{kind}/score"], tensors[f"{kind}/mean"]

    @cached_property
    def hash(self) -> str:
        """SHA-256, as hex, over all contents."""
        ladders = [[choice.to_json() for choice in self.space.ladder(kind)] for kind in BLOCK_KINDS]
        return hashlib.sha256(json.dumps([ladders, [layer.hash for layer in self.layers]]).encode()).hexdigest()

    def _tensors(self, layer: int, choice: BlockChoice) -> Mapping[str, Tensor]:
        if not 0 <= layer < len(self.layers):
            raise ArchitectureError(f"layer must be from 0 to {len(self.layers) - 1}, got {layer}")
        ladder = self.space.ladder(choice.kind)
        if choice not in ladder:
            raise ArchitectureError(
                f"the library knows the {choice.kind} block of layer {layer} with {', '.join(map(_label, ladder))} "
                f"units, got {_label(choice)}; use one of these, or build a library with a finer or larger space"
            )
        return self.layers[layer].tensors


@dataclass(frozen=True)
class Plan:
    """One library to build: how its units are ordered, and the directory it is kept in, if any."""

    recipe: ImportanceRecipe
    directory: Path | None = None


def build_library(
    parent: Parent,
    split: Split,
    recipe: ImportanceRecipe,
    space: Space,
    directory: Path | None = None,
    *,
    input_hash: str = "",
    memory_bytes: int = 2 << 30,
    progress: Advance | None = None,
) -> BlockLibrary:
    """`build_libraries` for one library."""
    plans = [Plan(recipe, directory)]
    (library,) = build_libraries(
        parent, split, plans, space, input_hash=input_hash, memory_bytes=memory_bytes, progress=progress
    )
    return library


def build_libraries(
    parent: Parent,
    split: Split,
    plans: Sequence[Plan],
    space: Space,
    *,
    input_hash: str = "",
    memory_bytes: int = 2 << 30,
    progress: Advance | None = None,
) -> list[BlockLibrary]:
    """Gather statistics on the calibration split once, then order and refit every block for each plan, layer by layer.

    With a `directory`, each layer is one file, written when it is ready and read back memory-mapped; files that are
    whole and were built from the same `input_hash` (of parent and split), recipe and space are kept, all others are
    built again. So calling this again finishes a killed build, and merely loads a finished one.

    Where the statistics of all missing layers exceed `memory_bytes`, the split is run several times, for as many layers
    at a time as fit (at least one). Solving a block takes about five float64 matrices (I, I) beside them.
    `progress` counts windows run and layers solved. Raises ModelError, RecipeError and RunDirectoryError.
    """
    assert space.shape == parent.shape, "the space is not this parent's"
    built = [_Built(plan, layer_keys(input_hash, plan.recipe, space)) for plan in plans]
    for library in built:
        library.load(input_hash)
    every = range(parent.shape.layers)
    missing = [layer for layer in every if any(layer not in library.layers for library in built)]
    per_pass = max(1, memory_bytes // statistics_bytes(parent.shape))
    passes = [missing[start : start + per_pass] for start in range(0, len(missing), per_pass)]
    windows = sum(len(source.windows) for source in split.sources.values())
    steps = Steps(len(passes) * windows + len(missing), progress)
    for some_layers in passes:
        statistics = collect_statistics(parent, split, layers=some_layers, progress=steps.report)
        steps.finish(windows)
        for layer in some_layers:
            blocks = {kind: statistics.pop((layer, kind)) for kind in BLOCK_KINDS}
            for library in built:
                if layer not in library.layers:
                    library.add(layer, _solve_layer(parent, layer, blocks, library.plan.recipe, space))
            steps.report(1)
            steps.finish(1)
    return [BlockLibrary(space, tuple(library.layers[layer] for layer in every)) for library in built]


def load_library(directory: Path, recipe: ImportanceRecipe, space: Space, *, input_hash: str) -> BlockLibrary:
    """The library that `build_library` wrote with the same arguments, memory-mapped.

    Every file is read once, to be held to its hash. Raises RunDirectoryError, naming the file, if one is missing,
    corrupt or was built from other inputs.
    """
    keys = layer_keys(input_hash, recipe, space)
    return BlockLibrary(space, tuple(read_layer(layer_path(directory, i), key) for i, key in enumerate(keys)))


def stored_layers(directory: Path, recipe: ImportanceRecipe, space: Space, *, input_hash: str) -> int:
    """How many layers `build_library` with the same arguments would find built."""
    return len(finished_layers(directory, layer_keys(input_hash, recipe, space)))


def solve_block(
    weight_DI: Tensor,
    bias_D: Tensor | None,
    statistics: BlockStatistics,
    shape: ParentShape,
    recipe: ImportanceRecipe,
    choices: Sequence[BlockChoice],
    kind: BlockKind,
) -> dict[str, Tensor]:
    """Orders of removal, and output weight and bias of each choice: names without the kind.

    Without `recipe.refit` the weights are the parent's own columns; its bias changes for "flap" alone.
    """
    fits_bias = recipe.refit and bias_D is not None

    def ordered(unit_size: int) -> Tensor:
        return removal_order(recipe.method, weight_DI, statistics, unit_size, recipe.damp, centred=fits_bias)

    tensors = {"order": ordered(weight_DI.shape[1] // shape.units(kind))}
    if any(_queries(choice) for choice in choices):
        tensors["query_order"] = _query_order(ordered(shape.head_dim), shape)
    for queries in sorted({_queries(choice) for choice in choices}):
        # Choices with as many query heads a group are nested, and solved from one factor.
        chain = sorted((c for c in choices if _queries(c) == queries), key=lambda choice: choice.units)
        units_U = tensors["order"].flip(0)[: chain[-1].units]
        queries_UQ = tensors["query_order"][:, -queries:][units_U] if queries else None
        columns = input_columns(units_U, shape, kind, queries_UQ)
        counts = [shape.inputs(choice) for choice in chain]
        for choice, count, (weight, bias) in zip(
            chain, counts, _outputs(weight_DI, bias_D, statistics, recipe, columns, counts), strict=True
        ):
            tensors[f"{_label(choice)}/weight"] = weight[:, columns[:count].argsort()]
            if bias is not None:
                tensors[f"{_label(choice)}/bias"] = bias
    return tensors


def _outputs(
    weight_DI: Tensor,
    bias_D: Tensor | None,
    statistics: BlockStatistics,
    recipe: ImportanceRecipe,
    columns: Tensor,
    counts: Sequence[int],
) -> list[tuple[Tensor, Tensor | None]]:
    """Weight and bias for the first `count` of `columns`, for each count."""
    if recipe.refit:
        mean_I = None if bias_D is None else statistics.mean_I
        return refit_nested(weight_DI, statistics.gram_II, columns, counts, recipe.damp, mean_I=mean_I, bias_D=bias_D)
    kept = [columns[:count] for count in counts]
    if recipe.method == "flap" and bias_D is not None:
        return [(weight_DI[:, some], flap_bias(weight_DI, statistics.mean_I, some, bias_D)) for some in kept]
    return [(weight_DI[:, some], bias_D) for some in kept]


def _queries(choice: BlockChoice) -> int:
    """Query heads a group where a choice leaves some out, else 0."""
    return (choice.queries_per_group or 0) if isinstance(choice, AttentionChoice) else 0


def _query_order(order_H: Tensor, shape: ParentShape) -> Tensor:
    """From the order in which single query heads (H,) leave to the order within each KV group: (kv_groups, queries)."""
    group_H = order_H // shape.queries_per_group
    groups = range(shape.kv_groups)
    return torch.stack([order_H[group_H == group] % shape.queries_per_group for group in groups])


def _label(choice: BlockChoice) -> str:
    """How a choice is named in a layer's file: `512`, or `2x1` for two KV groups with one query head each."""
    return f"{choice.units}" + (f"x{_queries(choice)}" if _queries(choice) else "")


@dataclass
class _Built:
    """A plan at work: the layers that are there, and the key of each layer's file."""

    plan: Plan
    keys: Sequence[str]
    layers: dict[int, LayerRepairs] = field(default_factory=dict)

    def load(self, input_hash: str) -> None:
        if self.plan.directory is not None:
            assert input_hash, "a library on disk needs the hash of its inputs"
            self.layers = finished_layers(self.plan.directory, self.keys)

    def add(self, layer: int, solved: LayerRepairs) -> None:
        directory = self.plan.directory
        self.layers[layer] = solved if directory is None else store_layer(directory, layer, solved, self.keys[layer])


def _solve_layer(
    parent: Parent, layer: int, blocks: Mapping[BlockKind, BlockStatistics], recipe: ImportanceRecipe, space: Space
) -> LayerRepairs:
    tensors: dict[str, Tensor] = {}
    for kind, statistics in blocks.items():
        weight_DI, bias_D = parent.output_weight(layer, kind), parent.output_bias(layer, kind)
        choices = _refitted(space, kind)
        try:
            solved = solve_block(weight_DI, bias_D, statistics, parent.shape, recipe, choices, kind)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise RecipeError(
                "importance.damp must make X^T X + damp * mean(diag) positive definite, got "
                f"{recipe.damp:g} in the {kind} block of layer {layer}; use {10 * recipe.damp:g}"
            ) from error
        if recipe.method == "flap":
            unit_size = weight_DI.shape[1] // parent.shape.units(kind)
            solved |= {"score": flap_scores(weight_DI, statistics, unit_size), "mean": statistics.mean_I}
        for name, tensor in solved.items():
            if not bool(tensor.isfinite().all()):
                raise ModelError(
                    f"the refit of the {kind} block of layer {layer} does not fit into {tensor.dtype}; "
                    "load the parent with model.dtype=float32 or bfloat16"
                )
            # A copy of its own: a bias that stays may be shared by all choices, which safetensors refuses to write.
            tensors[f"{kind}/{name}"] = tensor.cpu().clone(memory_format=torch.contiguous_format)
    return LayerRepairs(tensors)


def _refitted(space: Space, kind: BlockKind) -> list[BlockChoice]:
    """Choices that keep something, but not everything."""
    return [choice for choice in space.ladder(kind) if choice.units and choice != space.shape.full(kind)]
