"""Counts of what torch really does: tokens through decoder layers, floating point operations, bytes allocated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.nn.modules.module import _global_forward_hooks_with_kwargs, register_module_forward_hook
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass
class Work:
    """What ran within `counted`."""

    forward_layer_tokens: int = 0
    backward_layer_tokens: int = 0


@contextmanager
def counted() -> Iterator[Work]:
    """Counts the tokens that pass through decoder layers, of whatever model, and the gradients that come back."""
    work = Work()

    def hook(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        # A layer that is passed by (models/streams.py) computes nothing.
        if not type(module).__name__.endswith("DecoderLayer") or "forward" in vars(module):
            return
        hidden = output[0] if isinstance(output, tuple) else output
        tokens = hidden.shape[0] * hidden.shape[1]
        work.forward_layer_tokens += tokens
        if hidden.requires_grad:

            def came_back(gradient: torch.Tensor) -> None:
                work.backward_layer_tokens += tokens

            hidden.register_hook(came_back)

    handle = register_module_forward_hook(hook, with_kwargs=True)
    try:
        yield work
    finally:
        handle.remove()
        # torch keeps its note that the hook takes keywords, and then warns of a hook whatever it compiles.
        _global_forward_hooks_with_kwargs.pop(handle.id, None)


@dataclass
class Memory:
    """What `allocated` saw: the most bytes of tensors on the CPU at once, above what was there before."""

    peak_bytes: int = 0


@contextmanager
def allocated() -> Iterator[Memory]:
    """Watches torch's CPU allocator; scratch that a kernel allocates for itself is seen too."""
    memory = Memory()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        yield memory
    found: list[tuple[int, int]] = []
    waiting = list(watched.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation:
            found.append((event.start_time_ns, event.extra_fields.alloc_size))
    held = 0
    for _, change in sorted(found):
        held += change
        memory.peak_bytes = max(memory.peak_bytes, held)


class Flops(TorchDispatchMode):
    """Operations of matrix products, Cholesky factors and triangular solves, by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.by_dtype: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.rstrip("_")
        # Inference mode hands matmul and linear over whole, everything else its parts.
        if name == "linear":
            self.by_dtype[args[0].dtype] += 2 * args[0].numel() * args[1].shape[0]
        elif name in ("mm", "bmm", "addmm", "baddbmm", "matmul"):
            first, second = args[-2:]
            self.by_dtype[first.dtype] += 2 * first.numel() * second.shape[-1]
        elif name == "linalg_cholesky_ex":
            self.by_dtype[args[0].dtype] += args[0].numel() * args[0].shape[-1] // 3
        elif name == "cholesky_solve":
            self.by_dtype[args[1].dtype] += 2 * args[0].numel() * args[1].shape[-1]
        elif name == "linalg_solve_triangular":
            self.by_dtype[args[0].dtype] += args[0].numel() * args[1].shape[-1]
        return result
