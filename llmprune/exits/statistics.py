"""What every candidate exit would have said at every position of a split: stored once, so that thousands of rules for
leaving are scored without the model.

The states behind a layer do not depend on where earlier tokens left, where later layers read exact keys and values; so
nats are then exact, and an estimate where keys and values are of propagated states.

Shapes: E exits, W windows, N positions of a window (all but the last, which predicts nothing), D hidden size, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from llmprune.core.progress import Advance
from llmprune.data.tokens import Split
from llmprune.exits.training import states_of
from llmprune.models.exits import untrained_exit
from llmprune.models.modeling_pruned import Criterion, confidence_of
from llmprune.recover.step_memory import logits_of
from llmprune.recover.teacher import CHUNK


@dataclass(frozen=True, eq=False)
class ExitStatistics:
    """Of one trunk on one split."""

    layers: tuple[int, ...]
    confidence: Mapping[str, Tensor]
    """(E, W, N) by criterion; of agreement, what an exit would be confident of by itself: its largest probability."""
    top_EWN: Tensor
    nats_EWN: Tensor
    trunk_top_WN: Tensor
    trunk_nats_WN: Tensor
    weights_W: Tensor
    """Share of each window in the mixture of sources; they sum to 1."""

    @cached_property
    def agreement(self) -> Tensor:
        """Share of positions at which exit and trunk find the same token likeliest: (E,)."""
        return self.mean_of((self.top_EWN == self.trunk_top_WN).double())

    @property
    def trunk_nats(self) -> float:
        """Nats a token of the trunk, sources mixed by weight."""
        return float(self.mean_of(self.trunk_nats_WN))

    def mean_of(self, values: Tensor) -> Tensor:
        """Mean over positions (..., W, N) with windows at their weights."""
        return (values.double().mean(-1) * self.weights_W).sum(-1)

    def confident(self, criterion: Criterion, exit_: int, before: int | None) -> Tensor:
        """(W, N) of an exit; `before` is the exit that agreement is with, None at the first."""
        if criterion != "agreement":
            return self.confidence[criterion][exit_]
        own = self.confidence["top1"][exit_]
        return torch.zeros_like(own) if before is None else own * (self.top_EWN[exit_] == self.top_EWN[before])


@torch.no_grad()
def gather_statistics(
    trunk: PreTrainedModel,
    tensors: Mapping[str, Tensor],
    layers: Sequence[int],
    split: Split,
    advance: Advance = lambda done, total: None,
) -> ExitStatistics:
    """One pass of the trunk over a split, and each exit's head at every position."""
    exits = {layer: untrained_exit(trunk) for layer in layers}
    for layer, made in exits.items():
        made.load_state_dict({n.partition(".")[2]: t for n, t in tensors.items() if n.partition(".")[0] == str(layer)})
    windows = torch.cat([source.windows for source in split.sources.values()])
    weights = [split.weights[name] / len(one.windows) for name, one in split.sources.items() for _ in one.windows]
    shape = len(windows), windows.shape[1] - 1
    figures = {name: torch.empty(len(layers), *shape) for name in ("gate", "top1", "margin", "entropy")}
    top, nats = torch.empty(len(layers), *shape, dtype=torch.int64), torch.empty(len(layers), *shape)
    trunk_top, trunk_nats = torch.empty(*shape, dtype=torch.int64), torch.empty(*shape)
    for w, window_T in enumerate(windows):
        states, last_ND = states_of(trunk, layers, window_T[None])
        for rows in torch.split(torch.arange(shape[1]), CHUNK):
            following = window_T[rows + 1].to(trunk.device)
            logits_NV = logits_of(trunk, last_ND[rows]).float()
            trunk_top[w, rows], trunk_nats[w, rows] = _figures(logits_NV, following)
            for e, layer in enumerate(layers):
                own_ND = states[layer][rows]
                logits_NV = logits_of(trunk, exits[layer](own_ND)).float()
                top[e, w, rows], nats[e, w, rows] = _figures(logits_NV, following)
                figures["gate"][e, w, rows] = exits[layer].promise(own_ND).cpu()
                for name in ("top1", "margin", "entropy"):
                    figures[name][e, w, rows] = confidence_of(name, logits_NV, None).cpu()
        advance(w + 1, len(windows))
    return ExitStatistics(
        tuple(layers), figures, top, nats, trunk_top, trunk_nats, torch.tensor(weights, dtype=torch.float64)
    )


def _figures(logits_NV: Tensor, following_N: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest tokens, and nats of those that follow."""
    return logits_NV.argmax(-1).cpu(), functional.cross_entropy(logits_NV, following_N, reduction="none").cpu()
