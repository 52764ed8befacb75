"""Stand-ins for a parent whose weights are not there: models of its shape with random weights, as much of them as fits
into memory. How long a layer takes, its numbers do not say.

Time grows by as much with every further layer, and with every further row of the vocabulary. So a model that is too
large is timed in parts, at two depths and with two vocabularies, and a line through them gives the whole.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar, cast

import torch
from transformers import PreTrainedModel

from llmprune.models.parent import Parent, make_parent
from llmprune.models.sizes import parameter_bytes
from llmprune.models.surgery import child_config

STAND_IN_BYTES = 2**30
"""Weights of a stand-in, unless LEAST_LAYERS take more. A model that is smaller stands whole."""
LEAST_LAYERS = 3
"""Two layers apart from one, so that of a child that keeps every other layer one is kept."""
_ROWS_SHARE = 1 / 4
"""Of these bytes: enough to lie outside of a processor's caches, as the whole head does."""

Name = TypeVar("Name", bound=Hashable)


class Part(NamedTuple):
    """The first layers of a model, and the first rows of its vocabulary."""

    layers: int
    rows: int


def whole_of(parent: Parent) -> Part:
    """All of a parent."""
    return Part(parent.shape.layers, parent.model.config.get_text_config().vocab_size)


def parts_of(outline: Parent) -> list[Part]:
    """The parts that stand for a model, the largest first, each differing from the one before in one number: the model
    alone where it is small."""
    whole = whole_of(outline)
    layer, row = _bytes_of(outline)
    if layer * whole.layers + row * whole.rows <= STAND_IN_BYTES:
        return [whole]
    rows = min(whole.rows, max(2, int(_ROWS_SHARE * STAND_IN_BYTES) // row))
    room = STAND_IN_BYTES - rows * row
    layers = min(whole.layers, max(LEAST_LAYERS, room // layer))
    parts = [Part(layers, rows)]
    if layers < whole.layers:
        # As far apart as an even number of layers can be: see LEAST_LAYERS.
        parts.append(Part(1 if layers % 2 else 2, rows))
    if rows < whole.rows:
        parts.append(Part(parts[-1].layers, max(1, rows // 4)))
    return parts


def part_bytes(outline: Parent, part: Part) -> int:
    """Weights of a part, in the outline's dtype; norms outside of layers are left out."""
    layer, row = _bytes_of(outline)
    return layer * part.layers + row * part.rows


def _bytes_of(outline: Parent) -> tuple[int, int]:
    """Of a layer, and of a row of the vocabulary, in the embedding and, if that is another matrix, the head."""
    matrices = [outline.model.get_parameter(name) for name in outline.vocabulary_names()]
    return parameter_bytes(outline.layer(0)), sum(one[0].numel() * one.element_size() for one in matrices)


def stand_in(outline: Parent, part: Part, device: torch.device) -> Parent:
    """A part of a parent with random weights, as its class begins a training with. Deterministic."""
    model = _outlined(outline, part)
    model.to_empty(device=device)
    model.tie_weights()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model.initialize_weights()  # type: ignore[no-untyped-call]
    return make_parent(model, None, source=outline.source)


def _outlined(outline: Parent, part: Part) -> PreTrainedModel:
    shape = outline.shape
    kept = shape.architecture.without_layers(range(part.layers, shape.layers))
    config: Any = child_config(outline.model.config, outline.family, shape, kept)
    if part.rows < config.vocab_size:
        config.vocab_size = part.rows
        # Tokens that there may be no row for: an embedding refuses such a padding token.
        config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    model_class: Any = type(outline.model)
    with torch.device("meta"):
        return cast(PreTrainedModel, model_class._from_config(config, dtype=outline.model.dtype))


def drawn_to_whole(
    outline: Parent, device: torch.device, measure: Callable[[Parent], Mapping[Name, float]]
) -> dict[Name, float]:
    """What `measure` would say of the whole model, in seconds: said of its parts, one after the other, and drawn in
    lines of layers and rows. No more of a model takes less time."""
    whole, parts = whole_of(outline), parts_of(outline)
    said = []
    for part in parts:
        said.append(measure(stand_in(outline, part, device)))
        # A model is a web of references: it would stay beside the next one.
        gc.collect()
    total = dict(said[0])
    for (large, small), (of_large, of_small) in zip(pairwise(parts), pairwise(said), strict=True):
        axis = 0 if large.layers != small.layers else 1
        further = (whole[axis] - parts[0][axis]) / (large[axis] - small[axis])
        for name in total:
            total[name] += max(0.0, of_large[name] - of_small[name]) * further
    return total
