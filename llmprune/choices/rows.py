"""Which rows and columns of a block's projections belong to the units and query heads that a choice keeps.

Shapes: U units that stay, Q query heads that stay of each, R rows of one unit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.choices.dimensions import BlockKind, Dimensions


def part_rows(shape: Dimensions) -> dict[str, int]:
    """Rows that each letter of a row layout stands for, in one unit (see `BlockNames.rows`; the module of that travels
    alone, and has to know it too)."""
    return {"q": shape.queries_per_group * shape.head_dim, "k": shape.head_dim, "v": shape.head_dim, "c": 1}


def unit_rows(
    layout: str, kept_U: Tensor, shape: Dimensions, kind: BlockKind, queries_UQ: Tensor | None = None
) -> Tensor:
    """Row indices of some units in a projection with this layout (see `BlockNames.rows`), in the layout's order.

    `kept_U` (units,) int64 are the units that stay. `queries_UQ` (units, queries) int64 are the query heads that stay,
    counted within each of these KV groups; None keeps all.
    """
    parts = part_rows(shape)
    segments, offset = [], 0
    for segment in layout.split("|"):
        size = sum(parts[letter] for letter in segment)
        within, start = [], 0
        for letter in segment:
            rows_UR = torch.arange(parts[letter], device=kept_U.device).expand(len(kept_U), -1)
            if letter == "q" and queries_UQ is not None:
                of_head = torch.arange(shape.head_dim, device=kept_U.device)
                rows_UR = (queries_UQ.to(kept_U.device)[:, :, None] * shape.head_dim + of_head).flatten(1)
            within.append(start + rows_UR)
            start += parts[letter]
        segments.append((offset + kept_U[:, None] * size + torch.cat(within, dim=1)).reshape(-1))
        offset += shape.units(kind) * size
    return torch.cat(segments)


def input_columns(kept_U: Tensor, shape: Dimensions, kind: BlockKind, queries_UQ: Tensor | None = None) -> Tensor:
    """Columns of the output projection that some units (and query heads) feed: (inputs,) int64."""
    return unit_rows("q" if kind == "attention" else "c", kept_U, shape, kind, queries_UQ)
