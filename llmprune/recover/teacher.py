"""What a child learns from: the logits of its parent, which runs beside it; or the largest of them, stored when a
window is first seen, so that the parent does not run for it again.

Shapes: W windows, B windows of a pass, T tokens of a window, C positions of a chunk, D hidden size, V vocabulary, K
tokens that are kept of a position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from llmprune.recover.step_memory import last_states, logits_of

CHUNK = 256
"""Positions whose logits are in memory together."""

Loss = Callable[[Tensor], Tensor]
"""Of the child's logits of a chunk, (C, V): the sum of KL(parent || child) over its positions."""


class Teacher(Protocol):
    """Gives the loss of windows, chunk by chunk."""

    def losses(self, row: int, ids_BT: Tensor) -> Iterator[Loss]:
        """Of the windows at row `row` of what is learnt from, whose last tokens predict nothing."""
        ...


class LiveTeacher:
    """The parent itself: every position's whole distribution."""

    def __init__(self, parent: PreTrainedModel) -> None:
        self.parent = parent

    def losses(self, row: int, ids_BT: Tensor) -> Iterator[Loss]:
        for wanted_CV in log_probabilities(self.parent, ids_BT):
            yield partial(_whole_kl, wanted_CV)


class StoredTeacher:
    """The K likeliest tokens of every position and, as one more, all others together (a tail bucket): what is learnt is
    the same whether a window is new or not. One file, mapped into memory; each process of several has its own."""

    def __init__(self, parent: PreTrainedModel, windows: int, positions: int, kept: int, file: Path) -> None:
        self.parent = parent
        file.parent.mkdir(parents=True, exist_ok=True)
        values, ids, sums = windows * positions * kept * 2, windows * positions * kept * 4, windows * 8
        whole = torch.from_file(str(file), shared=True, size=values + ids + sums, dtype=torch.uint8)
        self._sums_W, self._ids_WNK, self._values_WNK = (
            whole[:sums].view(torch.int64),
            whole[sums : sums + ids].view(torch.int32).view(windows, positions, kept),
            whole[sums + ids :].view(torch.float16).view(windows, positions, kept),
        )

    def losses(self, row: int, ids_BT: Tensor) -> Iterator[Loss]:
        if not self._holds(row):
            self._store(row, ids_BT)
        values_NK, ids_NK = self._values_WNK[row].to(ids_BT.device), self._ids_WNK[row].to(ids_BT.device)
        for values_CK, ids_CK in zip(torch.split(values_NK, CHUNK), torch.split(ids_NK, CHUNK), strict=True):
            yield partial(_top_kl, values_CK.float(), ids_CK.long())

    def _holds(self, row: int) -> bool:
        """Whether a window was stored, and whole: a machine may have stopped in between."""
        return int(self._sums_W[row]) == _check(self._ids_WNK[row], self._values_WNK[row])

    def _store(self, row: int, ids_BT: Tensor) -> None:
        kept = self._values_WNK.shape[2]
        found = [wanted_CV.topk(kept) for wanted_CV in log_probabilities(self.parent, ids_BT)]
        self._values_WNK[row] = torch.cat([values for values, _ in found]).half().cpu()
        self._ids_WNK[row] = torch.cat([ids for _, ids in found]).int().cpu()
        self._sums_W[row] = _check(self._ids_WNK[row], self._values_WNK[row])


# As a decorator: a block within a generator would switch gradients off for whoever iterates over it.
@torch.no_grad()
def log_probabilities(model: PreTrainedModel, ids_BT: Tensor) -> Iterator[Tensor]:
    """Of the next token at every position but the last, (C, V) at a time, in float32."""
    for states_CD in torch.split(last_states(model, ids_BT)[:, :-1].flatten(0, 1), CHUNK):
        yield functional.log_softmax(logits_of(model, states_CD).float(), dim=-1)


def _check(ids_NK: Tensor, values_NK: Tensor) -> int:
    """A sum over a window's numbers; never 0, which an empty file holds."""
    return 1 + int(ids_NK.sum(dtype=torch.int64)) + int(values_NK.view(torch.int16).sum(dtype=torch.int64)) ** 2


class _WholeKl(torch.autograd.Function):
    """KL of whole distributions, whose gradient is the difference of two softmaxes: half the passes over a vocabulary
    that autograd would take, which were a quarter of a small model's step (docs/decisions/0036)."""

    @staticmethod
    def forward(ctx: Any, logits_CV: Tensor, wanted_CV: Tensor) -> Tensor:
        found_CV, likely_CV = functional.log_softmax(logits_CV.float(), dim=-1), wanted_CV.exp()
        total = torch.dot(likely_CV.flatten(), (wanted_CV - found_CV).flatten())
        ctx.save_for_backward(found_CV.exp_().sub_(likely_CV).to(logits_CV.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient_CV,) = ctx.saved_tensors
        return gradient_CV * gradients[0], None


def _whole_kl(wanted_CV: Tensor, logits_CV: Tensor) -> Tensor:
    total: Tensor = _WholeKl.apply(logits_CV, wanted_CV)  # type: ignore[no-untyped-call]
    return total


def _top_kl(wanted_CK: Tensor, ids_CK: Tensor, logits_CV: Tensor) -> Tensor:
    """KL between what is left when all tokens but K are one: a lower limit of the whole."""
    found_CK = functional.log_softmax(logits_CV.float(), dim=-1).gather(1, ids_CK)
    kept = functional.kl_div(found_CK, wanted_CK, reduction="sum", log_target=True)
    tails = functional.kl_div(_tail(found_CK), _tail(wanted_CK), reduction="sum", log_target=True)
    return kept + tails


def _tail(log_CK: Tensor) -> Tensor:
    """Log-probability of all tokens that are not kept: (C,)."""
    rest = -torch.expm1(log_CK.logsumexp(dim=-1))
    # Where the kept ones are all there is, rounding may leave nothing, or less.
    return rest.clamp_min(1e-6).log()
