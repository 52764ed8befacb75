"""What changing one block costs in quality, estimated for every choice of every block from one backward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from llmprune.blocks.library import BlockLibrary
from llmprune.blocks.solve import own_input_choices
from llmprune.choices.architecture import Architecture
from llmprune.choices.choice import Assignment, Choice
from llmprune.choices.dimensions import BlockKind
from llmprune.choices.space import Space
from llmprune.data.tokens import Split
from llmprune.models.beside import own_blocks, own_inputs
from llmprune.models.parent import Parent
from llmprune.models.surgery import output_of

WINDOWS_A_BATCH = 2
FURTHEST = 1.0
"""Nats of a token up to which the second order of a rounding is believed. The stream of a few tokens is thousands of
times the others' (massive activations, arXiv 2402.17762): the same relative error of it is as much further, and says
nothing, since a norm follows. On SmolLM2 one layer's FFN in q4_0 was estimated at +0.92 nats a token for -0.02."""

DeltaNats = dict[Assignment, float]
"""Nats a token that each choice of each layer costs."""
_Beside = Mapping[Choice, Mapping[int, nn.Module]]
"""By choice and layer, the blocks of choices that have inputs of their own."""


@dataclass(frozen=True)
class _Candidate:
    """One choice of one block: the inputs it keeps, its output projection and bias."""

    choice: Choice
    columns_S: torch.Tensor
    """Of the parent's inputs, or of the choice's own."""
    weight_DS: torch.Tensor
    bias_D: torch.Tensor

    def output(self, inputs_BTI: torch.Tensor) -> torch.Tensor:
        """The block's output for inputs of the output projection: (B, T, I) to (B, T, D)."""
        if self.choice.units == 0:
            # A leaf of its own, so that the gradient at a block that is not there is known as well.
            shape = (*inputs_BTI.shape[:-1], len(self.bias_D))
            return torch.zeros(shape, dtype=inputs_BTI.dtype, device=inputs_BTI.device, requires_grad=True)
        return nn.functional.linear(inputs_BTI[..., self.columns_S], self.weight_DS, self.bias_D)


def estimate_delta_nats(
    parent: Parent,
    split: Split,
    library: BlockLibrary,
    *,
    tokens: int,
    at: Architecture | None = None,
    caution: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> DeltaNats:
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
    """
    at = at or parent.shape.architecture
    own = {(layer, choice.kind): choice for layer, choice in at.blocks()}
    keys: list[Assignment] = [
        (i, c) for i, kind in library.space.blocks() for c in estimated_choices(library.space, kind)
    ]
    per_source = {name: dict.fromkeys(keys, 0.0) for name in split.sources}
    layers = range(parent.shape.layers)
    beside = {choice: own_blocks(parent, choice, layers, library) for choice in own_input_choices(library.space)}
    plan = _batches(split, tokens)
    rounded: dict[tuple[int, Choice], _Candidate] = {}
    for done, (name, windows, share) in enumerate(plan):
        sums, count = _batch_scores(parent, library, own, beside, rounded, windows)
        for key, value in sums.items():
            per_source[name][key] += share * value / count
        if progress:
            progress(done + 1, len(plan))
    composed = {name: _with_types(library.space, own, found) for name, found in per_source.items()}
    every = [(i, c) for i, kind in library.space.blocks() for c in library.space.ladder(kind)]
    return {
        key: cautious({name: found[key] for name, found in composed.items()}, split.weights, caution) for key in every
    }


def estimated_choices(space: Space, kind: BlockKind) -> list[Choice]:
    """The choices that are estimated: of those with a type of their own, the whole blocks."""
    return [
        choice for choice in space.ladder(kind) if choice.stored is None or choice == choice.entered_as(space.shape)
    ]


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


def _batches(split: Split, tokens: int) -> list[tuple[str, torch.Tensor, float]]:
    """Batches of windows: the source, the windows, and their share of what the source has of them."""
    plan = []
    for name, source in split.sources.items():
        wanted = max(1, round(tokens * split.weights[name] / split.seq_len))
        batches = torch.split(source.windows[:wanted], WINDOWS_A_BATCH)
        rows = sum(len(batch) for batch in batches)
        plan += [(name, batch, len(batch) / rows) for batch in batches]
    return plan


def _candidate(parent: Parent, library: BlockLibrary, layer: int, choice: Choice) -> _Candidate:
    weight_DI, bias = parent.output_weight(layer, choice.kind), parent.output_bias(layer, choice.kind)
    own_bias = weight_DI.new_zeros(weight_DI.shape[0]) if bias is None else bias
    if choice.units == 0:
        nothing = torch.empty(0, dtype=torch.int64, device=weight_DI.device)
        return _Candidate(choice, nothing, weight_DI[:, nothing], torch.zeros_like(own_bias))
    if choice == parent.shape.full(choice.kind):
        return _Candidate(choice, torch.arange(weight_DI.shape[1], device=weight_DI.device), weight_DI, own_bias)
    columns_S = choice.columns(library.kept(layer, choice.plain), parent.shape)
    new_weight, new_bias, _ = output_of(parent, library, layer, choice)
    bias_D = own_bias if new_bias is None else new_bias.to(own_bias)
    return _Candidate(choice, columns_S.to(weight_DI.device), new_weight.to(weight_DI), bias_D)


def _batch_scores(
    parent: Parent,
    library: BlockLibrary,
    own: Mapping[tuple[int, BlockKind], Choice],
    beside: _Beside,
    rounded: dict[tuple[int, Choice], _Candidate],
    windows: torch.Tensor,
) -> tuple[DeltaNats, int]:
    """Sums over the batch's tokens of g.delta + (g.delta)^2 / 2 for every candidate, and the number of tokens."""
    watched = _Watched(parent, library, own, beside, rounded)
    with watched.hooked(), torch.enable_grad():
        embedded = parent.model.get_input_embeddings()(windows.to(parent.device)).detach().requires_grad_()
        logits = parent.model(inputs_embeds=embedded, use_cache=False).logits[:, :-1].float()
        targets = windows[:, 1:].to(logits.device)
        nats = nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="sum")
        nats.backward()  # type: ignore[no-untyped-call]
    return watched.sums, int(targets.numel())


@dataclass
class _Watched:
    """The parent's modules while one batch runs through them as `own` and back."""

    parent: Parent
    library: BlockLibrary
    own: Mapping[tuple[int, BlockKind], Choice]
    beside: _Beside
    rounded: dict[tuple[int, Choice], _Candidate]
    """What takes time to make, from one batch to the next."""
    sums: DeltaNats = field(default_factory=dict)
    _entered: dict[tuple[int, Choice], torch.Tensor] = field(default_factory=dict)
    _inputs: dict[tuple[int, BlockKind], torch.Tensor] = field(default_factory=dict)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """With every block watched."""
        with ExitStack() as hooks:
            for layer, kind in self.own:
                # In this order: where the projection itself adds to the stream, it puts in what `at` has first.
                output, adds = self.parent.output_projection(layer, kind), self.parent.adds_to_stream(layer, kind)
                hooks.callback(output.register_forward_hook(partial(self._project, layer, kind)).remove)
                hooks.callback(adds.register_forward_hook(partial(self._add, layer, kind)).remove)
                if choices := [choice for choice in self.beside if choice.kind == kind]:
                    block, enter = self.parent.block(layer, kind), partial(self._enter, layer, choices)
                    hooks.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
            yield

    def _enter(
        self, layer: int, choices: Sequence[Choice], _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Of a block: runs those of these choices beside it."""
        for choice in choices:
            # Gradients of earlier layers flow through what `at` has, and through nothing else.
            with torch.set_grad_enabled(choice == self._entered_as(self.own[layer, choice.kind])):
                self._entered[layer, choice] = own_inputs(self.beside[choice][layer], args, kwargs)

    def _candidate(self, layer: int, choice: Choice) -> _Candidate:
        key = layer, choice
        if choice.stored is None:
            return _candidate(self.parent, self.library, layer, choice)
        if key not in self.rounded:
            self.rounded[key] = _candidate(self.parent, self.library, layer, choice)
        return self.rounded[key]

    def _entered_as(self, choice: Choice) -> Choice | None:
        return choice.entered_as(self.parent.shape)

    def _project(
        self, layer: int, kind: BlockKind, _: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> torch.Tensor:
        """Of an output projection: puts in what `at` has."""
        mine = self.own[layer, kind]
        self._inputs[layer, kind] = args[0].detach()
        if mine == self.parent.shape.full(kind):
            return output
        candidate = self._candidate(layer, mine)
        entered = self._entered_as(mine)
        return candidate.output(args[0] if entered is None else self._entered[layer, entered])

    def _add(
        self, layer: int, kind: BlockKind, _: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> None:
        """Of what adds to the residual stream: scores the candidates as soon as its gradient is known."""
        x_BTI = self._inputs.pop((layer, kind))
        # A candidate's inputs are the parent's, but for those that compute their own.
        others = {c: self._entered.pop((layer, c)).detach() for c in self.beside if c.kind == kind}
        hook = partial(self._score, layer, kind, x_BTI, others)
        output.register_hook(hook)  # type: ignore[no-untyped-call]

    def _score(
        self,
        layer: int,
        kind: BlockKind,
        x_BTI: torch.Tensor,
        others: Mapping[Choice, torch.Tensor],
        gradient_BTD: torch.Tensor,
    ) -> None:
        mine, norm = self.own[layer, kind], self.parent.output_norm(layer, kind)

        def along_gradient(choice: Choice) -> torch.Tensor:
            candidate = self._candidate(layer, choice)
            entered = self._entered_as(choice)
            inputs_BTI = x_BTI if entered is None else others[entered]
            return _along_gradient(gradient_BTD.detach(), inputs_BTI, candidate, norm)

        own_N = along_gradient(mine)
        for choice in estimated_choices(self.library.space, kind):
            if choice != mine:
                change_N = along_gradient(choice) - own_N
                rounds = choice.stored is not None or mine.stored is not None
                second_N = _bounded_second_order(change_N) if rounds else 0.5 * change_N.square()
                self.sums[layer, choice] = float((change_N + second_N).double().sum())


def _bounded_second_order(change_N: torch.Tensor) -> torch.Tensor:
    """Half the square, and beyond FURTHEST what has the same slope from there on (Huber, 1964)."""
    return nn.functional.huber_loss(change_N, torch.zeros_like(change_N), reduction="none", delta=FURTHEST)


def _along_gradient(
    gradient_BTD: torch.Tensor, inputs_BTI: torch.Tensor, candidate: _Candidate, norm: nn.Module | None
) -> torch.Tensor:
    """g.f(W'x + b') at every token, f the norm behind the block if there is one: (N,)."""
    # In half precision the difference of two outputs would be what rounding left of it.
    dtype = torch.promote_types(gradient_BTD.dtype, torch.float32)
    gradient_ND = gradient_BTD.reshape(-1, gradient_BTD.shape[-1]).to(dtype)
    if candidate.choice.units == 0:
        return gradient_ND.new_zeros(len(gradient_ND))
    inputs_NS = inputs_BTI.reshape(-1, inputs_BTI.shape[-1])[:, candidate.columns_S].to(dtype)
    weight_DS, bias_D = candidate.weight_DS.to(dtype), candidate.bias_D.to(dtype)
    if norm is not None:
        # Past its hooks: ours is one of them.
        output_ND: torch.Tensor = norm.forward(nn.functional.linear(inputs_NS, weight_DS, bias_D))
        return (gradient_ND * output_ND).sum(1)
    # Without the norm W'x need not be formed: the gradient is projected instead, which is as long as what is kept.
    return ((gradient_ND @ weight_DS) * inputs_NS).sum(1) + gradient_ND @ bias_D


def block_influence(parent: Parent, split: Split, *, tokens: int) -> list[float]:
    """Block influence of each layer: 1 - mean_t cos(h_l,t, h_{l+1},t) (ShortGPT, arXiv 2403.03853). Low: drop first."""
    influence_L = torch.zeros(parent.shape.layers, dtype=torch.float64)
    batch_L = torch.zeros_like(influence_L)

    def watch(layer: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            similarity = nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
            batch_L[layer] = 1.0 - similarity.double().mean().item()

        return hook

    handles = [
        parent.layer(layer).register_forward_hook(watch(layer), with_kwargs=True)
        for layer in range(parent.shape.layers)
    ]
    try:
        with torch.inference_mode():
            for name, windows, share in _batches(split, tokens):
                parent.model.base_model(input_ids=windows.to(parent.device), use_cache=False)
                influence_L += split.weights[name] * share * batch_L
    finally:
        for handle in handles:
            handle.remove()
    return [float(value) for value in influence_L]
