"""Children that stay in memory while they are asked for again: each is cut once, as long as there is room."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from transformers import PreTrainedModel

from llmprune.choices.architecture import Architecture
from llmprune.models.parent import Parent
from llmprune.models.stored import stored_weights
from llmprune.models.waiting import waits


class _Held(NamedTuple):
    first: int
    child: PreTrainedModel
    nbytes: int


class HeldChildren:
    """The children of architectures that somebody holds, within a limit of bytes that they take beside the parent.

    A child may lack the layers before some `first` one; it is of use only to who wants it from there on. While the
    parent waits none is held: there is no room to spare, and what a child shares with its parent would stay at home.
    """

    def __init__(self, parent: Parent, limit: int) -> None:
        self._parent, self._limit = parent, limit
        self._wanted: set[Architecture] = set()
        self._held: dict[Architecture, _Held] = {}

    @property
    def nbytes(self) -> int:
        return sum(held.nbytes for held in self._held.values())

    def hold(self, architecture: Architecture) -> None:
        """Keep its child from when it is cut, if there is room then."""
        self._wanted.add(architecture)

    def let_go(self, architecture: Architecture) -> None:
        self._wanted.discard(architecture)
        self._held.pop(architecture, None)

    def child(self, architecture: Architecture, first: int, cut: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        """The child from layer `first` on: the one that is held, or what `cut` makes."""
        held = self._held.get(architecture)
        if held is not None and held.first == first:
            return held.child
        self._held.pop(architecture, None)
        child = cut()
        wanted = architecture in self._wanted and not waits(self._parent.model)
        if wanted and self.nbytes + (size := own_bytes(child, self._parent)) <= self._limit:
            self._held[architecture] = _Held(first, child, size)
        return child

    def make_room(self) -> None:
        """Keep none that was held before the parent had to wait."""
        if waits(self._parent.model):
            self._held.clear()


def own_bytes(child: PreTrainedModel, parent: Parent) -> int:
    """What a child takes beside its parent: tensors that are not the parent's storage, and how they are stored."""
    parents = {id(stored) for stored, _ in parent.rounded.values()}
    parents |= {numbers.data_ptr() for _, numbers in parent.rounded.values()}
    parents |= {tensor.data_ptr() for tensor in parent.model.state_dict().values()}
    own = {tensor.data_ptr(): tensor.nbytes for tensor in child.state_dict().values()}
    own |= {id(stored): stored.blocks.nbytes for stored in stored_weights(child).values()}
    return sum(nbytes for place, nbytes in own.items() if place not in parents)
