"""Whether a model of the zoo is good enough to try a search on: it knows more than bytes, and its blocks matter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from llmprune.choices.architecture import DROPPED
from llmprune.choices.choice import Choice, Kept
from llmprune.core.progress import Advance
from llmprune.data.tokens import Split
from llmprune.measure.quality.perplexity import quality_from_windows
from llmprune.measure.quality.prefix import PrefixScorer
from llmprune.models.parent import Parent

LEAST_NATS_BELOW_BIGRAM = 0.3
LEAST_STANDARD_ERRORS = 10.0
BATCH_TOKENS = 2048
"""What goes through so small a model together: more would leave the processor's caches, and take far longer."""
SMOOTHING = 0.1
"""Count that every pair of bytes is given beforehand."""


class NoLibrary:
    """What surgery asks of a block library where blocks only stay or go: nothing."""

    def kept(self, layer: int, choice: Choice) -> Kept:
        raise AssertionError(f"{choice} in layer {layer} is neither whole nor gone")

    def norm_squares(self, layer: int, name: str) -> None:
        return None

    def output(self, layer: int, choice: Choice, weight_DI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        raise AssertionError(f"{choice} in layer {layer} is neither whole nor gone")


def bigram_windows(train_T: torch.Tensor, split: Split, vocabulary: int) -> dict[str, torch.Tensor]:
    """Nats a window, source by source, of the model that knows pairs of tokens alone, counted in the training text."""
    counts_VV = torch.zeros(vocabulary, vocabulary, dtype=torch.float64)
    counts_VV.index_put_((train_T[:-1], train_T[1:]), torch.ones(len(train_T) - 1).double(), accumulate=True)
    smoothed_VV = counts_VV + SMOOTHING
    nats_VV = -(smoothed_VV / smoothed_VV.sum(1, keepdim=True)).log()
    return {name: nats_VV[s.windows[:, :-1], s.windows[:, 1:]].sum(1) for name, s in split.sources.items()}


def paired(split: Split, changed: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor]) -> tuple[float, float]:
    """Nats a token by which `changed` is worse than `base` (nats a window), and the standard error of that: windows are
    the independent pieces, sources are mixed by weight."""
    mean, variance = 0.0, 0.0
    for name, weight in split.weights.items():
        differences_N = (changed[name] - base[name]).numpy() / (split.seq_len - 1)
        mean += weight * float(differences_N.mean())
        variance += weight**2 * float(differences_N.var(ddof=1)) / len(differences_N)
    return mean, math.sqrt(variance)


def drops(parent: Parent, scorer: PrefixScorer, advance: Advance) -> list[dict[str, Any]]:
    """For every block, what leaving it out costs in nats a token, with the standard error of that difference."""
    split, whole = scorer.split, parent.shape.architecture
    base = scorer.score(whole).nats
    blocks = [(layer, choice) for layer in range(parent.shape.layers) for choice in DROPPED.values()]
    found: list[dict[str, Any]] = []
    for layer, choice in blocks:
        advance(len(found), len(blocks))
        mean, error = paired(split, scorer.score(whole.with_choice(layer, choice)).nats, base)
        found.append({"layer": layer, "kind": choice.kind, "delta_nats": mean, "standard_error": error})
    return found


def report(parent: Parent, train_T: torch.Tensor, split: Split, advance: Advance) -> dict[str, Any]:
    """The model's figures on held-out text beside the bigram's, and the cost of each drop."""
    scorer = PrefixScorer(parent, NoLibrary(), split, batch_tokens=BATCH_TOKENS)
    own = quality_from_windows(split, scorer.score(parent.shape.architecture).nats)
    bigram = quality_from_windows(split, bigram_windows(train_T, split, parent.model.config.vocab_size))
    dropped = drops(parent, scorer, advance)
    ratios = [row["delta_nats"] / row["standard_error"] for row in dropped]
    below, median = bigram.nats_per_byte - own.nats_per_byte, float(np.median(ratios))
    return {
        "params": sum(p.numel() for p in parent.model.parameters()),
        "nats_per_byte": own.nats_per_byte,
        "bigram_nats_per_byte": bigram.nats_per_byte,
        "nats_below_bigram": below,
        "median_drop_standard_errors": median,
        "median_drop_nats": float(np.median([row["delta_nats"] for row in dropped])),
        "tokens": own.tokens,
        "windows": sum(len(source.windows) for source in split.sources.values()),
        "drops": dropped,
        "good": below >= LEAST_NATS_BELOW_BIGRAM and median >= LEAST_STANDARD_ERRORS,
    }
