"""KV groups kept, whole or with fewer query heads each: what an attention block keeps.

Shapes: K KV groups of the parent, U of them that stay, Q query heads that stay of each, H query heads of the parent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmprune.choices.choice import (
    Choice,
    Kept,
    Orders,
    Projection,
    RefitWork,
    kept_units,
    last_to_leave,
    too_many_units,
)
from llmprune.choices.dimensions import BlockKind, Dimensions, SizeWord
from llmprune.choices.rows import input_columns
from llmprune.choices.rungs import rungs
from llmprune.choices.solving import chain_work, solve_chain
from llmprune.core.recipe import SpaceRecipe

_QUERY_ORDER = "query_order"
"""Within each KV group, in which order its query heads leave: (K, query heads a group) int64."""


@dataclass(frozen=True, slots=True)
class AttentionChoice(Choice):
    """What an attention block keeps: KV groups (a KV head with the query heads that read it; 0 drops the block).

    `queries_per_group`: how many query heads stay of each kept group, the same number in all, so that the kernel stays
    legal; None keeps the parent's.
    """

    kv_groups: int
    queries_per_group: int | None = None

    kind: ClassVar[BlockKind] = "attention"

    @classmethod
    def ladder(cls, shape: Dimensions, rules: SpaceRecipe) -> Sequence[AttentionChoice]:
        """Multiples of the step, all groups, and 0 if blocks may be dropped; in a large space also with fewer query
        heads a group."""
        groups = rungs("space.kv_groups_step", rules.kv_groups_step, shape.kv_groups, drop=rules.drop)
        fewer = range(1, shape.queries_per_group) if rules.size == "large" else ()
        return [*(cls(n) for n in groups), *(cls(n, queries) for n in groups if n for queries in fewer)]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> AttentionChoice | None:
        return cls(data["kv_groups"], data.get("queries_per_group")) if "kv_groups" in data else None

    def to_json(self) -> dict[str, Any]:
        queries = {} if self.queries_per_group is None else {"queries_per_group": self.queries_per_group}
        return {"kv_groups": self.kv_groups, **queries}

    @property
    def units(self) -> int:
        return self.kv_groups

    @property
    def label(self) -> str:
        """`3`, or `2x1` for two KV groups with one query head each."""
        return f"{self.kv_groups}" + ("" if self.queries_per_group is None else f"x{self.queries_per_group}")

    def queries(self, shape: Dimensions) -> int:
        """Query heads that each kept KV group has."""
        return shape.queries_per_group if self.queries_per_group is None else self.queries_per_group

    def problem(self, shape: Dimensions) -> str | None:
        if self.queries_per_group is None or too_many_units(self, shape):
            return too_many_units(self, shape)
        most = shape.queries_per_group - 1 if self.kv_groups else 0
        if 1 <= self.queries_per_group <= most:
            return None
        rule = f"queries_per_group is from 1 to {most}, and left out where all stay or the block is dropped"
        if self.kv_groups and self.queries_per_group > shape.queries_per_group:
            rule += "; all query heads on fewer KV heads are said by merged_kv_groups"
        return f"{shape.queries_per_group} query heads a KV group: {rule}"

    def sizes(self, shape: Dimensions) -> Mapping[SizeWord, int]:
        if not self.kv_groups:
            return {}
        heads = self.kv_groups * self.queries(shape)
        return {"heads": heads, "kv_heads": self.kv_groups, "head_dim": shape.head_dim}

    def inputs(self, shape: Dimensions) -> int:
        return self.kv_groups * self.queries(shape) * shape.head_dim

    def rows(self, shape: Dimensions) -> int:
        return 2 * self.inputs(shape) + 2 * self.kv_groups * shape.head_dim

    def kept(self, orders: Orders, shape: Dimensions) -> Kept:
        units_U = kept_units(orders, self.units, self, shape)
        if self.queries_per_group is None:
            return Kept(units_U)
        whole_KQ = torch.arange(shape.queries_per_group).expand(shape.kv_groups, -1)
        order_KQ = last_to_leave(orders, _QUERY_ORDER, whole_KQ)
        return Kept(units_U, order_KQ[:, -self.queries_per_group :].sort(dim=1).values[units_U])

    @classmethod
    def solve(cls, choices: Sequence[AttentionChoice], projection: Projection) -> Iterator[tuple[str, Tensor]]:
        """Choices with as many query heads a group are nested."""
        shape, order_KQ = projection.shape, None
        if any(choice.queries_per_group for choice in choices):
            order_KQ = _query_order(projection.ordered(shape.head_dim), shape)
            yield _QUERY_ORDER, order_KQ
        for chain in _chains(choices):
            units_U = projection.order_U.flip(0)[: chain[-1].units]
            queries = chain[0].queries_per_group
            queries_UQ = None if queries is None or order_KQ is None else order_KQ[:, -queries:][units_U]
            yield from solve_chain(chain, input_columns(units_U, shape, cls.kind, queries_UQ), projection)

    @classmethod
    def refit_work(cls, choices: Sequence[AttentionChoice], shape: Dimensions) -> RefitWork:
        inputs = cls(shape.kv_groups).inputs(shape)
        works = [chain_work(chain, inputs, shape) for chain in _chains(choices)]
        orders = int(any(choice.queries_per_group for choice in choices))
        return RefitWork(
            flops=sum(work.flops for work in works),
            numbers=max(work.numbers for work in works),
            orders=orders,
            order_numbers=orders * shape.kv_groups * shape.queries_per_group,
        )


def _chains(choices: Sequence[AttentionChoice]) -> list[list[AttentionChoice]]:
    """The choices with as many query heads a group, ascending; those that keep all come first."""
    counts = sorted({choice.queries_per_group or 0 for choice in choices})
    ascending = sorted(choices, key=lambda choice: choice.units)
    return [[choice for choice in ascending if (choice.queries_per_group or 0) == count] for count in counts]


def _query_order(order_H: Tensor, shape: Dimensions) -> Tensor:
    """From the order in which single query heads (H,) leave to the order within each KV group: (K, queries)."""
    group_H = order_H // shape.queries_per_group
    groups = range(shape.kv_groups)
    return torch.stack([order_H[group_H == group] % shape.queries_per_group for group in groups])
