"""Weights of a child in the types that its GGUF file stores them in: rounded by ggml as soon as the child is cut, so
that what is scored, repaired and written is one and the same.

The blocks of a rounded weight stay with the model: rounding what was rounded before, with an importance matrix, need
not give the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.core.recipe import GgufType
from llmprune.numerics.ggml import Blocks, from_blocks, to_blocks

_ATTRIBUTE = "llmprune_stored_weights"


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """One matrix as a file holds it. `squares_C`: the mean square of each column's input, if that is known."""

    type: GgufType
    blocks: Blocks
    squares_C: Tensor | None = None

    @classmethod
    def of(cls, weight_RC: Tensor, type_: GgufType, squares_C: Tensor | None = None) -> StoredWeight:
        """Raises ModelError on numbers that the type cannot hold, or without llama.cpp."""
        return cls(type_, to_blocks(weight_RC, type_, squares_C), squares_C)

    def numbers_like(self, weight_RC: Tensor) -> Tensor:
        """What the file says, with a weight's dtype and device."""
        return from_blocks(self.blocks, self.type).to(weight_RC)

    def anew(self, weight_RC: Tensor) -> StoredWeight:
        """Another weight in its place."""
        return replace(self, blocks=to_blocks(weight_RC, self.type, self.squares_C))


def stored_weights(model: nn.Module) -> Mapping[str, StoredWeight]:
    """By the name of the parameter, the weights of a model that are rounded already; those of a model that was loaded
    are not known."""
    found: Mapping[str, StoredWeight] = model.__dict__.get(_ATTRIBUTE, {})
    return found


def remember(model: nn.Module, weights: Mapping[str, StoredWeight]) -> None:
    if weights:
        model.__dict__[_ATTRIBUTE] = dict(weights)


def as_stored(child: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that would take the place of a child's own, those in a type of their own rounded to it."""
    known = stored_weights(child)
    return {name: known[name].anew(t).numbers_like(t) if name in known else t for name, t in tensors.items()}


@torch.no_grad()
def store_again(child: PreTrainedModel) -> None:
    """Round what is stored in a type of its own after it was changed."""
    found = {}
    for name, stored in stored_weights(child).items():
        path, _, leaf = name.rpartition(".")
        module = child.get_submodule(path)
        weight = module.get_parameter(leaf)
        found[name] = stored.anew(weight)
        # In its place: the storage may be another's.
        setattr(module, leaf, nn.Parameter(found[name].numbers_like(weight), requires_grad=weight.requires_grad))
    # An output head may be the embedding.
    child.tie_weights()
    remember(child, found)
