"""Read a DeciLM checkpoint as its engines do, and report what does not fit. Run as a script, in a process of its own.

Imports transformers and safetensors only. Usage: python decilm_proof.py CHECKPOINT; prints one JSON object.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoConfig


def expected_shapes(config: Any) -> Iterator[tuple[str, list[int]]]:
    """Every tensor that the config implies, as vLLM builds the model from it."""
    hidden, head_dim, heads = config.hidden_size, config.head_dim, config.num_attention_heads
    yield "model.embed_tokens.weight", [config.vocab_size, hidden]
    yield "model.norm.weight", [hidden]
    if not config.tie_word_embeddings:
        yield "lm_head.weight", [config.vocab_size, hidden]
    for i, block in enumerate(config.block_configs):
        layer = f"model.layers.{i}"
        if not block.attention.no_op:
            kv_heads = heads // block.attention.n_heads_in_group
            rows = {"q_proj": heads * head_dim, "k_proj": kv_heads * head_dim, "v_proj": kv_heads * head_dim}
            yield f"{layer}.input_layernorm.weight", [hidden]
            yield f"{layer}.self_attn.o_proj.weight", [hidden, heads * head_dim]
            for name, size in rows.items():
                yield f"{layer}.self_attn.{name}.weight", [size, hidden]
            if config.attention_bias:
                for name, size in {**rows, "o_proj": hidden}.items():
                    yield f"{layer}.self_attn.{name}.bias", [size]
        if not block.ffn.no_op:
            width = block.ffn.intermediate_size
            yield f"{layer}.post_attention_layernorm.weight", [hidden]
            yield f"{layer}.mlp.down_proj.weight", [hidden, width]
            for name in ("gate_proj", "up_proj"):
                yield f"{layer}.mlp.{name}.weight", [width, hidden]
            if config.mlp_bias:
                for name, size in {"gate_proj": width, "up_proj": width, "down_proj": hidden}.items():
                    yield f"{layer}.mlp.{name}.bias", [size]


def main(checkpoint: str) -> None:
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=True)
    expected = dict(expected_shapes(config))
    with safe_open(Path(checkpoint) / "model.safetensors", framework="pt") as file:
        found = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    result = {
        "model_type": config.model_type,
        "architectures": config.architectures,
        "layers": len(config.block_configs),
        "config_layers": config.num_hidden_layers,
        "first_attention_is_there": not config.block_configs[0].attention.no_op,
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "misshapen": sorted(name for name in expected.keys() & found.keys() if expected[name] != found[name]),
        "llmprune_imported": "llmprune" in sys.modules,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
