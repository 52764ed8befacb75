"""Write a child as one GGUF file that llama.cpp computes the same from.

llama.cpp reads head counts and FFN widths layer by layer for few architectures; of those, `deci` (Nemotron-NAS) is
Llama-shaped: RMS norm, SiLU-gated FFN, rotary embedding over whole heads, optional biases. Its graph has two holes,
which zero blocks fill exactly: it discards the attention of a layer without an FFN, and it cannot load a model whose
first layer has no attention.

Shapes: D hidden size, H head size, R rows of a projection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmprune.choices.architecture import ParentShape
from llmprune.choices.choice import Choice
from llmprune.choices.dimensions import BLOCK_KINDS, BlockKind
from llmprune.core.errors import ExportError, ModelError
from llmprune.core.files import atomic_path
from llmprune.core.recipe import GgufType
from llmprune.formats.gguf_tokenizer import add_tokenizer
from llmprune.formats.layers import layer_sizes, stock_type
from llmprune.models.modeling_pruned import FAMILIES
from llmprune.models.stored import StoredWeight, stored_weights
from llmprune.numerics.ggml import TYPES, Blocks, to_blocks

ARCHITECTURE = "deci"
LLAMA_SHAPED = ("llama", "mistral", "qwen2")
"""Families whose forward pass is `deci`'s."""

STATIC_ROPE = ("default", "linear", "llama3")
"""Rotary embeddings that are one table of frequencies, whatever the length of the text."""

_ZERO_WIDTH = 32
"""Of a zero FFN: the smallest that most types can store."""


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
    if _head_dim(config) % 2:
        return f"head_dim must be even for gguf, got {_head_dim(config)}"
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
        head_dim, where = _head_dim(config), f" in layer {i}"
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


def write_gguf(
    child: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, path: Path, weights: GgufType = "f16"
) -> None:
    """Write a child - or a dense model of a Llama-shaped family - to `path`, whole or not at all.

    `weights` is how projections and embeddings are stored, but for the blocks of a child that have a type of their own;
    norms, biases and rotary factors are always f32. Without a tokenizer llama.cpp runs the file on token ids only. The
    child may be on any device and in any dtype.
    Raises ExportError if llama.cpp would not compute the same from it, RunDirectoryError if `path` cannot be written.
    """
    if problem := gguf_problem(child.config, weights) or gguf_child_problem(child.config, weights):
        raise ExportError(problem)
    layers = _layers(child.config)
    tensors = list(_tensors(child, layers, weights))
    with atomic_path(path) as temporary:
        writer = gguf.GGUFWriter(temporary, ARCHITECTURE)
        try:
            _add_metadata(writer, child.config, layers, weights, name=path.stem)
            if tokenizer is None:
                writer.add_tokenizer_model("none")
            else:
                add_tokenizer(writer, tokenizer, child.config.vocab_size, child.generation_config)
            for tensor in tensors:
                writer.add_tensor_info(
                    tensor.name, tensor.shape, np.dtype(np.float32), tensor.bytes, raw_dtype=TYPES[tensor.type].type
                )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            # One at a time, so that the file's size is never held in memory.
            for tensor in tensors:
                writer.write_tensor_data(tensor.stored())
        finally:
            writer.close()


def tensor_bytes(child: PreTrainedModel, weights: GgufType) -> dict[str, int]:
    """Bytes of every tensor in the file that `write_gguf` makes, by llama.cpp's name; zero blocks are among them.

    Reads no weight: the child may be on the meta device. Raises ExportError if there is no such file.
    """
    if problem := gguf_problem(child.config, weights) or gguf_child_problem(child.config, weights):
        raise ExportError(problem)
    return {tensor.name: tensor.bytes for tensor in _tensors(child, _layers(child.config), weights)}


def type_of(config: Any, name: str, weights: GgufType) -> GgufType:
    """How the matrix that a model with this config calls `name` is stored in its file."""
    family = FAMILIES[stock_type(config)]
    index, _, within = name.removeprefix(f"{family.layers}.").partition(".")
    if not name.startswith(f"{family.layers}."):
        return weights
    kind: BlockKind = "attention" if within.startswith(f"{family.attention.module}.") else "ffn"
    return layer_sizes(config)[int(index)].types.get(kind, weights)


def cached_numbers(config: Any) -> int:
    """Numbers in llama.cpp's cache for one token of one sequence: keys and values of every layer of the file."""
    return 2 * _head_dim(config) * sum(layer.kv_heads for layer in _layers(config))


@dataclass(frozen=True)
class _Layer:
    """One layer of the file: head counts as llama.cpp reads them, and the blocks that the child has not got."""

    prefix: str
    heads: int
    kv_heads: int
    ffn_width: int
    zero_head: bool
    zero_ffn: bool
    types: Mapping[BlockKind, GgufType]
    """Of blocks that have one of their own."""


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the file; `numbers` makes its values when they are written."""

    name: str
    shape: tuple[int, ...]
    type: GgufType
    numbers: Callable[[], torch.Tensor]
    rounded: StoredWeight | None = None
    """How the child has it stored already."""
    turned_heads: int = 0
    """Of queries and keys: heads whose rows llama.cpp has in another order."""

    @property
    def bytes(self) -> int:
        return int(math.prod(self.shape) * TYPES[self.type].bits / 8)

    def stored(self) -> Blocks:
        """The values in the file's type. Raises ExportError if it cannot hold one of them."""
        if self.rounded is not None:
            blocks = torch.from_numpy(self.rounded.blocks)
            return _turned(blocks, self.turned_heads).numpy()
        values = _turned(self.numbers(), self.turned_heads)
        assert values.shape == self.shape, f"{self.name}: {values.shape} for {self.shape}"
        try:
            return to_blocks(values, self.type)
        except ModelError as error:
            raise ExportError(f"{self.name} cannot be written: {error}") from error


def _layers(config: Any) -> list[_Layer]:
    """What each layer of the file has: the child's blocks, and zero blocks where llama.cpp has to have one."""
    family = FAMILIES[stock_type(config)]
    layers = []
    for i, sizes in enumerate(layer_sizes(config)):
        zero_head, zero_ffn = i == 0 and not sizes.heads, not sizes.ffn_width
        layers.append(
            _Layer(
                f"{family.layers}.{i}.",
                heads=1 if zero_head else sizes.heads,
                kv_heads=1 if zero_head else sizes.kv_heads,
                ffn_width=_ZERO_WIDTH if zero_ffn else sizes.ffn_width,
                zero_head=zero_head,
                zero_ffn=zero_ffn,
                types=sizes.types,
            )
        )
    return layers


def _add_metadata(writer: gguf.GGUFWriter, config: Any, layers: list[_Layer], weights: GgufType, *, name: str) -> None:
    head_dim = _head_dim(config)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(TYPES[weights].file)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(layers))
    writer.add_head_count([layer.heads for layer in layers])
    writer.add_head_count_kv([layer.kv_heads for layer in layers])
    writer.add_feed_forward_length([layer.ffn_width for layer in layers])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(_rope_theta(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


_NAMES: Mapping[str, str] = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Modules of a layer, and what llama.cpp calls them."""


def _tensors(child: PreTrainedModel, layers: list[_Layer], weights: GgufType) -> Iterator[_Tensor]:
    """Every tensor of the file, in order."""
    config, state, known = child.config, child.state_dict(), stored_weights(child)

    def tensor(name: str, own: str, type_: GgufType = weights, turned_heads: int = 0) -> _Tensor:
        source, rounded = state[own], known.get(own)
        stored_as: GgufType = type_ if source.ndim == 2 else "f32"
        assert rounded is None or rounded.type == stored_as, f"{own} is stored in {rounded}"
        return _Tensor(name, tuple(source.shape), stored_as, lambda: source, rounded, turned_heads)

    yield tensor("token_embd.weight", "model.embed_tokens.weight")
    if not config.tie_word_embeddings:
        yield tensor("output.weight", "lm_head.weight")
    yield tensor("output_norm.weight", "model.norm.weight")
    factors = _rope_factors(child)
    if not torch.allclose(factors, torch.ones_like(factors), rtol=1e-6, atol=0):
        yield _Tensor("rope_freqs.weight", tuple(factors.shape), "f32", lambda: factors)
    for i, layer in enumerate(layers):
        for module, name in _NAMES.items():
            turned = {"attn_q": layer.heads, "attn_k": layer.kv_heads}.get(name, 0)
            kind: BlockKind = "attention" if name.startswith("attn") else "ffn"
            for part in ("weight", "bias"):
                own = f"{layer.prefix}{module}.{part}"
                if own in state:
                    yield tensor(f"blk.{i}.{name}.{part}", own, layer.types.get(kind, weights), turned)
        for name, zeros in _zero_block_shapes(config, layer).items():
            # Rows of a head whose size is no multiple of a block cannot be quantised.
            fits = len(zeros) == 2 and zeros[-1] % TYPES[weights].block == 0
            yield _Tensor(f"blk.{i}.{name}.weight", zeros, weights if fits else "f32", partial(torch.zeros, zeros))


def _zero_block_shapes(config: Any, layer: _Layer) -> dict[str, tuple[int, ...]]:
    """Shapes of the zero tensors, by their llama.cpp name, that stand for blocks which are not there."""
    width, head_dim = config.hidden_size, _head_dim(config)
    shapes: dict[str, tuple[int, ...]] = {}
    if layer.zero_head:
        shapes |= dict.fromkeys(("attn_q", "attn_k", "attn_v"), (head_dim, width))
        shapes |= {"attn_norm": (width,), "attn_output": (width, head_dim)}
    if layer.zero_ffn:
        shapes |= dict.fromkeys(("ffn_gate", "ffn_up"), (_ZERO_WIDTH, width))
        shapes |= {"ffn_norm": (width,), "ffn_down": (width, _ZERO_WIDTH)}
    return shapes


def _turned(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of the queries or keys of some heads, (R, D) or (R,), in llama.cpp's order: transformers turns number i of a
    head with number i + H/2, llama.cpp number 2i with 2i + 1. Without heads the rows as they are."""
    if not heads:
        return rows
    return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _rope_factors(child: PreTrainedModel) -> torch.Tensor:
    """(H/2,) what llama.cpp divides the plain rotary frequencies by, to have the model's own."""
    rotary = child.get_submodule("model.rotary_emb")
    if rotary.get_buffer("inv_freq").is_meta:
        rotary = type(rotary)(config=child.config)
    head_dim, theta = _head_dim(child.config), _rope_theta(child.config)
    frequencies = rotary.get_buffer("inv_freq").detach().cpu().double()
    plain = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    return (plain / frequencies).float()


def _rope_theta(config: Any) -> float:
    return float(config.rope_parameters["rope_theta"])


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _effective_window(config: Any) -> int | None:
    """Positions that a sliding-window layer sees, if there is such a layer and that is less than all."""
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    slides = layer_types is None or "sliding_attention" in layer_types
    return window if window is not None and slides and window < config.max_position_embeddings else None
