"""What the layers of a child are, read from its config: what writers of other formats go by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmprune.choices.dimensions import BlockKind
from llmprune.core.recipe import GgufType
from llmprune.models.modeling_pruned import FAMILIES, PRUNED_PREFIX


@dataclass(frozen=True)
class LayerSizes:
    """Query heads, KV heads and FFN channels of one layer; 0 where the block is not there. `types`: of the weights of a
    block that has one of its own."""

    heads: int
    kv_heads: int
    ffn_width: int
    types: Mapping[BlockKind, GgufType] = field(default_factory=dict)


def stock_type(config: Any) -> str:
    """The model type of the family, of a stock or a pruned config."""
    return str(config.model_type).removeprefix(PRUNED_PREFIX)


def layer_sizes(config: Any) -> tuple[LayerSizes, ...]:
    """Sizes of every layer of a model with this config, stock or pruned."""
    return tuple(_sizes_of(config, i) for i in range(config.num_hidden_layers))


def vocabulary_type(config: Any) -> GgufType | None:
    """The type of embedding and output head, where they have one of their own."""
    type_: GgufType | None = getattr(config, "stored_vocabulary", None)
    return type_


def _sizes_of(config: Any, index: int) -> LayerSizes:
    family = FAMILIES[stock_type(config)]
    pruned = config.model_type.startswith(PRUNED_PREFIX)
    layer = config.per_layer_config[index] if pruned else config
    skip = layer.skip if pruned else ()
    heads = getattr(layer, family.heads)
    kv_heads = getattr(layer, family.kv_heads) if family.kv_heads else heads
    # GPT-2's n_inner may be unset, and then means four times the hidden size.
    width = getattr(layer, family.ffn_width) or 4 * config.hidden_size
    if "attention" in skip:
        heads = kv_heads = 0
    stored: Mapping[BlockKind, GgufType | None] = (getattr(config, "stored_types", None) or {index: {}})[index]
    types = {kind: type_ for kind, type_ in stored.items() if type_ is not None}
    return LayerSizes(heads, kv_heads, 0 if "mlp" in skip else width, types)


def head_dim_of(config: Any) -> int:
    """Size of a head, of a stock or a pruned config."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
