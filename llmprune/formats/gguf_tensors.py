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
from llmprune.formats.layers import head_dim_of, layer_sizes, stock_type
from llmprune.models.modeling_pruned import FAMILIES
from llmprune.models.stored import StoredWeight, stored_weights
from llmprune.numerics.ggml import TYPES, Blocks, to_blocks

_ZERO_WIDTH = 32
"""Of a zero FFN: the smallest that most types can store."""


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


def file_layers(config: Any) -> list[FileLayer]:
    """What each layer of the file has: the child's blocks, and zero blocks where llama.cpp has to have one."""
    family = FAMILIES[stock_type(config)]
    layers = []
    for i, sizes in enumerate(layer_sizes(config)):
        zero_head, zero_ffn = i == 0 and not sizes.heads, not sizes.ffn_width
        layers.append(
            FileLayer(
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


def file_tensors(child: PreTrainedModel, layers: list[FileLayer], weights: GgufType) -> Iterator[FileTensor]:
    """Every tensor of the file, in order."""
    config, state, known = child.config, child.state_dict(), stored_weights(child)

    def tensor(name: str, own: str, type_: GgufType = weights, turned_heads: int = 0) -> FileTensor:
        source, rounded = state[own], known.get(own)
        stored_as: GgufType = type_ if source.ndim == 2 else "f32"
        assert rounded is None or rounded.type == stored_as, f"{own} is stored in {rounded}"
        return FileTensor(name, tuple(source.shape), stored_as, lambda: source, rounded, turned_heads)

    yield tensor("token_embd.weight", "model.embed_tokens.weight")
    if not config.tie_word_embeddings:
        yield tensor("output.weight", "lm_head.weight")
    yield tensor("output_norm.weight", "model.norm.weight")
    factors = _rope_factors(child)
    if not torch.allclose(factors, torch.ones_like(factors), rtol=1e-6, atol=0):
        yield FileTensor("rope_freqs.weight", tuple(factors.shape), "f32", lambda: factors)
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
            yield FileTensor(f"blk.{i}.{name}.weight", zeros, weights if fits else "f32", partial(torch.zeros, zeros))


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
    head_dim, theta = head_dim_of(child.config), rope_theta(child.config)
    frequencies = rotary.get_buffer("inv_freq").detach().cpu().double()
    plain = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    return (plain / frequencies).float()


def rope_theta(config: Any) -> float:
    return float(config.rope_parameters["rope_theta"])
