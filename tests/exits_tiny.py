"""Models with random exits that several test files share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from families import tokens
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.models.exits import untrained_exit, with_exits
from llmprune.models.modeling_pruned import ExitRules, ExitsCache

NEVER = 2.0
GENERATED = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def random_exits(trunk: PreTrainedModel, seed: int = 0) -> dict[str, Tensor]:
    """An exit behind each layer but the last, away from what the trunk would say."""
    torch.manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for layer in range(1, trunk.config.num_hidden_layers):
        made = untrained_exit(trunk)
        with torch.no_grad():
            made.adapter.weight.add_(torch.randn_like(made.adapter.weight) * 0.1)
            made.gate.weight.normal_()
        tensors |= {f"{layer}.{name}": value for name, value in made.state_dict().items()}
    return tensors


def trunks_choice(trunk: PreTrainedModel, rules: ExitRules, length: int = 24) -> ExitRules:
    """The rules with thresholds in the middle of what their exits say of some text, so that tokens leave by each."""
    said: list[list[float]] = [[] for _ in rules.layers]
    # Above 1 nothing is looked at.
    model = with_exits(trunk, replace(rules, thresholds=(1.0,) * len(rules.layers)), random_exits(trunk))
    cache = ExitsCache(model)
    with torch.inference_mode():
        for token in tokens(1, length)[0]:
            states, top = cache.enter(token[None, None]), None
            for i in range(len(rules.layers)):
                if rules.criterion == "gate":
                    said[i].append(float(cache.exits[i].promise(states)))
                else:
                    logits, top_now, _ = cache.offer(i, states, top)
                    said[i].append(confidence(rules, logits, top))
                    top = top_now
                states = cache.deepen(i, states)
    ordered = [sorted(values) for values in said]
    # Between two values, so that rounding decides nothing.
    middles = tuple((values[len(values) // 2 - 1] + values[len(values) // 2]) / 2 for values in ordered)
    return replace(rules, thresholds=tuple(max(1e-6, middle) for middle in middles))


def confidence(rules: ExitRules, logits: Any, top_before: Any) -> float:
    from llmprune.models.modeling_pruned import confidence_of

    return float(confidence_of(rules.criterion, logits, top_before))


def decoded(model: PreTrainedModel, window_T: Tensor) -> tuple[Tensor, ExitsCache]:
    """Logits behind every token of a window that is fed token by token, (T, V), and what the cache remembers."""
    cache = ExitsCache(model)
    with torch.inference_mode():
        found = [model(token[None, None], past_key_values=cache, use_cache=True).logits[0, 0] for token in window_T]
    return torch.stack(found), cache
