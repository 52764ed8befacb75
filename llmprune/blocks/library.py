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

from llmprune.architecture import BLOCK_KINDS, BlockKind, Space
from llmprune.blocks.importance import removal_order
from llmprune.blocks.refit import flap_bias, refit_nested, unit_columns
from llmprune.blocks.statistics import BlockStatistics, collect_statistics, statistics_bytes
from llmprune.data.tokens import Split
from llmprune.errors import ArchitectureError, ModelError, RecipeError, RunDirectoryError
from llmprune.files import atomic_path
from llmprune.models.parent import Parent
from llmprune.progress import Advance
from llmprune.recipe import ImportanceRecipe

_VERSION = 1


@dataclass(frozen=True, eq=False)
class LayerRepairs:
    """One layer of the library: `KIND/order`, `KIND/UNITS/weight` and, where the parent has one, `KIND/UNITS/bias`."""

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

    def kept_units(self, layer: int, kind: BlockKind, units: int) -> Tensor:
        """Indices of the units that a choice keeps, ascending: (units,) int64. Smaller choices keep subsets.

        Raises ArchitectureError if `units` is not on the ladder.
        """
        self._check(layer, kind, units, self.space.ladder(kind))
        order = self.layers[layer].tensors[f"{kind}/order"]
        return order[len(order) - units :].sort().values

    def output(self, layer: int, kind: BlockKind, units: int) -> tuple[Tensor, Tensor | None]:
        """Weight (D, inputs of the kept units) and bias (D,) of the output projection, in the parent's dtype.

        The bias is None where the parent has none. Do not write into either: they may be views of a mapped file.
        Raises ArchitectureError unless `units` is on the ladder, and more than 0 and less than the parent's.
        """
        self._check(layer, kind, units, _refitted(self.space, kind))
        tensors = self.layers[layer].tensors
        return tensors[f"{kind}/{units}/weight"], tensors.get(f"{kind}/{units}/bias")

    @cached_property
    def hash(self) -> str:
        """SHA-256, as hex, over all contents."""
        ladders = [self.space.ladder(kind) for kind in BLOCK_KINDS]
        return hashlib.sha256(json.dumps([ladders, [layer.hash for layer in self.layers]]).encode()).hexdigest()

    def _check(self, layer: int, kind: BlockKind, units: int, choices: Sequence[int]) -> None:
        if not 0 <= layer < len(self.layers):
            raise ArchitectureError(f"layer must be from 0 to {len(self.layers) - 1}, got {layer}")
        if units not in choices:
            raise ArchitectureError(
                f"the library knows the {kind} block of layer {layer} with {list(choices)} units, got {units}; "
                "use one of these, or build a library with a finer space"
            )


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
    unit_size: int,
    recipe: ImportanceRecipe,
    choices: Sequence[int],
) -> dict[str, Tensor]:
    """Order of removal, and output weight and bias of each choice (units kept, ascending): names without the kind.

    Without `recipe.refit` the weights are the parent's own columns; its bias changes for "flap" alone.
    """
    fits_bias = recipe.refit and bias_D is not None
    order = removal_order(recipe.method, weight_DI, statistics, unit_size, recipe.damp, centred=fits_bias)
    tensors = {"order": order}
    columns = unit_columns(order.flip(0), unit_size)[: choices[-1] * unit_size if choices else 0]
    counts = [units * unit_size for units in choices]
    if recipe.refit:
        mean_I = statistics.mean_I if fits_bias else None
        fits = refit_nested(weight_DI, statistics.gram_II, columns, counts, recipe.damp, mean_I=mean_I, bias_D=bias_D)
    elif recipe.method == "flap" and bias_D is not None:
        kept = [columns[:count] for count in counts]
        fits = [(weight_DI[:, some], flap_bias(weight_DI, statistics.mean_I, some, bias_D)) for some in kept]
    else:
        fits = [(weight_DI[:, columns[:count]], bias_D) for count in counts]
    for units, count, (weight, bias) in zip(choices, counts, fits, strict=True):
        tensors[f"{units}/weight"] = weight[:, columns[:count].argsort()]
        if bias is not None:
            tensors[f"{units}/bias"] = bias
    return tensors


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
        unit_size = weight_DI.shape[1] // parent.shape.units(kind)
        try:
            solved = solve_block(weight_DI, bias_D, statistics, unit_size, recipe, _refitted(space, kind))
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


def _refitted(space: Space, kind: BlockKind) -> list[int]:
    """Choices that keep something, but not everything."""
    return [units for units in space.ladder(kind) if 0 < units < space.shape.units(kind)]


def _layer_keys(input_hash: str, recipe: ImportanceRecipe, space: Space) -> list[str]:
    """For each layer a hash of all that its file depends on."""
    ladders = [space.ladder(kind) for kind in BLOCK_KINDS]
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
