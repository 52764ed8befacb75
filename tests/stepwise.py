"""What a model computes behind a prompt and behind each token more, in each way that it is timed."""

from __future__ import annotations

from typing import Any

import torch
from families import Case, Slices, tiny_parent
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from llmprune.choices.architecture import Architecture
from llmprune.measure.speed.graphs import Recorder, StaticGeneration
from llmprune.models.surgery import prune


def child_of(case: Case) -> PreTrainedModel:
    """A child without the first attention, one FFN and a whole layer, and narrower in what is left."""
    parent = tiny_parent(case)
    groups, width = parent.shape.kv_groups, parent.shape.ffn_width
    layers = [(0, width), (max(1, groups - 1), 17), (0, 0), (groups, 0)]
    return prune(parent, Architecture.of(layers), Slices(parent))


def with_dynamic_rope() -> PreTrainedModel:
    """A model that asks the device how long the text is by now."""
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=24,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0},
    )
    return LlamaForCausalLM(config).eval()


@torch.inference_mode()
def grown(model: PreTrainedModel, ids_BT: torch.Tensor, prompt: int) -> list[torch.Tensor]:
    """Logits (B, V) with the cache that eager torch lets grow."""
    cache: Any = DynamicCache(config=model.config)
    passes = [ids_BT[:, :prompt], *(ids_BT[:, i : i + 1] for i in range(prompt, ids_BT.shape[1]))]
    return [model(ids_BT, past_key_values=cache, use_cache=True).logits[:, -1] for ids_BT in passes]


@torch.inference_mode()
def static(model: PreTrainedModel, ids_BT: torch.Tensor, prompt: int, record: Recorder) -> list[torch.Tensor]:
    """Logits (B, V) over tensors that never move, of the second of two ways through the text."""
    run, found = StaticGeneration(model, ids_BT, prompt, record), []
    for _ in range(2):
        found.clear()
        assert run.prefill() > 0
        found.append(run.logits_BTV[:, -1].clone())
        for _ in range(prompt, ids_BT.shape[1]):
            assert run.decode_step() > 0
            found.append(run.logits_BTV[:, -1].clone())
    return found
