"""DeciLM checkpoints computed from their files alone, as vLLM's source builds the model: what ours are held to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb


def decilm_logits(directory: Path, tokens_BS: Tensor) -> Tensor:
    """Logits (B, S, V) of token ids. Shapes: B rows, S tokens, Q query heads, K KV heads, d the head dim."""
    values = json.loads((directory / "config.json").read_text())
    blocks, tensors = values.pop("block_configs"), load_file(directory / "model.safetensors")
    names = ("hidden_size", "num_attention_heads", "head_dim", "rope_parameters", "max_position_embeddings")
    rotary = LlamaRotaryEmbedding(LlamaConfig(**{name: values[name] for name in names}))
    hidden = tensors["model.embed_tokens.weight"][tokens_BS]
    positions = torch.arange(tokens_BS.shape[1])[None].expand(tokens_BS.shape)
    with torch.inference_mode():
        for i, block in enumerate(blocks):
            layer = f"model.layers.{i}"
            if not block["attention"]["no_op"]:
                normed = _norm(hidden, tensors[f"{layer}.input_layernorm.weight"], values)
                group = block["attention"]["n_heads_in_group"]
                hidden = hidden + _attention(normed, f"{layer}.self_attn", tensors, values, group, rotary, positions)
            if not block["ffn"]["no_op"]:
                normed = _norm(hidden, tensors[f"{layer}.post_attention_layernorm.weight"], values)
                gate, up = (_project(normed, f"{layer}.mlp.{name}_proj", tensors) for name in ("gate", "up"))
                assert gate.shape[-1] == block["ffn"]["intermediate_size"]
                hidden = hidden + _project(silu(gate) * up, f"{layer}.mlp.down_proj", tensors)
        head = "model.embed_tokens" if values["tie_word_embeddings"] else "lm_head"
        return linear(_norm(hidden, tensors["model.norm.weight"], values), tensors[f"{head}.weight"])


def _attention(
    hidden: Tensor, name: str, tensors: dict[str, Tensor], values: Any, group: int, rotary: Any, positions: Tensor
) -> Tensor:
    heads, head_dim = values["num_attention_heads"], values["head_dim"]

    def split(part: str, count: int) -> Tensor:
        return _project(hidden, f"{name}.{part}_proj", tensors).unflatten(-1, (count, head_dim)).transpose(1, 2)

    query, key, value = split("q", heads), split("k", heads // group), split("v", heads // group)
    query, key = apply_rotary_pos_emb(query, key, *rotary(hidden, positions))
    key, value = (part.repeat_interleave(group, dim=1) for part in (key, value))
    mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
    return _project(mixed.transpose(1, 2).flatten(2), f"{name}.o_proj", tensors)


def _project(hidden: Tensor, name: str, tensors: dict[str, Tensor]) -> Tensor:
    return linear(hidden, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))


def _norm(hidden: Tensor, weight: Tensor, values: Any) -> Tensor:
    return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + values["rms_norm_eps"]) * weight
