"""What a model weighs where it is served: the one place that decides which bytes tables, cards and budgets speak of."""

from __future__ import annotations

from transformers import PreTrainedModel

from llmprune.choices.architecture import Architecture, ParentShape
from llmprune.choices.dimensions import BLOCK_KINDS
from llmprune.core.recipe import CacheType, GgufType
from llmprune.formats.gguf import cached_numbers, tensor_bytes
from llmprune.formats.layers import layer_sizes, vocabulary_type
from llmprune.models.sizes import Size, parameter_count, size_of
from llmprune.numerics.ggml import TYPES


def served_size(
    model: PreTrainedModel,
    shape: ParentShape,
    architecture: Architecture,
    gguf_type: GgufType | None,
    cache_type: CacheType = "f16",
) -> Size:
    """Sizes of a parent (with its own architecture) or child as its engine holds them: in torch's memory (`gguf_type`
    None), or in llama.cpp, which reads a GGUF file of that type - its tensors are counted, without header and tokenizer
    - and stores keys and values in `cache_type`. Needs no weights. Raises ExportError if there can be no such file.
    """
    if gguf_type is None:
        return size_of(model, shape, architecture)
    tensors = tensor_bytes(model, gguf_type)
    total = sum(tensors.values())
    # With an output of its own, the embedding is a row lookup.
    lookup = tensors["token_embd.weight"] if "output.weight" in tensors else 0
    return Size(
        params=parameter_count(model),
        bytes=total,
        stored_as=f"GGUF {'+'.join(_types_of(model, gguf_type))}",
        kv_bytes_per_token=int(cached_numbers(model.config) * TYPES[cache_type].bits / 8),
        decode_bytes=total - lookup,
    )


def _types_of(model: PreTrainedModel, gguf_type: GgufType) -> list[str]:
    """The types of a file's matrices, widest first."""
    config, found = model.config, {vocabulary_type(model.config) or gguf_type}
    for layer in layer_sizes(config):
        there = {"attention": layer.heads, "ffn": layer.ffn_width}
        found |= {layer.types.get(kind, gguf_type) for kind in BLOCK_KINDS if there[kind]}
    return [name for name in TYPES if name in found]
