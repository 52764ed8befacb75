"""What a scorer says of an architecture: figures of single windows, so that candidates can be compared in pairs.

A scorer may be asked for some windows now and for more of the same later; windows are counted source by source, from
the first on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from llmprune.choices.architecture import Architecture

Counts = Mapping[str, int]
"""Windows of each source, from its first on."""


@dataclass(frozen=True, eq=False)
class WindowScores:
    """Figures of some windows of a split; for each source (n,) float64 on the CPU, but for hits, in the order of its
    windows."""

    nats: Mapping[str, torch.Tensor]
    """Nats a window, as `quality.score_windows` gives them."""
    kl: Mapping[str, torch.Tensor] | None = None
    """KL(parent || child) a window in nats, over the parent's top K tokens; None if it was not asked for."""
    hits: Mapping[str, torch.Tensor] | None = None
    """(n, T - 1) bool: before which tokens, but a window's first, that token is the likeliest; of text that the parent
    wrote alone."""

    @property
    def counts(self) -> dict[str, int]:
        return {name: len(values) for name, values in self.nats.items()}

    def between(self, start: Counts, stop: Counts) -> WindowScores:
        """The windows from `start[name]` up to `stop[name]` of each source."""

        def cut(figures: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name: values[start[name] : stop[name]] for name, values in figures.items()}

        return WindowScores(
            cut(self.nats), None if self.kl is None else cut(self.kl), None if self.hits is None else cut(self.hits)
        )

    def head(self, counts: Counts) -> WindowScores:
        """The first `counts[name]` windows of each source."""
        return self.between(dict.fromkeys(counts, 0), counts)

    def joined(self, later: WindowScores) -> WindowScores:
        """These windows, followed in each source by those of `later`, which must hold the same figures."""
        for figure in ("kl", "hits"):
            assert (getattr(self, figure) is None) == (getattr(later, figure) is None), f"one part alone has {figure}"

        def join(first: Mapping[str, torch.Tensor], rest: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            assert first.keys() == rest.keys(), f"sources {list(first)} and {list(rest)}"
            return {name: torch.cat([values, rest[name]]) for name, values in first.items()}

        kl = None if self.kl is None or later.kl is None else join(self.kl, later.kl)
        hits = None if self.hits is None or later.hits is None else join(self.hits, later.hits)
        return WindowScores(join(self.nats, later.nats), kl, hits)


class SplitScorer(Protocol):
    """Scores a whole split."""

    def score(self, architecture: Architecture) -> WindowScores: ...


class WindowScorer(Protocol):
    """Scores architectures on the windows of one split, some of them now and others later."""

    @property
    def batch_windows(self) -> int:
        """Windows of one forward pass: ranges that end on a multiple of it cost nothing extra."""
        ...

    def hold(self, architecture: Architecture) -> None:
        """It will be asked for again: what was made to score it may be kept, until `let_go`."""
        ...

    def let_go(self, architecture: Architecture) -> None: ...

    def score_range(self, architecture: Architecture, start: Counts, stop: Counts) -> WindowScores:
        """The windows from `start[name]` up to `stop[name]` of each source. Raises ModelError if a logit is NaN."""
        ...
