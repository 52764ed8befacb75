"""KV groups merged: neighbours share one KV head, the mean of theirs, and all query heads stay (GQA, arXiv 2305.13245).

The block then reads what the parent's never computed, so that its refit and its estimate run it beside the parent's.
Shapes: I inputs of the output projection, M KV groups that share a KV head, R rows of a projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmprune.choices.choice import Choice, Kept, Orders, ParentBlock, Projection, RefitWork
from llmprune.choices.dimensions import BlockKind, Dimensions, SizeWord
from llmprune.choices.rows import part_rows
from llmprune.choices.solving import named
from llmprune.core.errors import ArchitectureError
from llmprune.core.recipe import SpaceRecipe
from llmprune.numerics.refit import refit_towards


@dataclass(frozen=True, slots=True)
class MergedChoice(Choice):
    """All query heads of an attention block on fewer KV heads: consecutive KV groups merge, as many in each head."""

    kv_groups: int
    """KV heads that are left: a divisor of the parent's KV groups, and fewer."""

    kind: ClassVar[BlockKind] = "attention"
    own_inputs: ClassVar[bool] = True

    @classmethod
    def of(cls, shape: Dimensions) -> tuple[MergedChoice, ...]:
        """All that a parent's blocks can keep, ascending."""
        return tuple(cls(k) for k in range(1, shape.kv_groups) if shape.kv_groups % k == 0)

    @classmethod
    def ladder(cls, shape: Dimensions, rules: SpaceRecipe) -> Sequence[MergedChoice]:
        """With `space.merge_kv`, all of them."""
        if not rules.merge_kv:
            return ()
        if rules.size == "layer":
            raise ArchitectureError(
                "space.merge_kv changes attention, and space.size=layer keeps it whole or not at all; set "
                "space.merge_kv=false, or space.size to small, medium or large"
            )
        if not cls.of(shape):
            raise ArchitectureError(
                f"space.merge_kv needs several KV groups, the parent has {shape.kv_groups}; set space.merge_kv=false"
            )
        return cls.of(shape)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MergedChoice | None:
        return cls(data["merged_kv_groups"]) if "merged_kv_groups" in data else None

    def to_json(self) -> dict[str, Any]:
        return {"merged_kv_groups": self.kv_groups}

    @property
    def units(self) -> int:
        return self.kv_groups

    @property
    def label(self) -> str:
        return f"merged{self.kv_groups}"

    def problem(self, shape: Dimensions) -> str | None:
        if self in self.of(shape):
            return None
        legal = " or ".join(str(choice.kv_groups) for choice in self.of(shape))
        return f"{shape.kv_groups} KV groups: merged_kv_groups is {legal or 'never so with one KV group'}"

    def sizes(self, shape: Dimensions) -> Mapping[SizeWord, int]:
        heads = shape.kv_groups * shape.queries_per_group
        return {"heads": heads, "kv_heads": self.kv_groups, "head_dim": shape.head_dim}

    def inputs(self, shape: Dimensions) -> int:
        return shape.kv_groups * shape.queries_per_group * shape.head_dim

    def rows(self, shape: Dimensions) -> int:
        return 2 * self.inputs(shape) + 2 * self.kv_groups * shape.head_dim

    def kept(self, orders: Orders, shape: Dimensions) -> Kept:
        """All query heads, whatever the order."""
        return Kept(torch.arange(shape.kv_groups))

    @classmethod
    def solve(cls, choices: Sequence[MergedChoice], projection: Projection) -> Iterator[tuple[str, Tensor]]:
        """Each by itself."""
        for choice in choices:
            yield from named(choice, *_output(projection, choice))

    @classmethod
    def refit_work(cls, choices: Sequence[MergedChoice], shape: Dimensions) -> RefitWork:
        """Of each one factor and two products; five matrices (I, I) are held."""
        inputs, outputs = choices[0].inputs(shape), shape.hidden_size
        flops = inputs**3 // 3 + 4 * inputs**2 * outputs
        return RefitWork(len(choices) * flops, 5 * inputs**2 + 3 * inputs * outputs)

    def tensors(self, block: ParentBlock, kept: Kept) -> dict[str, Tensor]:
        """Each KV head's are the mean of theirs that share it; where there are query heads alone nothing changes."""
        tensors = {}
        for name, layout in block.layouts.items():
            if set(layout) <= set("q|"):
                continue
            lines_MR = merged_rows(layout, block.shape, block.shape.kv_groups // self.kv_groups)
            first, *others = (block.rows(name, rows) for rows in lines_MR)
            for parameter, value in first.items():
                # As a mean of differences: heads that are alike come out as they were, to the last bit.
                shift = torch.stack([other[parameter].double() - value.double() for other in others]).sum(dim=0)
                tensors[parameter] = (value.double() + shift / len(lines_MR)).to(value.dtype).contiguous()
        return tensors

    def config_problem(self, words: Set[SizeWord]) -> str | None:
        if "kv_heads" in words:
            return None
        return "whose config has no number of KV heads: they cannot be merged; set space.merge_kv=false"


def merged_rows(layout: str, shape: Dimensions, merges: int) -> Tensor:
    """For each row of a projection whose KV groups merge, the parent's rows that it is the mean of: (merges, rows).

    A KV head's rows are those of `merges` consecutive ones; query heads' rows all stay, the same in every line.
    """
    parts = part_rows(shape)
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


def _output(projection: Projection, choice: MergedChoice) -> tuple[Tensor, Tensor | None]:
    """Weight and bias: without a refit the parent's."""
    weight_DI, bias_D, recipe = projection.weight_DI, projection.bias_D, projection.recipe
    if not recipe.refit:
        return weight_DI, bias_D
    moments = projection.own[choice]
    means = None if bias_D is None else (moments.mean_I, projection.mean_I)
    return refit_towards(weight_DI, moments.gram_II, moments.cross_II, recipe.damp, means_2I=means, bias_D=bias_D)
