"""Layers of a child spread over the processes that train it (FSDP2, arXiv 2304.11277): each holds a part of their
weights, gradients and moments, and has a layer whole only while that layer runs.

Embedding, head and last norm stay whole everywhere. A tensor is a part of one where torch says DTensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from llmprune.recover.team import Team


def shard_layers(layers: Iterable[nn.Module], device: torch.device, team: Team) -> None:
    """Spread every layer over the team. Called alike by every process, whose layers are alike; gradients are sums."""
    mesh = init_device_mesh(device.type, (team.size,))
    for layer in layers:
        if any(True for _ in layer.parameters()):
            # A layer by itself: parts of the model are called without its own forward pass.
            spread = fully_shard(layer, mesh=mesh)
            spread.set_gradient_divide_factor(1.0)
            # gloo knows plain sums only.
            spread.set_force_sum_reduction_for_comms(True)


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, on the CPU. Every process calls it alike."""
    found = tensor.detach()
    if isinstance(found, DTensor):
        found = found.full_tensor()
    return found.cpu().contiguous()


def part_like(value: Tensor, place: Tensor) -> Tensor:
    """A whole tensor as the part that belongs beside, or in place of, another."""
    value = value.to(place.device)
    if isinstance(place, DTensor):
        return distribute_tensor(value, place.device_mesh, place.placements, src_data_rank=None)
    return value


def in_groups(weights: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    """Parameter groups of an optimiser, none of which mixes whole tensors with parts."""
    groups = ([weight for weight in weights if isinstance(weight, DTensor) is parts] for parts in (False, True))
    return [{"params": group} for group in groups if group]


def clip_gradients(weights: Sequence[nn.Parameter], most: float, team: Team) -> float:
    """Scale all gradients so that their norm is at most so much; the norm before that."""
    if not any(isinstance(weight, DTensor) for weight in weights):
        return float(torch.nn.utils.clip_grad_norm_(weights, most))
    squares = 0.0
    for weight in weights:
        if isinstance(weight.grad, DTensor):
            # Each process has another part; what all have alike counts once.
            squares += float(weight.grad.to_local().square().sum())
        elif weight.grad is not None and team.leads:
            squares += float(weight.grad.square().sum())
    norm = math.sqrt(team.total(squares))
    for weight in weights:
        if weight.grad is not None and norm > most:
            weight.grad.mul_(most / (norm + 1e-6))
    return norm
