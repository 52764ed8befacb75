"""Hold a GGUF file to the child that it was made of, in a real llama.cpp.

Rounding moves a child's logits as far as that child is sensitive, so no fixed distance tells a good file from a wrong
one. What a file holds is exact, though: its numbers, expanded to float32, must compute what the child with weights
rounded in the same way computes. As llama.cpp runs the file itself, it rounds the inputs of every product as well, and
from there on no two computations round alike: that is held to what such rounding does to the same child.

Shapes: B sequences, T tokens of each, V words of the vocabulary, D inputs of a projection.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.activations import FastGELUActivation, GELUActivation, GELUTanh, NewGELUActivation
from transformers.pytorch_utils import Conv1D

from llmprune.core.errors import ExportError
from llmprune.core.recipe import GgufType
from llmprune.formats.gguf import type_of
from llmprune.formats.gguf_expanded import write_expanded
from llmprune.measure.speed.llamacpp import GgufModel, logits_of
from llmprune.models.expected import proof_tokens
from llmprune.models.modeling_pruned import input_axis
from llmprune.models.stored import stored_weights
from llmprune.numerics.divergence import kl_nats
from llmprune.numerics.ggml import from_blocks, to_blocks

MAX_CONTENTS_KL = 1e-5
"""Nats a token: float32 rounding alone was at most 6e-9, in children that have lost nearly everything."""

ROUNDING_MARGIN = 8.0
"""How many times what rounded inputs do to the child the file may be away: two such roundings differ, at most twofold
where it was measured."""


@dataclass(frozen=True)
class GgufProof:
    """Mean KL in nats a token on random tokens, of what llama.cpp predicts from the file.

    `contents_kl`: its numbers in float32, to the child with equally rounded weights. `served_kl`: the file itself, to
    the same. `child_kl`: the file itself, to the child as it is; what the type costs, and no part of the proof.
    """

    contents_kl: float
    served_kl: float
    child_kl: float


@torch.inference_mode()
def prove_gguf(child: PreTrainedModel, path: Path, weights: GgufType) -> GgufProof:
    """Hold the file at `path` to `child`, which stays as it is; the child may be on any device and in any dtype.

    A file that is not in f32 has an expanded copy beside it meanwhile: four bytes a parameter.
    Raises ExportError if llama.cpp computes something else from it.
    """
    ids_BT = proof_tokens(child)
    # All that is asked of the child, before llama.cpp loads the file. One pass for both halves, since rounding the
    # weights is the work.
    exact_BTV, rounded_BTV = _rounded_like(child, weights)(torch.cat([ids_BT, ids_BT])).logits.chunk(2)
    child_BTV = child(ids_BT.to(child.device)).logits.cpu()
    served_BTV = _logits(path, ids_BT)
    contents_kl = kl_nats(exact_BTV, served_BTV if weights == "f32" else _expanded_logits(path, ids_BT))
    _check(path, "its numbers are not the child's", contents_kl, MAX_CONTENTS_KL)
    served_kl = kl_nats(exact_BTV, served_BTV)
    limit = MAX_CONTENTS_KL + ROUNDING_MARGIN * kl_nats(exact_BTV, rounded_BTV)
    _check(path, "rounding does not explain it", served_kl, limit)
    return GgufProof(contents_kl, served_kl, kl_nats(child_BTV, served_BTV))


def _check(path: Path, reason: str, kl: float, limit: float) -> None:
    if not kl <= limit:
        raise ExportError(
            f"llama.cpp computes something else from {path.name}: KL {kl:.2g} nats a token > {limit:.2g}, {reason}; it "
            "is not written"
        )


def _logits(path: Path, ids_BT: torch.Tensor) -> torch.Tensor:
    with GgufModel(path) as model:
        return logits_of(model, ids_BT)


def _expanded_logits(path: Path, ids_BT: torch.Tensor) -> torch.Tensor:
    expanded = path.with_name(f"{path.stem}.expanded.gguf")
    try:
        write_expanded(path, expanded)
        return _logits(expanded, ids_BT)
    finally:
        expanded.unlink(missing_ok=True)


def _rounded_like(child: PreTrainedModel, weights: GgufType) -> PreTrainedModel:
    """The child in float32 on the CPU, its matrices rounded as the file stores them, one at a time as they are used.

    Of twice B sequences, the inputs of projections are rounded in the second half. Matrices are the child's own
    storage; all else is copied.
    """
    memo: dict[int, Any] = {id(buffer): buffer.detach().to("cpu", copy=True) for buffer in child.buffers()}
    for parameter in child.parameters():
        alone = nn.Parameter(parameter.detach().to("cpu", torch.float32, copy=True), requires_grad=False)
        memo[id(parameter)] = parameter if parameter.ndim > 1 else alone
    model: PreTrainedModel = copy.deepcopy(child, memo)
    # A child spread over several devices has hooks that would move activations.
    remove_hook_from_module(model, recurse=True)
    # By what they are, not by name: an output head may be the embedding.
    known = {id(child.get_parameter(name)) for name in stored_weights(child)}
    for name, module in model.named_modules():
        use: Any = None
        if isinstance(module, (nn.Linear, nn.Embedding, Conv1D)):
            type_ = type_of(child.config, f"{name}.weight", weights)
            # One that is rounded already is what it is.
            there = id(module.weight) in known
            rounded = (lambda values: values.detach().cpu().float()) if there else partial(_rounded, type_=type_)
            use = (
                partial(_embed, module, rounded)
                if isinstance(module, nn.Embedding)
                else partial(_project, module, rounded, _INPUTS.get(type_, "q8_0"))
            )
        elif isinstance(module, _GELUS):
            use = _looked_up_gelu
        if use is not None:
            module.forward = use
    return model


_GELUS = (GELUActivation, GELUTanh, NewGELUActivation, FastGELUActivation)
_INPUTS: Mapping[GgufType, GgufType] = {"f32": "f32", "f16": "f16"}
"""What llama.cpp rounds the inputs of a product to, by the type of the weights; 8 bits for all that are not here."""

_Rounding = Callable[[torch.Tensor], torch.Tensor]


def _project(module: Any, rounding: _Rounding, inputs: GgufType, inputs_BTD: torch.Tensor) -> torch.Tensor:
    exact, rounded = inputs_BTD.chunk(2)
    weight = module.weight if input_axis(module) == 1 else module.weight.T
    return functional.linear(torch.cat([exact, _rounded(rounded, inputs)]), rounding(weight), module.bias)


def _embed(module: Any, rounding: _Rounding, ids_BT: torch.Tensor) -> torch.Tensor:
    rows = rounding(functional.embedding(ids_BT.to(module.weight.device), module.weight))
    # Gemma's are scaled as they are looked up; the buffer of this number may be in half precision.
    scale: float = getattr(module, "scalar_embed_scale", 1.0)
    return rows * scale


def _looked_up_gelu(inputs: torch.Tensor) -> torch.Tensor:
    """GELU as llama.cpp has it: its tanh form in a table of f16 for every f16, and the plain ends of the line."""
    looked_up = functional.gelu(inputs.half().float(), approximate="tanh").half().float()
    return torch.where(inputs <= -10, torch.zeros_like(inputs), torch.where(inputs >= 10, inputs, looked_up))


def _rounded(values: torch.Tensor, type_: GgufType) -> torch.Tensor:
    """What a file of this type holds of `values`, on the CPU in float32; each row is rounded for itself."""
    return from_blocks(to_blocks(values.flatten(0, -2), type_), type_).reshape(values.shape)
