"""CUDA graphs on a CPU: what torch.cuda captures, recorded as operations over tensors, and run again without Python.

A replay does what the GPU's does: the same operations at the same addresses, whatever Python would decide by now. And
as there, what waits for a number from the device cannot be captured.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_READ_BY_PYTHON = {"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero"}


class _Graph(TorchDispatchMode):
    """In the place of torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in _READ_BY_PYTHON or torch.Tag.data_dependent_output in func.tags:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.operations:
            again = func(*args, **kwargs)
            for kept, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                # A view, or what an operation wrote into, is there already.
                if isinstance(kept, torch.Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


class _Stream:
    def wait_stream(self, other: Any) -> None:
        """There is one queue only."""


def install(monkeypatch: pytest.MonkeyPatch) -> list[_Graph]:
    """Put all this in the place of what `cuda_graphs` takes from torch.cuda. Returns the graphs that will be made."""
    graphs: list[_Graph] = []
    capturing: list[_Graph] = []

    def new_graph() -> _Graph:
        graphs.append(_Graph())
        return graphs[-1]

    @contextmanager
    def capture(graph: _Graph, pool: Any, stream: Any) -> Iterator[None]:
        capturing.append(graph)
        try:
            with graph:
                yield
        finally:
            capturing.pop()

    for name, stand_in in {
        "CUDAGraph": new_graph,
        "graph": capture,
        "graph_pool_handle": tuple,
        "Stream": lambda device: _Stream(),
        "current_stream": lambda device: _Stream(),
        "stream": lambda stream: nullcontext(),
        "device": lambda device: nullcontext(),
        "is_current_stream_capturing": lambda: bool(capturing),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return graphs
