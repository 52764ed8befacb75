"""One block solved: the order in which its units leave, and the output projection of every choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llmprune.blocks.importance import flap_scores, removal_order
from llmprune.blocks.layer_files import LayerRepairs
from llmprune.blocks.statistics import BlockStatistics
from llmprune.choices.architecture import AttentionChoice, BlockChoice, BlockKind, ParentShape
from llmprune.choices.space import Space
from llmprune.core.errors import ModelError, RecipeError
from llmprune.core.recipe import ImportanceRecipe
from llmprune.models.parent import Parent
from llmprune.models.rows import input_columns
from llmprune.numerics.refit import flap_bias, refit_nested, refit_towards


def solve_layer(
    parent: Parent, layer: int, blocks: Mapping[BlockKind, BlockStatistics], recipe: ImportanceRecipe, space: Space
) -> LayerRepairs:
    """Both blocks of a layer. Raises ModelError if a refit overflows, RecipeError if the damping is too small."""
    tensors: dict[str, Tensor] = {}
    for kind, statistics in blocks.items():
        weight_DI, bias_D = parent.output_weight(layer, kind), parent.output_bias(layer, kind)
        choices = refitted(space, kind)
        try:
            solved = solve_block(weight_DI, bias_D, statistics, parent.shape, recipe, choices, kind)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise RecipeError(
                "importance.damp must make X^T X + damp * mean(diag) positive definite, got "
                f"{recipe.damp:g} in the {kind} block of layer {layer}; use {10 * recipe.damp:g}"
            ) from error
        if recipe.method == "flap":
            unit_size = weight_DI.shape[1] // parent.shape.units(kind)
            solved |= {"score": flap_scores(weight_DI, statistics, unit_size), "mean": statistics.mean_I}
        solved |= {f"{name}/squares": squares_R for name, squares_R in statistics.norm_squares.items()}
        for name, tensor in solved.items():
            if not bool(tensor.isfinite().all()):
                raise ModelError(
                    f"the refit of the {kind} block of layer {layer} does not fit into {tensor.dtype}; "
                    "load the parent with model.dtype=float32 or bfloat16"
                )
            # A copy of its own: a bias that stays may be shared by all choices, which safetensors refuses to write.
            tensors[f"{kind}/{name}"] = tensor.cpu().clone(memory_format=torch.contiguous_format)
    return LayerRepairs(tensors)


def refitted(space: Space, kind: BlockKind) -> list[BlockChoice]:
    """Choices that keep something, but not everything."""
    return [choice for choice in space.ladder(kind) if choice.units and choice != space.shape.full(kind)]


def merged_choices(space: Space) -> list[AttentionChoice]:
    """The choices that merge KV groups: each has inputs of its own, and is solved by itself."""
    return [choice for choice in space.attention if space.shape.merges(choice) > 1]


def gathered_choices(space: Space, recipe: ImportanceRecipe) -> list[AttentionChoice]:
    """The choices for which a library needs statistics of their own: without a refit, none."""
    return merged_choices(space) if recipe.refit else []


def solve_block(
    weight_DI: Tensor,
    bias_D: Tensor | None,
    statistics: BlockStatistics,
    shape: ParentShape,
    recipe: ImportanceRecipe,
    choices: Sequence[BlockChoice],
    kind: BlockKind,
) -> dict[str, Tensor]:
    """Orders of removal, and output weight and bias of each choice: names without the kind.

    Without `recipe.refit` the weights are the parent's own columns; its bias changes for "flap" alone.
    """
    fits_bias = recipe.refit and bias_D is not None

    def ordered(unit_size: int) -> Tensor:
        return removal_order(recipe.method, weight_DI, statistics, unit_size, recipe.damp, centred=fits_bias)

    tensors = {"order": ordered(weight_DI.shape[1] // shape.units(kind))}
    merged = [c for c in choices if isinstance(c, AttentionChoice) and shape.merges(c) > 1]
    for own in merged:
        weight, bias = _merged_output(weight_DI, bias_D, statistics, recipe, own)
        tensors |= {f"{label(own)}/weight": weight} | ({} if bias is None else {f"{label(own)}/bias": bias})
    choices = [choice for choice in choices if choice not in merged]
    if any(thinned_queries(choice, shape) for choice in choices):
        tensors["query_order"] = _query_order(ordered(shape.head_dim), shape)
    for queries in sorted({thinned_queries(choice, shape) for choice in choices}):
        # Choices with as many query heads a group are nested, and solved from one factor.
        chain = sorted((c for c in choices if thinned_queries(c, shape) == queries), key=lambda choice: choice.units)
        units_U = tensors["order"].flip(0)[: chain[-1].units]
        queries_UQ = tensors["query_order"][:, -queries:][units_U] if queries else None
        columns = input_columns(units_U, shape, kind, queries_UQ)
        counts = [shape.inputs(choice) for choice in chain]
        for choice, count, (weight, bias) in zip(
            chain, counts, _outputs(weight_DI, bias_D, statistics, recipe, columns, counts), strict=True
        ):
            tensors[f"{label(choice)}/weight"] = weight[:, columns[:count].argsort()]
            if bias is not None:
                tensors[f"{label(choice)}/bias"] = bias
    return tensors


def _outputs(
    weight_DI: Tensor,
    bias_D: Tensor | None,
    statistics: BlockStatistics,
    recipe: ImportanceRecipe,
    columns: Tensor,
    counts: Sequence[int],
) -> list[tuple[Tensor, Tensor | None]]:
    """Weight and bias for the first `count` of `columns`, for each count."""
    if recipe.refit:
        mean_I = None if bias_D is None else statistics.mean_I
        return refit_nested(weight_DI, statistics.gram_II, columns, counts, recipe.damp, mean_I=mean_I, bias_D=bias_D)
    kept = [columns[:count] for count in counts]
    if recipe.method == "flap" and bias_D is not None:
        return [(weight_DI[:, some], flap_bias(weight_DI, statistics.mean_I, some, bias_D)) for some in kept]
    return [(weight_DI[:, some], bias_D) for some in kept]


def _merged_output(
    weight_DI: Tensor,
    bias_D: Tensor | None,
    statistics: BlockStatistics,
    recipe: ImportanceRecipe,
    choice: AttentionChoice,
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias behind merged KV groups: without a refit the parent's, whatever the order of units."""
    if not recipe.refit:
        return weight_DI, bias_D
    moments = statistics.merged[choice]
    means = None if bias_D is None else (moments.mean_I, statistics.mean_I)
    return refit_towards(weight_DI, moments.gram_II, moments.cross_II, recipe.damp, means_2I=means, bias_D=bias_D)


def thinned_queries(choice: BlockChoice, shape: ParentShape) -> int:
    """Query heads a group where a choice leaves some out, else 0."""
    if not isinstance(choice, AttentionChoice) or shape.merges(choice) > 1:
        return 0
    return choice.queries_per_group or 0


def _query_order(order_H: Tensor, shape: ParentShape) -> Tensor:
    """From the order in which single query heads (H,) leave to the order within each KV group: (kv_groups, queries)."""
    group_H = order_H // shape.queries_per_group
    groups = range(shape.kv_groups)
    return torch.stack([order_H[group_H == group] % shape.queries_per_group for group in groups])


def label(choice: BlockChoice) -> str:
    """How a choice is named in a layer's file: `512`, or `2x1` for two KV groups with one query head each."""
    queries = choice.queries_per_group if isinstance(choice, AttentionChoice) else None
    return f"{choice.units}" + ("" if queries is None else f"x{queries}")
