"""Blocks of a parent as choices with inputs of their own leave them, each run alone on what the parent's is given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from llmprune.choices.choice import Choice, Kept
from llmprune.models.parent import Parent
from llmprune.models.surgery import Block, Repairs, entering_tensors, skeleton


def own_blocks(
    parent: Parent, choice: Choice, layers: Iterable[int], library: Repairs | None = None
) -> dict[int, nn.Module]:
    """For each of `layers` its block as `choice` leaves it, but for the output projection, which hands its input
    through. Tensors that do not change are the parent's own storage."""
    names, whole = parent.names(choice.kind), parent.shape.architecture
    assert choice == choice.entered_as(parent.shape) and names.module, "it has inputs of its own, and is a module"
    child = skeleton(parent, whole.with_choices((layer, choice) for layer in range(parent.shape.layers)))
    every = Kept(torch.arange(parent.shape.units(choice.kind)))
    blocks = {}
    for layer in layers:
        block = child.get_submodule(f"{parent.family.layers}.{layer}.{names.module}")
        block.set_submodule(names.output, nn.Identity())
        theirs = parent.block(layer, choice.kind).state_dict()
        changed, _ = entering_tensors(Block(parent, layer, choice.kind, library), choice, every)
        block.load_state_dict({n: changed.get(n, theirs[n]) for n in block.state_dict()}, strict=True, assign=True)
        assert not any(buffer.is_meta for buffer in block.buffers()), "a block has buffers of its own"
        blocks[layer] = block.eval().requires_grad_(False)
    return blocks


def own_inputs(block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """What enters the output projection of one of `own_blocks`, called as the parent's is: (batch, tokens, I)."""
    output = block(*args, **kwargs)
    inputs_BTI = output[0] if isinstance(output, tuple) else output
    assert isinstance(inputs_BTI, torch.Tensor)
    return inputs_BTI
