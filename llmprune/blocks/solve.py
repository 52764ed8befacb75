"""One block solved: the order in which its units leave, and the output projection of every choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llmprune.blocks.changes import stored_change
from llmprune.blocks.importance import flap_scores, removal_order
from llmprune.blocks.layer_files import LayerRepairs
from llmprune.blocks.statistics import BlockStatistics
from llmprune.choices.architecture import ParentShape
from llmprune.choices.choice import Choice, Projection
from llmprune.choices.dimensions import BLOCK_KINDS, BlockKind
from llmprune.choices.kinds import by_kind
from llmprune.choices.space import Space
from llmprune.core.errors import ModelError, RecipeError
from llmprune.core.recipe import ImportanceRecipe
from llmprune.models.parent import Parent


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
        if statistics.entry_square_D is not None:
            solved |= {"entry_squares": statistics.entry_square_D, "output_squares": statistics.mean_square_I}
        if statistics.head_square_D is not None:
            solved["head_squares"] = statistics.head_square_D
        for tensor in solved.values():
            # Weights and biases will be written in the parent's dtype, in which they may have no number.
            written = tensor.to(parent.model.dtype) if tensor.dtype == weight_DI.dtype else tensor
            if not bool(written.isfinite().all()):
                raise ModelError(
                    f"the refit of the {kind} block of layer {layer} does not fit into {written.dtype}; "
                    "load the parent with model.dtype=float32 or bfloat16"
                )
        for name, tensor in _as_stored(solved, weight_DI, choices, parent.shape).items():
            # A copy of its own: a bias that stays may be shared by all choices, which safetensors refuses to write.
            tensors[f"{kind}/{name}"] = tensor.cpu().clone(memory_format=torch.contiguous_format)
    return LayerRepairs(tensors)


def _as_stored(
    solved: Mapping[str, Tensor], weight_DI: Tensor, choices: Sequence[Choice], shape: ParentShape
) -> dict[str, Tensor]:
    """Weights as what they change of the parent's columns, all else as it is."""
    stored = dict(solved)
    for choice in choices:
        columns_S = choice.columns(choice.kept(solved, shape), shape)
        parents_DS = weight_DI.index_select(1, columns_S.to(weight_DI.device))
        parts = stored_change(stored.pop(f"{choice.label}/weight"), parents_DS)
        stored |= {f"{choice.label}/{name}": tensor for name, tensor in parts.items()}
    return stored


def refitted(space: Space, kind: BlockKind) -> list[Choice]:
    """Choices that keep something, but not everything; the types of weights apart."""
    plain = (choice for choice in space.ladder(kind) if choice.stored is None)
    return [choice for choice in plain if choice.units and choice != space.shape.full(kind)]


def own_input_choices(space: Space) -> list[Choice]:
    """The choices whose blocks compute what enters the output projections of some."""
    found = (choice.entered_as(space.shape) for kind in BLOCK_KINDS for choice in space.ladder(kind))
    return list(dict.fromkeys(choice for choice in found if choice is not None))


def gathered_choices(space: Space, recipe: ImportanceRecipe) -> list[Choice]:
    """The choices for which a library needs statistics of their own: those that a refit fits to inputs of their own."""
    return [choice for choice in own_input_choices(space) if choice.stored is None] if recipe.refit else []


def offers_types(space: Space) -> bool:
    """Whether some choices store weights in a type of their own: rounding is weighed by what enters the blocks."""
    return any(choice.stored for kind in BLOCK_KINDS for choice in space.ladder(kind))


def solve_block(
    weight_DI: Tensor,
    bias_D: Tensor | None,
    statistics: BlockStatistics,
    shape: ParentShape,
    recipe: ImportanceRecipe,
    choices: Sequence[Choice],
    kind: BlockKind,
) -> dict[str, Tensor]:
    """Orders of removal, and output weight and bias of each choice: names without the kind."""
    fits_bias = recipe.refit and bias_D is not None

    def ordered(unit_size: int) -> Tensor:
        return removal_order(recipe.method, weight_DI, statistics, unit_size, recipe.damp, centred=fits_bias)

    order_U = ordered(weight_DI.shape[1] // shape.units(kind))
    projection = Projection(
        weight_DI, bias_D, statistics.gram_II, statistics.mean_I, statistics.own, shape, recipe, order_U, ordered
    )
    tensors = {"order": order_U}
    for kind_of_choice, own in by_kind(choices):
        tensors |= kind_of_choice.solve(own, projection)
    return tensors
