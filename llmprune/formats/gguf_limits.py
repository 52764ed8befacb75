"""What llama.cpp can compute of a family, and what a GGUF file can store: known from a config, without a weight."""

from __future__ import annotations

from typing import Any

from llmprune.choices.architecture import ParentShape
from llmprune.choices.choice import Choice
from llmprune.choices.dimensions import BLOCK_KINDS
from llmprune.core.recipe import GgufType, SpaceSize
from llmprune.formats.gguf_families import GGUF_FAMILIES, GgufFamily, gguf_family
from llmprune.formats.gguf_rope import SLIDING, rope_problem
from llmprune.formats.layers import head_dim_of, layer_sizes, stock_type
from llmprune.numerics.ggml import TYPES


def gguf_problem(config: Any, weights: GgufType = "f16") -> str | None:
    """Why a model with this config (a parent's, or a child's) cannot be a GGUF file from which llama.cpp computes
    the same; None if it can. Reads no weight."""
    if stock_type(config) not in GGUF_FAMILIES:
        return f"gguf holds the families {', '.join(GGUF_FAMILIES)}; got {stock_type(config)}; use hf"
    if config.hidden_size % (block := TYPES[weights].block):
        return (
            f"hidden_size must be a multiple of {block} for gguf in {weights}, got {config.hidden_size}; "
            f"use deploy.gguf_type={_instead(config.hidden_size)}"
        )
    family = gguf_family(config)
    return _word_problem(config, family) or rope_problem(config) or _attention_problem(config, family)


def gguf_sizes(config: Any) -> tuple[SpaceSize, ...]:
    """The space sizes whose children a GGUF file can be, for a parent with this config that can."""
    if gguf_mixes(config):
        return ("small", "layer", "medium", "large")
    # Where a layer's place says what it computes, hardly a layer can leave by itself.
    return ("small",) if gguf_family(config).unturned_every else ("small", "layer")


def gguf_mixes(config: Any) -> bool:
    """Whether a file of a model with this config may have layers that differ."""
    return gguf_family(config).layers_differ


def gguf_types_problem(config: Any) -> str | None:
    """Why blocks of a model with this config have no type of their own; None if they can."""
    if "transposed" in gguf_family(config).rewrites.values():
        return f"weights of {stock_type(config)} are stored by their inputs, and rounded by their outputs in gguf"
    return None


def gguf_choice_problem(config: Any, shape: ParentShape, choice: Choice, weights: GgufType = "f16") -> str | None:
    """Why no block of a parent of this config and shape can keep this in a GGUF file; None if it can."""
    sizes = choice.sizes(shape)
    if problem := _heads_problem(config, gguf_family(config), sizes.get("heads", 0)):
        return problem
    return _row_problem(sizes.get("heads", 0), shape.head_dim, sizes.get("ffn_width", 0), choice.stored or weights)


def gguf_child_problem(config: Any, weights: GgufType = "f16") -> str | None:
    """Why a child with this config cannot be a GGUF file, naming the layer; None if it can."""
    return _differing_problem(config) or gguf_row_problem(config, weights)


def gguf_row_problem(config: Any, weights: GgufType) -> str | None:
    """Why a block of a child with this config cannot be stored, naming the layer; None if all can."""
    for i, layer in enumerate(layer_sizes(config)):
        head_dim, where = head_dim_of(config), f" in layer {i}"
        attention, ffn = (layer.types.get(kind, weights) for kind in BLOCK_KINDS)
        problem = _row_problem(layer.heads, head_dim, 0, attention, where)
        if problem or (problem := _row_problem(0, 0, layer.ffn_width, ffn, where)):
            return problem
    return None


def _word_problem(config: Any, family: GgufFamily) -> str | None:
    """Words of the config that say something else than llama.cpp's graph of the family."""
    name = family.architecture
    for word, values in family.needs.items():
        if (found := getattr(config, word, None)) not in values:
            allowed = " or ".join(str(value) for value in values)
            return f"{word} must be {allowed} for gguf, which llama.cpp's {name} computes; got {found}; use hf"
    for word in family.settings.values():
        if getattr(config, word, None) is None:
            return f"{word} must be a number for gguf, which llama.cpp's {name} reads; got None; use hf"
    return None


def _attention_problem(config: Any, family: GgufFamily) -> str | None:
    """Attention that llama.cpp would compute otherwise: windows, scales, layers without a rotary embedding."""
    name, layers, head_dim = family.architecture, config.num_hidden_layers, head_dim_of(config)
    if not family.slides and (window := _effective_window(config)) is not None:
        return (
            f"gguf knows full attention only, and the model attends to {window} positions of up to "
            f"{config.max_position_embeddings}; use hf"
        )
    if family.slides and SLIDING not in config.layer_types:
        return f"layer_types must have a {SLIDING} for gguf, without which llama.cpp's {name} does not run; use hf"
    if family.scaled_by_heads_at is not None:
        if layers == family.scaled_by_heads_at:
            return (
                f"num_hidden_layers must not be {layers} for gguf, with which llama.cpp's {name} scales attention by "
                f"hidden_size / heads; use hf"
            )
        if (scalar := config.query_pre_attn_scalar) != head_dim:
            return (
                f"query_pre_attn_scalar must be head_dim for gguf, by which llama.cpp's {name} scales attention; got "
                f"{scalar} and {head_dim}; use hf"
            )
    if (every := family.unturned_every) is not None:
        turned = [int((i + 1) % every != 0) for i in range(layers)]
        if list(config.no_rope_layers) != turned:
            return (
                f"no_rope_layers must be {turned} for gguf, as every {every}th layer of llama.cpp's {name} has no "
                f"rotary embedding; got {list(config.no_rope_layers)}; leave out runs of {every} layers, or use hf"
            )
    return _heads_problem(config, family, layer_sizes(config)[0].heads)


def _heads_problem(config: Any, family: GgufFamily, heads: int) -> str | None:
    """Of a block that has heads at all."""
    if not heads or not family.heads_fill_hidden or heads * head_dim_of(config) == config.hidden_size:
        return None
    return (
        f"query heads x head_dim must be hidden_size for gguf, as llama.cpp's {family.architecture} reads them; got "
        f"{heads} x {head_dim_of(config)} of {config.hidden_size}; keep all query heads, or use hf"
    )


def _differing_problem(config: Any) -> str | None:
    """Layers that differ, where the family's architecture has them alike; types of their weights may differ."""
    if gguf_mixes(config):
        return None
    sizes = [(layer.heads, layer.kv_heads, layer.ffn_width) for layer in layer_sizes(config)]
    for i, own in enumerate(sizes):
        if own != sizes[0] or not all(own):
            first, name = sizes[0], gguf_family(config).architecture
            return (
                f"all layers of llama.cpp's {name} have the same sizes, with every block there; "
                f"layer {i} has {own[0]} query heads, {own[1]} KV heads and FFN width {own[2]}, layer 0 {first[0]}, "
                f"{first[1]} and {first[2]}; search with space.size={' or '.join(gguf_sizes(config))}, or export to hf"
            )
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
