"""A block's weights in another type than the parent's: how much of a block stays, and in how many bits.

The type is one that ggml stores in blocks of a row, so a row is a whole number of them, and every row is rounded for
itself: what stays of a block may be cut out before or after. What a smaller type costs is the rounding of all that the
block multiplies by; what it saves is bytes, which is what decoding reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

from llmprune.choices.choice import Choice, Kept, Orders, ParentBlock, Projection, RefitWork
from llmprune.choices.dimensions import BlockKind, Dimensions, SizeWord
from llmprune.choices.ffn import FfnChoice
from llmprune.choices.kv_groups import AttentionChoice
from llmprune.core.errors import ArchitectureError
from llmprune.core.recipe import GgufType, SpaceRecipe
from llmprune.numerics.ggml import TYPES

_PLAIN_BITS = 16.0
"""Bits that rows are counted at: the widest type that a file of small ones is compared with."""


@dataclass(frozen=True, slots=True)
class StoredChoice(Choice):
    """Another choice, with its weights in a type of their own. `plain` keeps something: a dropped block has none."""

    of: Choice
    weights: GgufType

    base: ClassVar[type[Choice]]
    """Whose choices it stores."""

    @classmethod
    def ladder(cls, shape: Dimensions, rules: SpaceRecipe) -> Sequence[Self]:
        """With `space.precision`, every size in every type whose blocks its rows are whole numbers of."""
        if not rules.precision:
            return ()
        if rules.size == "layer":
            raise ArchitectureError(
                "space.precision stores blocks in other types, and space.size=layer keeps layers as they are or not at "
                "all; set space.precision=[], or space.size to small, medium or large"
            )
        sizes = [size for size in cls.base.ladder(shape, rules) if size.units]
        choices = [cls(size, weights) for weights in rules.precision for size in sizes]
        return [choice for choice in choices if choice.problem(shape) is None]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self | None:
        if "stored" not in data or data["stored"] not in TYPES:
            return None
        of = cls.base.from_json({name: value for name, value in data.items() if name != "stored"})
        return None if of is None else cls(of, data["stored"])

    def to_json(self) -> dict[str, Any]:
        return {**self.of.to_json(), "stored": self.weights}

    @property
    def plain(self) -> Choice:
        return self.of

    @property
    def stored(self) -> GgufType:
        return self.weights

    def entered_as(self, shape: Dimensions) -> Choice:
        return type(self)(whole(shape, self.kind), self.weights)

    @property
    def units(self) -> int:
        return self.of.units

    @property
    def label(self) -> str:
        return f"{self.of.label}-{self.weights}"

    def problem(self, shape: Dimensions) -> str | None:
        if not self.units:
            return "a block that is dropped: it has no weights to store"
        block = TYPES[self.weights].block
        for name, length in (("hidden_size", shape.hidden_size), ("inputs of its output", self.inputs(shape))):
            if length % block:
                return f"{name} {length}: rows are stored in blocks of {block} in {self.weights}"
        return self.of.problem(shape)

    def sizes(self, shape: Dimensions) -> Mapping[SizeWord, int]:
        return self.of.sizes(shape)

    def inputs(self, shape: Dimensions) -> int:
        return self.of.inputs(shape)

    def rows(self, shape: Dimensions) -> int:
        """As many rows in 16 bits as its own take in theirs."""
        return round(self.of.rows(shape) * TYPES[self.weights].bits / _PLAIN_BITS)

    def kept(self, orders: Orders, shape: Dimensions) -> Kept:
        return self.of.kept(orders, shape)

    @classmethod
    def solve(cls, choices: Sequence[Self], projection: Projection) -> Iterator[tuple[str, Tensor]]:
        """Nothing: what is stored is what was solved for the plain choice."""
        yield from ()

    @classmethod
    def refit_work(cls, choices: Sequence[Self], shape: Dimensions) -> RefitWork:
        return RefitWork(0, 0)

    def tensors(self, block: ParentBlock, kept: Kept) -> dict[str, Tensor]:
        return self.of.tensors(block, kept)

    def columns(self, kept: Kept, shape: Dimensions) -> Tensor:
        return self.of.columns(kept, shape)

    def config_problem(self, words: Set[SizeWord]) -> str | None:
        return self.of.config_problem(words)


class StoredAttention(StoredChoice):
    """An attention block whose weights are stored in a type of their own."""

    __slots__ = ()
    kind: ClassVar[BlockKind] = "attention"
    base = AttentionChoice


class StoredFfn(StoredChoice):
    """An FFN block whose weights are stored in a type of their own."""

    __slots__ = ()
    kind: ClassVar[BlockKind] = "ffn"
    base = FfnChoice


def whole(shape: Dimensions, kind: BlockKind) -> Choice:
    """The parent's own choice."""
    return AttentionChoice(shape.kv_groups) if kind == "attention" else FfnChoice(shape.ffn_width)
