"""A child that learns: its weights in float32, and the model that runs forward and back for them.

In half precision that is a copy of the child, as engines run it: no weight is cast twice in a step, and hidden states
move half the bytes. Weights, their moments and their updates stay in float32 (arXiv 1710.03740).

Shapes: B windows of a pass, T tokens of a window.
"""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from llmprune.recover.step_memory import last_states, logits_of
from llmprune.recover.teacher import CHUNK, Teacher

Precision = Literal["float32", "bfloat16"]


def in_precision(model: PreTrainedModel, precision: Precision) -> PreTrainedModel:
    """The model itself where it is in that precision, or in half precision already; else a copy whose parameters are,
    and whose buffers (rotary frequencies, say) are not."""
    dtype = getattr(torch, precision)
    if precision == "float32" or model.dtype.itemsize <= dtype.itemsize:
        return model
    # Each parameter is copied once, in its new dtype: tied ones stay tied.
    in_place_of: dict[int, object] = {
        id(own): nn.Parameter(own.detach().to(dtype), requires_grad=own.requires_grad) for own in model.parameters()
    }
    return copy.deepcopy(model, in_place_of)


class Student:
    """The child is trained; what `learn` leaves in the gradients of its weights is for an optimiser, after whose step
    the model that `runs` has to `follow`."""

    def __init__(self, child: PreTrainedModel, precision: Precision) -> None:
        # What is spread over processes is gathered in its own dtype.
        spread = any(isinstance(weight, DTensor) for weight in child.parameters())
        self.runs = child if spread else in_precision(child, precision)
        self._casts = spread and precision != "float32"
        self._dtype = getattr(torch, precision)
        pairs = zip(child.parameters(), self.runs.parameters(), strict=True)
        self._copied = [(own, run) for own, run in pairs if own.requires_grad and own is not run]

    def learn(self, teacher: Teacher, row: int, ids_BT: Tensor, positions: int) -> float:
        """Add to the gradients that of the KL of every position over `positions`; and return it. The windows are those
        at `row` of what is learnt from."""
        with torch.autocast(self.runs.device.type, dtype=self._dtype, enabled=self._casts):
            loss = kl_backward(teacher, self.runs, row, ids_BT, positions)
        for own, run in self._copied:
            if run.grad is not None:
                grad = run.grad.to(own.dtype)
                own.grad = grad if own.grad is None else own.grad.add_(grad)
                run.grad = None
        return loss

    @torch.no_grad()
    def follow(self) -> None:
        """Run with the weights as they are now."""
        for own, run in self._copied:
            run.copy_(own)


def kl_backward(teacher: Teacher, child: PreTrainedModel, row: int, ids_BT: Tensor, positions: int) -> float:
    """Add to the gradients of the model that runs that of the KL of every position over `positions`, a chunk of logits
    at a time; and return it."""
    ids_BT = ids_BT.to(child.device)
    own_ND = last_states(child, ids_BT)[:, :-1].flatten(0, 1)
    leaf_ND, total = own_ND.detach().requires_grad_(), 0.0
    for loss_of, own_CD in zip(teacher.losses(row, ids_BT), torch.split(leaf_ND, CHUNK), strict=True):
        loss = loss_of(logits_of(child, own_CD)) / positions
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    own_ND.backward(leaf_ND.grad)  # type: ignore[no-untyped-call]
    return total
