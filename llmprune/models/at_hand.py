"""Weights brought to where they are computed, for as long as that takes; then the tensors of before are back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from torch import Tensor, nn


@dataclass(frozen=True)
class Place:
    """Where and how weights and states are computed."""

    device: torch.device
    dtype: torch.dtype | None = None
    """Of what is no integer; None: each tensor keeps its own."""

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self._dtype_of(tensor))

    def holds(self, tensor: Tensor) -> bool:
        return tensor.device == self.device and tensor.dtype == self._dtype_of(tensor)

    def _dtype_of(self, tensor: Tensor) -> torch.dtype:
        return tensor.dtype if self.dtype is None or not tensor.is_floating_point() else self.dtype


@contextmanager
def at_hand(modules: Iterable[nn.Module], place: Place) -> Iterator[int]:
    """Within it, the tensors that these modules themselves hold are in a place; afterwards the same ones as before
    stand there again. Gives the bytes that came from another device."""
    with _own_forwards(modules := list(modules)), _put_back() as before:
        yield bring(modules, place, before)


Slot = tuple[dict[str, Any], str, Tensor]
"""Where a module keeps a tensor, and the one that was there."""


def bring(modules: Iterable[nn.Module], place: Place, before: list[Slot] | None = None) -> int:
    """Put the tensors that these modules themselves hold into a place, one that several share once, and note in
    `before` what stood there. Returns the bytes that came from another device."""
    moved, nbytes = dict[int, tuple[Tensor, Any]](), 0
    # Normal tensors, although the caller may be in inference mode: gradients flow past them.
    with torch.inference_mode(False), torch.no_grad():
        for module in modules:
            offloaded = _offloaded(module)
            places: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for tensors in places:
                for name, tensor in tensors.items():
                    if tensor is None or place.holds(tensor):
                        continue
                    if before is not None:
                        before.append((tensors, name, tensor))
                    if id(tensor) not in moved:
                        source = offloaded.get(name, tensor)
                        nbytes += source.nbytes if source.device != place.device or tensor.is_meta else 0
                        # With what it is of: an id is one tensor's only as long as that lives.
                        moved[id(tensor)] = tensor, _alike(tensor, place(source.detach()))
                    tensors[name] = moved[id(tensor)][1]
    return nbytes


def _alike(tensor: Tensor, values: Tensor) -> Tensor:
    return nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values


@contextmanager
def _put_back() -> Iterator[list[Slot]]:
    before: list[Slot] = []
    try:
        yield before
    finally:
        for tensors, name, tensor in before:
            tensors[name] = tensor


@contextmanager
def _own_forwards(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within it, modules whose weights accelerate keeps elsewhere run as they would without it: its own forward would
    bring the weights with every batch, and take them away."""
    forwards = [(module, module.forward) for module in modules if _offloaded(module)]
    try:
        for module, _ in forwards:
            module.forward = vars(module)["_old_forward"]
        yield
    finally:
        for module, forward in forwards:
            module.forward = forward


def _offloaded(module: nn.Module) -> Mapping[str, Tensor]:
    """Weights of a module that accelerate keeps elsewhere, by their name in it."""
    hook = getattr(module, "_hf_hook", None)
    if not isinstance(hook, AlignDevicesHook) or not hook.offload or hook.weights_map is None:
        return {}
    names = [name for name, tensor in module.named_parameters(recurse=False) if tensor.is_meta]
    return {name: hook.weights_map[name] for name in names}
