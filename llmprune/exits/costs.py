"""What decoding with exits takes, part by part, as shares of the trunk's own step, beside which each was timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from llmprune.measure.speed.throughput import Workload, steady_process, token_ids
from llmprune.models.exits import with_exits
from llmprune.models.modeling_pruned import ExitRules, ExitsCache, confidence_of, head_logits

Counts = int | NDArray[Any]

COUNTS = (1, 2, 4, 8, 16, 32)
"""Tokens that go through later layers together, as they are timed; between them costs are interpolated."""
NEVER = 2.0
"""A threshold that no confidence reaches."""


@dataclass(frozen=True)
class ExitCosts:
    """Shares of the trunk's step. A part of the model is timed from one candidate exit to the next; its own call costs
    `call` whatever runs in it."""

    layers: tuple[int, ...]
    """The candidate exits; the end is one more."""
    call: float
    run: Mapping[int, tuple[float, ...]]
    """By the number of tokens in the batch, what all layers take as far as each exit, and the end."""
    store: Mapping[int, tuple[float, ...]]
    """The same of keys and values alone."""
    head: Mapping[int, float]
    """Of an adapter and the head, by the number of positions."""
    figures: float
    """Of a confidence from logits."""
    gate: float

    def layers_between(self, first: int | None, last: int | None, tokens: Counts = 1) -> Any:
        """Of running tokens from behind one layer (None: the embedding) to behind another (None: the last)."""
        return self.call + self._between(self.run, first, last, tokens)

    def keys_between(self, first: int, last: int | None, tokens: Counts) -> Any:
        """Of keys and values alone; nothing for no tokens."""
        found = self.call + self._between(self.store, first, last, tokens)
        return found * (np.asarray(tokens) > 0)

    def heads(self, positions: Counts) -> Any:
        return _interpolated(positions, list(self.head), list(self.head.values()))

    def _between(
        self, table: Mapping[int, tuple[float, ...]], first: int | None, last: int | None, tokens: Counts
    ) -> Any:
        ends = (*self.layers, None)
        start = [0.0] * len(table) if first is None else [row[ends.index(first)] for row in table.values()]
        stop = [row[ends.index(last)] for row in table.values()]
        return _interpolated(tokens, list(table), [b - a for a, b in zip(start, stop, strict=True)])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ExitCosts:
        """Inverse of `to_json`."""
        tables = {name: {int(n): tuple(row) for n, row in data[name].items()} for name in ("run", "store")}
        head = {int(n): value for n, value in data["head"].items()}
        return cls(**{**data, **tables, "layers": tuple(data["layers"]), "head": head})


def _interpolated(tokens: Counts, counts: Sequence[int], values: Sequence[float]) -> Any:
    """Between measured counts, and beyond the last by the slope before it."""
    asked = np.asarray(tokens, dtype=float)
    slope = (values[-1] - values[-2]) / (counts[-1] - counts[-2])
    return np.interp(asked, counts, values) + slope * np.maximum(0, asked - counts[-1])


def measure_costs(
    trunk: PreTrainedModel, tensors: Mapping[str, Tensor], layers: Sequence[int], workload: Workload, repeats: int
) -> ExitCosts:
    """Time every part behind the workload's prompt, each beside a step of the trunk; medians over repeats."""
    model = with_exits(trunk, ExitRules(tuple(layers), "gate", (NEVER,) * len(layers)), tensors)
    ids_BT = token_ids(trunk, workload)[:1]
    prompt, one = ids_BT[:, : workload.prompt_tokens], ids_BT[:, -1:]
    own, cache = DynamicCache(config=trunk.config), ExitsCache(model)
    ends = (0, *layers, len(cache.layers))
    with torch.inference_mode(), steady_process(workload.threads):
        trunk(prompt, past_key_values=own, use_cache=True, logits_to_keep=1)
        model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        for one_cache in (own, cache):
            one_cache.activate_past_recording()  # type: ignore[no-untyped-call]
        states = cache.enter(one)
        _crop(cache, 0, layers[0], 1)
        logits, exit_ = cache.logits(0, states), cache.exits[0]
        batches = {n: states.expand(1, n, -1).contiguous() for n in COUNTS}

        def trunk_step() -> None:
            trunk(one, past_key_values=own, use_cache=True, logits_to_keep=1)
            own.crop(-1)

        def part(index: int, n: int, keys_only: bool) -> Callable[[], None]:
            def call() -> None:
                if keys_only:
                    cache.parts[index].store(batches[n])
                elif index == 0:
                    cache.enter(one.expand(1, n))
                else:
                    cache.parts[index].run(states=batches[n])
                _crop(cache, ends[index], ends[index + 1], n)

            return call

        def head(n: int) -> None:
            head_logits(model, exit_(batches[n]))

        parts = range(len(cache.parts))
        timed: dict[tuple[Any, ...], Callable[[], object]] = {
            **{("run", n, i): part(i, n, keys_only=False) for n in COUNTS for i in parts},
            **{("store", n, i): part(i, n, keys_only=True) for n in COUNTS for i in parts[1:]},
            **{("head", n): partial(head, n) for n in COUNTS},
            ("figures",): lambda: float(confidence_of("top1", logits, None)),
            ("gate",): lambda: float(exit_.promise(states)),
        }
        shares = _shares(trunk_step, timed, repeats)
    call = max(0.0, (sum(shares["run", 1, i] for i in parts) + shares["head", 1] - 1) / (len(parts) - 1))

    def table(kind: str, n: int) -> tuple[float, ...]:
        found = [max(0.0, shares[kind, n, i] - call) if (kind, n, i) in shares else 0.0 for i in parts]
        return tuple(float(value) for value in np.cumsum(found))

    run, store = ({n: table(kind, n) for n in COUNTS} for kind in ("run", "store"))
    heads = {n: shares["head", n] for n in COUNTS}
    return ExitCosts(tuple(layers), call, run, store, heads, shares["figures",], shares["gate",])


def _crop(cache: DynamicCache, first: int, stop: int, tokens: int) -> None:
    for layer in cache.layers[first:stop]:
        layer.crop(-tokens)  # type: ignore[union-attr]


def _shares(
    step: Callable[[], object], timed: Mapping[tuple[Any, ...], Callable[[], object]], repeats: int
) -> dict[tuple[Any, ...], float]:
    """Each as a share of a step that was taken just before it, so that both meet the same load."""
    for call in (step, *timed.values()):
        call()
    found: dict[tuple[Any, ...], list[float]] = {name: [] for name in timed}
    for _ in range(repeats):
        for name, call in timed.items():
            began = time.perf_counter()
            step()
            between = time.perf_counter()
            call()
            found[name].append((time.perf_counter() - between) / (between - began))
    return {name: statistics.median(values) for name, values in found.items()}
