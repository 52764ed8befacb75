"""Training one small model on one core: minutes, not quality, are what counts."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from zoo_models import CONTEXT, HEAD_DIM, HEADS, new_model

from llmprune.core.progress import Advance


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a model learns: AdamW, warm-up and cosine."""

    steps: int = 800
    minutes: float | None = None
    """At most so long by the clock; the learning rate then falls by the clock."""
    windows: int = 2
    """Windows of CONTEXT tokens a step: few, since a step costs by the token and the first steps teach most."""
    learning_rate: float = 3e-3
    warm_up_steps: int = 20

    def of(self, family: str) -> Schedule:
        """The schedule of a family's model."""
        return replace(self, steps=self.steps * LONGER.get(family, 1))

    def rate(self, step: int, done: float) -> float:
        """The learning rate at a step, when a share of the training is done."""
        return (
            self.learning_rate
            * min(1.0, (step + 1) / self.warm_up_steps)
            * (0.05 + 0.475 * (1 + math.cos(math.pi * done)))
        )


LONGER = {"opt": 2}
"""Times as many steps: after as many as the others OPT's blocks matter too little to tell scores from noise."""

LOUDNESS, SHARPNESS = 2.0, 4.0
"""Of learned positions beside embeddings, and of the first look back: enough to be seen, by trial."""
EMBEDDINGS = Schedule(steps=200, windows=16, learning_rate=1e-2)
"""Embeddings and head alone, without layers, cost little and learn what a byte says of the next one."""


def encoded(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Documents one after another, each closed by EOS: (T,) int64."""
    ids: list[int] = []
    for text in documents:
        ids += [*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], tokenizer.eos_token_id]
    return torch.from_numpy(np.array(ids, dtype=np.int64))


def train(
    family: str, tokens_T: torch.Tensor, schedule: Schedule, advance: Advance, *, seed: int = 0
) -> PreTrainedModel:
    """A trained model of the family, in eval mode: the same one for the same seed, schedule and number of threads."""
    torch.manual_seed(seed)
    model, shallow = new_model(family), new_model(family, layers=0)
    _learn(shallow, tokens_T, EMBEDDINGS, seed, lambda done, total: None)
    missing, unexpected = model.load_state_dict(shallow.state_dict(), strict=False)
    assert missing and not unexpected, "what a model without layers has, every model has"
    _seed_positions(model)
    _learn(model, tokens_T, schedule, seed + 1, advance)
    return model.eval()  # type: ignore[no-any-return, no-untyped-call]


@torch.no_grad()
def _seed_positions(model: PreTrainedModel) -> None:
    """Where positions are learned (GPT-2, OPT) they begin as sinusoids, and head h of the first layer looks 1 + h % 4
    tokens back: from noise, minutes of training do not teach any head to look back, and the model stays a bigram."""
    embedded = model.get_input_embeddings().weight
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is not embedded]
    for table in tables:
        positions, width = table.weight.shape
        rates_W = 10_000 ** (-torch.arange(0, width, 2) / width)
        angles_PW = torch.arange(positions)[:, None] * rates_W
        waves_PW = torch.cat([angles_PW.sin(), angles_PW.cos()], dim=1)
        table.weight.copy_(waves_PW * (LOUDNESS * embedded.std() / waves_PW.std()))
        queries_ID, keys_ID = _query_and_key(model)
        queries_ID.zero_()
        keys_ID.zero_()
        rates = HEAD_DIM // 2
        fastest = torch.arange(rates)
        for head in range(HEADS):
            turned, own = rates_W[:rates] * (1 + head % 4), torch.arange(rates) + head * HEAD_DIM
            sines, cosines = fastest, fastest + width // 2
            keys_ID[sines, own] = keys_ID[cosines, own + rates] = 1.0
            queries_ID[sines, own] = queries_ID[cosines, own + rates] = SHARPNESS * turned.cos()
            queries_ID[cosines, own], queries_ID[sines, own + rates] = (
                -SHARPNESS * turned.sin(),
                SHARPNESS * turned.sin(),
            )


def _query_and_key(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the first layer's query and key weights, (inputs, outputs) each."""
    if model.config.model_type == "gpt2":
        queries, keys, _ = model.transformer.h[0].attn.c_attn.weight.chunk(3, dim=1)
        return queries, keys
    attention = model.model.decoder.layers[0].self_attn
    return attention.q_proj.weight.T, attention.k_proj.weight.T


def _learn(model: PreTrainedModel, tokens_T: torch.Tensor, schedule: Schedule, seed: int, advance: Advance) -> None:
    generator, began = np.random.default_rng(seed), time.monotonic()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=(0.9, 0.95))
    model.train()
    for step in range(schedule.steps):
        done = step / schedule.steps
        if schedule.minutes is not None:
            done = max(done, (time.monotonic() - began) / (60 * schedule.minutes))
        if done >= 1:
            break
        for group in optimiser.param_groups:
            group["lr"] = schedule.rate(step, done)
        starts = generator.integers(len(tokens_T) - CONTEXT, size=schedule.windows)
        batch_BT = torch.stack([tokens_T[start : start + CONTEXT] for start in starts])
        model(input_ids=batch_BT, labels=batch_BT, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        advance(step + 1, schedule.steps)
