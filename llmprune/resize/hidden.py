"""A model with a narrower residual stream: one hidden size for all of it, in a stock class, ready to be a parent.

Two ways. "rotation" (SliceGPT, arXiv 2401.15024) turns the stream into a basis in which the last directions hold
little, and leaves them out; here one basis serves the whole model, so that no matrix is needed on the residual path and
the child is a stock checkpoint. "channels" (Minitron, arXiv 2407.14679) leaves out the least active channels of the
stream as they are. Heads, head dim and FFN width stay. What is left out is not lost to what reads the stream as far as
it can be told from what is kept: maps that read it are solved again by least squares.

Shapes: D the hidden size, E that of the child (E <= D).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from llmprune.core.errors import ArchitectureError, UnsupportedModelError, quoted
from llmprune.core.progress import Advance
from llmprune.data.tokens import Split
from llmprune.models.modeling_pruned import FAMILIES
from llmprune.models.parent import Parent
from llmprune.resize.basis import Basis, channel_basis, rotated_basis
from llmprune.resize.stream import collect_places, embedding_name, gain_offset, head_name, is_tied, readings, writers

Way = Literal["rotation", "channels"]
WAYS: tuple[Way, ...] = get_args(Way)
MULTIPLE = 32
"""Of which hidden sizes are multiples by default: a row of a GGUF file is whole blocks of 32 numbers."""
ROWS = 8192
"""Rows of a matrix that are multiplied out in float64 together."""

_TWINS = {"llama": "mistral"}
"""Families whose models, without biases, another family computes to the letter under the same tensor names, while its
config does not demand that the heads divide the hidden size."""


@dataclass(frozen=True, eq=False)
class HiddenCut:
    """A child with a narrower residual stream."""

    model: PreTrainedModel
    """Stock, in eval mode, in the parent's dtype; shares no storage with the parent."""
    way: Way
    energy: float
    """Share of the normalised stream's square that is kept, 0 to 1: a mean over norms and tokens."""


def cut_hidden(
    parent: Parent,
    split: Split,
    hidden_size: int,
    *,
    way: Way = "rotation",
    multiple: int = MULTIPLE,
    refit: bool = True,
    progress: Advance = lambda done, total: None,
) -> HiddenCut:
    """The parent with a residual stream of `hidden_size`, chosen and fitted on the tokens of `split` (calibration).

    With `refit`, maps that read the stream are solved again, to make of what is kept what the parent's made of all; a
    head that is the embedding is not, and stays the embedding. The parent is untouched. `progress` counts windows.
    Memory beside the two models: a float64 matrix (D, D) a norm.

    At the parent's own size a rotation leaves its logits, unless the head is the embedding and the gains before it
    differ: they cannot be turned with the stream.

    Raises ArchitectureError if the size is not legal (`legal_hidden_sizes`), UnsupportedModelError if the family's
    config cannot say it (`config_problem`) or forbids the way (`rotation_problem`), and ModelError if an activation is
    not finite.
    """
    if way not in WAYS:
        raise ArchitectureError(f"way must be one of {', '.join(WAYS)}; got {quoted(way)}")
    problem = config_problem(parent) or (rotation_problem(parent) if way == "rotation" else None)
    if problem:
        raise UnsupportedModelError(f"{parent.source}: {problem}")
    if problem := size_problem(parent, hidden_size, multiple):
        raise ArchitectureError(f"{parent.source}: {problem}")
    places = collect_places(parent, split, progress=progress)
    make = rotated_basis if way == "rotation" else channel_basis
    with torch.inference_mode(False), torch.no_grad():
        basis = make(parent, places, hidden_size, refit_readers=refit)
        child = _skeleton(parent, hidden_size)
        _fill(child, _tensors(parent, child, basis), parent)
    return HiddenCut(child, way, basis.energy)


def config_problem(parent: Parent) -> str | None:
    """Why no config of the family can say another hidden size with the same heads; None if one can."""
    family = parent.family
    if not family.derives_head_dim:
        return None
    return (
        f"{family.config} has no field head_dim: the width of a head is hidden_size / {family.heads}, so another "
        "hidden size would be other heads too; prune its blocks instead"
    )


def rotation_problem(parent: Parent) -> str | None:
    """Why the stream cannot be rotated; None if it can."""
    if problem := config_problem(parent):
        return problem
    behind = parent.family.attention.output_norm or parent.family.ffn.output_norm
    if behind is not None:
        return (
            f"{parent.model.config.model_type} adds to its stream what a norm with weights ({behind}) gives, and those "
            'weights scale channels, not directions; use way="channels"'
        )
    assert all(reading.norm is not None for reading in readings(parent)), "without norms behind blocks, they are before"
    return None


def size_problem(parent: Parent, hidden_size: int, multiple: int = MULTIPLE) -> str | None:
    """Why a child cannot have this hidden size; None if it can."""
    full = parent.shape.hidden_size
    if not 0 < hidden_size <= full:
        return f"hidden_size must be from {multiple} to the parent's {full}, got {hidden_size}"
    if hidden_size == full:
        return None
    if hidden_size % multiple:
        near = hidden_size // multiple * multiple
        return f"hidden_size must be a multiple of {multiple}, got {hidden_size}; use {near or multiple}"
    try:
        _child_config(parent, hidden_size)
    except StrictDataclassError as error:
        return f"hidden_size {hidden_size} is refused by {parent.family.config}: {' '.join(str(error).split())}"
    return None


def legal_hidden_sizes(parent: Parent, multiple: int = MULTIPLE) -> list[int]:
    """Hidden sizes below the parent's that a child can have, the largest first; none if no config can say them."""
    if config_problem(parent):
        return []
    sizes = range((parent.shape.hidden_size - 1) // multiple * multiple, 0, -multiple)
    return [size for size in sizes if size_problem(parent, size, multiple) is None]


def _child_config(parent: Parent, hidden_size: int) -> Any:
    """The parent's config with another hidden size, in its own class or its twin's. Raises StrictDataclassError as
    the own class does if neither takes it."""
    config = parent.model.config
    values = config.to_dict()
    for key in ("model_type", "architectures", "transformers_version", "quantization_config", "_name_or_path"):
        values.pop(key, None)
    values |= {"hidden_size": hidden_size, "head_dim": parent.shape.head_dim}
    try:
        child = type(config)(**values)
    except StrictDataclassError:
        twin = _twin(config)
        if twin is None:
            raise
        child = getattr(transformers, FAMILIES[twin].config)(**{**values, "sliding_window": None})
    child.dtype = config.dtype
    child._attn_implementation = config._attn_implementation
    return child


def _twin(config: Any) -> str | None:
    biased = any(getattr(config, name, False) for name in ("attention_bias", "mlp_bias"))
    return None if biased else _TWINS.get(config.model_type)


def _skeleton(parent: Parent, hidden_size: int) -> PreTrainedModel:
    """The child in its class and at its sizes, its weights still to come."""
    config = _child_config(parent, hidden_size)
    with no_init_weights():
        child = getattr(transformers, FAMILIES[config.model_type].causal_lm)(config)
    return cast(PreTrainedModel, child)


def _tensors(parent: Parent, child: PreTrainedModel, basis: Basis) -> dict[str, Tensor]:
    """Every tensor of the child, by its name."""
    model, tensors = parent.model, dict(parent.model.state_dict())
    head, embedding = head_name(parent), embedding_name(parent)
    tied = is_tied(parent)
    # Gemma multiplies what it looks up by the root of its hidden size.
    stretch = _embedding_scale(model) / _embedding_scale(child)
    tensors[f"{embedding}.weight"] = _times(tensors[f"{embedding}.weight"], basis.down_DE * stretch)
    for reading in readings(parent):
        for name in reading.maps:
            if not (name == head and tied):
                tensors[f"{name}.weight"] = _times(tensors[f"{name}.weight"], basis.ups[reading.place])
    if tied:
        tensors[f"{head}.weight"] = tensors[f"{embedding}.weight"]
    for name in writers(parent):
        tensors[f"{name}.weight"] = _times(tensors[f"{name}.weight"].mT, basis.down_DE).mT
        if f"{name}.bias" in tensors:
            tensors[f"{name}.bias"] = _times(tensors[f"{name}.bias"], basis.down_DE)
    for name, gain_E in basis.gains.items():
        scale = basis.scales[name] / (stretch if tied and name == readings(parent)[-1].norm else 1.0)
        tensors[f"{name}.weight"] = gain_E * scale - gain_offset(model.get_submodule(name))
    return tensors


def _embedding_scale(model: PreTrainedModel) -> float:
    return float(getattr(model.get_input_embeddings(), "embed_scale", 1.0))


def _times(weight: Tensor, matrix: Tensor) -> Tensor:
    """A weight (..., D) times a float64 matrix (D, E), in the weight's dtype."""
    # An embedding in float64 may be larger than all the rest.
    parts = [part.to(matrix) @ matrix for part in torch.split(weight.reshape(-1, len(matrix)), ROWS)]
    return torch.cat(parts).reshape(*weight.shape[:-1], -1).to(weight.dtype)


def _fill(child: PreTrainedModel, tensors: dict[str, Tensor], parent: Parent) -> None:
    """Give the child its weights, in the parent's dtype and place: a missing, unexpected or misshapen one is an
    error."""
    # Copies: what the cut leaves as it is would be the parent's own storage.
    own = {
        name: value.detach().to(parent.device, parent.model.dtype, copy=True).contiguous()
        for name, value in tensors.items()
    }
    child.load_state_dict(own, strict=True, assign=True)
    child.tie_weights()
    child.to(parent.device)  # type: ignore[arg-type]
    child.generation_config = copy.deepcopy(parent.model.generation_config)
    child.eval().requires_grad_(False)  # type: ignore[no-untyped-call]
