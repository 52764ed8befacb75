"""Which rows and columns of a block's projections belong to the units and query heads that a choice keeps."""

from __future__ import annotations

import torch
from torch import nn

from llmprune.choices.architecture import BlockKind, ParentShape
from llmprune.models.modeling_pruned import part_rows


def unit_rows(
    layout: str, kept_U: torch.Tensor, shape: ParentShape, kind: BlockKind, queries_UQ: torch.Tensor | None = None
) -> torch.Tensor:
    """Row indices of some units in a projection with this layout (see `BlockNames.rows`), in the layout's order.

    `kept_U` (units,) int64 are the units that stay. `queries_UQ` (units, queries) int64 are the query heads that stay,
    counted within each of these KV groups; None keeps all.
    """
    parts = part_rows(shape.queries_per_group, shape.head_dim)
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


def merged_rows(layout: str, shape: ParentShape, merges: int) -> torch.Tensor:
    """For each row of a projection whose KV groups merge, the parent's rows that it is the mean of: (merges, rows).

    A KV head's rows are those of `merges` consecutive ones; query heads' rows all stay, the same in every line.
    """
    parts = part_rows(shape.queries_per_group, shape.head_dim)
    heads, segments, offset = shape.kv_groups // merges, [], 0
    for segment in layout.split("|"):
        size = sum(parts[letter] for letter in segment)
        within, start = [], 0
        for letter in segment:
            rows_KR = torch.arange(shape.kv_groups)[:, None] * size + torch.arange(parts[letter]) + start
            if letter == "q":
                within.append(rows_KR.reshape(1, heads, -1).expand(merges, -1, -1))
            else:
                within.append(rows_KR.reshape(heads, merges, -1).transpose(0, 1))
            start += parts[letter]
        segments.append(offset + torch.cat(within, dim=2).flatten(1))
        offset += shape.kv_groups * size
    return torch.cat(segments, dim=1)


def input_columns(
    kept_U: torch.Tensor, shape: ParentShape, kind: BlockKind, queries_UQ: torch.Tensor | None = None
) -> torch.Tensor:
    """Columns of the output projection that some units (and query heads) feed: (inputs,) int64."""
    return unit_rows("q" if kind == "attention" else "c", kept_U, shape, kind, queries_UQ)


def is_norm(module: nn.Module) -> bool:
    """Whether a module whose rows belong to units is a norm over all of them (OLMo 2's queries and keys), so that what
    is left of it sees another scale than the parent's did."""
    return module.get_parameter("weight").ndim == 1
