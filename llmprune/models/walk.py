"""A parent one layer at a time: all text goes through a layer before the next is touched.

So the weights of a layer are brought to where they are computed once, however long the text is, and between two layers
nothing of it is there but the residual stream. Statistics and estimates walk; scoring and timing run whole models.

Shapes: B windows of a batch, T tokens of a window, D the hidden size, V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.models.at_hand import Place, at_hand
from llmprune.models.parent import Parent
from llmprune.models.streams import embedded, layer_calls, no_embeddings, passed_by

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
        with self._at_hand(layer.modules(), place):
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

    def _place(self, module: nn.Module) -> Place:
        device = _home(module) if self._device is None else self._device
        return Place(device, walking_dtype(self._parent.model.dtype, device))

    @contextmanager
    def _at_hand(self, modules: Iterable[nn.Module], place: Place) -> Iterator[None]:
        with at_hand(modules, place) as brought_bytes:
            self.brought_bytes += brought_bytes
            yield


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
