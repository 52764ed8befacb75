"""Predict a whole child's figures from its options, by what the trials so far measured.

Four regressions compete: Ridge or RBF-SVR on one-hot options (DyNAS-T, arXiv 2205.10358), of the figure itself or of
what a straight line in the additive table's estimate leaves over. With fewer trials than options the table is the
better half of the knowledge; the line is there because additive estimates flatter (docs/decisions/0006).
Shapes: P candidates, S trials, D decisions, V one-hot variables.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from llmprune.search.samplers.ladders import Floats, Ints

Model = Literal["ridge", "svr"]
Of = Literal["value", "residual"]
FOLDS = 5
ALPHAS = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
SVR_C = 10.0
SVR_EPSILON = 0.02
"""In standard deviations of what is fitted."""

Regression = Callable[[Ints], Floats]


@dataclass(frozen=True)
class Predictor:
    """`predict(indices_PD)` gives a figure of each candidate; `mape` is the cross-validated error, as a share."""

    model: Model
    of: Of
    mape: float
    predict: Regression


def one_hot(indices_PD: Ints, options_D: Ints) -> Floats:
    """PV: one variable for each option of each decision."""
    hot_PV = np.zeros((len(indices_PD), int(options_D.sum())))
    offsets_D = np.concatenate([[0], np.cumsum(options_D)[:-1]])
    hot_PV[np.arange(len(indices_PD))[:, None], offsets_D + indices_PD] = 1.0
    return hot_PV


def fit(indices_SD: Ints, values_S: Floats, estimate: Regression, options_D: Ints) -> Predictor:
    """The regression of least cross-validated MAPE, fitted to all trials; the residual and Ridge win ties.

    `estimate` is the additive table's guess. Deterministic: the folds go by the order of the trials. Values are
    positive. At least two trials a fold.
    """
    assert len(values_S) >= 2 * FOLDS, f"{FOLDS} folds need {2 * FOLDS} trials, got {len(values_S)}"
    kinds: list[tuple[Model, Of]] = [(model, of) for of in ("residual", "value") for model in ("ridge", "svr")]
    errors = {kind: _mape(kind, indices_SD, values_S, estimate, options_D) for kind in kinds}
    # Where the table is exact, all errors are rounding.
    kind = min(kinds, key=lambda kind: round(errors[kind], 9))
    return Predictor(*kind, errors[kind], _fit_one(kind, indices_SD, values_S, estimate, options_D))


def _mape(kind: tuple[Model, Of], indices_SD: Ints, values_S: Floats, estimate: Regression, options_D: Ints) -> float:
    fold_S = np.arange(len(values_S)) % FOLDS
    errors = np.empty(len(values_S))
    for fold in range(FOLDS):
        held = fold_S == fold
        predict = _fit_one(kind, indices_SD[~held], values_S[~held], estimate, options_D)
        errors[held] = np.abs(predict(indices_SD[held]) / values_S[held] - 1.0)
    return float(errors.mean())


def _fit_one(
    kind: tuple[Model, Of], indices_SD: Ints, values_S: Floats, estimate: Regression, options_D: Ints
) -> Regression:
    model, of = kind
    line = _line(estimate, indices_SD, values_S) if of == "residual" else None
    rest_S = values_S if line is None else values_S - line(indices_SD)
    centre, scale = float(rest_S.mean()), float(rest_S.std())
    if scale <= 1e-9 * float(np.abs(values_S).max()):
        learnt: Regression = lambda indices_PD: np.zeros(len(indices_PD))  # noqa: E731
    else:
        learn = _ridge if model == "ridge" else _svr
        learnt = learn(one_hot(indices_SD, options_D), (rest_S - centre) / scale, options_D)

    def predict(indices_PD: Ints) -> Floats:
        rest_P = centre + scale * learnt(indices_PD)
        return rest_P if line is None else rest_P + line(indices_PD)

    return predict


def _line(estimate: Regression, indices_SD: Ints, values_S: Floats) -> Regression:
    """Least squares of the values on the table's estimate."""
    estimates_S = estimate(indices_SD)
    spread = float(estimates_S.var())
    covariance = float(((estimates_S - estimates_S.mean()) * (values_S - values_S.mean())).mean())
    slope = covariance / spread if spread > 0 else 0.0
    offset = float(values_S.mean() - slope * estimates_S.mean())
    return lambda indices_PD: offset + slope * estimate(indices_PD)


def _ridge(hot_SV: Floats, values_S: Floats, options_D: Ints) -> Regression:
    """Ridge with the penalty of least leave-one-out error."""
    from sklearn.linear_model import RidgeCV  # slow to import, and most runs never come here

    fitted = RidgeCV(alphas=ALPHAS).fit(hot_SV, values_S)
    return lambda indices_PD: one_hot(indices_PD, options_D) @ fitted.coef_ + fitted.intercept_


def _svr(hot_SV: Floats, values_S: Floats, options_D: Ints) -> Regression:
    """Support vector regression with an RBF kernel as wide as the trials lie apart.

    One-hot rows differ by twice their Hamming distance, squared: one matrix product gives the kernel, where libsvm
    would walk through every pair.
    """
    from sklearn.svm import SVR

    decisions = len(options_D)
    away_SS = 2.0 * (decisions - hot_SV @ hot_SV.T)
    gamma = 1.0 / max(float(away_SS.mean()), 1e-9)
    fitted = SVR(kernel="precomputed", C=SVR_C, epsilon=SVR_EPSILON).fit(np.exp(-gamma * away_SS), values_S)
    support_SV, weights_S = hot_SV[fitted.support_], fitted.dual_coef_[0]

    def predict(indices_PD: Ints) -> Floats:
        away_PS = 2.0 * (decisions - one_hot(indices_PD, options_D) @ support_SV.T)
        predicted: Floats = np.exp(-gamma * away_PS) @ weights_S + fitted.intercept_[0]
        return predicted

    return predict
