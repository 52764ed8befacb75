"""How far one model's predictions are from another's."""

from __future__ import annotations

import torch


def kl_nats(expected_BTV: torch.Tensor, found_BTV: torch.Tensor) -> float:
    """Mean `KL(expected || found)` of what two models' logits predict, in nats a token; B rows, T tokens, V words."""
    expected, found = (logits.double().log_softmax(-1) for logits in (expected_BTV, found_BTV))
    return float((expected.exp() * (expected - found)).sum(-1).mean())
