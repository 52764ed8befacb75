"""How well a model predicts text: nats a token, nats a byte and perplexity, source by source and for the mixture.

Nats a token is what trials are ranked by, but it only compares models with one tokenizer; nats a byte compares any
two. Perplexity is exp(nats a token), and means nothing without the data set, window length and token count beside it.

Shapes: N windows, T tokens of a window, V words of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, PlainSerializer
from torch.nn import functional
from transformers import PreTrainedModel

from llmprune.core.errors import ModelError
from llmprune.data.tokens import Split
from llmprune.measure.quality.agreement import Agreement, agreement_of

LOGITS_BYTES = 256 * 2**20
"""What the float32 logits of one forward pass may take, unless a single window takes more."""

Figure = Annotated[
    float,
    BeforeValidator(lambda value: math.inf if value is None else value),
    PlainSerializer(lambda value: value if math.isfinite(value) else None),
]
"""Infinite, where logits overflow. JSON has no infinity: pydantic's models write null, and read it back."""


@dataclass(frozen=True)
class SourceQuality:
    """Figures of one source. They are infinite, never NaN, for a child whose logits overflow."""

    nats_per_token: Figure
    nats_per_byte: Figure
    ppl: Figure
    tokens: int
    """Scored tokens: all but the first of each window."""


@dataclass(frozen=True)
class Quality:
    """Figures of a split, with what they must not be quoted without."""

    nats_per_token: float
    """Weighted mean of the sources' nats a token; `nats_per_byte` likewise."""
    nats_per_byte: float
    ppl: float
    """exp(nats_per_token): the geometric mixture of the sources' perplexities."""
    per_source: Mapping[str, SourceQuality]
    dataset: str
    split: str
    seq_len: int
    """Tokens of a window; windows do not overlap, so this is the stride too."""
    tokens: int
    bos: bool
    agreement: Agreement | None = None
    """Of text that the parent wrote."""

    def to_json(self) -> dict[str, Any]:
        """JSON has no infinity: an infinite figure becomes null."""
        data = asdict(self)
        if self.agreement is None:
            del data["agreement"]
        else:
            data["agreement"] = self.agreement.to_json()
        data["per_source"] = {name: _finite_or_null(figures) for name, figures in data["per_source"].items()}
        return _finite_or_null(data)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Quality:
        """Inverse of `to_json`."""
        sources = {name: SourceQuality(**_null_as_infinite(figures)) for name, figures in data["per_source"].items()}
        found = {"agreement": Agreement.from_json(data["agreement"])} if "agreement" in data else {}
        return cls(**{**_null_as_infinite(data), "per_source": sources, **found})


def score(model: PreTrainedModel, split: Split, progress: Callable[[int, int], None] | None = None) -> Quality:
    """Score a model on every window of a split. Raises ModelError as `window_nats` does."""
    return quality_from_windows(split, score_windows(model, split, progress))


def score_windows(
    model: PreTrainedModel, split: Split, progress: Callable[[int, int], None] | None = None
) -> dict[str, torch.Tensor]:
    """Each source's (N,) float64 nats a window, so that two models can be compared window by window.

    `progress(done, total)` counts windows. Raises ModelError as `window_nats` does.
    """
    total = sum(len(source.windows) for source in split.sources.values())
    nats: dict[str, torch.Tensor] = {}
    finished = 0
    for name, source in split.sources.items():
        nats[name] = window_nats(model, source.windows, progress=_shifted(progress, finished, total))
        finished += len(source.windows)
    return nats


def quality_from_windows(
    split: Split, nats: Mapping[str, torch.Tensor], hits: Mapping[str, torch.Tensor] | None = None
) -> Quality:
    """The figures that each source's (N,) nats a window, and (N, T - 1) hits on text that the parent wrote, amount
    to."""
    assert nats.keys() == split.sources.keys(), f"nats of {list(nats)} for a split of {list(split.sources)}"
    per_source: dict[str, SourceQuality] = {}
    for name, source in split.sources.items():
        assert len(nats[name]) == len(source.windows), f"{len(nats[name])} of {len(source.windows)} windows of {name}"
        tokens = len(source.windows) * (split.seq_len - 1)
        total = float(nats[name].sum())
        per_token = total / tokens
        per_source[name] = SourceQuality(per_token, total / int(source.bytes.sum()), _exp(per_token), tokens)
    per_token = sum(split.weights[name] * figures.nats_per_token for name, figures in per_source.items())
    return Quality(
        nats_per_token=per_token,
        nats_per_byte=sum(split.weights[name] * figures.nats_per_byte for name, figures in per_source.items()),
        ppl=_exp(per_token),
        per_source=per_source,
        dataset=split.dataset,
        split=split.name,
        seq_len=split.seq_len,
        tokens=sum(figures.tokens for figures in per_source.values()),
        bos=split.bos,
        agreement=None if hits is None else agreement_of(split, hits),
    )


@torch.inference_mode()
def window_nats(
    model: PreTrainedModel,
    windows: torch.Tensor,
    *,
    batch_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """Nats (negative log-likelihood) of the last T - 1 tokens of each window, summed: (N, T) int64 to (N,) float64.

    The logits are the causal LM's own, so soft-capping and scaling of its family are in them; the log-softmax is in
    float32 whatever the model's dtype. A forward pass takes `batch_tokens` tokens, or one window if that is more; by
    default, as many as LOGITS_BYTES allow. A window whose logits overflow has infinitely many nats.
    Raises ModelError if a logit is NaN.
    """
    count, window_tokens = windows.shape
    assert window_tokens >= 2, "a window has a token to predict, and one to predict it from"
    assert not model.training, "dropout would be scored: call model.eval() first"
    nats: list[torch.Tensor] = []
    for batch_BT in torch.split(windows, batch_windows(model, window_tokens, batch_tokens)):
        batch_BT = batch_BT.to(model.device)
        logits_BTV = model(input_ids=batch_BT, use_cache=False).logits
        # One window at a time: float32 copies of a whole batch would double the peak.
        for tokens_T, logits_TV in zip(batch_BT, logits_BTV, strict=True):
            nats.append(nats_of_logits(model, tokens_T, logits_TV, window=len(nats)))
        if progress is not None:
            progress(len(nats), count)
    return torch.stack(nats).cpu() if nats else torch.zeros(0, dtype=torch.float64)


def batch_windows(model: PreTrainedModel, window_tokens: int, batch_tokens: int | None = None) -> int:
    """How many windows go through a forward pass together; see `window_nats`."""
    if batch_tokens is None:
        batch_tokens = LOGITS_BYTES // (4 * model.config.get_text_config().vocab_size)
    return max(1, batch_tokens // window_tokens)


def nats_of_logits(
    model: PreTrainedModel, tokens_T: torch.Tensor, logits_TV: torch.Tensor, window: int
) -> torch.Tensor:
    """Nats of one window from the logits that `model` gave for it: a float64 scalar, infinite if they overflow.

    Raises ModelError, naming the model and the number of the window, if a logit is NaN.
    """
    scored_TV = logits_TV[:-1].float()
    total = functional.cross_entropy(scored_TV, tokens_T[1:].to(scored_TV.device), reduction="none").double().sum()
    if torch.isfinite(total):
        return total
    if scored_TV.isnan().any():
        raise ModelError(
            f"logits must be numbers; {type(model).__name__} gives NaN in window {window}, in {model.dtype}: use "
            "bfloat16 or float32 if that is float16, else check the model's weights"
        )
    return torch.full_like(total, math.inf)


def _shifted(
    progress: Callable[[int, int], None] | None, finished: int, total: int
) -> Callable[[int, int], None] | None:
    """`progress` as seen by one loop of several, `finished` windows having gone before it."""
    return None if progress is None else lambda done, _: progress(finished + done, total)


def _exp(nats_per_token: float) -> float:
    try:
        return math.exp(nats_per_token)
    except OverflowError:
        return math.inf


_FIGURES = ("nats_per_token", "nats_per_byte", "ppl")


def _finite_or_null(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: None if key in _FIGURES and math.isinf(value) else value for key, value in data.items()}


def _null_as_infinite(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: math.inf if key in _FIGURES and value is None else value for key, value in data.items()}
