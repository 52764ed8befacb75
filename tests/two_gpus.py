"""Two GPUs where there is none: tensors that say that they lie on "cuda:0" or "cuda:1", while the CPU computes.

An operation on tensors of two devices is an error, as on GPUs; only copies, and indices from the CPU, cross. What this
cannot show: streams, speed, and a GPU's rounding. Forward passes only: autograd looks behind the names. Their memory
is that of the tensors which are alive, and may be limited.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from accelerate import dispatch_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel

Place = str | torch.device
CPU = torch.device("cpu")
_aten = torch.ops.aten
_CROSSING = {_aten._to_copy, _aten.to, _aten.copy_}
_INDEXING = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default}


@dataclass
class Memory:
    """Of both together, in bytes."""

    limit: int | None = None
    peak: int = 0
    _tensors: Counter[int] = field(default_factory=Counter)
    """How many there are, by the storage that they share."""
    _nbytes: dict[int, int] = field(default_factory=dict)

    @property
    def used(self) -> int:
        return sum(self._nbytes.values())

    def claim(self, held: torch.Tensor) -> Claim:
        storage = held.untyped_storage()
        place, nbytes = storage.data_ptr(), storage.nbytes()
        if self.limit is not None and place not in self._nbytes and self.used + nbytes > self.limit:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {nbytes} bytes.")
        self._tensors[place] += 1
        self._nbytes[place] = nbytes
        self.peak = max(self.peak, self.used)
        return Claim(self, place)

    def release(self, place: int) -> None:
        self._tensors[place] -= 1
        if not self._tensors[place]:
            del self._nbytes[place]


class Claim:
    """Of one tensor, as long as it lives."""

    def __init__(self, memory: Memory, place: int) -> None:
        self._memory, self._place = memory, place

    def __del__(self) -> None:
        self._memory.release(self._place)


_memory: list[Memory] = []
"""Of the stand-ins that are there now."""


class OnGpu(torch.Tensor):
    """A tensor of the CPU under another name. To torch's own code it has no memory ("meta"), so that every operation
    on it comes by here."""

    held: torch.Tensor
    place: torch.device
    claim: Claim | None

    @staticmethod
    def __new__(cls, held: torch.Tensor, place: torch.device) -> OnGpu:
        claim = _memory[-1].claim(held) if _memory else None
        # Never an inference tensor: within that mode too, a view of a normal one has to be normal.
        with torch.inference_mode(False):
            made: OnGpu = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls, held.size(), held.stride(), held.storage_offset(), dtype=held.dtype, device="meta"
            )
        made.held, made.place, made.claim = held, place, claim
        return made

    def __init__(self, held: torch.Tensor, place: torch.device) -> None:
        pass

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.place

    is_meta = property(lambda self: False)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnGpu({self.held}, {self.place})"

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Itself, where nothing changes: torch compares with where it believes this to be."""
        found: torch.Tensor = super().to(*args, **kwargs)
        changes = found.device != self.place or found.dtype != self.dtype or kwargs.get("copy")
        return found if changes else self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Of `tensor.to(other)` torch would take the device that it knows.
        if func is torch.Tensor.to and isinstance(args[-1], OnGpu) and len(args) == 2:
            args = args[0], args[1].place, args[1].dtype
        # Results that are on the CPU stay what they are.
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Tensors that are made on a device have no argument that would bring them here."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    named = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    tensors = [one for one in tree_leaves(named) if isinstance(one, torch.Tensor)]
    places = [one.place for one in tensors if isinstance(one, OnGpu)]
    # Numbers may come from the CPU, and lists of rows.
    on_cpu = any(one.ndim and not isinstance(one, OnGpu) for one in tensors) and func not in _INDEXING
    if func.overloadpacket not in _CROSSING and (len(set(places)) > 1 or (places and on_cpu)):
        raise RuntimeError(f"expected all tensors on one device, got {[str(one.device) for one in tensors]} for {func}")
    place = places[0] if places else CPU
    if (asked := named.get("device")) is not None and torch.device(asked).type != "meta":
        place = torch.device(asked)
        named["device"] = CPU
    elif func is _aten.scalar_tensor.default:
        # A number beside a tensor, by torch's own code: where that believes the tensor to be.
        named["device"] = CPU
    elif func is _aten.to.other:
        place = named["other"].device
    found = func(**tree_map(_held, named))
    for argument in func._schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            return named[argument.name]
    if place.type != "cuda":
        return found
    return tree_map(lambda one: OnGpu(one, place) if isinstance(one, torch.Tensor) else one, found)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, OnGpu) else value


@contextmanager
def two_gpus(limit_bytes: int | None = None) -> Iterator[Memory]:
    """Within it, tensors can be on cuda:0 and cuda:1, as many as fit into the limit."""
    # `torch.tensor` makes its tensor on the CPU, and moves it in a second step.
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with (
            patch.object(torch.cuda, "_lazy_init", lambda: None),
            patch.object(torch.accelerator, "synchronize", lambda device: None),
            _Factories(),
        ):
            _memory.append(Memory(limit_bytes))
            yield _memory[-1]
    finally:
        _memory.clear()
        torch._C._set_only_lift_cpu_tensors(False)


def spread(model: PreTrainedModel, device_map: Mapping[str, Place]) -> PreTrainedModel:
    """The model with its modules where the map says, moved and hooked as transformers does it for `device_map`."""
    moved: dict[int, torch.Tensor] = {}

    def at_its_place(name: str, tensor: torch.Tensor) -> torch.Tensor:
        place = torch.device(next(place for module, place in device_map.items() if name.startswith(f"{module}.")))
        if place.type == "cuda" and id(tensor) not in moved:
            there = OnGpu(tensor.detach(), place)
            moved[id(tensor)] = nn.Parameter(there, requires_grad=False) if isinstance(tensor, nn.Parameter) else there
        return moved.get(id(tensor), tensor)

    for name, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                if tensor is not None:
                    tensors[key] = at_its_place(f"{name}.{key}", tensor)  # type: ignore[assignment]
    first = next(iter(device_map.values()))
    dispatch_model(model, dict(device_map), main_device=first, skip_keys=model._skip_keys_device_placement)
    return model
