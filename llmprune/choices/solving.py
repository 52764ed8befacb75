"""Refits that kinds of choices share: nested choices are solved from one factor.

Shapes: D outputs and I inputs of the output projection, S inputs that the largest choice of a chain keeps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from llmprune.choices.choice import Choice, Projection, RefitWork
from llmprune.choices.dimensions import Dimensions
from llmprune.numerics.refit import flap_bias, refit_nested


def named(choice: Choice, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    """An output weight and bias, as a library stores them."""
    yield f"{choice.label}/weight", weight
    if bias is not None:
        yield f"{choice.label}/bias", bias


def solve_chain(chain: Sequence[Choice], columns_S: Tensor, projection: Projection) -> Iterator[tuple[str, Tensor]]:
    """Output weight and bias of choices that keep the first of `columns_S` (S,), as many as each has inputs; columns of
    a weight ascend. Without a refit they are the parent's own, and the bias changes for "flap" alone."""
    counts = [choice.inputs(projection.shape) for choice in chain]
    for choice, count, (weight, bias) in zip(chain, counts, _outputs(projection, columns_S, counts), strict=True):
        yield from named(choice, weight[:, columns_S[:count].argsort()], bias)


def _outputs(projection: Projection, columns_S: Tensor, counts: Sequence[int]) -> list[tuple[Tensor, Tensor | None]]:
    """Weight and bias for the first `count` of the columns, for each count."""
    weight_DI, bias_D, recipe = projection.weight_DI, projection.bias_D, projection.recipe
    if recipe.refit:
        mean_I = None if bias_D is None else projection.mean_I
        return refit_nested(weight_DI, projection.gram_II, columns_S, counts, recipe.damp, mean_I=mean_I, bias_D=bias_D)
    kept = [columns_S[:count] for count in counts]
    if recipe.method == "flap" and bias_D is not None:
        return [(weight_DI[:, some], flap_bias(weight_DI, projection.mean_I, some, bias_D)) for some in kept]
    return [(weight_DI[:, some], bias_D) for some in kept]


def chain_work(chain: Sequence[Choice], inputs: int, shape: Dimensions) -> RefitWork:
    """Of `solve_chain`, in a block with so many inputs.

    One factor S^3 / 3 and its right-hand side, then S^2 D a choice. Held are H (I, I), its rows (S, I) and factor
    (S, S) or, later, two copies of the factor and the right-hand sides (S, D).
    """
    counts, outputs = [choice.inputs(shape) for choice in chain], shape.hidden_size
    most = max(counts)
    shared = most**3 // 3 + 2 * most * inputs * outputs + most**2 * outputs
    factored = inputs**2 + most * inputs + 2 * most**2
    substituted = inputs**2 + 3 * most**2 + 4 * most * outputs
    return RefitWork(
        flops=shared + sum(count**2 * outputs for count in counts),
        numbers=inputs * outputs + max(factored, substituted),
    )
