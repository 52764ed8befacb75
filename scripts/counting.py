"""Counts of what torch really runs: tokens through decoder layers, and floating point operations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook
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
        if not type(module).__name__.endswith("DecoderLayer"):
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
