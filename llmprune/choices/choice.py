"""What a kind of choice answers for itself; all other code sees `Choice`, and asks.

A kind is a class in a module of its own, listed in `kinds.py`: it owns its ladder, what is legal, its JSON, what stays
of a block, the refit of what is left, the tensors and sizes that come of it, and what all that costs. Formats own their
limits, and families are data. What is decided for the whole model (`vocabulary.py`) is no block's choice.

Shapes: D outputs and I inputs of a block's output projection, U units that stay, Q query heads that stay of each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from llmprune.choices.dimensions import BlockKind, Dimensions, SizeWord
from llmprune.choices.rows import input_columns, unit_rows
from llmprune.choices.vocabulary import VocabularyChoice
from llmprune.core.recipe import GgufType, ImportanceRecipe, SpaceRecipe

Orders = Mapping[str, Tensor]
"""By name, the orders in which parts of a block leave, first to leave first: "order" (units of the block,) int64, and
what kinds have stored of their own."""


class Kept(NamedTuple):
    """What stays of a block's units, ascending."""

    units_U: Tensor
    queries_UQ: Tensor | None = None
    """Query heads that stay of each kept KV group, counted within it; None: all."""


class RefitWork(NamedTuple):
    """What the refits of some choices of one kind take in a block, from shapes alone."""

    flops: int
    """In float64; a multiply-add counts as two."""
    numbers: int
    """Numbers in float64 held at once, beside the statistics and what is solved."""
    orders: int = 0
    """Orders of removal beside that of the units."""
    order_numbers: int = 0
    """Numbers in int64 that these have."""


@dataclass(frozen=True, eq=False, slots=True)
class OwnMoments:
    """Moments of what enters a projection where a choice has inputs `z` of its own, beside the parent's `x`, in
    float64."""

    gram_II: Tensor
    """`E[z z^T]`."""
    cross_II: Tensor
    """`E[z x^T]`."""
    mean_I: Tensor
    """`E[z]`."""


@dataclass(frozen=True, eq=False, slots=True)
class Projection:
    """An output projection that choices ask a refit of: `y = W x + b`, and what calibration tokens say of `x`."""

    weight_DI: Tensor
    bias_D: Tensor | None
    gram_II: Tensor
    """`E[x x^T]`, float64."""
    mean_I: Tensor
    """`E[x]`, float64."""
    own: Mapping[Choice, OwnMoments]
    """Of the choices that have inputs of their own; empty without a refit."""
    shape: Dimensions
    recipe: ImportanceRecipe
    order_U: Tensor
    """In which order the block's units leave: all of them."""
    ordered: Callable[[int], Tensor]
    """In which order units of so many columns each leave."""


class ParentBlock(Protocol):
    """A block of a parent, as far as tensors of a choice are made of it."""

    @property
    def shape(self) -> Dimensions: ...

    @property
    def layouts(self) -> Mapping[str, str]:
        """Of each projection (or norm) whose rows belong to units, by its name within the block: see `unit_rows`."""
        ...

    def rows(self, name: str, rows: Tensor) -> dict[str, Tensor]:
        """Copies of some rows of one of these, by the name of the parameter within the block."""
        ...

    def norm_scale(self, name: str, rows: Tensor) -> float:
        """What the weights of some rows are multiplied by to be given the scale that they had in the parent: other than
        1 for a norm over all units."""
        ...


class Choice(ABC):
    """What one block keeps: hashable, and of one parent's blocks all alike.

    With 0 units the block is dropped, and nothing but its size is asked of the choice; the parent's own choice, of
    `ParentShape.full`, is asked for no tensors and no refit. `kind` is the half of a layer that it is about.
    """

    __slots__ = ()

    kind: ClassVar[BlockKind]
    own_inputs: ClassVar[bool] = False
    """Whether its output projection reads what the parent's block never computes: then statistics and estimates run its
    block beside the parent's, its tensors depend on no order, and its refit is given `OwnMoments`."""

    @classmethod
    @abstractmethod
    def ladder(cls, shape: Dimensions, rules: SpaceRecipe) -> Sequence[Choice]:
        """The choices of this kind that a search may make. Raises ArchitectureError on rules that the parent breaks."""

    @classmethod
    @abstractmethod
    def from_json(cls, data: Mapping[str, Any]) -> Choice | None:
        """Inverse of `to_json`, its values unchecked; None if this is no text of the kind."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Numbers of at least 0, by names that no other kind of choice for this half has alone; and `stored`, a type of
        weights."""

    @property
    @abstractmethod
    def units(self) -> int:
        """Units that the block has left; 0 where it is dropped."""

    @property
    @abstractmethod
    def label(self) -> str:
        """Names the choice in files and messages: unlike that of any other choice for this half."""

    @property
    def plain(self) -> Choice:
        """The same block, its weights stored as the parent's are: what a library solves, and keeps."""
        return self

    @property
    def stored(self) -> GgufType | None:
        """The type of its weights, where that is a choice; None: the parent's."""
        return None

    def entered_as(self, shape: Dimensions) -> Choice | None:
        """The choice whose block computes what enters its output projection, all units of it; None: the parent's."""
        return self if self.own_inputs else None

    @abstractmethod
    def problem(self, shape: Dimensions) -> str | None:
        """Why no block of such a parent can keep this, continuing "keeps ... of a parent with"; None if it can."""

    @abstractmethod
    def sizes(self, shape: Dimensions) -> Mapping[SizeWord, int]:
        """What a config says of a block with this choice; nothing where it is dropped."""

    @abstractmethod
    def inputs(self, shape: Dimensions) -> int:
        """Inputs of the output projection."""

    @abstractmethod
    def rows(self, shape: Dimensions) -> int:
        """Rows and columns of the projections: what size and time of the block go by."""

    @abstractmethod
    def kept(self, orders: Orders, shape: Dimensions) -> Kept:
        """What stays; where an order is not given the first stay."""

    @classmethod
    @abstractmethod
    def solve(cls, choices: Sequence[Any], projection: Projection) -> Iterator[tuple[str, Tensor]]:
        """What a library stores for choices of this kind, by name: for each `LABEL/weight` (D, inputs) and, where the
        parent has one, `LABEL/bias` (D,); and orders of its own. Without `recipe.refit` weights are the parent's."""

    @classmethod
    @abstractmethod
    def refit_work(cls, choices: Sequence[Any], shape: Dimensions) -> RefitWork:
        """What `solve` takes with a refit."""

    def tensors(self, block: ParentBlock, kept: Kept) -> dict[str, Tensor]:
        """The tensors of the block that change, but for the output projection, by their name within the block: here
        the rows of what stays."""
        tensors: dict[str, Tensor] = {}
        for name, layout in block.layouts.items():
            rows = unit_rows(layout, kept.units_U, block.shape, self.kind, kept.queries_UQ)
            scale = block.norm_scale(name, rows)
            tensors |= {parameter: value * scale for parameter, value in block.rows(name, rows).items()}
        return tensors

    def columns(self, kept: Kept, shape: Dimensions) -> Tensor:
        """Columns of the output projection that stay: (inputs,) int64."""
        return input_columns(kept.units_U, shape, self.kind, kept.queries_UQ)

    def config_problem(self, words: Set[SizeWord]) -> str | None:
        """Why a family whose config has just these words cannot say it, continuing "is a ... model"; None if it can."""
        return None


AnyChoice = Choice | VocabularyChoice
Assignment = tuple[int, AnyChoice]
"""A choice for the block of its kind in a layer; or, for `WHOLE_MODEL`, for the vocabulary."""


def attends(choices: Iterable[AnyChoice]) -> bool:
    """Whether there is an attention among these that stays: in a model without any, no token sees another."""
    return any(isinstance(choice, Choice) and choice.kind == "attention" and choice.units > 0 for choice in choices)


def too_many_units(choice: Choice, shape: Dimensions) -> str | None:
    """The problem of a choice with other than 0 to all units."""
    of_parent = shape.units(choice.kind)
    return None if 0 <= choice.units <= of_parent else f"{of_parent} units in its {choice.kind} block"


def last_to_leave(orders: Orders, name: str, whole: Tensor) -> Tensor:
    """An order, and where there is none that in which the last of `whole` (..., n), ascending, leave first."""
    return orders.get(name, whole.flip(-1))


def kept_units(orders: Orders, units: int, choice: Choice, shape: Dimensions) -> Tensor:
    """So many of a block's units, those that leave last, ascending: (units,) int64."""
    order_U = last_to_leave(orders, "order", torch.arange(shape.units(choice.kind)))
    return order_U[len(order_U) - units :].sort().values
