"""The files of a block library: one a layer, held to a hash of what it was built from and of what is in it."""

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

from llmprune.choices.dimensions import BLOCK_KINDS, BlockKind
from llmprune.choices.space import Space
from llmprune.core.errors import RunDirectoryError
from llmprune.core.files import atomic_path
from llmprune.core.recipe import ImportanceRecipe

_VERSION = 5


@dataclass(frozen=True, eq=False)
class LayerRepairs:
    """One layer of the library: `KIND/order` and orders that kinds of choice have stored of their own, and for every
    choice that is refitted `KIND/LABEL/change` with its scales (see `blocks.changes`) and, where the parent has one,
    `KIND/LABEL/bias`; `KIND/score` and `KIND/mean` for
    "flap"; `attention/NORM/squares` for a norm over all heads; and where types of weights are choices
    `KIND/entry_squares` and `KIND/output_squares`, with `ffn/head_squares` in the last layer."""

    tensors: Mapping[str, Tensor]

    @cached_property
    def orders(self) -> Mapping[BlockKind, Mapping[str, Tensor]]:
        """Of each block what is not of one choice alone, by its name without the kind."""
        parts = {name: name.split("/") for name in self.tensors}
        return {
            kind: {parts[name][1]: tensor for name, tensor in self.tensors.items() if parts[name][:-1] == [kind]}
            for kind in BLOCK_KINDS
        }

    @cached_property
    def hash(self) -> str:
        """SHA-256, as hex, over every tensor's name, dtype, shape and bytes."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.view(torch.uint8).numpy().data)
        return digest.hexdigest()


def layer_keys(input_hash: str, recipe: ImportanceRecipe, space: Space) -> list[str]:
    """For each layer a hash of all that its file depends on."""
    ladders = [[choice.to_json() for choice in ladder] for ladder in space.ladders.values()]
    inputs = [_VERSION, input_hash, recipe.decisive(), ladders]
    return [hashlib.sha256(json.dumps([*inputs, i]).encode()).hexdigest() for i in range(space.shape.layers)]


def layer_path(directory: Path, layer: int) -> Path:
    return directory / f"layer_{layer:03}.safetensors"


def store_layer(directory: Path, index: int, layer: LayerRepairs, key: str) -> LayerRepairs:
    """Write a layer, and give it back mapped from its file, so that it needs no memory of its own."""
    path = layer_path(directory, index)
    with atomic_path(path) as temporary:
        save_file(dict(layer.tensors), temporary, {"input_hash": key, "content_hash": layer.hash})
    return read_layer(path, key)


def finished_layers(directory: Path, keys: Sequence[str]) -> dict[int, LayerRepairs]:
    layers = {}
    for layer, key in enumerate(keys):
        try:
            layers[layer] = read_layer(layer_path(directory, layer), key)
        except RunDirectoryError:
            continue  # Whatever is wrong with the file, building it again mends it.
    return layers


def read_layer(path: Path, key: str) -> LayerRepairs:
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
