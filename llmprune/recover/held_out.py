"""Which windows of the recovery text are learnt from, and which are held out to judge by."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llmprune.data.tokens import Split

HELD_OUT = 8
"""One window of so many of a source is held out."""


def held_out(split: Split) -> Split:
    """The windows of a split that a refit is judged by, and not fitted on."""
    sources = {}
    for name, source in split.sources.items():
        if (rows := ~_fitted(len(source.windows))).any():
            sources[name] = source.of(rows)
    total = sum(split.weights[name] for name in sources)
    return replace(split, sources=sources, weights={name: split.weights[name] / total for name in sources})


def windows_to_learn_from(split: Split, of_refit: Split) -> Tensor:
    """The windows of a split, (W, T), but for those that its part for refits holds out."""
    found = []
    for name, source in split.sources.items():
        own = _fitted(len(of_refit.sources[name].windows))
        rest = torch.ones(len(source.windows) - len(own), dtype=torch.bool)
        found.append(source.windows[torch.cat([own, rest])])
    return torch.cat(found)


def _fitted(count: int) -> Tensor:
    """Which of so many windows of a source are fitted on: (count,). A single one always is."""
    place = torch.arange(count)
    return place % HELD_OUT != HELD_OUT - 1 if count >= HELD_OUT else (place < count - 1) | (place == 0)


def windows_of(split: Split) -> tuple[Tensor, Tensor, Tensor]:
    """All windows (W, T), the share of a token of each (W,), and which of them are fitted on (W,)."""
    windows, shares, fit = [], [], []
    for name, source in split.sources.items():
        windows.append(source.windows)
        shares.append(torch.full((len(source.windows),), split.weights[name] / source.windows.numel()))
        fit.append(_fitted(len(source.windows)))
    return torch.cat(windows), torch.cat(shares), torch.cat(fit)
