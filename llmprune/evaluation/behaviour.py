"""Where a child behaves unlike its parent, token by token, on one split of text.

Shapes: T tokens of a window, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmprune.core.errors import ModelError
from llmprune.core.progress import Advance
from llmprune.data.tokens import Split

SPAN = 16
"""Tokens of a passage; a shorter window is one."""
CONTEXT = 24
"""Tokens that are shown before one."""
CHUNK = 256
"""Positions whose probabilities lie in memory together."""


@dataclass(frozen=True)
class Place:
    """A token that two models disagree over, or the first of a passage."""

    source: str
    before: str
    """What both models have read last."""
    text: str
    """What comes next in truth."""
    parents: str
    """The likeliest next token of the parent."""
    childs: str
    kl: float
    """`KL(parent || child)`, nats; of a passage the mean of its tokens."""
    nats_lost: float
    """What the child gives to the true token less than its parent does; of a passage the mean."""


@dataclass(frozen=True)
class Behaviour:
    """How alike two models are: means over a split's tokens, its sources weighed as they are there."""

    tokens: int
    same_top: float
    """Share of tokens before which both find the same token likeliest."""
    kl: float
    nats_lost: float
    worst_tokens: Sequence[Place]
    worst_passages: Sequence[Place]


@dataclass(frozen=True)
class _Window:
    """What was found of the T - 1 predictions of a window."""

    source: str
    ids_T: Tensor
    kl_T: Tensor
    lost_T: Tensor
    parents_T: Tensor
    childs_T: Tensor


def behaviour(
    parent: PreTrainedModel,
    child: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    split: Split,
    *,
    most: int,
    progress: Advance = lambda done, total: None,
) -> Behaviour:
    """Read a split with both models; at most so many tokens, and passages of SPAN tokens, that they disagree over most,
    none of them within SPAN tokens of another. Raises ModelError if a logit is NaN."""
    windows = list(_read(parent, child, split, progress))
    kl, lost, same = 0.0, 0.0, 0.0
    for name, source in split.sources.items():
        own = [window for window in windows if window.source == name]
        share = split.weights[name] / (len(source.windows) * (split.seq_len - 1))
        kl += share * sum(float(window.kl_T.sum()) for window in own)
        lost += share * sum(float(window.lost_T.sum()) for window in own)
        same += share * sum(int((window.parents_T == window.childs_T).sum()) for window in own)
    tokens = sum(len(window.kl_T) for window in windows)
    worst = [_worst(windows, tokenizer, most, span) for span in (1, min(SPAN, split.seq_len - 1))]
    return Behaviour(tokens, same, kl, lost, *worst)


@torch.inference_mode()
def _read(parent: PreTrainedModel, child: PreTrainedModel, split: Split, progress: Advance) -> Iterator[_Window]:
    every = [(name, ids_T) for name, source in split.sources.items() for ids_T in source.windows]
    for done, (name, ids_T) in enumerate(every):
        progress(done, len(every))
        logits = (
            model(input_ids=ids_T[None].to(model.device), use_cache=False).logits[0, :-1] for model in (parent, child)
        )
        chunks = zip(*(torch.split(found_TV, CHUNK) for found_TV in logits), torch.split(ids_T[1:], CHUNK), strict=True)
        columns = zip(*(_compared(*chunk) for chunk in chunks), strict=True)
        window = _Window(name, ids_T, *(torch.cat(column) for column in columns))
        if window.kl_T.isnan().any():
            raise ModelError(f"logits must be numbers; {type(child).__name__} or its parent gives NaN in {name}")
        yield window
    progress(len(every), len(every))


def _compared(parents_TV: Tensor, childs_TV: Tensor, true_T: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """KL, nats lost, and either's likeliest token: (T,) each, on the CPU."""
    own_TV, found_TV = (values.float().log_softmax(-1) for values in (parents_TV, childs_TV.to(parents_TV.device)))
    kl_T = (own_TV.exp() * (own_TV - found_TV)).sum(-1)
    true_T1 = true_T[:, None].to(own_TV.device)
    lost_T = (own_TV.gather(1, true_T1) - found_TV.gather(1, true_T1))[:, 0]
    return kl_T.cpu(), lost_T.cpu(), own_TV.argmax(-1).cpu(), found_TV.argmax(-1).cpu()


def _worst(windows: Sequence[_Window], tokenizer: PreTrainedTokenizerBase, most: int, span: int) -> list[Place]:
    ranked = sorted(
        ((mean, number, place) for number, window in enumerate(windows) for place, mean in _means(window, span)),
        reverse=True,
    )
    taken: list[tuple[int, int]] = []
    for _, number, place in ranked:
        if len(taken) == most:
            break
        if all(number != other or abs(place - there) >= SPAN for other, there in taken):
            taken.append((number, place))
    return [_place(windows[number], place, span, tokenizer) for number, place in taken]


def _means(window: _Window, span: int) -> Iterator[tuple[int, float]]:
    """Where each run of `span` predictions begins, and the mean of its KL."""
    return enumerate(window.kl_T.unfold(0, span, 1).mean(-1).tolist())


def _place(window: _Window, place: int, span: int, tokenizer: PreTrainedTokenizerBase) -> Place:
    def text(ids_T: Tensor) -> str:
        return str(tokenizer.decode(ids_T.tolist()))

    following = slice(place, place + span)
    return Place(
        window.source,
        text(window.ids_T[max(0, place + 1 - CONTEXT) : place + 1]),
        text(window.ids_T[1:][following]),
        text(window.parents_T[place : place + 1]),
        text(window.childs_T[place : place + 1]),
        float(window.kl_T[following].mean()),
        float(window.lost_T[following].mean()),
    )
