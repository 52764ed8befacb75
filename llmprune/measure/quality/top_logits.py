"""KL divergence of a child from its parent, over the tokens that the parent finds likely.

The parent's top K logits stand for its whole distribution (K of 512 is about equal to all of them: Minitron,
arXiv 2407.14679), so they are computed once and kept: 8 bytes for each of the K in float32, where all V would be
hundreds of times that. Both sides are renormalised over the K tokens.

All K of a child's logits come out of the family's own forward pass with the other V - K. To compute those K alone
would mean to gather K rows of the output projection for every position: more bytes to move than the full product
has to compute on, so it saves nothing that could be relied on, and nats need all V anyway.

Shapes: B windows of a batch, T positions that predict a token (all but a window's last), V words, K kept logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class TopLogits:
    """The parent's K largest logits at each scored position of a batch."""

    values_BTK: torch.Tensor
    """In the dtype that the model computes in, largest first."""
    tokens_BTK: torch.Tensor
    """int32: the token of each."""

    @classmethod
    def of(cls, logits_BSV: torch.Tensor, k: int) -> TopLogits:
        """From the logits of whole windows, S = T + 1 positions; k is at most V."""
        # One window at a time: a sort of all V for a whole batch would double the peak.
        tops = [logits_SV[:-1].topk(k, dim=-1) for logits_SV in logits_BSV]
        values_BTK, tokens_BTK = (torch.stack([top[i] for top in tops]) for i in (0, 1))
        return cls(values_BTK, tokens_BTK.to(torch.int32))

    @property
    def nbytes(self) -> int:
        return self.values_BTK.nbytes + self.tokens_BTK.nbytes


def kl_windows(top: TopLogits, logits_BSV: torch.Tensor) -> torch.Tensor:
    """KL(parent || child) in nats, summed over each window's scored positions: (B,) float64.

    `logits_BSV` are the child's for the same windows. The softmax is in float32 whatever the dtype. Child logits that
    overflow are infinitely far away.
    """
    sums = [
        _kl(values_TK, tokens_TK, logits_SV[:-1])
        for values_TK, tokens_TK, logits_SV in zip(top.values_BTK, top.tokens_BTK, logits_BSV, strict=True)
    ]
    return torch.stack(sums)


def _kl(values_TK: torch.Tensor, tokens_TK: torch.Tensor, logits_TV: torch.Tensor) -> torch.Tensor:
    parent_TK = values_TK.float().log_softmax(-1)
    child_TK = logits_TV.gather(-1, tokens_TK.long()).float().log_softmax(-1)
    total = (parent_TK.exp() * (parent_TK - child_TK)).sum(-1).double().sum()
    return total if torch.isfinite(total) else torch.full_like(total, math.inf)


def check_top_logits_fit(k: int, positions: int, element_bytes: int, limit_bytes: int) -> None:
    """Raises ValueError if K logits and tokens of so many positions are more than the limit."""
    needed = positions * k * (element_bytes + 4)
    if needed > limit_bytes:
        most = limit_bytes // (positions * (element_bytes + 4))
        raise ValueError(
            f"top_k {k} takes {needed:,} bytes for {positions:,} positions, and {limit_bytes:,} are allowed; "
            f"lower top_k to {most}, score fewer windows or allow more memory"
        )
