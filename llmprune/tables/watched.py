"""The blocks of a parent as an estimate watches them: what comes of every choice is held to the gradient.

Shapes: B windows, T tokens, N tokens of a batch, D hidden size, I inputs of an output projection, S those kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from llmprune.blocks.library import BlockLibrary
from llmprune.blocks.solve import own_input_choices
from llmprune.choices.choice import Assignment, Choice
from llmprune.choices.dimensions import BlockKind
from llmprune.choices.space import Space
from llmprune.models.beside import OwnBlocks, own_inputs
from llmprune.models.parent import Parent
from llmprune.models.surgery import output_of

FURTHEST = 1.0
"""Nats of a token up to which the second order of a rounding is believed. The stream of a few tokens is thousands of
times the others' (massive activations, arXiv 2402.17762): the same relative error of it is as much further, and says
nothing, since a norm follows. On SmolLM2 one layer's FFN in q4_0 was estimated at +0.92 nats a token for -0.02."""


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


class Batch(NamedTuple):
    """Windows that run together."""

    source: str
    windows_BT: torch.Tensor
    share: float
    """Of what the estimate has of the source."""

    @property
    def predicted(self) -> int:
        """Tokens that are predicted."""
        return self.windows_BT[:, 1:].numel()


@dataclass
class Watched:
    """The parent's modules while batches run through them as `own` and back."""

    parent: Parent
    library: BlockLibrary
    own: Mapping[tuple[int, BlockKind], Choice]
    keeps: bool = False
    """Whether all candidates of a layer are kept until it is left, and not those alone that are slow to make."""
    sums: dict[str, dict[tuple[int, Choice], torch.Tensor]] = field(default_factory=dict)
    """By source, nats a token of every candidate."""
    _beside: dict[Choice, OwnBlocks] = field(default_factory=dict)
    _blocks: dict[tuple[int, Choice], nn.Module] = field(default_factory=dict)
    """Those of choices that have inputs of their own."""
    _candidates: dict[tuple[int, Choice], _Candidate] = field(default_factory=dict)
    """What takes time to make, from one batch to the next."""
    _entered: dict[tuple[int, Choice], torch.Tensor] = field(default_factory=dict)
    _inputs: dict[tuple[int, BlockKind], torch.Tensor] = field(default_factory=dict)
    _batch: Batch | None = None

    def begin(self, batch: Batch) -> None:
        """What runs from now on is this batch."""
        self._batch = batch

    def totals(self) -> dict[str, dict[Assignment, float]]:
        """By source, nats a token of every candidate."""
        return {name: {key: float(nats) for key, nats in sums.items()} for name, sums in self.sums.items()}

    def leave(self, layer: int) -> None:
        """A walk is through with a layer: what was made for it goes."""
        for made in (self._blocks, self._candidates):
            for key in [key for key in made if key[0] == layer]:
                del made[key]

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """With every block watched."""
        choices = own_input_choices(self.library.space)
        self._beside = {choice: OwnBlocks(self.parent, choice, self.library) for choice in choices}
        with ExitStack() as hooks:
            for layer, kind in self.own:
                # In this order: where the projection itself adds to the stream, it puts in what `at` has first.
                output, adds = self.parent.output_projection(layer, kind), self.parent.adds_to_stream(layer, kind)
                hooks.callback(output.register_forward_hook(partial(self._project, layer, kind)).remove)
                hooks.callback(adds.register_forward_hook(partial(self._add, layer, kind)).remove)
                if choices := [choice for choice in self._beside if choice.kind == kind]:
                    block, enter = self.parent.block(layer, kind), partial(self._enter, layer, choices)
                    hooks.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
            yield

    def _enter(
        self, layer: int, choices: Sequence[Choice], _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Of a block: runs those of these choices beside it."""
        for choice in choices:
            key = layer, choice
            if key not in self._blocks:
                self._blocks[key] = self._beside[choice].of(layer)
            # Gradients of earlier layers flow through what `at` has, and through nothing else.
            is_on_the_way = choice == self._entered_as(self.own[layer, choice.kind])
            with torch.set_grad_enabled(is_on_the_way and torch.is_grad_enabled()):
                self._entered[key] = own_inputs(self._blocks[key], args, kwargs)

    def _candidate(self, layer: int, choice: Choice) -> _Candidate:
        key = layer, choice
        if key in self._candidates:
            return self._candidates[key]
        candidate = _candidate(self.parent, self.library, layer, choice)
        if choice.stored is not None or self.keeps:
            self._candidates[key] = candidate
        return candidate

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
        others = {c: self._entered.pop((layer, c)).detach() for c in self._beside if c.kind == kind}
        if output.requires_grad:
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
        batch = self._batch
        assert batch is not None, "a batch runs"
        sums = self.sums.setdefault(batch.source, {})

        def along_gradient(choice: Choice) -> torch.Tensor:
            candidate = self._candidate(layer, choice)
            entered = self._entered_as(choice)
            inputs_BTI = x_BTI if entered is None else others[entered]
            return _along_gradient(gradient_BTD.detach(), inputs_BTI, candidate, norm)

        own_N = along_gradient(mine)
        for choice in estimated_choices(self.library.space, kind):
            change_N = along_gradient(choice) - own_N if choice != mine else torch.zeros_like(own_N)
            rounds = choice.stored is not None or mine.stored is not None
            second_N = _bounded_second_order(change_N) if rounds else 0.5 * change_N.square()
            nats = (change_N + second_N).double().sum() * (batch.share / batch.predicted)
            # Not read yet: that would wait for an accelerator at every choice.
            sums[layer, choice] = sums[layer, choice] + nats if (layer, choice) in sums else nats


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


def estimated_choices(space: Space, kind: BlockKind) -> list[Choice]:
    """The choices that are estimated: of those with a type of their own, the whole blocks."""
    return [
        choice for choice in space.ladder(kind) if choice.stored is None or choice == choice.entered_as(space.shape)
    ]


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
