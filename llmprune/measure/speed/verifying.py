"""What a parent's pass over a few tokens costs, beside its decode step of one: the price of verifying a draft.

At a small batch a decode step waits for the weights, and a pass over some tokens more reads them no more often. How
far that carries depends on machine, engine and kernels, and is rarely nothing: a CPU is soon bound by arithmetic, and
libraries take other kernels for one row than for several. So it is measured, as speed-ups are: in turns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from llmprune.measure.speed.sessions import Timed
from llmprune.measure.speed.throughput import (
    Spread,
    Workload,
    check_model,
    compiled_passes,
    in_turns,
    running,
    steady_process,
    token_ids,
)

PAIRS = 4
"""Turns of one token against n in one repeat, for each n that is timed."""
TIMED = (2, 3, 4, 5, 7, 9, 13, 17, 25, 33)
"""Lengths of passes that are timed; what lies between two is drawn on a line between them."""


@dataclass(frozen=True)
class VerifyCosts:
    """Seconds of a pass over n = 1..K+1 tokens with logits behind each, by those of one over one token, behind the
    workload's prompt: what a round takes that drafts up to K tokens, but for the drafting."""

    ratios: tuple[Spread, ...]
    """Of n = 1..K+1; the first is 1, and those that were not timed lie between their neighbours."""

    @property
    def most(self) -> int:
        """The longest draft, K."""
        return len(self.ratios) - 1

    @property
    def medians(self) -> tuple[float, ...]:
        """As `draft_speedup` takes them."""
        return tuple(ratio.median for ratio in self.ratios)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> VerifyCosts:
        """Inverse of `to_json`."""
        return cls(tuple(Spread(**ratio) for ratio in data["ratios"]))


@torch.inference_mode()
def verify_costs(parent: PreTrainedModel, workload: Workload, most: int, repeats: int) -> VerifyCosts:
    """Time the parent's passes over up to `most` + 1 tokens (of each row of the batch) against its decode step, at the
    lengths that are TIMED.

    A repeat reads the prompt and then takes PAIRS turns for each n. What a pass reads is taken back, so every one
    stands behind the prompt alone. The model must have the workload's dtype and device.
    """
    assert most >= 1 and repeats >= 1, "there is something to time"
    check_model(parent, workload)
    room = replace(workload, generated_tokens=max(workload.generated_tokens, most + 1))
    timed = sorted({*(tokens for tokens in TIMED if tokens <= most), most + 1})
    ratios: dict[int, list[float]] = {tokens: [] for tokens in timed}
    with (
        running([parent], token_ids(parent, room), room, takes_back=True) as (run,),
        steady_process(workload.threads),
        compiled_passes(workload, 2 + len(timed)),
    ):
        run.prefill()
        for tokens in (1, *ratios):
            _read_and_take_back(run, tokens)
        for _ in range(repeats):
            run.prefill()
            for tokens, found in ratios.items():
                passes = (partial(_read_and_take_back, run, count) for count in (1, tokens))
                found += [seconds / decode_s for decode_s, seconds in in_turns(*passes, pairs=PAIRS)]
    known = {1: Spread(1.0, 1.0, 1.0)} | {tokens: Spread.of(found) for tokens, found in ratios.items()}
    return VerifyCosts(tuple(_between(known, tokens) for tokens in range(1, most + 2)))


def _between(known: Mapping[int, Spread], tokens: int) -> Spread:
    lengths = list(known)
    figures = ([getattr(spread, name) for spread in known.values()] for name in ("median", "low", "high"))
    return Spread(*(float(np.interp(tokens, lengths, of_figure)) for of_figure in figures))


def _read_and_take_back(run: Timed, tokens: int) -> float:
    seconds = run.read(tokens)
    run.take_back(tokens)
    return seconds
