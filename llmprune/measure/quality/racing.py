"""Race candidates on growing slices of the same windows, and stop scoring those that have clearly lost.

Windows are paired samples: some are hard for every model, so two candidates are compared window by window, by the
one-sided Wilcoxon signed-rank test. A sample is a window's share of the mixture's figure, so that samples of one
candidate sum to what candidates are ranked by; a difference keeps its sign and, without a true difference, its
symmetry, so the test stays valid.

    raced = race(scorer, split, candidates, incumbent=scorer.score(best))
    finalists = [candidate for candidate in raced if candidate.kept]      # scored on every window

Shapes: C candidates, N windows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.stats import wilcoxon

from llmprune.choices.architecture import Architecture
from llmprune.core.errors import ModelError
from llmprune.data.tokens import Split
from llmprune.measure.quality.scores import Counts, WindowScorer, WindowScores

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

SHARES = (1 / 8, 1 / 4, 1 / 2, 1.0)
"""Share of the split's windows that a candidate has been scored on after each stage."""

ALPHA = 0.1
"""Level of each single comparison: how often one that is no worse than the best is dropped by chance. It is not
corrected for the number of candidates and stages, so in long races of near equals lower it, or keep more survivors."""

_NOISE = 1e-6
"""Relative difference of two figures that float32 arithmetic alone can make."""


_EXACT_WINDOWS = 50
"""Up to here the signed ranks' exact distribution is taken, above it the normal one: scipy's own bound."""


@dataclass(frozen=True, eq=False)
class Raced:
    """What became of one candidate."""

    architecture: Architecture
    scores: WindowScores | None
    """Of the windows that it was scored on; None for one whose first logits were no numbers."""
    kept: bool
    """Whether no stage has rejected it."""
    stage: int
    """The last stage that it was scored in, from 0: the one that rejected it, if any did."""

    @property
    def windows(self) -> int:
        """How many windows it was scored on."""
        return 0 if self.scores is None else sum(self.scores.counts.values())


def mixture_samples(figures: Mapping[str, FloatArray], weights: Mapping[str, float]) -> FloatArray:
    """Each window's share of the mean over sources by weight: (N,), in the order of `figures`. They sum to it."""
    return np.concatenate([values * weights[name] / max(1, len(values)) for name, values in figures.items()])


def smallest_p_value(windows: int) -> float:
    """The least that `p_value_of_worse` can give for so many windows, 2^-N: four are needed to reject at 0.1."""
    return float(2.0**-windows)


def p_value_of_worse(candidate_N: FloatArray, reference_N: FloatArray) -> float:
    """How likely so high a figure is for a candidate that is no worse than the reference, by their signed ranks.

    Both are finite. Windows without a difference (nor one that rounding explains) say nothing and are left out.
    """
    differences = candidate_N - reference_N
    differences = differences[np.abs(differences) > _NOISE * np.abs(reference_N)]
    if not len(differences):
        return 1.0
    # Ties make "exact" conservative by a rank or so; "auto" would resample for them, thousands of times slower.
    method = "exact" if len(differences) <= _EXACT_WINDOWS else "auto"
    return float(wilcoxon(differences, alternative="greater", method=method).pvalue)


def still_racing(
    samples_CN: FloatArray, reference_N: FloatArray | None = None, *, alpha: float = ALPHA, survivors: int = 1
) -> BoolArray:
    """Which candidates stay in the race: (C,).

    A candidate leaves if it is worse than the best - the least sum, the reference's counted in - at level `alpha`; but
    at least the `survivors` best stay. One with a figure that is not finite is broken and leaves in any case.
    """
    finite_C: BoolArray = np.logical_and.reduce(np.isfinite(samples_CN), axis=1)
    contenders = samples_CN[finite_C]
    if reference_N is not None and np.isfinite(reference_N).all():
        contenders = np.vstack([contenders, reference_N])
    if not len(contenders):
        return finite_C
    best_N = contenders[contenders.sum(axis=1).argmin()]
    kept_C = finite_C.copy()
    kept_C[finite_C] = [p_value_of_worse(sample_N, best_N) > alpha for sample_N in samples_CN[finite_C]]
    by_figure = np.argsort(np.where(finite_C, np.where(finite_C[:, None], samples_CN, 0).sum(axis=1), np.inf))
    kept_C[by_figure[:survivors]] = True
    return kept_C & finite_C


def stages_of(split: Split, shares: Sequence[float] = SHARES, multiple: int = 1) -> list[dict[str, int]]:
    """Windows of each source that candidates have been scored on after each stage, in multiples of a batch.

    Stages that would add no window are left out, so small splits have fewer stages than shares.
    """
    assert shares and all(one < other for one, other in pairwise(shares)), f"shares grow from stage to stage: {shares}"
    stages: list[dict[str, int]] = []
    for share in shares:
        counts = split.first_windows(share, multiple)
        if not stages or counts != stages[-1]:
            stages.append(counts)
    return stages


def race_batch(split: Split) -> int:
    """Windows of a forward pass small enough for a race, which stops between passes, to stop after a quarter."""
    return max(1, min(len(source.windows) for source in split.sources.values()) // 4)


def race(
    scorer: WindowScorer,
    split: Split,
    candidates: Sequence[Architecture],
    *,
    incumbent: WindowScores | None = None,
    figure: Literal["nats", "kl"] = "nats",
    shares: Sequence[float] = SHARES,
    alpha: float = ALPHA,
    survivors: int = 1,
    progress: Callable[[int, int, int], None] | None = None,
) -> list[Raced]:
    """Score candidates in stages; after each, those leave that `still_racing` drops. In the order of `candidates`.

    No window is scored twice for a candidate, and the scorer holds it until it leaves, so that it is cut once.
    `incumbent` holds the scores, on all windows of `shares`, of an architecture to beat: it is never scored here, nor
    dropped. `figure` is what decides. A candidate whose logits are no numbers loses at once.
    `progress(stage, done, racing)` counts candidates within a stage.
    """
    lanes = [_Lane(architecture) for architecture in candidates]
    before, stages = dict.fromkeys(split.sources, 0), stages_of(split, shares, scorer.batch_windows)
    try:
        for stage, counts in enumerate(stages):
            is_last = stage + 1 == len(stages)
            racing = [lane for lane in lanes if lane.kept]
            for done, lane in enumerate(racing, 1):
                if not is_last:
                    scorer.hold(lane.architecture)
                lane.run(scorer, before, counts, stage)
                if is_last or not lane.kept:
                    scorer.let_go(lane.architecture)
                if progress is not None:
                    progress(stage, done, len(racing))
            racing = [lane for lane in racing if lane.kept]
            if racing:
                samples_CN = np.stack([_samples(lane.scores, figure, split) for lane in racing])
                reference_N = None if incumbent is None else _samples(incumbent.head(counts), figure, split)
                decided_C = still_racing(samples_CN, reference_N, alpha=alpha, survivors=survivors)
                for lane, kept in zip(racing, decided_C, strict=True):
                    lane.kept = bool(kept)
                    if not kept:
                        scorer.let_go(lane.architecture)
            before = counts
    finally:
        for lane in lanes:
            scorer.let_go(lane.architecture)
    return [Raced(lane.architecture, lane.scores, lane.kept, lane.stage) for lane in lanes]


@dataclass
class _Lane:
    """One candidate on its way."""

    architecture: Architecture
    scores: WindowScores | None = None
    kept: bool = True
    stage: int = field(default=0)

    def run(self, scorer: WindowScorer, start: Counts, stop: Counts, stage: int) -> None:
        self.stage = stage
        try:
            new = scorer.score_range(self.architecture, start, stop)
        except ModelError:
            # Its logits are NaN. That is an error where one model is scored; among candidates it is the last place.
            self.kept = False
            return
        self.scores = new if self.scores is None else self.scores.joined(new)


def _samples(scores: WindowScores | None, figure: Literal["nats", "kl"], split: Split) -> FloatArray:
    assert scores is not None, "a candidate in the race has been scored"
    figures: Any = scores.nats if figure == "nats" else scores.kl
    assert figures is not None, "a race by KL needs a scorer that computes it"
    return mixture_samples({name: figures[name].numpy() for name in split.sources}, split.weights)
