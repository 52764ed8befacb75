"""A DeciLM config: a Llama whose layers differ, in the schema of Nemotron-NAS models.

Engines read `config.block_configs[i].attention.no_op`, `.attention.n_heads_in_group`, `.ffn.no_op` and
`.ffn.intermediate_size` as attributes; JSON gives mappings, so this class turns them into objects, and back.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

from transformers import LlamaConfig


@dataclass
class AttentionConfig:
    """`n_heads_in_group`: query heads that share a KV head; None where the block is not there."""

    no_op: bool = False
    n_heads_in_group: int | None = None
    replace_with_linear: bool = False


@dataclass
class FFNConfig:
    """`intermediate_size`: channels; None where the block is not there."""

    no_op: bool = False
    intermediate_size: int | None = None
    replace_with_linear: bool = False


@dataclass
class BlockConfig:
    """One layer."""

    attention: AttentionConfig
    ffn: FFNConfig


class DeciLMConfig(LlamaConfig):  # type: ignore[no-untyped-call]
    """Llama's config, and what each layer keeps."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: list[Any] | None = None, **kwargs: Any) -> None:
        self.block_configs = [_block(entry) for entry in block_configs or []]
        super().__init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        blocks, plain = self.block_configs, copy.copy(self)
        del plain.block_configs
        values: dict[str, Any] = super(DeciLMConfig, plain).to_dict()
        values["block_configs"] = [asdict(block) for block in blocks]
        return values


def _block(entry: Any) -> BlockConfig:
    if isinstance(entry, BlockConfig):
        return entry
    return BlockConfig(AttentionConfig(**entry["attention"]), FFNConfig(**entry["ffn"]))
