"""The dimensions of a parent, as far as choices speak of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BlockKind = Literal["attention", "ffn"]
"""A half of a layer."""
BLOCK_KINDS: tuple[BlockKind, BlockKind] = ("attention", "ffn")
WHOLE_MODEL = -1
"""In place of a layer, where something is chosen once for a model."""

SizeWord = Literal["heads", "kv_heads", "head_dim", "ffn_width"]
"""What a config may say of a layer, in the words of the family table (`models/modeling_pruned.py`)."""


@dataclass(frozen=True, slots=True)
class Dimensions:
    """What all layers of a parent have."""

    layers: int
    hidden_size: int
    kv_groups: int
    queries_per_group: int
    head_dim: int
    ffn_width: int

    def units(self, kind: BlockKind) -> int:
        """How many units the parent's blocks of this kind have: KV groups or FFN channels."""
        return self.kv_groups if kind == "attention" else self.ffn_width
