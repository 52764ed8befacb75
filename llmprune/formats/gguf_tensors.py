"""The tensors of a child's GGUF file: llama.cpp's names, shapes and types, and the values as they are written.

Shapes: D hidden size, H head size, R rows of a projection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from llmprune.choices.dimensions import BlockKind
from llmprune.core.errors import ExportError, ModelError
from llmprune.core.recipe import GgufType
from llmprune.formats.gguf_families import Rewrite, gguf_family
from llmprune.formats.gguf_rope import rope_divisors
from llmprune.formats.layers import head_dim_of, layer_sizes, stock_type, vocabulary_type
from llmprune.models.modeling_pruned import FAMILIES
from llmprune.models.stored import StoredWeight, stored_weights
from llmprune.numerics.ggml import TYPES, Blocks, to_blocks

_ZERO_WIDTH = 32
"""Of a zero FFN: the smallest that most types can store."""


def _as_it_is(values: torch.Tensor) -> torch.Tensor:
    return values


@dataclass(frozen=True)
class FileLayer:
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
class FileTensor:
    """One tensor of the file; `numbers` makes its values when they are written."""

    name: str
    shape: tuple[int, ...]
    type: GgufType
    numbers: Callable[[], torch.Tensor]
    rounded: StoredWeight | None = None
    """How the child has it stored already."""
    rewrite: Callable[[torch.Tensor], torch.Tensor] = _as_it_is
    """Of the child's values, or of the blocks that hold them: to what the file has."""

    @property
    def bytes(self) -> int:
        return int(math.prod(self.shape) * TYPES[self.type].bits / 8)

    def stored(self) -> Blocks:
        """The values in the file's type. Raises ExportError if it cannot hold one of them."""
        if self.rounded is not None:
            return self.rewrite(torch.from_numpy(self.rounded.blocks)).numpy()
        values = self.rewrite(self.numbers())
        assert values.shape == self.shape, f"{self.name}: {values.shape} for {self.shape}"
        try:
            return to_blocks(values, self.type)
        except ModelError as error:
            raise ExportError(f"{self.name} cannot be written: {error}") from error


def file_layers(config: Any) -> list[FileLayer]:
    """What each layer of the file has: the child's blocks, and zero blocks where llama.cpp has to have one."""
    prefix, fills = FAMILIES[stock_type(config)].layers, gguf_family(config).layers_differ
    layers = []
    for i, sizes in enumerate(layer_sizes(config)):
        zero_head, zero_ffn = fills and i == 0 and not sizes.heads, fills and not sizes.ffn_width
        layers.append(
            FileLayer(
                f"{prefix}.{i}.",
                heads=1 if zero_head else sizes.heads,
                kv_heads=1 if zero_head else sizes.kv_heads,
                ffn_width=_ZERO_WIDTH if zero_ffn else sizes.ffn_width,
                zero_head=zero_head,
                zero_ffn=zero_ffn,
                types=sizes.types,
            )
        )
    return layers


def file_tensors(child: PreTrainedModel, layers: list[FileLayer], weights: GgufType) -> Iterator[FileTensor]:
    """Every tensor of the file, in order."""
    config, state, known, family = child.config, child.state_dict(), stored_weights(child), gguf_family(child.config)

    def tensors(prefix: str, module: str, name: str, type_: GgufType, heads: int = 0) -> Iterator[FileTensor]:
        for part in ("weight", "bias"):
            if (own := f"{module}.{part}") not in state:
                continue
            source, rounded, rewrite = state[own], known.get(own), family.rewrites.get(name)
            stored_as: GgufType = type_ if source.ndim == 2 else "f32"
            assert rounded is None or rounded.type == stored_as, f"{own} is stored in {rounded}"
            shape = tuple(reversed(source.shape) if rewrite == "transposed" else source.shape)
            rewritten = _as_it_is if rewrite is None else partial(_REWRITES[rewrite], heads)
            yield FileTensor(f"{prefix}{name}.{part}", shape, stored_as, partial(_as_it_is, source), rounded, rewritten)

    of_vocabulary = vocabulary_type(config) or weights
    for module, name in family.whole.items():
        if name != "output" or not config.tie_word_embeddings:
            yield from tensors("", module, name, whole_type(name, of_vocabulary))
    if (divisors := rope_divisors(child)) is not None:
        yield FileTensor("rope_freqs.weight", tuple(divisors.shape), "f32", partial(_as_it_is, divisors))
    for i, layer in enumerate(layers):
        for module, name in family.layer.items():
            kind: BlockKind = "attention" if name.startswith("attn") else "ffn"
            heads = layer.kv_heads if name == "attn_k" else layer.heads
            yield from tensors(f"blk.{i}.", f"{layer.prefix}{module}", name, layer.types.get(kind, weights), heads)
        for name, zeros in _zero_block_shapes(config, layer).items():
            # Rows of a head whose size is no multiple of a block cannot be quantised.
            fits = len(zeros) == 2 and zeros[-1] % TYPES[weights].block == 0
            yield FileTensor(f"blk.{i}.{name}.weight", zeros, weights if fits else "f32", partial(torch.zeros, zeros))


def whole_type(name: str, weights: GgufType) -> GgufType:
    """How a matrix outside the layers is stored: positions are added up in f32."""
    return "f32" if name == "position_embd" else weights


def _zero_block_shapes(config: Any, layer: FileLayer) -> dict[str, tuple[int, ...]]:
    """Shapes of the zero tensors, by their llama.cpp name, that stand for blocks which are not there."""
    width, head_dim = config.hidden_size, head_dim_of(config)
    shapes: dict[str, tuple[int, ...]] = {}
    if layer.zero_head:
        shapes |= dict.fromkeys(("attn_q", "attn_k", "attn_v"), (head_dim, width))
        shapes |= {"attn_norm": (width,), "attn_output": (width, head_dim)}
    if layer.zero_ffn:
        shapes |= dict.fromkeys(("ffn_gate", "ffn_up"), (_ZERO_WIDTH, width))
        shapes |= {"ffn_norm": (width,), "ffn_down": (width, _ZERO_WIDTH)}
    return shapes


def _turned(heads: int, rows: torch.Tensor) -> torch.Tensor:
    """Rows of the queries or keys of some heads, (R, D) or (R,): transformers turns number i of a head with number
    i + H/2, llama.cpp number 2i with 2i + 1."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _kinds_apart(heads: int, rows: torch.Tensor) -> torch.Tensor:
    """Rows of queries, keys and values, head by head, (R, D) or (R,): all queries first, then keys, then values."""
    return rows.reshape(heads, 3, len(rows) // heads // 3, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)


def _transposed(_: int, weight: torch.Tensor) -> torch.Tensor:
    """A matrix that is stored by its inputs, as one that is stored by its outputs; a bias as it is."""
    return weight.T if weight.ndim == 2 else weight


def _plus_one(_: int, weight: torch.Tensor) -> torch.Tensor:
    """What a norm multiplies by, where its weight says how much more than one that is."""
    return weight.float() + 1


_REWRITES: Mapping[Rewrite, Callable[[int, torch.Tensor], torch.Tensor]] = {
    "heads turned": _turned,
    "kinds apart": _kinds_apart,
    "transposed": _transposed,
    "plus one": _plus_one,
}
