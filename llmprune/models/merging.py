"""Attention blocks of a parent with KV groups merged, each run alone on what the parent's own block is given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from llmprune.choices.architecture import AttentionChoice
from llmprune.models.parent import Parent
from llmprune.models.surgery import merged_tensors, skeleton


def merged_blocks(parent: Parent, choice: AttentionChoice, layers: Iterable[int]) -> dict[int, nn.Module]:
    """For each of `layers` its attention as `choice`, which merges, leaves it, but for the output projection, which
    hands its input through. Tensors that do not change are the parent's own storage."""
    family, whole = parent.family, parent.shape.architecture
    child = skeleton(parent, whole.with_choices((layer, choice) for layer in range(parent.shape.layers)))
    blocks = {}
    for layer in layers:
        block = child.get_submodule(f"{family.layers}.{layer}.{family.attention.module}")
        block.set_submodule(family.attention.output, nn.Identity())
        theirs, changed = parent.block(layer, "attention").state_dict(), merged_tensors(parent, layer, choice)
        block.load_state_dict({n: changed.get(n, theirs[n]) for n in block.state_dict()}, strict=True, assign=True)
        assert not any(buffer.is_meta for buffer in block.buffers()), "an attention block has buffers of its own"
        blocks[layer] = block.eval().requires_grad_(False)
    return blocks


def merged_inputs(block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """What enters the output projection of one of `merged_blocks`, called as the parent's is: (batch, tokens, I)."""
    inputs_BTI = block(*args, **kwargs)[0]
    assert isinstance(inputs_BTI, torch.Tensor)
    return inputs_BTI
