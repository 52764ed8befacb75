"""Is a child worse than its parent, or was it the luck of the questions? Tests on the same samples, in pairs.

Two models answer the same questions, so what tells them apart are the questions on which they differ; the scatter
among questions, which is most of a plain standard error, cancels. A difference is candidate minus reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest, norm

CONFIDENCE = 0.95
DRAWS = 10_000
SEED = 0

Floats = npt.NDArray[np.float64]

_ENTRIES = 4_000_000
"""Resampled rows held at a time."""


@dataclass(frozen=True)
class Difference:
    """A figure of the candidate less the reference's, an interval for it, and the odds of as much by chance."""

    difference: float
    low: float
    high: float
    test: Literal["mcnemar", "bootstrap"]
    p: float
    """Two-sided."""
    samples: int
    flips: int | None = None
    """Answers that went from right to wrong or back: there may be many where accuracy is the same."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def mcnemar(reference: Sequence[float], candidate: Sequence[float]) -> Difference:
    """McNemar's exact test of two models' right (1) and wrong (0) answers to the same questions.

    Where both are right or both wrong nothing is learnt; of the questions that one alone answers, each should get half.
    The interval is Bonett and Price's adjusted Wald interval (Journal of Educational and Behavioral Statistics 37,
    2012), which holds its confidence for few questions too. It comes from another formula than p, so at the very edge
    one may call a difference significant and the other not.
    """
    assert len(reference) == len(candidate) > 0, f"{len(reference)} and {len(candidate)} answers are no pairs"
    assert {*reference, *candidate} <= {0, 1}, "answers are right or wrong"
    n = len(reference)
    gained = sum(after > before for before, after in zip(reference, candidate, strict=True))
    lost = sum(after < before for before, after in zip(reference, candidate, strict=True))
    p = float(binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0
    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    reach = float(norm.ppf((1 + CONFIDENCE) / 2)) * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    low, high = max(up - down - reach, -1.0), min(up - down + reach, 1.0)
    return Difference((gained - lost) / n, low, high, "mcnemar", p, n, gained + lost)


def first_mean(means: Sequence[Floats]) -> Floats:
    """The plain mean of single figures, as a statistic for `paired_bootstrap`."""
    return np.asarray(means[0][..., 0])


def paired_bootstrap(
    reference: Sequence[Floats],
    candidate: Sequence[Floats],
    statistic: Callable[[Sequence[Floats]], Floats] = first_mean,
    *,
    draws: int = DRAWS,
    seed: int = SEED,
) -> Difference:
    """Resample the samples, the same ones for both models, and see how the difference of a statistic scatters.

    A model's figures are one (n, k) array a stratum (a source of text, say): k figures of each of n samples. Samples
    are drawn with replacement within their stratum. The statistic is a function of the strata's means, each (..., k),
    and gives (...). The interval holds the middle `CONFIDENCE` of the draws; p is twice the share of draws on the far
    side of zero, itself and the observed draw counted, so it is never below 2 / (draws + 1).
    """
    shapes = [[figures.shape for figures in model] for model in (reference, candidate)]
    assert shapes[0] == shapes[1] and all(len(s) == 2 and s[0] for s in shapes[0]), f"{shapes} are no pairs"
    generator = np.random.default_rng(seed)
    differences = np.empty(draws)
    chunk = max(1, _ENTRIES // sum(len(figures) for figures in reference))
    for start in range(0, draws, chunk):
        size = min(chunk, draws - start)
        rows = [generator.integers(len(figures), size=(size, len(figures))) for figures in reference]
        drawn = [
            statistic([figures[picked].mean(axis=1) for figures, picked in zip(model, rows, strict=True)])
            for model in (candidate, reference)
        ]
        differences[start : start + size] = drawn[0] - drawn[1]
    observed = [statistic([figures.mean(axis=0) for figures in model]) for model in (candidate, reference)]
    low, high = np.quantile(differences, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    far = 1 + min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    samples = sum(len(figures) for figures in reference)
    p = min(1.0, 2 * far / (draws + 1))
    return Difference(float(observed[0] - observed[1]), float(low), float(high), "bootstrap", p, samples)
