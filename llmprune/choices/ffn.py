"""FFN channels kept: the width of an FFN block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from llmprune.choices.choice import Choice, Kept, Orders, Projection, RefitWork, kept_units, too_many_units
from llmprune.choices.dimensions import BlockKind, Dimensions, SizeWord
from llmprune.choices.rungs import rungs
from llmprune.choices.solving import chain_work, solve_chain
from llmprune.core.recipe import SpaceRecipe


@dataclass(frozen=True, slots=True)
class FfnChoice(Choice):
    """What an FFN block keeps, in channels; 0 drops it."""

    ffn_width: int

    kind: ClassVar[BlockKind] = "ffn"

    @classmethod
    def ladder(cls, shape: Dimensions, rules: SpaceRecipe) -> Sequence[FfnChoice]:
        """Multiples of the step, the parent's width, and 0 if blocks may be dropped."""
        return [cls(n) for n in rungs("space.ffn_step", rules.ffn_step, shape.ffn_width, drop=rules.drop)]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FfnChoice | None:
        return cls(data["ffn_width"]) if "ffn_width" in data else None

    def to_json(self) -> dict[str, Any]:
        return {"ffn_width": self.ffn_width}

    @property
    def units(self) -> int:
        return self.ffn_width

    @property
    def label(self) -> str:
        return f"{self.ffn_width}"

    def problem(self, shape: Dimensions) -> str | None:
        return too_many_units(self, shape)

    def sizes(self, shape: Dimensions) -> Mapping[SizeWord, int]:
        return {"ffn_width": self.ffn_width} if self.ffn_width else {}

    def inputs(self, shape: Dimensions) -> int:
        return self.ffn_width

    def rows(self, shape: Dimensions) -> int:
        return self.ffn_width

    def kept(self, orders: Orders, shape: Dimensions) -> Kept:
        return Kept(kept_units(orders, self.units, self, shape))

    @classmethod
    def solve(cls, choices: Sequence[FfnChoice], projection: Projection) -> Iterator[tuple[str, Tensor]]:
        """All are nested."""
        chain = sorted(choices, key=lambda choice: choice.units)
        return solve_chain(chain, projection.order_U.flip(0)[: chain[-1].units], projection)

    @classmethod
    def refit_work(cls, choices: Sequence[FfnChoice], shape: Dimensions) -> RefitWork:
        return chain_work(choices, shape.ffn_width, shape)
