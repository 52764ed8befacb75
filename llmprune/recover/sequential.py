"""Sequential refit: the output projections of a chosen child, solved again block by block on the child's own inputs.

A library's refit gives back what a block lost, on the parent's inputs. Here each kept block of a child is solved
towards the parent's residual stream just before the child's *next* kept block, on the inputs that the child itself
computes: a block gives back what those before it lost and what dropped ones after it would have added (ReplaceMe, arXiv
2505.02819, without new parameters). No gradients, and one pass over the tokens, layer by layer.

Shapes: W windows, B of a batch, T tokens of a window, N tokens, D hidden size, I inputs of an output projection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.choices.architecture import Architecture
from llmprune.choices.dimensions import BlockKind
from llmprune.core.progress import Advance
from llmprune.data.tokens import Split
from llmprune.measure.quality.perplexity import score
from llmprune.models.modeling_pruned import input_axis
from llmprune.models.parent import Parent
from llmprune.models.stored import as_stored
from llmprune.models.streams import (
    BATCH_TOKENS,
    Call,
    GivenAttention,
    Shelf,
    embedded,
    instead_of,
    layer_calls,
    until,
)
from llmprune.models.waiting import part_at_home
from llmprune.recover.held_out import windows_of
from llmprune.recover.least_squares import LeastSquares

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of the way from the weights that are there to what was solved, tried on held-out tokens."""

Stop = tuple[int, tuple[BlockKind, ...]]
"""A layer of the parent, and its kept blocks that are solved together."""


@dataclass(frozen=True)
class BlockRefit:
    """What the refit of one stop did, in squared distance to the parent's stream on held-out tokens."""

    layer: int
    kinds: tuple[BlockKind, ...]
    ridge: float | None
    """None: the weights that are there were better than any other."""
    error_before: float
    error_after: float


@dataclass(frozen=True, eq=False)
class SequentialRefit:
    tensors: Mapping[str, Tensor]
    """By the names of the child's parameters; the child is untouched."""
    blocks: Sequence[BlockRefit]


def refit_sequentially(
    parent: Parent,
    child: PreTrainedModel,
    architecture: Architecture,
    split: Split,
    *,
    memory_bytes: int = 4 << 30,
    scratch: Path | None = None,
    progress: Advance = lambda done, total: None,
) -> SequentialRefit:
    """`R = t - h - W x` and `W' = W + R^T X (X^T X + ridge I)^-1`: x the child's inputs of an output projection, h its
    stream before the block, t the parent's before the child's next kept block. Every token counts by one over the
    mean square of t, since the norm that reads the stream divides by it. The ridge, which pulls towards the weights
    that are there, is chosen stop by stop on held-out windows, and where none helps the weights stay. Where a
    projection has a bias the moments are centred, and the bias is solved too.

    Where a norm follows the block (Gemma 2 and 3, OLMo 2) it is taken as it is at the weights that are there: the
    inputs are divided by the scale of its input, the residual by its gain. Blocks of a parallel residual (GPT-NeoX)
    are solved together.

    Memory beside the models: four streams (W, T, D) and the inputs (W, T, I) of one stop, in files below `scratch`
    where they exceed `memory_bytes`; two float64 matrices (I, I). Of a parent that waits (see `models/waiting.py`) one
    layer at a time is beside the child. `progress` counts stops.
    """
    stops = stops_of(parent, architecture)
    with torch.inference_mode(), Shelf(memory_bytes, scratch) as shelf:
        walk = _Walk(parent, child, architecture, split, shelf)
        blocks = []
        for done, stop in enumerate(stops):
            progress(done, len(stops))
            after = stops[done + 1] if done + 1 < len(stops) else None
            blocks.append(walk.solve(stop, after))
        progress(len(stops), len(stops))
    return SequentialRefit({name: tensor.clone() for name, tensor in walk.solved.items()}, blocks)


def on_the_way(child: PreTrainedModel, solved: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Tensors that go a share of the way from the child's own to what was solved."""
    own = child.state_dict()
    return {name: torch.lerp(own[name], value.to(own[name]), share) for name, value in solved.items()}


def nats_on_the_way(
    child: PreTrainedModel, solved: Mapping[str, Tensor], judged_by: Split, progress: Advance
) -> dict[float, float]:
    """Nats a token of the child with its tensors moved by each of SHARES towards what was solved; 0: as it is.

    What squares gain goes with the share, and what few tokens have put into the solution by chance with its square: a
    part of the way has most of the one and little of the other. The child is as it was afterwards.
    """
    own, nats = {name: child.state_dict()[name] for name in solved}, {}
    for done, share in enumerate(SHARES):
        progress(done, len(SHARES))
        # As it would be stored: what a refit gains may be lost in rounding again.
        moved = as_stored(child, on_the_way(child, solved, share)) if share else own
        child.load_state_dict(moved, strict=False, assign=True)
        nats[share] = score(child, judged_by).nats_per_token
        child.load_state_dict(own, strict=False, assign=True)
    return nats


def stops_of(parent: Parent, architecture: Architecture) -> list[Stop]:
    """The kept blocks in the order in which the stream meets them."""
    kept = [(i, tuple(c.kind for c in layer.blocks if c.units)) for i, layer in enumerate(architecture.layers)]
    if parent.parallel_residual:
        return [(i, kinds) for i, kinds in kept if kinds]
    return [(i, (kind,)) for i, kinds in kept for kind in kinds]


class _ParentStream:
    """The parent's residual stream on all windows, before and in the middle of one layer after another."""

    def __init__(self, parent: Parent, windows_WT: Tensor, batches: Sequence[slice], shelf: Shelf) -> None:
        self._parent, self._batches, self._at, self._has_run = parent, batches, 0, False
        self._layers = [parent.layer(index) for index in range(parent.shape.layers)]
        shape = (*windows_WT.shape, parent.shape.hidden_size)
        self._before, self._middle, self._after = (shelf.place(shape, parent.model.dtype) for _ in range(3))
        with part_at_home(parent.model, parent.outside_layers()):
            self._calls = layer_calls(parent.model, self._layers, windows_WT.shape[1])
            for rows in batches:
                self._before[rows] = embedded(parent.model, self._layers[0], windows_WT[rows]).to("cpu")

    def behind_all(self) -> Tensor:
        """What the last layer gives."""
        return self.before(len(self._layers), "attention")

    def before(self, layer: int, kind: BlockKind) -> Tensor:
        """What the block reads, (W, T, D), to be used at once; asked for in the order of the stream."""
        while self._at < layer:
            self._run()
            self._before, self._after = self._after, self._before
            self._at, self._has_run = self._at + 1, False
        if kind == "attention" or self._parent.parallel_residual:
            return self._before
        self._run()
        return self._middle

    def _run(self) -> None:
        if self._has_run:
            return
        layer, scale = self._layers[self._at], self._parent.stream_scale
        adds = self._parent.adds_to_stream(self._at, "attention")
        seen: list[Tensor] = []
        handle = adds.register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            with part_at_home(self._parent.model, layer.modules()):
                for rows in self._batches:
                    before_BTD = self._before[rows].to(self._parent.device)
                    after_BTD = self._calls[self._at](layer, before_BTD)
                    self._after[rows] = after_BTD.to("cpu")
                    self._middle[rows] = (before_BTD + scale * seen.pop().view_as(before_BTD)).to("cpu")
        finally:
            handle.remove()
        self._has_run = True


@dataclass(frozen=True)
class _Projection:
    """An output projection of the child as it is now."""

    name: str
    """Of the module, within the child."""
    weight_DI: Tensor
    bias_D: Tensor | None


class _Walk:
    """The child's stream on its way through the layers, and what was solved so far."""

    def __init__(
        self, parent: Parent, child: PreTrainedModel, architecture: Architecture, split: Split, shelf: Shelf
    ) -> None:
        windows_WT, self._share_W, self._fit_W = windows_of(split)
        batch = max(1, BATCH_TOKENS // split.seq_len)
        self._batches = [slice(i, i + batch) for i in range(0, len(windows_WT), batch)]
        self._parent, self._child = parent, child
        self._layers = list(child.get_submodule(parent.family.layers).children())
        self._calls = layer_calls(child, self._layers, windows_WT.shape[1])
        self._position = {layer: i for i, layer in enumerate(architecture.kept_layers)}
        self._parents = _ParentStream(parent, windows_WT, self._batches, shelf)
        self._stream_WTD = shelf.place((*windows_WT.shape, parent.shape.hidden_size), parent.model.dtype)
        self._stream_WTD.copy_(self._parents.before(0, "attention"))
        shape = parent.shape
        together = sum if parent.parallel_residual else max
        most = max(together(choice.inputs(shape) for choice in layer.blocks) for layer in architecture.layers)
        self._inputs_N = shelf.place((windows_WT.numel() * most,), parent.model.dtype)
        self._attention: dict[int, _Projection] = {}
        self.solved: dict[str, Tensor] = {}

    def solve(self, stop: Stop, after: Stop | None) -> BlockRefit:
        """Solve a stop, and take the stream through it."""
        layer, kinds = stop
        projections = [self._projection(layer, kind) for kind in kinds]
        widths = [projection.weight_DI.shape[1] for projection in projections]
        inputs_WTI = self._inputs_N[: self._stream_WTD[..., 0].numel() * sum(widths)]
        inputs_WTI = inputs_WTI.view(*self._stream_WTD.shape[:2], sum(widths))
        for rows in self._batches:
            inputs_WTI[rows] = self._inputs(layer, kinds, self._stream_WTD[rows]).to("cpu")
        target_WTD = self._parents.behind_all() if after is None else self._parents.before(after[0], after[1][0])
        weight_DI = torch.cat([projection.weight_DI for projection in projections], dim=1)
        biases = [projection.bias_D for projection in projections if projection.bias_D is not None]
        bias_D = torch.stack(biases).sum(0) if biases else None
        problem = LeastSquares(
            inputs_WTI,
            self._stream_WTD,
            target_WTD,
            weight_DI,
            bias_D,
            None if len(kinds) > 1 else self._norm(layer, kinds[0]),
            self._parent.stream_scale,
            self._share_W,
            self._batches,
        )
        ridge, weight_DI, new_bias_D, before, error = problem.solve(self._fit_W)
        for rows in self._batches:
            problem.add(rows, weight_DI, new_bias_D)
        if ridge is not None:
            shift_D = None if bias_D is None or new_bias_D is None else (new_bias_D - bias_D) / len(biases)
            for projection, solved_DI in zip(projections, torch.split(weight_DI, widths, dim=1), strict=True):
                self._store(projection, solved_DI, shift_D)
        return BlockRefit(layer, kinds, ridge, before, error)

    def _store(self, projection: _Projection, weight_DI: Tensor, shift_D: Tensor | None) -> None:
        module = self._child.get_submodule(projection.name)
        weight = weight_DI if input_axis(module) == 1 else weight_DI.T
        self.solved[f"{projection.name}.weight"] = weight.contiguous()
        if projection.bias_D is not None and shift_D is not None:
            self.solved[f"{projection.name}.bias"] = projection.bias_D + shift_D

    def _projection(self, layer: int, kind: BlockKind) -> _Projection:
        names = self._parent.names(kind)
        path = ".".join(part for part in (names.module, names.output) if part)
        name = f"{self._parent.family.layers}.{self._position[layer]}.{path}"
        module = self._child.get_submodule(name)
        weight = module.get_parameter("weight").detach()
        bias = getattr(module, "bias", None)
        return _Projection(
            name, weight if input_axis(module) == 1 else weight.T, None if bias is None else bias.detach()
        )

    def _norm(self, layer: int, kind: BlockKind) -> nn.Module | None:
        name = self._parent.names(kind).output_norm
        return None if name is None else self._layers[self._position[layer]].get_submodule(name)

    def _inputs(self, layer: int, kinds: tuple[BlockKind, ...], stream_BTD: Tensor) -> Tensor:
        """What enters the output projections of a layer whose blocks read this stream, side by side: (B, T, I)."""
        module, call = self._layers[self._position[layer]], self._calls[self._position[layer]]
        stream_BTD = stream_BTD.to(self._child.device)
        if kinds == ("ffn",) and not self._parent.parallel_residual:
            # The stream is behind the attention already.
            return self._behind_attention(module, call, layer, stream_BTD)
        seen = []
        for kind in kinds:
            output = self._child.get_submodule(self._projection(layer, kind).name)
            seen.append(until(output, partial(call, module, stream_BTD))[0])
        return torch.cat([inputs.reshape(*stream_BTD.shape[:2], -1) for inputs in seen], dim=-1)

    def _behind_attention(self, module: nn.Module, call: Call, layer: int, stream_BTD: Tensor) -> Tensor:
        nothing = GivenAttention()
        nothing.output_BTD = torch.zeros_like(stream_BTD)
        output = self._child.get_submodule(self._projection(layer, "ffn").name)
        with instead_of(module, self._parent.family.attention.module, nothing):
            inputs = until(output, partial(call, module, stream_BTD))[0]
        return inputs.reshape(*stream_BTD.shape[:2], -1)
