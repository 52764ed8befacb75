"""A parent one layer at a time: all text goes through a layer before the next is touched.

So the weights of a layer are brought to where they are computed once, however long the text is, and between two layers
nothing of it is there but the residual stream. Statistics and estimates walk; scoring and timing run whole models.

Shapes: B windows of a batch, T tokens of a window, D the hidden size, V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate.hooks import AlignDevicesHook
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.models.parent import Parent
from llmprune.models.placement import is_spread
from llmprune.models.streams import embedded, layer_calls, no_embeddings, passed_by

Result = TypeVar("Result")

Run = Callable[[Tensor], Tensor]
"""From hidden states (B, T, D), wherever they lie, to what comes of them."""


class Walk:
    """The way of windows of so many tokens through a parent."""

    def __init__(self, parent: Parent, tokens: int, device: torch.device | None = None) -> None:
        """`device`: where layers are computed; by default each where its weights are, or where accelerate would bring
        them. A CPU computes half precision several times more slowly than float32, so there the weights of a layer are
        widened while it runs."""
        self._parent, self._device = parent, device
        self.layers = [parent.layer(index) for index in range(parent.shape.layers)]
        with torch.no_grad():
            self._calls = layer_calls(parent.model, self.layers, tokens)
        self.brought_bytes = 0
        """Weights that were brought from elsewhere, as often as they were."""

    def embedded(self, ids_BT: Tensor) -> Tensor:
        """What enters the first layer: (B, T, D) on the CPU, in the dtype that layers are computed in."""
        with torch.no_grad():
            states_BTD = embedded(self._parent.model, self.layers[0], ids_BT)
        return states_BTD.to("cpu", self._place(self.layers[0]).dtype)

    @contextmanager
    def layer(self, index: int) -> Iterator[Run]:
        """A layer with its weights at hand."""
        layer = self.layers[index]
        place = self._place(layer)
        call = self._calls[index].moved(place)
        with self._at_hand([layer], place):
            yield lambda hidden_BTD: call(layer, place(hidden_BTD))

    @contextmanager
    def behind(self) -> Iterator[Run]:
        """What comes behind the last layer, from its output to the logits (B, T, V)."""
        with self._rest(lambda given: self._parent.model(**given).logits) as run:
            yield run

    @contextmanager
    def last_states(self) -> Iterator[Run]:
        """What the output head reads, from the last layer's output: (B, T, D)."""
        with self._rest(lambda given: self._parent.model.base_model(**given).last_hidden_state) as run:
            yield run

    @contextmanager
    def _rest(self, behind: Callable[[dict[str, Any]], Tensor]) -> Iterator[Run]:
        head = self._parent.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        place = self._place(head)
        model = self._parent.model

        def run(hidden_BTD: Tensor) -> Tensor:
            hidden_BTD = place(hidden_BTD)
            with passed_by(self.layers, hidden_BTD):
                entering = no_embeddings(model, *hidden_BTD.shape[:2]).to(hidden_BTD)
                return behind({"inputs_embeds": entering, "use_cache": False})

        with self._at_hand(_outside(self._parent.model, self.layers), place):
            yield run

    def _place(self, module: nn.Module) -> _Place:
        device = _home(module) if self._device is None else self._device
        return _Place(device, walking_dtype(self._parent.model.dtype, device))

    @contextmanager
    def _at_hand(self, modules: Iterable[nn.Module], place: _Place) -> Iterator[None]:
        """Within it, weights of these modules are where and how they are computed; afterwards the same tensors as
        before stand in their places."""
        before: list[tuple[dict[str, Any], str, Tensor]] = []
        forwards: list[tuple[nn.Module, Any]] = []
        try:
            # Normal tensors, although the caller may be in inference mode: gradients flow past them.
            with torch.inference_mode(False), torch.no_grad():
                for module in (part for owner in modules for part in owner.modules()):
                    if offloaded := _offloaded(module):
                        # accelerate's own forward would bring the weights with every batch, and take them away.
                        forwards.append((module, module.forward))
                        module.forward = vars(module)["_old_forward"]
                    places: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
                    for tensors in places:
                        for name, tensor in tensors.items():
                            if tensor is not None and not place.holds(tensor):
                                before.append((tensors, name, tensor))
                                tensors[name] = self._brought(offloaded.get(name, tensor), tensor, place)
            yield
        finally:
            for tensors, name, tensor in before:
                tensors[name] = tensor
            for module, forward in forwards:
                module.forward = forward

    def _brought(self, tensor: Tensor, like: Tensor, place: _Place) -> Any:
        if tensor.device != place.device or like.is_meta:
            self.brought_bytes += tensor.nbytes
        here = place(tensor.detach())
        return nn.Parameter(here, requires_grad=False) if isinstance(like, nn.Parameter) else here


@dataclass(frozen=True)
class _Place:
    """Where and how weights and states are computed."""

    device: torch.device
    dtype: torch.dtype

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else tensor.dtype)

    def holds(self, tensor: Tensor) -> bool:
        return tensor.device == self.device and (tensor.dtype == self.dtype or not tensor.is_floating_point())


def walking_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What layers of a parent in that dtype are computed in where they are walked."""
    return torch.float32 if device.type == "cpu" and dtype.itemsize < 4 else dtype


def is_brought(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether weights in that dtype are not computed with as they are: they are widened, or their choices come from
    another memory than an accelerator's."""
    return device.type != "cpu" or walking_dtype(dtype, device) != dtype


def _outside(model: PreTrainedModel, layers: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """The modules with weights that are in no layer, but for the embedding, which nothing behind a layer reads."""
    within = {part for layer in layers for part in layer.modules()} | {model.get_input_embeddings()}
    for module in model.modules():
        if module not in within and any(True for _ in module.parameters(recurse=False)):
            yield module


def _home(module: nn.Module) -> torch.device:
    """Where a module is computed: where its weights are, or where accelerate brings them."""
    first = next(part for part in module.modules() if any(True for _ in part.parameters(recurse=False)))
    device = next(first.parameters(recurse=False)).device
    hook = getattr(first, "_hf_hook", None)
    return torch.device(hook.execution_device) if device.type == "meta" and hook is not None else device


def _offloaded(module: nn.Module) -> Mapping[str, Tensor]:
    """Weights of a module that accelerate keeps elsewhere, by their name in it."""
    hook = getattr(module, "_hf_hook", None)
    if not isinstance(hook, AlignDevicesHook) or not hook.offload or hook.weights_map is None:
        return {}
    names = [name for name, tensor in module.named_parameters(recurse=False) if tensor.is_meta]
    return {name: hook.weights_map[name] for name in names}


def with_room(parent: Parent, work: Callable[[torch.device | None], Result]) -> Result:
    """What is done layer by layer: `work`, told where layers are to be computed (None: where they lie). If the parent's
    accelerator has no room for both, the parent waits in CPU memory, and its layers come one at a time.

    Raises torch.OutOfMemoryError if there is no room even so.
    """
    try:
        return work(None)
    except torch.OutOfMemoryError:
        if is_spread(parent.model):
            raise
    device = parent.device
    parent.model.to("cpu")  # type: ignore[arg-type]
    try:
        return work(device)
    finally:
        parent.model.to(device)  # type: ignore[arg-type]
