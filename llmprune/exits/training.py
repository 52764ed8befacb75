"""Exits for all candidate layers of a trunk at once: each adapter is solved by least squares for the states that the
head reads at the end (a tuned lens, arXiv 2303.08112), then learns what the trunk predicts, `KL(trunk || exit)` on the
logits; each gate is a logistic regression of whether both find the same token likeliest. The trunk stays as it is.

Shapes: W windows, T tokens of a window, N positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from llmprune.core.progress import Advance
from llmprune.measure.quality.prefix_states import states_at
from llmprune.models.exits import family_of, untrained_exit
from llmprune.models.modeling_pruned import Exit
from llmprune.models.streams import input_device
from llmprune.numerics.refit import damped_gram
from llmprune.recover.step_memory import last_states, logits_of

DAMP = 0.01
"""Ridge of the least squares, as a share of the mean square of what an adapter reads."""
POSITIONS = 128
"""Of a window, whose logits are in memory together: what one step learns from."""
FITTED_WINDOWS = 64
FITTED_SHARE = 0.25
"""Least squares go over so many windows, or take this share of the time."""
LEARNING_RATE, FINAL_SHARE, WARM_UP_STEPS = 3e-4, 0.05, 10
GATE_RIDGE = 1e-2
GATE_FROM = 0.25
"""Share of the steps behind which exits are near enough to what they end as for a gate to learn of them."""


@dataclass(frozen=True)
class Trained:
    """Exits by the layer that they stand behind, and how they came about."""

    tensors: Mapping[str, Tensor]
    """As `models.exits.with_exits` names them, in the dtype of the trunk."""
    tokens: int
    """Positions that were learnt from, all exits at each."""
    seconds: float
    kl_solved: Mapping[int, float]
    """KL a token on text that was held out, as least squares left an exit; `kl_trained` at the end."""
    kl_trained: Mapping[int, float]


@torch.no_grad()
def states_of(trunk: PreTrainedModel, layers: Sequence[int], ids_BT: Tensor) -> tuple[dict[int, Tensor], Tensor]:
    """Of every position, (N, D): the states behind so many layers, and what the head reads at the end."""
    blocks = list(trunk.get_submodule(family_of(trunk.config).layers).children())
    with states_at(blocks, None, layers) as seen:
        last_ND = last_states(trunk, ids_BT.to(input_device(trunk))).flatten(0, 1)
    return {layer: seen[layer].flatten(0, 1) for layer in layers}, last_ND


def train_exits(
    trunk: PreTrainedModel,
    layers: Sequence[int],
    windows_WT: Tensor,
    held_out_T: Tensor,
    minutes: float,
    seed: int = 0,
    advance: Advance = lambda done, total: None,
) -> Trained:
    """Exits behind each of `layers`, from windows of text, in about so many minutes: the number of steps is settled
    when the first one was timed. An exit that training made worse on `held_out_T` stays as least squares left it."""
    began = time.monotonic()
    order_W = torch.randperm(len(windows_WT), generator=torch.Generator().manual_seed(seed))
    fitted_until = began + 60 * minutes * FITTED_SHARE
    exits = _solved(trunk, layers, windows_WT[order_W[:FITTED_WINDOWS]], fitted_until)
    held_out = states_of(trunk, layers, held_out_T[None])
    before = _divergences(trunk, exits, *held_out)
    solved = {layer: {name: t.clone() for name, t in made.state_dict().items()} for layer, made in exits.items()}
    seen, tokens = _learn(trunk, exits, windows_WT[order_W], 60 * minutes - (time.monotonic() - began), seed, advance)
    after = _divergences(trunk, exits, *held_out)
    for layer, made in exits.items():
        if not after[layer] <= before[layer]:
            made.load_state_dict(solved[layer])
    kl_trained = {layer: min(before[layer], after[layer]) for layer in exits}
    for layer, (states, same) in seen.items():
        _fit_gate(exits[layer], torch.cat(states), torch.cat(same))
    tensors = {
        f"{layer}.{name}": t.detach().to(trunk.dtype)
        for layer, made in exits.items()
        for name, t in made.state_dict().items()
    }
    return Trained(tensors, tokens, time.monotonic() - began, before, kl_trained)


def _solved(trunk: PreTrainedModel, layers: Sequence[int], windows_WT: Tensor, until: float) -> dict[int, Exit]:
    """Exits in float32 whose adapters are the least-squares maps to what the head reads at the end, on as many windows
    as there is time for. The ridge pulls them to handing the states on as they are, which few tokens leave them at."""
    exits = {layer: untrained_exit(trunk).float() for layer in layers}
    width, count = trunk.config.hidden_size, 0
    new = {"dtype": torch.float64, "device": trunk.device}
    gram = {layer: torch.zeros(width, width, **new) for layer in layers}  # type: ignore[call-overload]
    cross = {layer: torch.zeros(width, width, **new) for layer in layers}  # type: ignore[call-overload]
    sums = {layer: torch.zeros(2, width, **new) for layer in layers}  # type: ignore[call-overload]
    for window_T in windows_WT:
        if count and time.monotonic() > until:
            break
        states, last_ND = states_of(trunk, layers, window_T[None])
        count += len(last_ND)
        for layer, states_ND in states.items():
            read_ND = exits[layer].norm(states_ND.float())
            gram[layer] += (read_ND.T @ read_ND).double()
            lacking_ND = last_ND.float() - read_ND
            cross[layer] += (lacking_ND.T @ read_ND).double()
            sums[layer] += torch.stack([read_ND, lacking_ND]).double().sum(1)
    for layer, made in exits.items():
        mean_D, lacking_D = sums[layer] / count
        hessian = damped_gram(gram[layer] / count, DAMP, mean_D)
        centred = cross[layer] / count - torch.outer(lacking_D, mean_D)
        change_DD = torch.linalg.solve(hessian, centred.T).T
        made.adapter.weight.add_(change_DD)
        made.adapter.bias.copy_(lacking_D - change_DD @ mean_D)
    return exits


def _learn(
    trunk: PreTrainedModel, exits: Mapping[int, Exit], windows_WT: Tensor, seconds: float, seed: int, advance: Advance
) -> tuple[dict[int, tuple[list[Tensor], list[Tensor]]], int]:
    """Train in place; of the later positions, what each gate reads, and whether exit and trunk agreed; and how many
    positions were learnt from."""
    trained = [p for made in exits.values() for p in (*made.norm.parameters(), *made.adapter.parameters())]
    optimiser = torch.optim.AdamW([p.requires_grad_() for p in trained], lr=LEARNING_RATE, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    seen: dict[int, tuple[list[Tensor], list[Tensor]]] = {layer: ([], []) for layer in exits}
    steps, step, tokens, began = 2, 0, 0, time.monotonic()
    while step < steps:
        done = step / steps
        rate = min(1.0, (step + 1) / WARM_UP_STEPS) * (
            FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * done))
        )
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * rate
        window_T = windows_WT[step % len(windows_WT)]
        states, last_ND = states_of(trunk, list(exits), window_T[None])
        rows = torch.randperm(len(last_ND), generator=generator)[:POSITIONS]
        wanted_NV = _log_probabilities(trunk, last_ND[rows]).detach()
        for layer, found_NV in _predictions(trunk, exits, states, rows):
            _kl(wanted_NV, found_NV).mean().backward()  # type: ignore[no-untyped-call]
            if done >= GATE_FROM or step < 2:
                seen[layer][0].append(states[layer][rows])
                seen[layer][1].append(found_NV.argmax(-1) == wanted_NV.argmax(-1))
        optimiser.step()
        optimiser.zero_grad()
        step, tokens = step + 1, tokens + len(rows)
        if step == 2:
            # The first one warmed up.
            steps = max(2, int(seconds / max(1e-3, (time.monotonic() - began) / 2)))
        advance(step, steps)
    for p in trained:
        p.requires_grad_(False)
    return seen, tokens


def _predictions(
    trunk: PreTrainedModel, exits: Mapping[int, Exit], states: Mapping[int, Tensor], rows: Tensor
) -> Iterator[tuple[int, Tensor]]:
    for layer, made in exits.items():
        yield layer, _log_probabilities(trunk, made(states[layer][rows].float()).to(trunk.dtype))


def _log_probabilities(trunk: PreTrainedModel, read_ND: Tensor) -> Tensor:
    return functional.log_softmax(logits_of(trunk, read_ND).float(), dim=-1)


def _kl(wanted_NV: Tensor, found_NV: Tensor) -> Tensor:
    return functional.kl_div(found_NV, wanted_NV, reduction="none", log_target=True).sum(-1)


@torch.no_grad()
def _divergences(
    trunk: PreTrainedModel, exits: Mapping[int, Exit], states: Mapping[int, Tensor], last_ND: Tensor
) -> dict[int, float]:
    """KL a token of each exit from the trunk."""
    total = dict.fromkeys(exits, 0.0)
    for rows in torch.split(torch.arange(len(last_ND)), POSITIONS):
        wanted_NV = _log_probabilities(trunk, last_ND[rows])
        for layer, found_NV in _predictions(trunk, exits, states, rows):
            total[layer] += float(_kl(wanted_NV, found_NV).sum()) / len(last_ND)
    return total


def _fit_gate(made: Exit, states_ND: Tensor, same_N: Tensor) -> None:
    """Logistic regression with a ridge, on what the gate will read."""
    with torch.no_grad():
        read_ND = made.norm(states_ND.float())
        mean_D, spread_D = read_ND.mean(0), read_ND.std(0).clamp(min=1e-6)
        scaled_ND = (read_ND - mean_D) / spread_D
    weight_D = torch.zeros(scaled_ND.shape[1], device=scaled_ND.device, requires_grad=True)
    bias = torch.zeros((), device=scaled_ND.device, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight_D, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        found = functional.binary_cross_entropy_with_logits(scaled_ND @ weight_D + bias, same_N.float())
        found = found + GATE_RIDGE * weight_D.square().sum()
        found.backward()  # type: ignore[no-untyped-call]
        return found

    optimiser.step(loss)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        made.gate.weight.copy_((weight_D / spread_D)[None])
        made.gate.bias.copy_((bias - (weight_D / spread_D) @ mean_D)[None])
