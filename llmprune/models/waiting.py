"""Models that wait in CPU memory where an accelerator has no room for them and for what is done beside them.

Nothing waits that need not: work is tried with everything at home, and torch says whether there was room. What waits
keeps its weights in CPU memory, so that to bring it home is one copy of them, and to send it away again none.

    nats = with_children(parent.model, lambda: score(prune(parent, architecture, library), split))
    with at_home(parent.model):
        logits = parent.model(ids.to(parent.device)).logits
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.models.at_hand import Place, at_hand, bring
from llmprune.models.placement import is_spread
from llmprune.models.streams import input_device

Result = TypeVar("Result")

_homes: WeakKeyDictionary[PreTrainedModel, torch.device] = WeakKeyDictionary()
"""Models that wait, each with the device that it computes on."""

_CPU = torch.device("cpu")


def waits(model: PreTrainedModel) -> bool:
    """Whether its weights wait in CPU memory until it is brought home."""
    return model in _homes


def home_of(model: PreTrainedModel) -> torch.device:
    """Where a model computes, and inputs go, though it may wait elsewhere."""
    return _homes.get(model) or input_device(model)


def wait(model: PreTrainedModel) -> None:
    """From now on the model waits in CPU memory. One that lies there already is at home, and stays what it is."""
    assert not is_spread(model), "a model on several devices has no other place"
    if not waits(model) and (home := input_device(model)) != _CPU:
        bring(model.modules(), Place(_CPU))
        _homes[model] = home


def come_home(model: PreTrainedModel) -> None:
    """The model waits no longer."""
    if (home := _homes.pop(model, None)) is not None:
        bring(model.modules(), Place(home))


@contextmanager
def at_home(model: PreTrainedModel) -> Iterator[None]:
    """Within it, a model that waits lies where it computes; any other lies there anyhow."""
    home = _homes.pop(model, None)
    if home is None:
        yield
        return
    try:
        with at_hand(model.modules(), Place(home)):
            yield
    finally:
        _homes[model] = home


@contextmanager
def part_at_home(model: PreTrainedModel, modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within it, what these modules of a model that waits hold themselves lies where it computes."""
    if not waits(model):
        yield
        return
    with at_hand(modules, Place(home_of(model))):
        yield


def brought_home(model: PreTrainedModel, tensor: Tensor) -> Tensor:
    """A tensor of a model: where that computes, if it waits."""
    return tensor.to(home_of(model)) if waits(model) else tensor


def with_children(parent: PreTrainedModel, work: Callable[[], Result]) -> Result:
    """What is done with children of a parent, which `work` cuts: tried with all of them at home. If there is no room,
    the parent waits from then on, and work that wants it whole has to bring it home while no child is there.

    Raises torch.OutOfMemoryError if there is no room even so.
    """
    try:
        return work()
    except torch.OutOfMemoryError:
        if waits(parent) or is_spread(parent) or input_device(parent) == _CPU:
            raise
    # Not before the error is gone: its traceback holds the children.
    wait(parent)
    return work()


def with_room(parent: PreTrainedModel, work: Callable[[torch.device | None], Result]) -> Result:
    """What is done layer by layer: `work`, told where layers are to be computed (None: where they lie). If the parent's
    accelerator has no room for both, the parent waits meanwhile, and its layers come one at a time.

    Raises torch.OutOfMemoryError if there is no room even so.
    """
    if waits(parent):
        return work(home_of(parent))
    try:
        return work(None)
    except torch.OutOfMemoryError:
        if is_spread(parent):
            raise
    wait(parent)
    try:
        return work(home_of(parent))
    finally:
        come_home(parent)
