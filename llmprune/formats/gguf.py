"""Write a child as one GGUF file that llama.cpp computes the same from.

llama.cpp reads head counts and FFN widths layer by layer for few architectures; of those, `deci` (Nemotron-NAS) is
Llama-shaped: RMS norm, SiLU-gated FFN, rotary embedding over whole heads, optional biases. Its graph has two holes,
which zero blocks fill exactly: it discards the attention of a layer without an FFN, and it cannot load a model whose
first layer has no attention.

Shapes: D hidden size, H head size, R rows of a projection.
"""

from __future__ import annotations

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
from llmprune.core.errors import ExportError
from llmprune.core.files import atomic_path
from llmprune.core.recipe import GgufType
from llmprune.formats.gguf_tokenizer import add_tokenizer
from llmprune.formats.layers import layer_sizes, stock_type
from llmprune.models.modeling_pruned import FAMILIES

ARCHITECTURE = "deci"
LLAMA_SHAPED = ("llama", "mistral", "qwen2")
"""Families whose forward pass is `deci`'s."""

STATIC_ROPE = ("default", "linear", "llama3")
"""Rotary embeddings that are one table of frequencies, whatever the length of the text."""

BLOCK = 32
"""Numbers that q8_0 stores under one scale: a row of a weight is a whole number of blocks."""

_TYPES: dict[GgufType, tuple[gguf.GGMLQuantizationType, gguf.LlamaFileType]] = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
_F16_MAX = float(np.finfo(np.float16).max)


def stored_type(weights: GgufType) -> gguf.GGMLQuantizationType:
    """How projections and embeddings are stored in a file of these weights."""
    return _TYPES[weights][0]


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
    if weights == "q8_0" and config.hidden_size % BLOCK:
        return (
            f"hidden_size must be a multiple of {BLOCK} for gguf in q8_0, got {config.hidden_size}; "
            "use deploy.gguf_type=f16"
        )
    return None


def gguf_choice_problem(shape: ParentShape, choice: Choice, weights: GgufType = "f16") -> str | None:
    """Why no block of a parent of this shape can keep this in a GGUF file; None if it can."""
    sizes = choice.sizes(shape)
    return _row_problem(sizes.get("heads", 0), shape.head_dim, sizes.get("ffn_width", 0), weights)


def gguf_child_problem(config: Any, weights: GgufType = "f16") -> str | None:
    """Why a child with this config cannot be a GGUF file, naming the layer; None if it can."""
    for i, layer in enumerate(layer_sizes(config)):
        if problem := _row_problem(layer.heads, _head_dim(config), layer.ffn_width, weights, f" in layer {i}"):
            return problem
    return None


def _row_problem(heads: int, head_dim: int, ffn_width: int, weights: GgufType, where: str = "") -> str | None:
    """Rows of an output projection that are no whole number of blocks cannot be stored in q8_0."""
    if weights != "q8_0":
        return None
    if heads * head_dim % BLOCK:
        return (
            f"query heads x head_dim must be a multiple of {BLOCK} for gguf in q8_0, got {heads} x {head_dim}{where}; "
            "use another number of heads, or deploy.gguf_type=f16"
        )
    if ffn_width % BLOCK:
        low = ffn_width // BLOCK * BLOCK
        return (
            f"ffn_width must be a multiple of {BLOCK} for gguf in q8_0, got {ffn_width}{where}; "
            f"use {f'{low} or ' if low else ''}{low + BLOCK}, or deploy.gguf_type=f16"
        )
    return None


def write_gguf(
    child: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, path: Path, weights: GgufType = "f16"
) -> None:
    """Write a child - or a dense model of a Llama-shaped family - to `path`, whole or not at all.

    `weights` is how projections and embeddings are stored; norms, biases and rotary factors are always f32. Without a
    tokenizer llama.cpp runs the file on token ids only. The child may be on any device and in any dtype.
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
                    tensor.name, tensor.shape, np.dtype(np.float32), tensor.bytes, raw_dtype=tensor.type
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


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the file; `numbers` makes its values when they are written."""

    name: str
    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    numbers: Callable[[], torch.Tensor]

    @property
    def bytes(self) -> int:
        block, block_bytes = gguf.GGML_QUANT_SIZES[self.type]
        return int(np.prod(self.shape)) // block * block_bytes

    def stored(self) -> np.ndarray[Any, Any]:
        """The values in the file's type. Raises ExportError if f16 cannot hold one of them."""
        values = self.numbers().detach().to("cpu", torch.float32).contiguous().numpy()
        assert values.shape == self.shape, f"{self.name}: {values.shape} for {self.shape}"
        if self.type != gguf.GGMLQuantizationType.F32 and not np.abs(values).max(initial=0) <= _F16_MAX:
            raise ExportError(
                f"weights must be numbers within +-{_F16_MAX:.0f} for gguf in f16 or q8_0; {self.name} is not; use f32"
            )
        stored: np.ndarray[Any, Any] = gguf.quants.quantize(values, self.type)
        return stored


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
                ffn_width=BLOCK if zero_ffn else sizes.ffn_width,
                zero_head=zero_head,
                zero_ffn=zero_ffn,
            )
        )
    return layers


def _add_metadata(writer: gguf.GGUFWriter, config: Any, layers: list[_Layer], weights: GgufType, *, name: str) -> None:
    head_dim = _head_dim(config)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(_TYPES[weights][1])
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
    config = child.config
    state, type_ = child.state_dict(), stored_type(weights)

    def tensor(name: str, source: torch.Tensor, turned_heads: int = 0) -> _Tensor:
        stored_as = type_ if source.ndim == 2 else gguf.GGMLQuantizationType.F32
        numbers = (lambda: _turned(source, turned_heads)) if turned_heads else (lambda: source)
        return _Tensor(name, tuple(source.shape), stored_as, numbers)

    yield tensor("token_embd.weight", state["model.embed_tokens.weight"])
    if not config.tie_word_embeddings:
        yield tensor("output.weight", state["lm_head.weight"])
    yield tensor("output_norm.weight", state["model.norm.weight"])
    factors = _rope_factors(child)
    if not torch.allclose(factors, torch.ones_like(factors), rtol=1e-6, atol=0):
        yield tensor("rope_freqs.weight", factors)
    for i, layer in enumerate(layers):
        for module, name in _NAMES.items():
            turned = {"attn_q": layer.heads, "attn_k": layer.kv_heads}.get(name, 0)
            for part in ("weight", "bias"):
                source = state.get(f"{layer.prefix}{module}.{part}")
                if source is not None:
                    yield tensor(f"blk.{i}.{name}.{part}", source, turned)
        for name, zeros in _zero_block_shapes(config, layer).items():
            # Rows of a head whose size is no multiple of a block cannot be quantised.
            shape_type = type_ if len(zeros) == 2 and zeros[-1] % BLOCK == 0 else gguf.GGMLQuantizationType.F32
            yield _Tensor(f"blk.{i}.{name}.weight", zeros, shape_type, partial(torch.zeros, zeros))


def _zero_block_shapes(config: Any, layer: _Layer) -> dict[str, tuple[int, ...]]:
    """Shapes of the zero tensors, by their llama.cpp name, that stand for blocks which are not there."""
    width, head_dim = config.hidden_size, _head_dim(config)
    shapes: dict[str, tuple[int, ...]] = {}
    if layer.zero_head:
        shapes |= dict.fromkeys(("attn_q", "attn_k", "attn_v"), (head_dim, width))
        shapes |= {"attn_norm": (width,), "attn_output": (width, head_dim)}
    if layer.zero_ffn:
        shapes |= dict.fromkeys(("ffn_gate", "ffn_up"), (BLOCK, width))
        shapes |= {"ffn_norm": (width,), "ffn_down": (width, BLOCK)}
    return shapes


def _turned(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of queries or keys, (R, D) or (R,), in llama.cpp's order: transformers turns number i of a head with
    number i + H/2, llama.cpp number 2i with 2i + 1."""
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
