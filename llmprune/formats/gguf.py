"""Write a child as one GGUF file that llama.cpp computes the same from.

llama.cpp reads head counts and FFN widths layer by layer for few architectures; of those, `deci` (Nemotron-NAS) is
Llama-shaped: RMS norm, SiLU-gated FFN, rotary embedding over whole heads, optional biases. Its graph has two holes,
which zero blocks fill exactly: it discards the attention of a layer without an FFN, and it cannot load a model whose
first layer has no attention. Children of other families are written in their family's own architecture, whose layers
are all alike (`gguf_families`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmprune.choices.dimensions import BlockKind
from llmprune.core.errors import ExportError
from llmprune.core.files import atomic_path
from llmprune.core.recipe import GgufType
from llmprune.formats.gguf_families import gguf_family
from llmprune.formats.gguf_limits import gguf_child_problem, gguf_problem, gguf_row_problem
from llmprune.formats.gguf_rope import SLIDING, add_rope
from llmprune.formats.gguf_tensors import FileLayer, file_layers, file_tensors, whole_type
from llmprune.formats.gguf_tokenizer import add_tokenizer
from llmprune.formats.layers import head_dim_of, layer_sizes, stock_type, vocabulary_type
from llmprune.models.modeling_pruned import FAMILIES
from llmprune.numerics.ggml import TYPES


def write_gguf(
    child: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, path: Path, weights: GgufType = "f16"
) -> None:
    """Write a child - or a dense model of a family that llama.cpp knows - to `path`, whole or not at all.

    `weights` is how projections and embeddings are stored, but for what has a type of its own in the child;
    norms, biases and rotary factors are always f32. Without a tokenizer llama.cpp runs the file on token ids only. The
    child may be on any device and in any dtype.
    Raises ExportError if llama.cpp would not compute the same from it, RunDirectoryError if `path` cannot be written.
    """
    if problem := gguf_problem(child.config, weights) or gguf_child_problem(child.config, weights):
        raise ExportError(problem)
    layers = file_layers(child.config)
    tensors = list(file_tensors(child, layers, weights))
    with atomic_path(path) as temporary:
        writer = gguf.GGUFWriter(temporary, gguf_family(child.config).architecture)
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
    """Bytes of every tensor in the file that `write_gguf` makes, by llama.cpp's name; zero blocks are among them. Where
    a family's layers have to be alike, they are counted all the same if they differ.

    Reads no weight: the child may be on the meta device. Raises ExportError if its tensors cannot be stored.
    """
    if problem := gguf_problem(child.config, weights) or gguf_row_problem(child.config, weights):
        raise ExportError(problem)
    return {tensor.name: tensor.bytes for tensor in file_tensors(child, file_layers(child.config), weights)}


def type_of(config: Any, name: str, weights: GgufType) -> GgufType:
    """How the matrix that a model with this config calls `name` is stored in its file."""
    family = FAMILIES[stock_type(config)]
    index, _, within = name.removeprefix(f"{family.layers}.").partition(".")
    if not name.startswith(f"{family.layers}."):
        return whole_type(gguf_family(config).whole[name.removesuffix(".weight")], vocabulary_type(config) or weights)
    kind: BlockKind = "attention" if within.startswith(f"{family.attention.module}.") else "ffn"
    return layer_sizes(config)[int(index)].types.get(kind, weights)


def cached_numbers(config: Any) -> int:
    """Numbers in llama.cpp's cache for one token of one sequence: keys and values of every layer of the file."""
    return 2 * head_dim_of(config) * sum(layer.kv_heads for layer in file_layers(config))


def _add_metadata(
    writer: gguf.GGUFWriter, config: Any, layers: list[FileLayer], weights: GgufType, *, name: str
) -> None:
    family, head_dim = gguf_family(config), head_dim_of(config)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(TYPES[weights].file)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(layers))
    writer.add_head_count(_by_layer([layer.heads for layer in layers], config))
    writer.add_head_count_kv(_by_layer([layer.kv_heads for layer in layers], config))
    writer.add_feed_forward_length(_by_layer([layer.ffn_width for layer in layers], config))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    add_rope(writer, config)
    if family.slides:
        slides = [kind == SLIDING for kind in config.layer_types]
        writer.add_array(f"{family.architecture}.attention.sliding_window_pattern", slides)
    for key, word in {**family.settings, **family.optional}.items():
        if (value := getattr(config, word, None)) is not None:
            _add_setting(writer, f"{family.architecture}.{key}", value)


def _by_layer(sizes: list[int], config: Any) -> list[int] | int:
    return sizes if gguf_family(config).layers_differ else sizes[0]


def _add_setting(writer: gguf.GGUFWriter, key: str, value: float | bool) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif key.endswith("sliding_window"):
        writer.add_uint32(key, int(value))
    else:
        writer.add_float32(key, float(value))
