"""What llama.cpp's `deci` can compute, and what a GGUF file can store: known from a config, without a weight."""

from __future__ import annotations

from typing import Any

from llmprune.choices.architecture import ParentShape
from llmprune.choices.choice import Choice
from llmprune.choices.dimensions import BLOCK_KINDS
from llmprune.core.recipe import GgufType
from llmprune.formats.layers import head_dim_of, layer_sizes, stock_type
from llmprune.numerics.ggml import TYPES

LLAMA_SHAPED = ("llama", "mistral", "qwen2")
"""Families whose forward pass is `deci`'s."""

STATIC_ROPE = ("default", "linear", "llama3")
"""Rotary embeddings that are one table of frequencies, whatever the length of the text."""


def gguf_problem(config: Any, weights: GgufType = "f16") -> str | None:
    """Why a model with this config (a parent's, or a child's) cannot be a GGUF file from which llama.cpp computes
    the same; None if it can. Reads no weight."""
    family = stock_type(config)
    rope = getattr(config, "rope_parameters", None) or {}
    if family not in LLAMA_SHAPED:
        return f"gguf holds {', '.join(LLAMA_SHAPED)} models, whose layers llama.cpp's deci computes; got {family}"
    if config.hidden_act not in ("silu", "swish"):
        return f"hidden_act must be silu for gguf, got {config.hidden_act}"
    if (kind := rope.get("rope_type", "default")) not in STATIC_ROPE:
        return f"rope_type must be one of {', '.join(STATIC_ROPE)} for gguf, got {kind}"
    if (share := rope.get("partial_rotary_factor") or 1.0) != 1.0:
        return f"the rotary embedding must turn whole heads for gguf, got partial_rotary_factor {share}"
    if (window := _effective_window(config)) is not None:
        return (
            f"gguf knows full attention only, and the model attends to {window} positions of up to "
            f"{config.max_position_embeddings}"
        )
    if head_dim_of(config) % 2:
        return f"head_dim must be even for gguf, got {head_dim_of(config)}"
    if config.hidden_size % (block := TYPES[weights].block):
        return (
            f"hidden_size must be a multiple of {block} for gguf in {weights}, got {config.hidden_size}; "
            f"use deploy.gguf_type={_instead(config.hidden_size)}"
        )
    return None


def gguf_choice_problem(shape: ParentShape, choice: Choice, weights: GgufType = "f16") -> str | None:
    """Why no block of a parent of this shape can keep this in a GGUF file; None if it can."""
    sizes = choice.sizes(shape)
    return _row_problem(sizes.get("heads", 0), shape.head_dim, sizes.get("ffn_width", 0), choice.stored or weights)


def gguf_child_problem(config: Any, weights: GgufType = "f16") -> str | None:
    """Why a child with this config cannot be a GGUF file, naming the layer; None if it can."""
    for i, layer in enumerate(layer_sizes(config)):
        head_dim, where = head_dim_of(config), f" in layer {i}"
        attention, ffn = (layer.types.get(kind, weights) for kind in BLOCK_KINDS)
        problem = _row_problem(layer.heads, head_dim, 0, attention, where)
        if problem or (problem := _row_problem(0, 0, layer.ffn_width, ffn, where)):
            return problem
    return None


def _row_problem(heads: int, head_dim: int, ffn_width: int, weights: GgufType, where: str = "") -> str | None:
    """Rows of an output projection that are no whole number of blocks cannot be stored."""
    block = TYPES[weights].block
    if heads * head_dim % block:
        return (
            f"query heads x head_dim must be a multiple of {block} for gguf in {weights}, got {heads} x {head_dim}"
            f"{where}; use another number of heads, or deploy.gguf_type={_instead(heads * head_dim)}"
        )
    if ffn_width % block:
        low = ffn_width // block * block
        return (
            f"ffn_width must be a multiple of {block} for gguf in {weights}, got {ffn_width}{where}; "
            f"use {f'{low} or ' if low else ''}{low + block}, or deploy.gguf_type={_instead(ffn_width)}"
        )
    return None


def _instead(length: int) -> str:
    """The types that can store rows of this length, but for what takes four bytes a number."""
    return " or ".join(name for name, type_ in TYPES.items() if name != "f32" and length % type_.block == 0)


def _effective_window(config: Any) -> int | None:
    """Positions that a sliding-window layer sees, if there is such a layer and that is less than all."""
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    slides = layer_types is None or "sliding_attention" in layer_types
    return window if window is not None and slides and window < config.max_position_embeddings else None
