"""FLAP (arXiv 2312.11983): one threshold for the fluctuation of all units, and a bias for what left.

Shapes: D outputs of a block's output projection, I its inputs, U units of a block, N units of the whole parent.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.baselines.given import Given, Path
from llmprune.blocks.library import BlockLibrary
from llmprune.choices.architecture import Architecture
from llmprune.choices.choice import Choice
from llmprune.choices.dimensions import BLOCK_KINDS, BlockKind
from llmprune.choices.space import Space
from llmprune.models.parent import Parent
from llmprune.models.waiting import brought_home
from llmprune.numerics.refit import flap_bias
from llmprune.search.judging import Finish

SHARES = 200
"""Thresholds that are tried: as many equal shares of the parameters of all blocks."""

BIAS = "flap-bias"
"""What `compensate` is called in a child's id."""


def flap(given: Given) -> Path:
    """Ever larger shares of the blocks' parameters pruned, each by one threshold for all blocks.

    Widths are rounded to the space's ladders, and a block keeps at least its smallest choice: FLAP thins blocks.
    """
    scores = {(i, kind): given.library.fluctuation(i, kind)[0] for i, kind in given.space.blocks()}
    unit_params = {kind: params_per_unit(given.parent, kind) for kind in BLOCK_KINDS}
    last = given.space.shape.architecture
    yield last
    for step in range(1, SHARES):
        threshold = global_threshold(scores, unit_params, step / SHARES)
        architecture = at_threshold(given.space, scores, threshold)
        if architecture != last:
            last = architecture
            yield architecture


def global_threshold(
    scores: Mapping[tuple[int, BlockKind], Tensor], unit_params: Mapping[BlockKind, int], share: float
) -> float:
    """The score that units must exceed so that about `share` of the parameters of all blocks leaves.

    As in the paper, scores of attention units and of FFN channels are sorted together, while each counts by its
    parameters: an attention head of a Llama by as many as 512/3 channels.
    """
    every_N = torch.cat(list(scores.values()))
    params_N = torch.cat([torch.full_like(score_U, unit_params[kind]) for (_, kind), score_U in scores.items()])
    falling_N, order_N = every_N.sort(descending=True, stable=True)
    kept_N = params_N[order_N].cumsum(0)
    return float(falling_N[(kept_N - (1.0 - share) * kept_N[-1]).abs().argmin()])


def at_threshold(space: Space, scores: Mapping[tuple[int, BlockKind], Tensor], threshold: float) -> Architecture:
    """Each block with the choice nearest to its number of units above the threshold (the smaller of two as near)."""
    changes = []
    for (layer, kind), score_U in scores.items():
        count = int((score_U > threshold).sum())
        nearest = min(_widths(space, kind), key=lambda choice: (abs(choice.units - count), choice.units))
        changes.append((layer, nearest))
    return space.shape.architecture.with_choices(changes)


def params_per_unit(parent: Parent, kind: BlockKind) -> int:
    """Parameters that leave with one unit of a block; the output projection's bias stays."""
    names, block = parent.names(kind), parent.block(0, kind)
    own = sum(parameter.numel() for name in names.rows for parameter in block.get_submodule(name).parameters())
    return (own + parent.output_weight(0, kind).numel()) // parent.shape.units(kind)


def compensate(parent: Parent, library: BlockLibrary, child: PreTrainedModel, architecture: Architecture) -> None:
    """Give the child's output projections the biases `b' = b + W_P mean_P` that a family without them cannot hold.

    The child then computes what FLAP does, and is good for evaluation only. Where the family has biases the library
    has put them in already.
    """
    position = {layer: i for i, layer in enumerate(architecture.kept_layers)}
    for layer, choice in _without_bias(parent, architecture):
        names = parent.names(choice.kind)
        path = f"{parent.family.layers}.{position[layer]}.{names.module}.{names.output}".replace("..", ".")
        weight_DI = parent.output_weight(layer, choice.kind)
        columns_S = choice.columns(library.kept(layer, choice), parent.shape).to(weight_DI.device)
        mean_I = library.fluctuation(layer, choice.kind)[1].to(weight_DI.device)
        bias_D = flap_bias(weight_DI, mean_I, columns_S)
        child.get_submodule(path).bias = nn.Parameter(brought_home(parent.model, bias_D), requires_grad=False)


def compensation(parent: Parent, library: BlockLibrary) -> Finish:
    """`compensate`, for the children of one library."""
    return Finish(BIAS, partial(compensate, parent, library), partial(needs_bias, parent))


def needs_bias(parent: Parent, architecture: Architecture) -> bool:
    """Whether FLAP's child of this architecture has biases that its checkpoint could not hold."""
    return bool(_without_bias(parent, architecture))


def _without_bias(parent: Parent, architecture: Architecture) -> list[tuple[int, Choice]]:
    """Thinned blocks whose output projection has no bias of its own."""
    return [
        (layer, choice)
        for layer, choice in architecture.blocks()
        if choice.units and choice != parent.shape.full(choice.kind) and parent.output_bias(layer, choice.kind) is None
    ]


def _widths(space: Space, kind: BlockKind) -> list[Choice]:
    """Choices that keep some whole units: of the parent's own kind, and with all inputs of these."""
    shape, full = space.shape, space.shape.full(kind)
    of_unit = full.inputs(shape) // full.units
    same = [choice for choice in space.ladder(kind) if type(choice) is type(full) and choice.units]
    return [choice for choice in same if choice.inputs(shape) == choice.units * of_unit]
