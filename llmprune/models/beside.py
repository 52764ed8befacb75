"""Blocks of a parent as choices with inputs of their own leave them, each run alone on what the parent's is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from llmprune.choices.choice import Choice, Kept
from llmprune.models.parent import Parent
from llmprune.models.surgery import Block, Repairs, entering_tensors, skeleton


class OwnBlocks:
    """The blocks of a parent as one choice leaves them, but for the output projection: it hands its input through."""

    def __init__(self, parent: Parent, choice: Choice, library: Repairs | None = None) -> None:
        names, whole = parent.names(choice.kind), parent.shape.architecture
        assert choice == choice.entered_as(parent.shape) and names.module, "it has inputs of its own, and is a module"
        self._parent, self._choice, self._library = parent, choice, library
        self._child = skeleton(parent, whole.with_choices((layer, choice) for layer in range(parent.shape.layers)))

    def of(self, layer: int) -> nn.Module:
        """That of a layer, of the parent's weights as they are now: tensors that do not change are its own storage."""
        parent, choice = self._parent, self._choice
        names, every = parent.names(choice.kind), Kept(torch.arange(parent.shape.units(choice.kind)))
        block = self._child.get_submodule(f"{parent.family.layers}.{layer}.{names.module}")
        block.set_submodule(names.output, nn.Identity())
        theirs = parent.block(layer, choice.kind).state_dict()
        changed, _ = entering_tensors(Block(parent, layer, choice.kind, self._library), choice, every)
        block.load_state_dict({n: changed.get(n, theirs[n]) for n in block.state_dict()}, strict=True, assign=True)
        assert not any(buffer.is_meta for buffer in block.buffers()), "a block has buffers of its own"
        return block.eval().requires_grad_(False)


def own_inputs(block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """What enters the output projection of one of `OwnBlocks`, called as the parent's is: (batch, tokens, I)."""
    output = block(*args, **kwargs)
    inputs_BTI = output[0] if isinstance(output, tuple) else output
    assert isinstance(inputs_BTI, torch.Tensor)
    return inputs_BTI
