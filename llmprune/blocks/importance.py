"""In which order units leave a block: the least important first.

An order is nested by construction: a child that keeps `k` units keeps the last `k` of it.
Shapes: D outputs of the block's output projection, I its inputs, U units, C columns of one unit (I = U * C),
A columns still there, R columns removed in one step, K = A - R.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from llmprune.blocks.statistics import BlockStatistics
from llmprune.numerics.refit import damped_gram, unit_columns

ImportanceMethod = Literal["obs", "magnitude", "wanda-sp", "flap"]


def removal_order(
    method: ImportanceMethod,
    weight_DI: Tensor,
    statistics: BlockStatistics,
    unit_size: int,
    damp: float,
    *,
    centred: bool = False,
    channel_batch: int = 32,
) -> Tensor:
    """All units of a block as (U,) int64, in the order in which they are removed.

    `damp`, `centred` (a bias will take up the mean of what leaves) and `channel_batch` (units of one column
    that leave in a step) matter to "obs" alone; see `obs_order`.
    Raises torch.linalg.LinAlgError if `damp` is too small.
    """
    if method == "obs":
        hessian_II = damped_gram(statistics.gram_II, damp, statistics.mean_I if centred else None)
        return obs_order(weight_DI, hessian_II, unit_size, batch=channel_batch if unit_size == 1 else 1)
    if method == "magnitude":
        scores_U = magnitude_scores(weight_DI, unit_size)
    elif method == "wanda-sp":
        scores_U = wanda_sp_scores(weight_DI, statistics, unit_size)
    else:
        scores_U = flap_scores(weight_DI, statistics, unit_size)
    return torch.argsort(scores_U, stable=True)


def magnitude_scores(weight_DI: Tensor, unit_size: int) -> Tensor:
    """`||W[:,j]||_2`, summed over the unit's columns: (U,)."""
    columns_I: Tensor = torch.linalg.vector_norm(weight_DI.double(), dim=0)
    return columns_I.view(-1, unit_size).sum(dim=1)


def wanda_sp_scores(weight_DI: Tensor, statistics: BlockStatistics, unit_size: int) -> Tensor:
    """`mean_i |W[i,j]| * sqrt(E[x_j^2])`, summed over the unit's columns: (U,).

    Wanda (arXiv 2306.11695) in the structured form of FLAP's authors; the root mean square stands for `||X_j||_2`,
    from which it differs by a factor that all columns share.
    """
    columns_I = weight_DI.double().abs().mean(dim=0).to(statistics.gram_II) * statistics.mean_square_I.sqrt()
    return columns_I.view(-1, unit_size).sum(dim=1)


def flap_scores(weight_DI: Tensor, statistics: BlockStatistics, unit_size: int) -> Tensor:
    """Standardised fluctuation, comparable across layers and kinds: (U,), for one global threshold.

    `Var(x_j) * ||W[:,j]||^2`, z-scored over the block's columns, then averaged over the unit's
    (FLAP, arXiv 2312.11983).
    """
    columns_I = statistics.variance_I * weight_DI.double().square().sum(dim=0).to(statistics.gram_II)
    centred_I = columns_I - columns_I.mean()
    # Columns that are all alike have no spread to divide by; their scores are then all zero.
    standard_I = centred_I / columns_I.std().clamp(min=torch.finfo(torch.float64).tiny)
    return standard_I.view(-1, unit_size).mean(dim=1)


class Elimination(NamedTuple):
    """What is left after columns were removed."""

    weight_DK: Tensor  # the re-solved weight of the remaining columns, in their old order
    inverse_KK: Tensor  # inverse of H restricted to the remaining columns
    loss: Tensor  # what the removal adds to tr((W - W') H (W - W')^T), a scalar


def inverse(hessian_II: Tensor) -> Tensor:
    """Inverse of a positive definite matrix. Raises torch.linalg.LinAlgError if rounding made it indefinite."""
    factor_II = torch.linalg.cholesky(hessian_II)
    # Half the time of torch.cholesky_inverse at I = 1536, and steadier on a busy machine.
    root_II: Tensor = torch.linalg.solve_triangular(factor_II, torch.eye(len(factor_II)).to(factor_II), upper=False)
    return root_II.mT @ root_II


def eliminate(weight_DA: Tensor, inverse_AA: Tensor, removed_R: Tensor) -> Elimination:
    """Remove columns and let the rest make up for them (structured OBS; ZipLM, arXiv 2302.04089).

    With `Hinv_RR = L L^T`, `V = L^-1 Hinv_RK` and `Y = L^-1 W_R^T`:
    `W_K - W_R Hinv_RR^-1 Hinv_RK = W_K - Y^T V`, `Hinv_KK - V^T V`, and the loss is `||Y||^2`.
    """
    remaining = torch.ones(weight_DA.shape[1], dtype=torch.bool, device=weight_DA.device)
    remaining[removed_R] = False
    kept_K = remaining.nonzero().flatten()
    rows_RA = inverse_AA.index_select(0, removed_R)
    factor_RR = torch.linalg.cholesky(rows_RA.index_select(1, removed_R))
    y_RD = torch.linalg.solve_triangular(factor_RR, weight_DA.index_select(1, removed_R).mT, upper=False)
    v_RK = torch.linalg.solve_triangular(factor_RR, rows_RA.index_select(1, kept_K), upper=False)
    return Elimination(
        weight_DA.index_select(1, kept_K).addmm_(y_RD.mT, v_RK, alpha=-1),
        inverse_AA.index_select(0, kept_K).index_select(1, kept_K).addmm_(v_RK.mT, v_RK, alpha=-1),
        y_RD.square().sum(),
    )


def obs_order(weight_DI: Tensor, hessian_II: Tensor, unit_size: int, *, batch: int) -> Tensor:
    """Units (U,) int64 in the order of structured OBS: the `batch` least scores leave, the rest is re-solved, again.

    The score of unit j is `tr(W_j (Hinv_jj)^-1 W_j^T)`: the loss of removing it alone from what is left.
    `hessian_II` is a `damped_gram`. Cost, in float64: one inverse of H and
    `I^3 / 3` multiply-adds for the updates, whatever the batch; small batches are bound by memory traffic instead.
    """
    weight_DA = weight_DI.to(hessian_II)
    inverse_AA = inverse(hessian_II)
    active_U = torch.arange(weight_DI.shape[1] // unit_size, device=hessian_II.device)
    order = []
    while len(active_U) > 0:
        leaving = torch.argsort(_obs_scores(weight_DA, inverse_AA, unit_size), stable=True)[:batch]
        order.append(active_U[leaving])
        remaining = torch.ones_like(active_U, dtype=torch.bool)
        remaining[leaving] = False
        active_U = active_U[remaining]
        weight_DA, inverse_AA, _ = eliminate(weight_DA, inverse_AA, unit_columns(leaving, unit_size))
    return torch.cat(order)


def _obs_scores(weight_DA: Tensor, inverse_AA: Tensor, unit_size: int) -> Tensor:
    if unit_size == 1:
        return weight_DA.square().sum(dim=0) / inverse_AA.diagonal()
    units = len(inverse_AA) // unit_size
    blocks = inverse_AA.view(units, unit_size, units, unit_size).diagonal(dim1=0, dim2=2)
    factors_UCC = torch.linalg.cholesky(blocks.permute(2, 0, 1))
    weights_UCD = weight_DA.mT.reshape(units, unit_size, -1)
    solved_UCD: Tensor = torch.linalg.solve_triangular(factors_UCC, weights_UCD, upper=False)
    return solved_UCD.square().sum(dim=(1, 2))
