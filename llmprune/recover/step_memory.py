"""What keeps a training step small: logits a few positions at a time, since a vocabulary's worth of floats for every
token of a batch would be its largest tensors; and activations that are computed again instead of kept.

Shapes: B windows, T tokens, N positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from llmprune.models.streams import instead_of


class _GivenStates(nn.Module):
    """A base model whose last hidden states are known; OPT asks it for its decoder."""

    def __init__(self, states_BTD: Tensor) -> None:
        super().__init__()
        self.states_BTD = states_BTD

    @property
    def decoder(self) -> nn.Module:
        return self

    def forward(self, *_: Any, **__: Any) -> BaseModelOutputWithPastAndCrossAttentions:
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.states_BTD)


def last_states(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    """What the model's head reads: (B, T, D)."""
    states = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
    assert isinstance(states, Tensor)
    return states


def logits_of(model: PreTrainedModel, states_ND: Tensor) -> Tensor:
    """The model's own logits of some last hidden states, scaled and capped as its family does: (N, V)."""
    with instead_of(model, model.base_model_prefix, _GivenStates(states_ND[None])):
        ids = torch.zeros(1, len(states_ND), dtype=torch.int64, device=states_ND.device)
        logits = model(input_ids=ids, use_cache=False).logits
    assert isinstance(logits, Tensor)
    return logits[0]


@contextmanager
def recomputed(model: PreTrainedModel) -> Iterator[None]:
    """Within it, a layer keeps only what enters it for the backward pass, and runs once more there (gradient
    checkpointing, arXiv 1604.06174). transformers' own asks for a model in training mode, dropout and all."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    own = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward
