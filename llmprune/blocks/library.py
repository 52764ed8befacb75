"""The block library: for every block the order in which units leave, and the output projection of every choice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from llmprune.blocks.changes import CHANGE_PARTS, changed
from llmprune.blocks.layer_files import LayerRepairs, finished_layers, layer_keys, layer_path, read_layer, store_layer
from llmprune.blocks.solve import gathered_choices, offers_types, refitted, solve_layer
from llmprune.blocks.statistics import layer_statistics
from llmprune.choices.choice import Choice, Kept
from llmprune.choices.dimensions import BlockKind
from llmprune.choices.space import Space
from llmprune.core.errors import ArchitectureError
from llmprune.core.progress import Advance, Steps
from llmprune.core.recipe import ImportanceRecipe
from llmprune.data.tokens import Split
from llmprune.models.parent import Parent
from llmprune.models.surgery import InputSquares
from llmprune.models.waiting import with_room


@dataclass(frozen=True, eq=False)
class BlockLibrary:
    """What pruning needs to know of every block, for every choice on the space's ladders; tensors are on the CPU."""

    space: Space
    layers: tuple[LayerRepairs, ...]

    def kept(self, layer: int, choice: Choice) -> Kept:
        """What a choice keeps of the units; smaller choices of a kind keep subsets, where the kind says so.

        Raises ArchitectureError if the choice is not on the ladder.
        """
        return choice.kept(self._layer(layer, choice).orders[choice.kind], self.space.shape)

    def output(self, layer: int, choice: Choice, weight_DI: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight (D, inputs of the kept units) and bias (D,) of the output projection, from the parent's weight (D, I)
        and where and as that is.

        The bias is None where the parent has none. Do not write into it: it may be a view of a mapped file.
        Raises ArchitectureError unless the choice is on the ladder; it is neither a drop nor the parent's.
        """
        tensors = self._layer(layer, choice).tensors
        assert choice in refitted(self.space, choice.kind), f"{choice} has no output projection of its own"
        name = f"{choice.kind}/{choice.label}"
        columns_S = choice.columns(self.kept(layer, choice), self.space.shape)
        parents_DS = weight_DI.index_select(1, columns_S.to(weight_DI.device))
        change = {part: tensors[f"{name}/{part}"] for part in CHANGE_PARTS if f"{name}/{part}" in tensors}
        return changed(parents_DS, change), tensors.get(f"{name}/bias")

    def fluctuation(self, layer: int, kind: BlockKind) -> tuple[Tensor, Tensor]:
        """Of a library ordered by "flap": the units' standardised scores (U,), and the mean (I,) of the inputs of the
        output projection, both float64. Raises ArchitectureError if the layer is not the parent's."""
        tensors = self._layer(layer, self.space.shape.full(kind)).tensors
        return tensors[f"{kind}/score"], tensors[f"{kind}/mean"]

    def norm_squares(self, layer: int, name: str) -> Tensor | None:
        """Mean square of every row that enters a norm over all heads: (rows,) float64; None if it is no such norm.

        With them the weights of what is left of the norm are scaled to what the parent gave those rows on average.
        """
        return self._layer(layer, self.space.shape.full("attention")).tensors.get(f"attention/{name}/squares")

    def input_squares(self, layer: int, kind: BlockKind) -> InputSquares | None:
        """What rounding a block's weights is weighed by; None where the space offers no types."""
        tensors = self._layer(layer, self.space.shape.full(kind)).tensors
        found = [tensors.get(f"{kind}/{name}_squares") for name in ("entry", "output")]
        return None if found[0] is None or found[1] is None else InputSquares(found[0], found[1])

    def head_squares(self) -> Tensor | None:
        """What rounding the output head is weighed by; None where the space offers no types."""
        return self.layers[-1].tensors.get("ffn/head_squares")

    @cached_property
    def hash(self) -> str:
        """SHA-256, as hex, over all contents."""
        ladders = [[choice.to_json() for choice in ladder] for ladder in self.space.ladders.values()]
        return hashlib.sha256(json.dumps([ladders, [layer.hash for layer in self.layers]]).encode()).hexdigest()

    def _layer(self, layer: int, choice: Choice) -> LayerRepairs:
        if not 0 <= layer < len(self.layers):
            raise ArchitectureError(f"layer must be from 0 to {len(self.layers) - 1}, got {layer}")
        ladder = self.space.ladder(choice.kind)
        if choice not in ladder:
            raise ArchitectureError(
                f"the library knows the {choice.kind} block of layer {layer} with "
                f"{', '.join(own.label for own in ladder)} units, got {choice.label}; use one of these, or build a "
                "library with a finer or larger space"
            )
        return self.layers[layer]


@dataclass(frozen=True)
class LibrarySpec:
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
    progress: Advance | None = None,
) -> BlockLibrary:
    """`build_libraries` for one library."""
    specs = [LibrarySpec(recipe, directory)]
    (library,) = build_libraries(parent, split, specs, space, input_hash=input_hash, progress=progress)
    return library


def build_libraries(
    parent: Parent,
    split: Split,
    specs: Sequence[LibrarySpec],
    space: Space,
    *,
    input_hash: str = "",
    progress: Advance | None = None,
) -> list[BlockLibrary]:
    """Walk the calibration split through the parent once, and order and refit every block of a layer for each library
    before the next layer is reached.

    With a `directory`, each layer is one file, written when it is ready and read back memory-mapped; files that are
    whole and were built from the same `input_hash` (of parent and split), recipe and space are kept, all others are
    built again. So calling this again finishes a killed build, and merely loads a finished one.

    Memory: see `layer_statistics`; solving a block takes about five float64 matrices (I, I) beside its statistics.
    `progress` counts layers. Raises ModelError, RecipeError and RunDirectoryError.
    """
    assert space.shape == parent.shape, "the space is not this parent's"
    built = [_Built(spec, layer_keys(input_hash, spec.recipe, space)) for spec in specs]
    for library in built:
        library.load(input_hash)
    with_room(parent.model, lambda device: _complete(built, parent, split, space, device, progress))
    return [library.whole(space) for library in built]


def _complete(
    built: Sequence[_Built],
    parent: Parent,
    split: Split,
    space: Space,
    device: torch.device | None,
    progress: Advance | None,
) -> None:
    """Solve the layers that any of the libraries lacks."""
    missing = [layer for layer in range(parent.shape.layers) if any(layer not in library.layers for library in built)]
    if not missing:
        return
    own = max((gathered_choices(space, library.spec.recipe) for library in built), key=len)
    walked = layer_statistics(parent, split, layers=missing, own=own, entries=offers_types(space), device=device)
    steps = Steps(len(missing), progress)
    steps.report(0)
    for layer, blocks in walked:
        for library in built:
            if layer not in library.layers:
                library.add(layer, solve_layer(parent, layer, blocks, library.spec.recipe, space))
        steps.report(1)
        steps.finish(1)


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


@dataclass
class _Built:
    """A library at work: the layers that are there, and the key of each layer's file."""

    spec: LibrarySpec
    keys: Sequence[str]
    layers: dict[int, LayerRepairs] = field(default_factory=dict)

    def load(self, input_hash: str) -> None:
        if self.spec.directory is not None:
            assert input_hash, "a library on disk needs the hash of its inputs"
            self.layers = finished_layers(self.spec.directory, self.keys)

    def whole(self, space: Space) -> BlockLibrary:
        return BlockLibrary(space, tuple(self.layers[layer] for layer in range(space.shape.layers)))

    def add(self, layer: int, solved: LayerRepairs) -> None:
        directory = self.spec.directory
        self.layers[layer] = solved if directory is None else store_layer(directory, layer, solved, self.keys[layer])
