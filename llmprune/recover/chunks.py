"""Logits a few positions at a time: a vocabulary's worth of floats for every token of a batch would be the largest
tensors of a training step.

Shapes: B windows, T tokens, N positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from llmprune.recover.streams import instead_of


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
