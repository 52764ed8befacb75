"""What a method's scoring came to: each architecture scored once, with what it cost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from llmprune.choices.architecture import Architecture
from llmprune.core.errors import ModelError
from llmprune.core.progress import Advance
from llmprune.data.tokens import Split
from llmprune.measure.quality.perplexity import quality_from_windows

Score = Callable[[Architecture], Mapping[str, torch.Tensor]]
"""Each source's (N,) nats a window, of one architecture on the split that methods choose by."""

Memo = dict[str, tuple[float, float]]
"""By an architecture's hash: nats a token, and the seconds that scoring took."""


@dataclass
class Ledger:
    """Scores children for one method, and counts.

    What an earlier process has scored is in `memo`: it is not scored again, but counts as it did then, in evaluations
    and in seconds.
    """

    score: Score
    split: Split
    memo: Memo = field(default_factory=dict)
    save: Callable[[], None] = lambda: None
    """Called after each new score; it may write the memo, or not yet."""
    advance: Advance = lambda done, total: None
    _used: set[str] = field(default_factory=set)
    _seconds: float = 0.0

    def nats(self, architectures: Sequence[Architecture]) -> list[float]:
        """Nats a token of each; infinite for a child whose logits are not numbers."""
        nats = []
        for done, architecture in enumerate(architectures):
            self.advance(done, len(architectures))
            nats.append(self._nats(architecture))
        return nats

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count the seconds of the body as the method's."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._seconds += time.monotonic() - started

    def effort(self, preparation_tokens: int) -> dict[str, Any]:
        """What choosing has cost so far."""
        return effort_of(len(self._used), self.split.tokens, preparation_tokens, self._seconds)

    def _nats(self, architecture: Architecture) -> float:
        key = architecture.hash
        if key not in self.memo:
            started = time.monotonic()
            try:
                nats = quality_from_windows(self.split, self.score(architecture)).nats_per_token
            except ModelError:
                nats = math.inf
            self.memo[key] = (nats, time.monotonic() - started)
            self._used.add(key)
            self.save()
        elif key not in self._used:
            self._used.add(key)
            self._seconds += self.memo[key][1]
        return self.memo[key][0]


def effort_of(evaluations: int, tokens: int, preparation_tokens: int, seconds: float) -> dict[str, Any]:
    """Evaluations of `tokens` each, what they read, what was read to prepare (statistics, tables), and minutes of
    choosing; `forward_equivalents` is all that was read, in evaluations."""
    return {
        "evaluations": evaluations,
        "evaluation_tokens": evaluations * tokens,
        "preparation_tokens": preparation_tokens,
        "forward_equivalents": evaluations + preparation_tokens / tokens,
        "minutes": seconds / 60,
    }
