"""The rotary embedding of a model, as llama.cpp is told of it: settings, or divisors of its plain frequencies.

Shapes: H head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gguf
import torch
from transformers import PreTrainedModel

from llmprune.formats.gguf_families import gguf_family
from llmprune.formats.layers import head_dim_of

FULL, SLIDING = "full_attention", "sliding_attention"
"""Kinds of layers, in a config's `layer_types`."""


def rope_of(config: Any, kind: str = FULL) -> Mapping[str, Any]:
    """The config's parameters of the rotary embedding in layers of this kind; empty if positions are embedded."""
    rope = getattr(config, "rope_parameters", None) or {}
    own: Mapping[str, Any] = rope.get(kind, rope)
    return own


def rope_problem(config: Any) -> str | None:
    """Why llama.cpp does not turn heads as a model with this config does; None if it does."""
    family, rope, head_dim = gguf_family(config), rope_of(config), head_dim_of(config)
    if (kind := rope.get("rope_type", "default")) not in family.ropes:
        return f"rope_type must be one of {', '.join(family.ropes)} for gguf, got {kind}; use hf"
    sliding = rope_of(config, SLIDING)
    if sliding is not rope and (kind := sliding.get("rope_type", "default")) != "default":
        return f"rope_type must be default in sliding_attention layers for gguf, got {kind}; use hf"
    if not family.part_turns and (share := rope.get("partial_rotary_factor") or 1.0) != 1.0:
        return f"the rotary embedding must turn whole heads for gguf, got partial_rotary_factor {share}; use hf"
    if rope and head_dim % 2:
        return f"head_dim must be even for gguf, got {head_dim}; use hf"
    return None


def add_rope(writer: gguf.GGUFWriter, config: Any) -> None:
    """Add the settings to a file that is being written."""
    family, rope = gguf_family(config), rope_of(config)
    if not rope:
        return
    writer.add_rope_dimension_count(int(head_dim_of(config) * (rope.get("partial_rotary_factor") or 1.0)))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if family.slides:
        writer.add_float32(f"{family.architecture}.rope.freq_base_swa", float(rope_of(config, SLIDING)["rope_theta"]))
    if rope["rope_type"] == "linear" and not family.rope_divisors:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def rope_divisors(child: PreTrainedModel) -> torch.Tensor | None:
    """(H/2,) what llama.cpp divides the plain rotary frequencies by, to have the model's own; None if they are plain,
    or the file's settings say it."""
    config = child.config
    if not gguf_family(config).rope_divisors:
        return None
    rotary = child.get_submodule("model.rotary_emb")
    if rotary.get_buffer("inv_freq").is_meta:
        rotary = type(rotary)(config=config)
    head_dim, theta = head_dim_of(config), float(rope_of(config)["rope_theta"])
    frequencies = rotary.get_buffer("inv_freq").detach().cpu().double()
    plain = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    divisors = (plain / frequencies).float()
    return None if torch.allclose(divisors, torch.ones_like(divisors), rtol=1e-6, atol=0) else divisors
