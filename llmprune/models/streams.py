"""A model's layers run one after another on hidden states of many windows: what one layer gives is kept, the model's
activations never lie in memory together.

Shapes: W windows of a split, B windows of a batch, T tokens of a window, D the hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from transformers import PreTrainedModel

BATCH_TOKENS = 2048
"""Tokens that go through a layer together, in whole windows."""


class Shelf:
    """Where tensors of many windows lie: in memory as long as they fit into `memory_bytes`, else in files of a
    temporary directory beside the run, mapped into memory."""

    def __init__(self, memory_bytes: int, scratch: Path | None = None) -> None:
        self._left, self._scratch, self._files = memory_bytes, scratch, 0
        self._directory: TemporaryDirectory[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._directory is not None:
            self._directory.cleanup()

    def place(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Room for a tensor on the CPU; it lasts as long as the shelf."""
        needed = torch.Size(shape).numel() * dtype.itemsize
        if needed <= self._left:
            self._left -= needed
            return torch.empty(tuple(shape), dtype=dtype)
        if self._directory is None:
            self._directory = TemporaryDirectory(prefix=".states.", dir=self._scratch)
        self._files += 1
        file = Path(self._directory.name) / str(self._files)
        flat = torch.from_file(str(file), shared=True, size=torch.Size(shape).numel(), dtype=dtype)
        return flat.reshape(tuple(shape))


class _Reached(Exception):
    """Ends a pass: what it was for is known."""


@dataclass(frozen=True)
class Call:
    """What a layer is called with beside the hidden states: the same for all windows of one length."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: bool
    """Whether the hidden states go by name."""

    def __call__(self, layer: nn.Module, hidden_BTD: Tensor) -> Tensor:
        if self.by_name:
            output = layer(*self.args, **self.kwargs, hidden_states=hidden_BTD)
        else:
            output = layer(hidden_BTD, *self.args, **self.kwargs)
        after_BTD: Tensor = output[0] if isinstance(output, tuple) else output
        return after_BTD

    def moved(self, here: Callable[[Tensor], Tensor]) -> Call:
        """The same call with its tensors elsewhere."""
        args, kwargs = recursively_apply(here, (self.args, self.kwargs))
        return Call(args, kwargs, self.by_name)


def input_device(model: PreTrainedModel) -> torch.device:
    """Where inputs go: the device of the embeddings, or that to which accelerate brings them."""
    embedding = model.get_input_embeddings()
    device: torch.device = embedding.weight.device  # type: ignore[assignment]
    hook = getattr(embedding, "_hf_hook", None)
    return torch.device(hook.execution_device) if device.type == "meta" and hook is not None else device


@contextmanager
def passed_by(layers: Sequence[nn.Module], last_BTD: Tensor | None = None) -> Iterator[dict[int, Call]]:
    """Within it the layers hand on what enters them, so that a pass through their model is what is before and behind
    them alone; behind the last comes `last_BTD` instead, if it is given. How each was called is noted."""
    calls: dict[int, Call] = {}

    def forward(index: int, *args: Any, **kwargs: Any) -> Tensor:
        others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        calls[index] = Call(args[1:], others, by_name="hidden_states" in kwargs)
        entering_BTD: Tensor = args[0] if args else kwargs["hidden_states"]
        return entering_BTD if last_BTD is None or index < len(layers) - 1 else last_BTD

    own = [layer.__dict__.get("forward") for layer in layers]
    try:
        for index, layer in enumerate(layers):
            layer.forward = partial(forward, index)
        yield calls
    finally:
        for layer, before in zip(layers, own, strict=True):
            del layer.forward
            if before is not None:
                layer.forward = before


def layer_calls(model: PreTrainedModel, layers: Sequence[nn.Module], tokens: int) -> list[Call]:
    """How the model calls each of its layers on a window of so many tokens: masks, positions, rotary embeddings."""
    with passed_by(layers) as calls:
        model.base_model(inputs_embeds=no_embeddings(model, 1, tokens), use_cache=False)
    return [calls[index] for index in range(len(layers))]


def no_embeddings(model: PreTrainedModel, windows: int, tokens: int) -> Tensor:
    """What a pass is begun with that takes no notice of it: (B, T, E) zeros, as wide as an embedding."""
    width: int = model.get_input_embeddings().weight.shape[1]  # type: ignore[index, assignment]
    return torch.zeros(windows, tokens, width, dtype=model.dtype, device=input_device(model))


def embedded(model: PreTrainedModel, first_layer: nn.Module, ids_BT: Tensor) -> Tensor:
    """What enters the first layer: (B, T, D)."""
    seen: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])
        raise _Reached

    handle = first_layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        model.base_model(input_ids=ids_BT.to(input_device(model)), use_cache=False)
    except _Reached:
        pass
    finally:
        handle.remove()
    return seen[0]


def until(module: nn.Module, run: Callable[[], object]) -> tuple[Tensor, Tensor]:
    """Run as far as `module` only: its input and its output, with the shape of what it was given."""
    seen: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.extend((args[0], output))
        raise _Reached

    handle = module.register_forward_hook(hook)
    try:
        run()
    except _Reached:
        pass
    finally:
        handle.remove()
    return seen[0], seen[1]


@contextmanager
def instead_of(owner: nn.Module, name: str, stand_in: nn.Module) -> Iterator[None]:
    """Within it, `owner` has `stand_in` for its submodule `name`."""
    own = owner.get_submodule(name)
    owner.set_submodule(name, stand_in)
    try:
        yield
    finally:
        owner.set_submodule(name, own)


class GivenAttention(nn.Module):
    """An attention block whose output is known."""

    def __init__(self) -> None:
        super().__init__()
        self.output_BTD: Tensor | None = None

    def forward(self, *_: Any, **__: Any) -> tuple[Tensor, None]:
        assert self.output_BTD is not None, "its output is given first"
        return self.output_BTD, None
