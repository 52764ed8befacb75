"""What changing one block costs in quality, estimated for every choice of every block from one backward pass."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from llmprune.blocks.library import BlockLibrary
from llmprune.choices.architecture import Architecture
from llmprune.choices.choice import Assignment, Choice
from llmprune.choices.dimensions import BlockKind
from llmprune.choices.space import Space
from llmprune.core.progress import Advance, Steps
from llmprune.data.tokens import Split
from llmprune.models.parent import Parent
from llmprune.models.placement import is_spread
from llmprune.models.waiting import with_room
from llmprune.models.walk import Walk, is_brought
from llmprune.tables.watched import Batch, Watched

WINDOWS_A_BATCH = 2
DeltaNats = dict[Assignment, float]
"""Nats a token that each choice of each layer costs."""


@dataclass(frozen=True)
class Estimate:
    """What one forward and one backward pass tell of every block."""

    delta_nats: DeltaNats
    influence: Sequence[float]
    """Block influence of each layer: 1 - mean_t cos(h_l,t, h_{l+1},t) (ShortGPT, arXiv 2403.03853). Low: drop first."""


def estimate_delta_nats(
    parent: Parent,
    split: Split,
    library: BlockLibrary,
    *,
    tokens: int,
    at: Architecture | None = None,
    caution: float = 0.0,
    progress: Advance | None = None,
) -> DeltaNats:
    """The costs of `estimate`, alone."""
    return estimate(parent, split, library, tokens=tokens, at=at, caution=caution, progress=progress).delta_nats


def estimate(
    parent: Parent,
    split: Split,
    library: BlockLibrary,
    *,
    tokens: int,
    at: Architecture | None = None,
    caution: float = 0.0,
    walked: bool | None = None,
    progress: Advance | None = None,
) -> Estimate:
    """Estimated nats per token that each choice costs, put alone into the architecture `at` (default: the parent).

    With `delta_t` the change at token t of what the block adds to the residual stream and `g_t` the gradient of the
    summed NLL with respect to that: mean_t g_t.delta_t + 1/2 mean_t (g_t.delta_t)^2, the first-order term and the
    Fisher form of the second. Where a norm stands between the block and the stream (Gemma 2 and 3, OLMo 2) the change
    is taken behind it, by the norm itself: it does not see the scale of its input, so that in front of it the gradient
    is orthogonal to the output, and a dropped block would seem to cost nothing. Products are in float32 at the least,
    whatever the parent's dtype. It sees no interaction between the blocks that change: what is built on it is measured
    as a whole model. Where weights are rounded the second order of a token grows no faster than its size beyond
    `FURTHEST`.

    About `tokens` tokens of `split` are used, shared over its sources by weight. With `caution`, so many standard
    deviations between the sources' own estimates are added to their mean (see `cautious`).

    Cost: one forward and one backward pass over activations (the parent's weights are frozen), and local matrix
    products. `at` is computed by the parent's modules with the output projections of `at` in place of its own, so that
    blocks may grow back too. The blocks of choices that have inputs of their own are run beside the parent's, on the
    same hidden states. What `at` has costs 0.

    A parent that computes where it lies keeps the graph of one batch at a time; any other is `walked` (see
    `is_walked`): all tokens go forward layer by layer, the residual stream is kept at the borders, and each layer is
    run again with gradients on the way back (gradient checkpointing, arXiv 1604.06174), so that its weights and its
    choices are brought to where they are computed once each way (`with_room`). `progress` counts batches of a pass, and
    of a layer.
    """
    at = at or parent.shape.architecture
    own = {(layer, choice.kind): choice for layer, choice in at.blocks()}
    batches = _batches(split, tokens)
    shares = [split.weights[batch.source] * batch.share for batch in batches]

    def computed(device: torch.device | None) -> tuple[dict[str, DeltaNats], list[float]]:
        walks = is_walked(parent, device) if walked is None else walked
        watched = Watched(parent, library, own, keeps=walks)
        influence_L = torch.zeros(parent.shape.layers, dtype=torch.float64)
        with watched.hooked():
            if walks:
                _walk(watched, batches, influence_L, shares, device, progress)
            else:
                _pass_all(watched, batches, influence_L, shares, progress)
        return watched.totals(), influence_L.tolist()

    sums, influence = with_room(parent.model, computed)
    return Estimate(_every_choice(library.space, own, sums, split.weights, caution), influence)


def is_walked(parent: Parent, device: torch.device | None = None) -> bool:
    """Whether an estimate goes layer by layer: where weights have to be brought, or to be widened, to be computed with;
    and on accelerators, where choices do."""
    return is_brought(parent.model.dtype, parent.device if device is None else device) or is_spread(parent.model)


def _every_choice(
    space: Space,
    own: Mapping[tuple[int, BlockKind], Choice],
    found: Mapping[str, DeltaNats],
    weights: Mapping[str, float],
    caution: float,
) -> DeltaNats:
    composed = {name: _with_types(space, own, nats) for name, nats in found.items()}
    every = [(i, c) for i, kind in space.blocks() for c in space.ladder(kind)]
    return {key: cautious({name: nats[key] for name, nats in composed.items()}, weights, caution) for key in every}


def _with_types(space: Space, own: Mapping[tuple[int, BlockKind], Choice], found: DeltaNats) -> DeltaNats:
    """And the rest of them: what was cut and what is rounded err independently of each other, so that their costs,
    which are of second order, add up; and the rounding of fewer rows costs less in proportion."""
    shape, every = space.shape, dict(found)
    for layer, kind in space.blocks():
        full = shape.full(kind)
        for choice in space.ladder(kind):
            if choice == own[layer, kind]:
                every[layer, choice] = 0.0
            elif (layer, choice) not in found:
                entered, share = choice.entered_as(shape), shape.rows(choice.plain) / shape.rows(full)
                assert entered is not None, "a type of its own"
                rounding = found[layer, entered] - found[layer, full]
                every[layer, choice] = found[layer, choice.plain] + share * rounding
    return every


def cautious(nats: Mapping[str, float], weights: Mapping[str, float], caution: float) -> float:
    """The mean of the sources' nats by weight, and `caution` standard deviations between them.

    What one kind of text misses more than another is likely to be missed by text that nobody asked; and what few tokens
    say too well of a choice, another source's tokens rarely say as well.
    """
    mean = sum(weights[name] * value for name, value in nats.items())
    variance = sum(weights[name] * (value - mean) ** 2 for name, value in nats.items())
    return mean + caution * math.sqrt(variance)


def _batches(split: Split, tokens: int) -> list[Batch]:
    plan = []
    for name, source in split.sources.items():
        wanted = max(1, round(tokens * split.weights[name] / split.seq_len))
        batches = torch.split(source.windows[:wanted], WINDOWS_A_BATCH)
        rows = sum(len(batch) for batch in batches)
        plan += [Batch(name, batch, len(batch) / rows) for batch in batches]
    return plan


def _pass_all(
    watched: Watched,
    batches: Sequence[Batch],
    influence_L: torch.Tensor,
    shares: Sequence[float],
    progress: Advance | None,
) -> None:
    """One batch after another through the whole model and back."""
    for done, (batch, share) in enumerate(zip(batches, shares, strict=True)):
        _pass(watched, batch, influence_L, share)
        if progress:
            progress(done + 1, len(batches))


def _pass(watched: Watched, batch: Batch, influence_L: torch.Tensor, share: float) -> None:
    parent = watched.parent
    watched.begin(batch)
    states: list[torch.Tensor] = []
    with ExitStack() as hooks, torch.enable_grad():
        for layer in range(parent.shape.layers):
            hook = partial(_note, states)
            hooks.callback(parent.layer(layer).register_forward_hook(hook, with_kwargs=True).remove)
        embedded = parent.model.get_input_embeddings()(batch.windows_BT.to(parent.device)).detach().requires_grad_()
        logits = parent.model(inputs_embeds=embedded, use_cache=False).logits
        for layer, (before, after) in enumerate(zip(states[::2], states[1::2], strict=True)):
            influence_L[layer] += share * _influence(before, after)
        states.clear()
        _nats(logits, batch).backward()  # type: ignore[no-untyped-call]


def _note(states: list[torch.Tensor], _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    states += [args[0] if args else kwargs["hidden_states"], output[0] if isinstance(output, tuple) else output]


def _walk(
    watched: Watched,
    batches: Sequence[Batch],
    influence_L: torch.Tensor,
    shares: Sequence[float],
    device: torch.device | None,
    progress: Advance | None,
) -> None:
    """All batches through one layer after another, and back."""
    layers = watched.parent.shape.layers
    steps = Steps((2 * layers + 1) * len(batches), progress)
    walk = Walk(watched.parent, batches[0].windows_BT.shape[1], device)
    borders = [[walk.embedded(batch.windows_BT).cpu()] for batch in batches]
    for layer in range(layers):
        with walk.layer(layer) as run, torch.no_grad():
            for states, batch, share in steps.over(list(zip(borders, batches, shares, strict=True))):
                watched.begin(batch)
                states.append(run(states[-1]).cpu())
                influence_L[layer] += share * _influence(states[-2], states[-1])
        watched.leave(layer)
    gradients = []
    with walk.behind() as run, torch.enable_grad():
        for states, batch in steps.over(list(zip(borders, batches, strict=True))):
            last = states.pop().requires_grad_()
            _nats(run(last), batch).backward()  # type: ignore[no-untyped-call]
            gradients.append(_gradient(last))
    for layer in reversed(range(layers)):
        with walk.layer(layer) as run, torch.enable_grad():
            for i, batch in steps.over(list(enumerate(batches))):
                watched.begin(batch)
                before = borders[i].pop().requires_grad_()
                after = run(before)
                after.backward(gradients[i].to(after))  # type: ignore[no-untyped-call]
                gradients[i] = _gradient(before)
        watched.leave(layer)


def _gradient(leaf_BTD: torch.Tensor) -> torch.Tensor:
    assert leaf_BTD.grad is not None, "a backward pass has reached it"
    return leaf_BTD.grad


def _influence(before_BTD: torch.Tensor, after_BTD: torch.Tensor) -> float:
    similarity = nn.functional.cosine_similarity(before_BTD.detach().float(), after_BTD.detach().float(), dim=-1)
    return 1.0 - similarity.double().mean().item()


def _nats(logits_BTV: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Summed over the tokens that are predicted."""
    predicted_NV = logits_BTV[:, :-1].float().flatten(0, 1)
    targets_N = batch.windows_BT[:, 1:].to(logits_BTV.device).flatten()
    return nn.functional.cross_entropy(predicted_NV, targets_N, reduction="sum")
