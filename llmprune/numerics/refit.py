"""Least-squares weights for what is left of a block once units have left it.

All of it is about one output projection `y = W x + b`, whose inputs `x` have the second moment `G = E[x x^T]`.
Shapes: D outputs, I inputs (columns of W), S inputs kept, U units, C columns of one unit (I = U * C).
Sources: optimal brain surgeon in the form of ZipLM (arXiv 2302.04089); the bias is FLAP's (arXiv 2312.11983).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def unit_columns(units: Tensor, unit_size: int) -> Tensor:
    """Columns of the output projection that belong to `units` (any order, kept): (U,) int64 -> (U * C,) int64."""
    return (units[:, None] * unit_size + torch.arange(unit_size, device=units.device)).flatten()


def damped_gram(gram_II: Tensor, damp: float, mean_I: Tensor | None = None) -> Tensor:
    """`H = G + damp * mean(diag G) * I` in float64; with a mean, `G` is centred first (`G - mean mean^T`).

    The ridge pulls the refit towards the parent's weights, not towards zero: the refit minimises
    `tr((W - W') H (W - W')^T)` over `W'` with zeros in the removed columns.
    """
    gram = gram_II.double()
    hessian = gram.clone() if mean_I is None else torch.addr(gram, mean_I.double(), mean_I.double(), alpha=-1)
    ridge = damp * hessian.diagonal().mean()
    # A block whose inputs never vary has nothing to fit: any ridge makes it keep the parent's weights.
    hessian.diagonal().add_(torch.where(ridge > 0, ridge, 1.0))
    return hessian


def refit(
    weight_DI: Tensor,
    gram_II: Tensor,
    kept_S: Tensor,
    damp: float,
    *,
    mean_I: Tensor | None = None,
    bias_D: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`refit_nested` for one set of columns: the weight (D, S), its columns in the order of `kept_S`, and the bias."""
    return refit_nested(weight_DI, gram_II, kept_S, [len(kept_S)], damp, mean_I=mean_I, bias_D=bias_D)[0]


def refit_nested(
    weight_DI: Tensor,
    gram_II: Tensor,
    columns_S: Tensor,
    counts: Sequence[int],
    damp: float,
    *,
    mean_I: Tensor | None = None,
    bias_D: Tensor | None = None,
) -> list[tuple[Tensor, Tensor | None]]:
    """For each count, the least-squares weight (D, count) and bias (D,) for the first `count` of `columns_S`.

    `W'_S = W H[:,S] H[S,S]^-1`, solved in float64 through one Cholesky factor of `H[columns,columns]` whose leading
    blocks are the factors of every prefix. Results come in the dtype of `weight_DI`.

    With `mean_I` the projection may have a bias: minimising `E||W x + b - W' x_S - b'||^2` over `b'` first gives
    `b' = b + W mean - W' mean_S`, and puts it back as the same problem in centred inputs, so `H` is centred
    (a missing `bias_D` counts as 0). Without `mean_I` the bias is returned as it came.
    When every column is kept, weight and bias are the parent's bit for bit.

    Raises torch.linalg.LinAlgError if `damp` is too small for the factor to exist.
    """
    hessian_II = damped_gram(gram_II, damp, mean_I)
    weight64_DI = weight_DI.to(hessian_II)
    factor_SS = torch.linalg.cholesky(hessian_II.index_select(0, columns_S).index_select(1, columns_S))
    target_SD = hessian_II.index_select(0, columns_S) @ weight64_DI.mT
    half_SD = torch.linalg.solve_triangular(factor_SS, target_SD, upper=False)
    results: list[tuple[Tensor, Tensor | None]] = []
    for count in counts:
        columns = columns_S[:count]
        if count == weight_DI.shape[1]:
            results.append((weight_DI[:, columns], bias_D))
            continue
        solved = torch.linalg.solve_triangular(factor_SS[:count, :count].mT, half_SD[:count], upper=True).mT
        bias = bias_D
        if mean_I is not None:
            mean = mean_I.to(hessian_II)
            shift_D = weight64_DI @ mean - solved @ mean[columns]
            bias = (shift_D if bias_D is None else bias_D.to(hessian_II) + shift_D).to(weight_DI)
        results.append((solved.to(weight_DI), bias))
    return results


def refit_towards(
    weight_DI: Tensor,
    gram_II: Tensor,
    cross_II: Tensor,
    damp: float,
    *,
    means_2I: tuple[Tensor, Tensor] | None = None,
    bias_D: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The weight (D, I) that makes other inputs `z` give what the parent's `x` gave, as nearly as squares tell.

    With `gram_II = E[z z^T]` and `cross_II = E[z x^T]`: `W' = W + W (cross^T - gram) H^-1`, `H` the `damped_gram` of z.
    It minimises `E||W x - W' z||^2 + ridge * ||W - W'||^2`, so the ridge pulls towards the parent's weight, and with
    `z = x` the weight is the parent's. With the means of z and x both moments are centred, and the bias (D,) takes up
    what is left, as in `refit_nested`. Float64 inside; results in the dtype of `weight_DI`.

    Raises torch.linalg.LinAlgError if `damp` is too small.
    """
    gram, cross = gram_II.double(), cross_II.double()
    factor_II = torch.linalg.cholesky(damped_gram(gram_II, damp, None if means_2I is None else means_2I[0]))
    if means_2I is not None:
        mean_z, mean_x = (mean.to(gram) for mean in means_2I)
        gram = torch.addr(gram, mean_z, mean_z, alpha=-1)
        cross = torch.addr(cross, mean_z, mean_x, alpha=-1)
    weight64_DI = weight_DI.to(gram)
    change_ID = torch.cholesky_solve((cross - gram) @ weight64_DI.mT, factor_II)
    solved = weight64_DI + change_ID.mT
    if means_2I is None:
        return solved.to(weight_DI), bias_D
    shift_D = weight64_DI @ mean_x - solved @ mean_z
    return solved.to(weight_DI), (shift_D if bias_D is None else bias_D.to(gram) + shift_D).to(weight_DI)


def flap_bias(weight_DI: Tensor, mean_I: Tensor, kept_S: Tensor, bias_D: Tensor | None = None) -> Tensor:
    """The bias (D,) that carries the mean output of the removed columns, the kept ones being left as they are.

    `b' = b + W_P mean_P` (FLAP, arXiv 2312.11983), in the dtype of `weight_DI`; a missing bias counts as 0.
    """
    removed = torch.ones(weight_DI.shape[1], dtype=torch.bool, device=weight_DI.device)
    removed[kept_S] = False
    shift_D = weight_DI[:, removed].double() @ mean_I[removed].double()
    return (shift_D if bias_D is None else bias_D.double() + shift_D).to(weight_DI.dtype)


def reconstruction_loss(weight_DI: Tensor, gram_II: Tensor, kept_S: Tensor, new_weight_DS: Tensor) -> float:
    """`E||W x - W' x_S||^2 = tr((W - W') G (W - W')^T)`, in squared units of the block's output, per token.

    Pass `damped_gram` for the loss that the refit minimises, or a centred gram where a bias takes up the mean.
    """
    delta_DI = weight_DI.double().clone()
    delta_DI[:, kept_S] -= new_weight_DS.double()
    return float(torch.einsum("di,ij,dj->", delta_DI, gram_II.double(), delta_DI))
