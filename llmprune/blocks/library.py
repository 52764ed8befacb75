"""The block library: for every block the order in which units leave, and the output projection of every choice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmprune.architecture import BLOCK_KINDS, AttentionChoice, BlockChoice, BlockKind, ParentShape
from llmprune.blocks.importance import removal_order
from llmprune.blocks.refit import flap_bias, refit_nested
from llmprune.blocks.statistics import BlockStatistics, collect_statistics, statistics_bytes
from llmprune.data.tokens import Split
from llmprune.errors import ArchitectureError, ModelError, RecipeError, RunDirectoryError
from llmprune.files import atomic_path
from llmprune.models.parent import Parent
from llmprune.models.rows import input_columns
from llmprune.progress import Advance
from llmprune.recipe import ImportanceRecipe
from llmprune.space import Space

_VERSION = 2


@dataclass(frozen=True, eq=False)
class LayerRepairs:
    """One layer of the library: `KIND/order`, `attention/query_order` where query heads can leave, and for every choice
    `KIND/CHOICE/weight` and, where the parent has one, `KIND/CHOICE/bias`."""

    tensors: Mapping[str, Tensor]

    @cached_property
    def hash(self) -> str:
        """SHA-256, as hex, over every tensor's name, dtype, shape and bytes."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.view(torch.uint8).numpy().data)
        return digest.hexdigest()


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
    """Gather statistics on the calibration split, then order and refit every block, layer by layer.

    With a `directory`, each layer is one file, written when it is ready and read back memory-mapped; files that are
    whole and were built from the same `input_hash` (of parent and split), recipe and space are kept, all others are
    built again. So calling this again finishes a killed build, and merely loads a finished one.

    Where the statistics of all missing layers exceed `memory_bytes`, the split is run several times, for as many layers
    at a time as fit (at least one). Solving a block takes about five float64 matrices (I, I) beside them.
    `progress` counts windows run and layers solved. Raises ModelError, RecipeError and RunDirectoryError.
    """
    assert space.shape == parent.shape, "the space is not this parent's"
    assert directory is None or input_hash, "a library on disk needs the hash of its inputs"
    keys = _layer_keys(input_hash, recipe, space)
    layers = {} if directory is None else _finished_layers(directory, keys)
    missing = [layer for layer in range(parent.shape.layers) if layer not in layers]
    per_pass = max(1, memory_bytes // statistics_bytes(parent.shape))
    passes = [missing[start : start + per_pass] for start in range(0, len(missing), per_pass)]
    windows = sum(len(source.windows) for source in split.sources.values())
    steps = _Steps(len(passes) * windows + len(missing), progress)
    for some_layers in passes:
        statistics = collect_statistics(parent, split, layers=some_layers, progress=steps.report)
        steps.finish(windows)
        for layer in some_layers:
            blocks = {kind: statistics.pop((layer, kind)) for kind in BLOCK_KINDS}
            solved = _solve_layer(parent, layer, blocks, recipe, space)
            layers[layer] = solved if directory is None else _store(directory, layer, solved, keys[layer])
            steps.report(1)
            steps.finish(1)
    return BlockLibrary(space, tuple(layers[layer] for layer in range(parent.shape.layers)))


def load_library(directory: Path, recipe: ImportanceRecipe, space: Space, *, input_hash: str) -> BlockLibrary:
    """The library that `build_library` wrote with the same arguments, memory-mapped.

    Every file is read once, to be held to its hash. Raises RunDirectoryError, naming the file, if one is missing,
    corrupt or was built from other inputs.
    """
    keys = _layer_keys(input_hash, recipe, space)
    return BlockLibrary(space, tuple(_read_layer(_layer_path(directory, i), key) for i, key in enumerate(keys)))


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


class _Steps:
    """One progress over several loops, each of which counts from 0."""

    def __init__(self, total: int, progress: Advance | None) -> None:
        self._finished, self._total, self._progress = 0, total, progress

    def report(self, done: int, _total: int = 0) -> None:
        if self._progress is not None:
            self._progress(self._finished + done, self._total)

    def finish(self, steps: int) -> None:
        self._finished += steps


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


def _layer_keys(input_hash: str, recipe: ImportanceRecipe, space: Space) -> list[str]:
    """For each layer a hash of all that its file depends on."""
    ladders = [[choice.to_json() for choice in space.ladder(kind)] for kind in BLOCK_KINDS]
    inputs = [_VERSION, input_hash, recipe.model_dump(mode="json"), ladders]
    return [hashlib.sha256(json.dumps([*inputs, i]).encode()).hexdigest() for i in range(space.shape.layers)]


def _layer_path(directory: Path, layer: int) -> Path:
    return directory / f"layer_{layer:03}.safetensors"


def _store(directory: Path, index: int, layer: LayerRepairs, key: str) -> LayerRepairs:
    """Write a layer, and give it back mapped from its file, so that it needs no memory of its own."""
    path = _layer_path(directory, index)
    with atomic_path(path) as temporary:
        save_file(dict(layer.tensors), temporary, {"input_hash": key, "content_hash": layer.hash})
    return _read_layer(path, key)


def _finished_layers(directory: Path, keys: Sequence[str]) -> dict[int, LayerRepairs]:
    layers = {}
    for layer, key in enumerate(keys):
        try:
            layers[layer] = _read_layer(_layer_path(directory, layer), key)
        except RunDirectoryError:
            continue  # Whatever is wrong with the file, building it again mends it.
    return layers


def _read_layer(path: Path, key: str) -> LayerRepairs:
    fix = "build the library again: only the layers that are missing or bad are built"
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            layer = LayerRepairs({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except OSError as error:
        raise RunDirectoryError(f"cannot read {path}: {error.strerror or error}; {fix}") from error
    except SafetensorError as error:
        raise RunDirectoryError(f"{path} is not a whole layer of a block library: {error}; {fix}") from error
    if metadata.get("input_hash") != key:
        raise RunDirectoryError(f"{path} was built from another parent, split, recipe or space; {fix}")
    if metadata.get("content_hash") != layer.hash:
        raise RunDirectoryError(f"{path} does not have the contents it was written with; {fix}")
    return layer
