"""Output projections as a library stores them: what a refit changed of the parent's columns, in 8 bits.

A refitted weight is the parent's columns plus a difference that is much smaller: a coarse step of the difference is a
fine one of the weight, and takes half of what the weight itself would in 16 bits. One scale a row and one a column fit
it: columns whose inputs vary little are changed most, and some rows are a hundred times the others (massive
activations, arXiv 2402.17762).

Shapes: D outputs, S inputs that a choice keeps.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_STEPS = 127
_CHANGE, _ROWS, _COLUMNS = "change", "change_rows", "change_columns"
CHANGE_PARTS = (_CHANGE, _ROWS, _COLUMNS)
"""Names of what `stored_change` gives: (D, S) int8, (D,) and (S,) float32."""


def stored_change(weight_DS: Tensor, parents_DS: Tensor) -> dict[str, Tensor]:
    """The difference of a weight to the parent's columns; nothing where there is none."""
    change_DS = weight_DS.float() - parents_DS.float()
    # A row that does not change has no size to divide by, and any will do.
    rows_D = change_DS.abs().mean(dim=1)
    rows_D = torch.where(rows_D > 0, rows_D, 1.0)
    columns_S = (change_DS / rows_D[:, None]).abs().amax(dim=0) / _STEPS
    if not bool(columns_S.any()):
        return {}
    steps_DS = change_DS / rows_D[:, None] / torch.where(columns_S > 0, columns_S, 1.0)
    return {_CHANGE: steps_DS.round().to(torch.int8), _ROWS: rows_D, _COLUMNS: columns_S}


def changed(parents_DS: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
    """The weight (D, S), from the parent's columns and what `stored_change` gave of it, where and as those are."""
    if not stored:
        return parents_DS
    steps_DS, rows_D, columns_S = (stored[name].to(parents_DS.device) for name in CHANGE_PARTS)
    change_DS = steps_DS.float().mul_(rows_D[:, None]).mul_(columns_S)
    # In half precision a small step would be lost on the way.
    return (change_DS + parents_DS).to(parents_DS.dtype)
