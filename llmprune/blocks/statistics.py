"""What the calibration tokens say about the inputs of every block's output projection.

Shapes: I inputs of the projection, N tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmprune.choices.architecture import ParentShape
from llmprune.choices.choice import Choice, OwnMoments
from llmprune.choices.dimensions import BLOCK_KINDS, BlockKind
from llmprune.core.errors import ModelError
from llmprune.data.tokens import Split
from llmprune.models.beside import OwnBlocks, own_inputs
from llmprune.models.modeling_pruned import input_axis
from llmprune.models.parent import Parent, is_norm
from llmprune.models.walk import Walk

BATCH_TOKENS = 2048
"""Tokens of one forward pass, in whole windows."""


@dataclass(frozen=True, eq=False, slots=True)
class BlockStatistics:
    """Moments of a projection's inputs `x` over the weighted mixture of sources, in float64."""

    gram_II: Tensor
    """`G = E[x x^T]`."""
    mean_I: Tensor
    """`E[x]`."""
    tokens: int
    """Tokens seen, over all sources."""
    own: Mapping[Choice, OwnMoments] = field(default_factory=dict)
    """For the choices with inputs of their own that were asked for."""
    norm_squares: Mapping[str, Tensor] = field(default_factory=dict)
    """By the name of a norm over all heads: `E[x_j^2]` (rows,) of what enters it."""
    entry_square_D: Tensor | None = None
    """`E[x_j^2]` of what enters the block's first projections, if that was asked for."""
    head_square_D: Tensor | None = None
    """`E[x_j^2]` of what enters the output head, with the FFN of the last layer, if that was asked for."""

    @property
    def mean_square_I(self) -> Tensor:
        """`E[x_j^2]`."""
        return self.gram_II.diagonal()

    @property
    def variance_I(self) -> Tensor:
        """`E[x_j^2] - E[x_j]^2`, over tokens."""
        return (self.mean_square_I - self.mean_I.square()).clamp(min=0)


def layer_statistics(
    parent: Parent,
    split: Split,
    *,
    layers: Sequence[int] | None = None,
    own: Sequence[Choice] = (),
    entries: bool = False,
    device: torch.device | None = None,
) -> Iterator[tuple[int, dict[BlockKind, BlockStatistics]]]:
    """Walk the split through the parent once and give, layer by layer, for both blocks of each of `layers` (all by
    default) what enters their output projections; while a layer's are in hand its weights are where they are computed,
    on `device` (the parent's by default). Every source counts by its weight, however many tokens it has. For each of
    `own`, choices with inputs of their own, every block is run as the choice leaves it beside the parent's, on the
    parent's own input. With `entries`, what enters the blocks is looked at too, and what enters the output head.

    A batch is multiplied out in float32 and summed in float64: summing in float32 would halve the memory, but then the
    error grows with the number of batches, and the float64 inverses of `damped_gram` start from it.
    Memory beside the parent: the residual stream of all tokens on the CPU, `statistics_bytes` of one layer, and while a
    batch runs its activations and one float32 matrix (I, I).

    Raises ModelError if an activation is not finite, or too large to be squared in float32.
    """
    wanted = sorted(range(parent.shape.layers) if layers is None else layers)
    if not wanted:
        return
    batch = max(1, BATCH_TOKENS // split.seq_len)
    batches = [
        (split.weights[name] / source.windows.numel(), ids_BT)
        for name, source in split.sources.items()
        for ids_BT in torch.split(source.windows, batch)
    ]
    walk = Walk(parent, split.seq_len, device)
    beside = {choice: OwnBlocks(parent, choice) for choice in own}
    with torch.inference_mode():
        states = [walk.embedded(ids_BT).cpu() for _, ids_BT in batches]
    for layer in range(wanted[-1] + 1):
        with walk.layer(layer) as run:
            watched = _watched(parent, layer, beside, entries) if layer in wanted else _Watched({}, ExitStack())
            with watched.hooks, torch.inference_mode():
                for number, (share, _) in enumerate(batches):
                    for block in watched.blocks.values():
                        block.token_share = share
                    states[number] = run(states[number]).cpu()
            last = watched.blocks.get("ffn")
            if entries and last is not None and layer == parent.shape.layers - 1:
                _look_behind(walk, last, zip([share for share, _ in batches], states, strict=True))
            if watched.blocks:
                yield layer, {kind: block.statistics() for kind, block in watched.blocks.items()}


class _Watched(NamedTuple):
    """The blocks of one layer whose inputs are summed up as it runs."""

    blocks: dict[BlockKind, _Moments]
    hooks: ExitStack


def _watched(parent: Parent, layer: int, beside: Mapping[Choice, OwnBlocks], entries: bool) -> _Watched:
    blocks: dict[BlockKind, _Moments] = {}
    hooks = ExitStack()
    for kind in BLOCK_KINDS:
        blocks[kind] = block = _Moments(parent, layer, kind)
        hooks.callback(parent.output_projection(layer, kind).register_forward_pre_hook(block).remove)
        for name, module in _norms_over_units(parent, layer, kind):
            squares = block.norm_squares[name] = _Squares(block, module.get_parameter("weight"))
            hooks.callback(module.register_forward_pre_hook(squares).remove)
        if entries:
            first = _first_projection(parent, layer, kind)
            block.entry = _Squares(block, first.get_parameter("weight")[0])
            hooks.callback(first.register_forward_pre_hook(block.entry).remove)
        block.beside = {c: (blocks.of(layer), _OwnSums(block)) for c, blocks in beside.items() if c.kind == kind}
        if block.beside:
            handle = parent.block(layer, kind).register_forward_pre_hook(block.enter, with_kwargs=True)
            hooks.callback(handle.remove)
    return _Watched(blocks, hooks)


def _look_behind(walk: Walk, last: _Moments, states: Iterable[tuple[float, Tensor]]) -> None:
    """Note what enters the output head."""
    with walk.last_states() as run, torch.inference_mode():
        for share, states_BTD in states:
            last.token_share = share
            found_BTD = run(states_BTD)
            if last.head is None:
                last.head = _Squares(last, found_BTD[0, 0])
            last.head.add(found_BTD)


TOKENS_AN_INPUT = 4
"""Calibration tokens for each input of an output projection, under which a refit is more luck than knowledge.

Least squares on N tokens with I inputs leaves 1 - I/N of the noise on the tokens it was fitted on, and outside, where
children are used, about 1 / (1 - I/N) of it (1 + I/(N - I - 1) for Gaussian inputs): at 4 tokens an input 4/3, at 2
twice as much, at 1 without bound. The ridge softens that, and neighbouring tokens are no independent draws.
"""


def few_tokens_warning(shape: ParentShape, tokens: int) -> str | None:
    """What to say if the widest output projection has fewer than `TOKENS_AN_INPUT` tokens an input; else None."""
    inputs = max(shape.inputs(shape.full(kind)) for kind in BLOCK_KINDS)
    wanted = TOKENS_AN_INPUT * inputs
    if tokens >= wanted:
        return None
    return (
        f"{tokens:,} calibration tokens are few for output projections of {inputs:,} inputs: what is refitted on them "
        f"fits other text worse; data.calibration_tokens={wanted} ({TOKENS_AN_INPUT} an input) would do"
    )


def statistics_bytes(shape: ParentShape, own: Sequence[Choice] = ()) -> int:
    """What the statistics of one layer take: two float64 matrices (I, I), and two means; and two matrices and a mean
    more for each of the choices with inputs of their `own`."""
    plain = sum(8 * (width * width + width) for width in (shape.inputs(shape.full(kind)) for kind in BLOCK_KINDS))
    return plain + sum(8 * (2 * width * width + width) for width in (choice.inputs(shape) for choice in own))


class _Moments:
    """Running weighted sums over the inputs of one projection, whose forward pre-hook this is."""

    def __init__(self, parent: Parent, layer: int, kind: BlockKind) -> None:
        weight_DI = parent.output_weight(layer, kind)
        self.block = f"{kind} block of layer {layer}"
        self.token_share = 0.0
        self.tokens = 0
        # Normal tensors, although the caller is in inference mode: the statistics outlive it.
        with torch.inference_mode(False):
            self.gram_II = torch.zeros(2 * weight_DI.shape[1:], dtype=torch.float64, device=weight_DI.device)
            self.mean_I = torch.zeros(weight_DI.shape[1], dtype=torch.float64, device=weight_DI.device)
        self.beside: dict[Choice, tuple[nn.Module, _OwnSums]] = {}
        self.norm_squares: dict[str, _Squares] = {}
        self.entry: _Squares | None = None
        self.head: _Squares | None = None

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Pre-hook of the block: the same input goes through those beside it first."""
        for block, sums in self.beside.values():
            sums.inputs = own_inputs(block, args, kwargs)

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        x_NI = args[0].reshape(-1, len(self.mean_I)).float()
        gram_II = self._finite(x_NI.mT @ x_NI)
        self.gram_II.add_(gram_II, alpha=self.token_share)
        self.mean_I.add_(x_NI.sum(dim=0), alpha=self.token_share)
        self.tokens += len(x_NI)
        for _, sums in self.beside.values():
            assert sums.inputs is not None, "the block is entered before its output projection"
            z_NI, sums.inputs = sums.inputs.reshape(x_NI.shape).float(), None
            sums.gram_II.add_(self._finite(z_NI.mT @ z_NI), alpha=self.token_share)
            sums.cross_II.add_(z_NI.mT @ x_NI, alpha=self.token_share)
            sums.mean_I.add_(z_NI.sum(dim=0), alpha=self.token_share)

    def _finite(self, gram_II: Tensor) -> Tensor:
        # A column of the batch with anything that is not finite has no finite sum of squares.
        if not bool(gram_II.diagonal().isfinite().all()):
            raise ModelError(
                f"activations must be finite, but those entering the output projection of the {self.block} are not; "
                "load the parent with model.dtype=float32, or check its weights"
            )
        return gram_II

    def statistics(self) -> BlockStatistics:
        own = {c: OwnMoments(sums.gram_II, sums.cross_II, sums.mean_I) for c, (_, sums) in self.beside.items()}
        squares = {name: found.square_R for name, found in self.norm_squares.items()}
        entry, head = (None if found is None else found.square_R for found in (self.entry, self.head))
        return BlockStatistics(self.gram_II, self.mean_I, self.tokens, own, squares, entry, head)


def _norms_over_units(parent: Parent, layer: int, kind: BlockKind) -> Iterator[tuple[str, nn.Module]]:
    block = parent.block(layer, kind)
    for name in parent.names(kind).rows:
        if is_norm(module := block.get_submodule(name)):
            yield name, module


def _first_projection(parent: Parent, layer: int, kind: BlockKind) -> nn.Module:
    """A projection that reads what enters the block, its weight (rows, D)."""
    block = parent.block(layer, kind)
    modules = (block.get_submodule(name) for name in parent.names(kind).rows)
    return next(module for module in modules if not is_norm(module) and input_axis(module) == 1)


class _Squares:
    """Running weighted mean square of every number that enters a module, whose forward pre-hook this may be."""

    def __init__(self, block: _Moments, weight_R: Tensor) -> None:
        self.block = block
        with torch.inference_mode(False):
            self.square_R = torch.zeros(weight_R.shape, dtype=torch.float64, device=weight_R.device)

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.add(args[0])

    def add(self, x_R: Tensor) -> None:
        """More of it: (..., R)."""
        x_NR = x_R.reshape(-1, len(self.square_R)).float().to(self.square_R.device)
        self.square_R.add_(x_NR.square().sum(dim=0), alpha=self.block.token_share)


class _OwnSums:
    """Running weighted sums over the inputs of one projection that a choice computes for itself."""

    def __init__(self, like: _Moments) -> None:
        with torch.inference_mode(False):
            self.gram_II, self.cross_II = torch.zeros_like(like.gram_II), torch.zeros_like(like.gram_II)
            self.mean_I = torch.zeros_like(like.mean_I)
        self.inputs: Tensor | None = None
        """Of the batch that is in the block right now."""
