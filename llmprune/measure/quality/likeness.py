"""How alike a child is to its parent beyond what it loses: KL, and how often both find the same token likeliest.

Two models may answer as often right and yet differently ("Accuracy is not all you need", arXiv 2407.09141): nats alone
do not show it.

Shapes: N windows, S tokens of a window.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.data.tokens import Split
from llmprune.measure.quality.perplexity import Figure
from llmprune.measure.quality.top_logits import TopLogits, kl_windows
from llmprune.models.waiting import at_home

TOP_K = 512
"""Tokens of a position that stand for the parent's whole distribution."""


class Likeness(BaseModel):
    """Means over a split's tokens, its sources weighed as they are there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kl: Figure
    """`KL(parent || child)`, nats a token, over the parent's TOP_K likeliest tokens."""
    same_top: float
    """Share of tokens before which both find the same token likeliest."""


class ParentsLogits:
    """A parent's likeliest tokens everywhere in a split: read when they are first asked for, and kept.

    A parent that waits has to come home for it: `read` before there is a child.
    """

    def __init__(self, parent: PreTrainedModel, split: Split) -> None:
        self._parent, self._split = parent, split

    @cached_property
    def _tops(self) -> Mapping[str, list[TopLogits]]:
        k = min(TOP_K, self._parent.config.get_text_config().vocab_size)
        with at_home(self._parent):
            return {
                name: [TopLogits.of(_logits(self._parent, ids_S), k) for ids_S in source.windows]
                for name, source in self._split.sources.items()
            }

    def read(self) -> None:
        """Run the parent, unless it was."""
        _ = self._tops

    def beside(self, child: PreTrainedModel) -> Likeness:
        """How alike a child is."""
        kl, same = 0.0, 0.0
        for name, source in self._split.sources.items():
            share = self._split.weights[name] / (len(source.windows) * (self._split.seq_len - 1))
            for top, ids_S in zip(self._tops[name], source.windows, strict=True):
                logits_BSV = _logits(child, ids_S)
                kl += share * float(kl_windows(top, logits_BSV))
                likeliest_T = logits_BSV[0, :-1].argmax(-1)
                same += share * int((likeliest_T == top.tokens_BTK[0, :, 0].to(likeliest_T.device)).sum())
        return Likeness(kl=kl, same_top=same)


@torch.inference_mode()
def _logits(model: PreTrainedModel, ids_S: Tensor) -> Tensor:
    """(1, S, V) of one window."""
    logits_BSV = model(input_ids=ids_S[None].to(model.device), use_cache=False).logits
    assert isinstance(logits_BSV, Tensor)
    return logits_BSV
