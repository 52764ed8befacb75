"""Hidden states that candidates share: what comes out of the layers that two architectures begin with.

A prefix is the layers that a child runs before a point, with what they keep. Layers that are gone compute nothing and
are left out of it, so architectures which differ only in how many layers are gone there share it too.

Shapes: B windows of a batch, T tokens, D the hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from llmprune.choices.architecture import Architecture, LayerChoice
from llmprune.choices.choice import attends
from llmprune.choices.vocabulary import VocabularyChoice


class Step(NamedTuple):
    """A layer that runs: the parent's, what it keeps, and what embedded the tokens that come to it."""

    layer: int
    keeps: LayerChoice
    vocabulary: VocabularyChoice


Steps = tuple[Step, ...]
"""The layers that run, in order. A prefix is the first few of a child's steps."""


def steps_of(architecture: Architecture) -> Steps:
    """What a child of this architecture runs."""
    layers = enumerate(architecture.layers)
    return tuple(Step(i, layer, architecture.vocabulary) for i, layer in layers if not layer.is_gone)


def without_first_layers(architecture: Architecture, count: int) -> Architecture:
    """The architecture with the parent's first `count` layers gone, whatever it kept of them."""
    return Architecture((LayerChoice.of(0, 0),) * count + architecture.layers[count:], architecture.vocabulary)


def last_start(steps: Steps) -> int:
    """The last step that a child can be started at: its rest must have attention to be a child itself."""
    return max(i for i, step in enumerate(steps) if attends(step.keeps.blocks))


def common_steps(first: Steps, second: Steps) -> int:
    """How many steps two architectures have in common before they part."""
    for i, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return i
    return min(len(first), len(second))


def spread(first: int, last: int, count: int) -> list[int]:
    """Up to `count` of the integers from `first` to `last`, as evenly as they go, where first - 1 is there for free."""
    count = max(0, min(count, last - first + 1))
    return [first - 1 + i * (last - first + 2) // (count + 1) for i in range(1, count + 1)]


class PrefixStates:
    """Hidden states after the prefixes that were used last, for each the (B, T, D) tensors of some batches.

    The states of all batches after one prefix take the same memory whatever the prefix, so the limit is a number of
    prefixes; the one that was not used for longest leaves first.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        # A dict keeps the order of insertion: least recently used first.
        self._states: dict[Steps, dict[int, torch.Tensor]] = {}

    def __len__(self) -> int:
        return len(self._states)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for batches in self._states.values() for tensor in batches.values())

    def deepest(self, steps: Steps, last: int, batches: Sequence[int]) -> int:
        """The longest prefix of `steps`, `last` of them at most, that is there for all these batches; else 0."""
        for length in range(last, 0, -1):
            if (states := self._states.get(steps[:length])) and all(batch in states for batch in batches):
                return length
        return 0

    def use(self, prefix: Steps) -> dict[int, torch.Tensor]:
        """The states after a prefix, by batch, to read or to add to; it is now the most recently used."""
        states = self._states.pop(prefix, {})
        self._states[prefix] = states
        return states

    def make_room(self, needed: Iterable[Steps]) -> None:
        """Forget the prefixes that were not used for longest until these fit; `needed` must be within the limit."""
        prefixes = list(needed)
        assert len(prefixes) <= self.limit, f"{len(prefixes)} prefixes, where {self.limit} fit"
        for prefix in prefixes:
            self.use(prefix)
        while len(self._states) > self.limit:
            del self._states[next(iter(self._states))]


@contextmanager
def states_at(
    layers: Sequence[nn.Module], first: torch.Tensor | None, captured: Sequence[int]
) -> Iterator[dict[int, torch.Tensor]]:
    """Within it, layer 0 reads the hidden states `first`, unless None; what each `captured` layer reads is noted."""
    seen: dict[int, torch.Tensor] = {}

    def replacing(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        incoming = args[0] if args else kwargs["hidden_states"]
        assert first is not None and incoming.shape == first.shape, f"{incoming.shape} where other states were kept"
        return ((first, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": first})

    def noting(index: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            seen[index] = args[0] if args else kwargs["hidden_states"]

        return hook

    handles = [layers[i].register_forward_pre_hook(noting(i), with_kwargs=True) for i in captured]
    if first is not None:
        handles.append(layers[0].register_forward_pre_hook(replacing, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
