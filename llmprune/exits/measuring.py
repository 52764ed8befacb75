"""What a model with exits really loses and how fast it really is: every figure here is of the model that is exported.

Shapes: W windows, T tokens of a window, N positions of it (all but the last), D hidden size.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel

from llmprune.core.progress import Advance
from llmprune.data.tokens import Split
from llmprune.exits.policy import Mode, Scan, left_at, scan
from llmprune.measure.quality.perplexity import Quality, quality_from_windows
from llmprune.measure.speed.throughput import Spread, Workload, steady_process
from llmprune.models.exits import exits_of, family_of
from llmprune.models.modeling_pruned import Exit, ExitRules, ExitsCache, confidence_of
from llmprune.models.streams import input_device
from llmprune.recover.step_memory import last_states, logits_of
from llmprune.recover.teacher import CHUNK


@dataclass(frozen=True, eq=False)
class ExitQuality:
    """Of text that is read as it would be written: every token leaves where the rules let it."""

    quality: Quality
    depths: tuple[float, ...]
    """Share of tokens that left by each exit, sources mixed by weight; the last by none."""
    scans: Mapping[str, Sequence[Scan]]
    """By source, what each exit did."""


@torch.inference_mode()
def score_exits(
    model: PreTrainedModel, split: Split, advance: Advance = lambda done, total: None, *, prompt_tokens: int = 1
) -> ExitQuality:
    """Score a model with exits on every window of a split: the first `prompt_tokens` are read whole, each later one
    leaves as it would in generation, and later layers read of it what they would there."""
    nats: dict[str, Tensor] = {}
    scans: dict[str, list[Scan]] = {}
    shares = torch.zeros(len(exits_of(model)) + 1, dtype=torch.float64)
    done, total = 0, sum(len(source.windows) for source in split.sources.values())
    for name, source in split.sources.items():
        found = []
        for window_T in source.windows:
            read_ND, of_exits = _read_as_written(model, window_T, prompt_tokens)
            following = window_T[1:].to(read_ND.device)
            found.append(_nats(model, read_ND, following))
            scans.setdefault(name, []).append(of_exits)  # type: ignore[arg-type]
            done += 1
            advance(done, total)
        nats[name] = torch.stack(found)
        scans[name] = _stacked(scans[name])  # type: ignore[arg-type]
        left = left_at(scans[name])
        counts = torch.stack([(left == i).double().mean() for i in range(len(shares))])
        shares += split.weights[name] * counts
    return ExitQuality(quality_from_windows(split, nats), tuple(shares.tolist()), scans)


def _stacked(of_windows: Sequence[Sequence[Scan]]) -> list[Scan]:
    return [
        Scan(torch.cat([one.leaves for one in of_exit]), torch.cat([one.brought for one in of_exit]))
        for of_exit in zip(*of_windows, strict=True)
    ]


def _nats(model: PreTrainedModel, read_ND: Tensor, following_N: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for rows in torch.split(torch.arange(len(read_ND)), CHUNK):
        logits_NV = logits_of(model, read_ND[rows]).float()
        total += functional.cross_entropy(logits_NV, following_N[rows], reduction="none").double().sum().cpu()
    return total


def _read_as_written(model: PreTrainedModel, window_T: Tensor, prompt_tokens: int) -> tuple[Tensor, list[Scan]]:
    """What the head reads at every position, (N, D), and what each exit did there."""
    ids_BT = window_T[None, :-1].to(input_device(model))
    reading = _Reading(model, ids_BT.shape[1], prompt_tokens)
    with reading.hooked():
        last_ND = last_states(model, ids_BT)[0]
    for i, (states_ND, one) in enumerate(zip(reading.states, reading.scans, strict=True)):
        rows = one.leaves[0].to(last_ND.device)
        last_ND = torch.where(rows[:, None], reading.exits[i](states_ND), last_ND)
    return last_ND, reading.scans


class _Reading:
    """One pass over a window in which positions leave: the states of one that has left stay what they are, so that
    later layers make of them the keys and values that `ExitsCache` stores."""

    def __init__(self, model: PreTrainedModel, positions: int, prompt_tokens: int) -> None:
        rules = ExitRules.of(model.config)
        assert rules is not None, "a model with exits"
        self.model, self.rules, self.exits = model, rules, exits_of(model)
        self.scans: list[Scan] = []
        self.states: list[Tensor] = []
        self._may_leave = torch.arange(positions) >= prompt_tokens
        self._arrives = torch.ones(1, positions, dtype=torch.bool)
        self._carried = torch.zeros(1, positions, dtype=torch.int64)
        self._top_before: Tensor | None = None
        self._left_N: Tensor | None = None

    @contextmanager
    def hooked(self) -> Iterator[None]:
        layers = list(self.model.get_submodule(family_of(self.model.config).layers).children())
        handles = [layers[i].register_forward_pre_hook(self._decide, with_kwargs=True) for i in self.rules.layers]
        if self.rules.keys == "propagated":
            late = layers[self.rules.layers[0] :]
            handles += [layer.register_forward_hook(self._hold, with_kwargs=True) for layer in late]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _decide(self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        i = len(self.scans)
        states_ND = (args[0] if args else kwargs["hidden_states"])[0]
        sure_N = self._confidence(self.exits[i], states_ND) >= self.rules.thresholds[i]
        sure_1N = (sure_N & self._may_leave)[None]
        self.scans.append(scan(sure_1N, self._arrives, self._carried, self.rules.waiting))
        self.states.append(states_ND)
        self._arrives, self._carried = self._arrives & ~self.scans[-1].leaves, self.scans[-1].brought
        self._left_N = ~self._arrives[0].to(states_ND.device)

    def _confidence(self, made: Exit, states_ND: Tensor) -> Tensor:
        if self.rules.criterion == "gate":
            return made.promise(states_ND).cpu()
        found, tops = [], []
        for rows in torch.split(torch.arange(len(states_ND)), CHUNK):
            logits_NV = logits_of(self.model, made(states_ND[rows]))
            before = None if self._top_before is None else self._top_before[rows]
            found.append(confidence_of(self.rules.criterion, logits_NV, before).cpu())
            tops.append(logits_NV.argmax(-1))
        self._top_before = torch.cat(tops)
        return torch.cat(found)

    def _hold(self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        entering = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        assert self._left_N is not None, "the first exit comes before"
        held = torch.where(self._left_N[None, :, None], entering, after)
        return (held, *output[1:]) if isinstance(output, tuple) else held


@dataclass(frozen=True)
class ExitSpeed:
    """Measured beside the parent, token by token."""

    decode_tokens_per_s: Spread
    decode_speedup: Spread
    """Seconds of the parent over those of the model for the same number of tokens behind one prompt. The spread is over
    prompts: tokens of different depth take different times, so that no single pair says anything."""
    depths: tuple[float, ...]
    """Share of the timed tokens that left by each exit; the last by none."""


def time_exits(
    parent: PreTrainedModel,
    model: PreTrainedModel,
    windows_WT: Tensor,
    workload: Workload,
    mode: Mode = "early",
    *,
    free: bool = False,
    advance: Advance = lambda done, total: None,
) -> ExitSpeed:
    """Decode behind the first tokens of each window, parent and model in turn: the window's own tokens, which is the
    text that nats are of; or, with `free` and of drafts always, what each finds likeliest."""
    prompt, generated = workload.prompt_tokens, workload.generated_tokens
    assert windows_WT.shape[1] >= prompt + generated, "a window holds the prompt and the tokens behind it"
    speedups, rates, left = [], [], list[int]()
    exits = len(exits_of(model))
    with torch.inference_mode(), steady_process(workload.threads):
        # The first window is read twice: what runs for the first time is slower.
        for done, window_T in enumerate([windows_WT[0], *windows_WT]):
            ids_BT = window_T[None].to(input_device(parent))[:, : prompt + generated]
            taken = _drafts_in_turns if mode == "draft" else _free_in_turns if free else _text_in_turns
            of_parent, of_model, tokens, cache = taken(parent, model, ids_BT, prompt)
            if done:
                left += cache.left_at
                speedups.append(of_parent / of_model)
                rates.append(tokens / of_model)
            advance(done + 1, 1 + len(windows_WT))
    depths = tuple(left.count(i) / len(left) for i in range(exits + 1))
    return ExitSpeed(Spread.of(rates), Spread.of(speedups), depths)


_Taken = tuple[float, float, int, ExitsCache]
"""Seconds of the parent and of the model, for how many tokens, and what the model remembers of them."""


class _Steps:
    """One model that decodes token by token."""

    def __init__(self, model: PreTrainedModel, cache: DynamicCache, prompt_BT: Tensor) -> None:
        self._model, self.cache, self.seconds = model, cache, 0.0
        self.next = self._read(prompt_BT)

    def take(self, token_BT: Tensor) -> None:
        began = time.perf_counter()
        self.next = self._read(token_BT)
        self.seconds += time.perf_counter() - began

    def _read(self, ids_BT: Tensor) -> Tensor:
        logits = self._model(ids_BT, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        # An item of it is waited for, on whatever device.
        return torch.tensor([[int(logits[0, -1].argmax())]], device=ids_BT.device)


def _both(parent: PreTrainedModel, model: PreTrainedModel, prompt_BT: Tensor) -> tuple[_Steps, _Steps, ExitsCache]:
    cache = ExitsCache(model)
    own = DynamicCache(config=parent.config)
    return _Steps(parent, own, prompt_BT), _Steps(model, cache, prompt_BT), cache


def _text_in_turns(parent: PreTrainedModel, model: PreTrainedModel, ids_BT: Tensor, prompt: int) -> _Taken:
    of_parent, of_model, cache = _both(parent, model, ids_BT[:, :prompt])
    for i in range(prompt, ids_BT.shape[1]):
        for one in (of_parent, of_model) if i % 2 else (of_model, of_parent):
            one.take(ids_BT[:, i : i + 1])
    return of_parent.seconds, of_model.seconds, ids_BT.shape[1] - prompt, cache


def _free_in_turns(parent: PreTrainedModel, model: PreTrainedModel, ids_BT: Tensor, prompt: int) -> _Taken:
    of_parent, of_model, cache = _both(parent, model, ids_BT[:, :prompt])
    for i in range(prompt, ids_BT.shape[1]):
        for one in (of_parent, of_model) if i % 2 else (of_model, of_parent):
            one.take(one.next)
    return of_parent.seconds, of_model.seconds, ids_BT.shape[1] - prompt, cache


def _drafts_in_turns(parent: PreTrainedModel, model: PreTrainedModel, ids_BT: Tensor, prompt: int) -> _Taken:
    of_parent, of_model, cache = _both(parent, model, ids_BT[:, :prompt])
    cache.activate_past_recording()  # type: ignore[no-untyped-call]
    token, tokens, seconds = of_model.next, 0, 0.0
    while tokens < ids_BT.shape[1] - prompt:
        began = time.perf_counter()
        drafts, logits = cache.draft(token, cache.rules.waiting)
        found = logits[0].argmax(-1).tolist()
        accepted = next((j for j, draft in enumerate(drafts) if int(draft) != found[j]), len(drafts))
        cache.settle(accepted)
        token = torch.tensor([[found[accepted]]], device=ids_BT.device)
        seconds += time.perf_counter() - began
        for _ in range(accepted + 1):
            of_parent.take(of_parent.next)
        tokens += accepted + 1
    return of_parent.seconds, seconds, tokens, cache


def worst_token_speedup(
    parent: PreTrainedModel, model: PreTrainedModel, ids_BT: Tensor, workload: Workload, mode: Mode, repeats: int
) -> float:
    """The parent's step over the dearest token that the rules allow, which is brought about: one that every exit looks
    at and none lets go, with as many others as may wait; or a full draft of which nothing is kept. Median of pairs."""
    prompt_BT = ids_BT[:, : workload.prompt_tokens]
    ratios = []
    with torch.inference_mode(), steady_process(workload.threads):
        for repeat in range(repeats + 1):
            of_parent, of_model, cache = _both(parent, model, prompt_BT)
            never = 0.0 if mode == "draft" else 1.0
            cache.rules = replace(cache.rules, thresholds=(never,) * len(cache.exits))
            if mode == "draft":
                cache.activate_past_recording()  # type: ignore[no-untyped-call]
            else:
                # Full rooms; in the first there is just enough for another, or nobody would look at the token.
                waiting = [cache.enter(of_model.next) for _ in range(cache.rules.waiting)]
                for i in range(len(cache.exits)):
                    for states in waiting[i == 0 :]:
                        cache.wait(i, states)
            of_parent.take(of_parent.next)
            began = time.perf_counter()
            if mode == "draft":
                cache.draft(of_model.next, cache.rules.waiting)
                cache.settle(0)
            else:
                of_model.take(of_model.next)
            if repeat:
                ratios.append(of_parent.seconds / (time.perf_counter() - began))
    return statistics.median(ratios)
