"""What a model weighs in memory: exact counts, from the model itself."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from llmprune.choices.architecture import Architecture, ParentShape


@dataclass(frozen=True)
class Size:
    """Counts of one model.

    params: parameters, tied ones once. bytes: of all weights. stored_as: how those are stored, a dtype of torch or
    a type of GGUF file ("GGUF q8_0"). kv_bytes_per_token: what the cache grows by for each token of one sequence.
    decode_bytes: weights read to decode one token (see `decode_bytes`).
    """

    params: int
    bytes: int
    stored_as: str
    kv_bytes_per_token: int
    decode_bytes: int


def size_of(model: PreTrainedModel, shape: ParentShape, architecture: Architecture) -> Size:
    """Sizes of a parent (with its own architecture) or child in torch's memory."""
    kv_heads = sum(choice.sizes(shape).get("kv_heads", 0) for _, choice in architecture.blocks())
    return Size(
        params=parameter_count(model),
        bytes=parameter_bytes(model),
        stored_as=str(model.dtype).removeprefix("torch."),
        kv_bytes_per_token=2 * kv_heads * shape.head_dim * model.dtype.itemsize,
        decode_bytes=decode_bytes(model),
    )


def parameter_count(model: nn.Module) -> int:
    """Parameters, tied ones once."""
    # `parameters()` gives a shared parameter once.
    return sum(parameter.numel() for parameter in model.parameters())


def decode_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights read to decode one token: all, but for an input embedding that is not tied to the output -
    that one is a row lookup."""
    embedding = model.get_input_embeddings().weight
    output = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    tied = output is not None and output.weight is embedding
    lookup = 0 if tied else embedding.numel() * embedding.element_size()  # type: ignore[operator]
    return parameter_bytes(model) - int(lookup)


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of all parameters in memory, tied ones once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
