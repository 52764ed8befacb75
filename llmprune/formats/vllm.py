"""Write a child in the DeciLM (Nemotron-NAS) schema, which vLLM and others serve: one entry a layer in the config.

The schema is Llama's, with KV heads and FFN width layer by layer and blocks left out; all layers have the same number
of query heads. Read in vLLM 0.33's source; not run there.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import llmprune.formats.configuration_decilm as schema
import llmprune.formats.decilm_proof
from llmprune.core.errors import ExportError
from llmprune.core.files import write_json
from llmprune.formats.layers import LayerSizes, layer_sizes
from llmprune.models.checkpoint import (
    METADATA_FILE,
    check_destination,
    file_hashes,
    move_into_place,
    staging_beside,
)
from llmprune.models.fresh_process import in_fresh_process

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "configuration_decilm.py"
_LAYERS = "model.layers"
_LEAVES_WITH_ATTENTION = "input_layernorm"
_LIKE_LLAMA = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


@dataclass(frozen=True)
class _Layer:
    """A layer as the schema will have it: `empty_attention` is one that adds zero."""

    sizes: LayerSizes
    empty_attention: bool


def write_vllm(
    child: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, directory: Path, *, force: bool = False
) -> None:
    """Write config, its class, weights and tokenizer to `directory`: whole and read back by their own class, or not.

    The child's layers have the same number of query heads (see `formats.check_child`). Raises ExportError if the
    directory is taken, or the files do not hold what their config says.
    """
    check_destination(directory, force=force)
    with staging_beside(directory) as staging:
        _write(child, tokenizer, staging)
        _prove(staging)
        write_json(staging / METADATA_FILE, {"format": 1, "files": file_hashes(staging)})
        move_into_place(staging, directory)


def _prove(directory: Path) -> None:
    found = in_fresh_process(llmprune.formats.decilm_proof.__file__, directory)
    for rule in ("missing", "unexpected", "misshapen"):
        if found[rule]:
            raise ExportError(f"the DeciLM checkpoint has {rule} tensors: {', '.join(found[rule][:5])}")
    if found["layers"] != found["config_layers"] or not found["first_attention_is_there"] or found["llmprune_imported"]:
        raise ExportError(f"the DeciLM checkpoint's config does not read back as it was written: {found}")


def _write(child: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, directory: Path) -> None:
    layers = _layers(child.config)
    write_json(directory / "config.json", _config(child, layers))
    shutil.copyfile(schema.__file__, directory / CONFIG_FILE)
    save_file(_tensors(child, layers), directory / WEIGHTS_FILE, metadata={"format": "pt"})
    if child.generation_config is not None:
        child.generation_config.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def _layers(config: Any) -> list[_Layer]:
    sizes = layer_sizes(config)
    heads = next(layer.heads for layer in sizes if layer.heads)
    # vLLM finds its way into the first layer by that layer's attention, so one that was left out becomes one that
    # adds zero: the least that the schema can say.
    return [
        _Layer(LayerSizes(heads, 1, layer.ffn_width), True) if i == 0 and not layer.heads else _Layer(layer, False)
        for i, layer in enumerate(sizes)
    ]


def _config(child: PreTrainedModel, layers: list[_Layer]) -> dict[str, Any]:
    whole = child.config.to_dict()
    values = {key: whole[key] for key in _LIKE_LLAMA if key in whole}
    heads = layers[0].sizes.heads
    first = next(layer.sizes for layer in layers if layer.sizes.heads)
    values |= {
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        "num_key_value_heads": first.kv_heads,
        "intermediate_size": max(layer.sizes.ffn_width for layer in layers) or whole["intermediate_size"],
    }
    blocks = [
        schema.BlockConfig(
            schema.AttentionConfig(no_op=False, n_heads_in_group=heads // layer.sizes.kv_heads)
            if layer.sizes.heads
            else schema.AttentionConfig(no_op=True),
            schema.FFNConfig(no_op=False, intermediate_size=layer.sizes.ffn_width)
            if layer.sizes.ffn_width
            else schema.FFNConfig(no_op=True),
        )
        for layer in layers
    ]
    made: Any = schema.DeciLMConfig(block_configs=blocks, **values)
    return {
        **made.to_dict(),
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": f"{Path(CONFIG_FILE).stem}.DeciLMConfig"},
        "dtype": str(child.dtype).removeprefix("torch."),
    }


def _tensors(child: PreTrainedModel, layers: list[_Layer]) -> dict[str, torch.Tensor]:
    """The child's own tensors, tied ones once, and those of an attention that adds zero."""
    left_out = set(getattr(child, "_tied_weights_keys", None) or {}) if child.config.tie_word_embeddings else set()
    tensors = {name: value.contiguous() for name, value in child.state_dict().items() if name not in left_out}
    config = child.config
    for i, layer in enumerate(layers):
        if not layer.empty_attention:
            continue
        widths = {
            "q_proj": (layer.sizes.heads * config.head_dim, config.hidden_size),
            "k_proj": (layer.sizes.kv_heads * config.head_dim, config.hidden_size),
            "v_proj": (layer.sizes.kv_heads * config.head_dim, config.hidden_size),
            "o_proj": (config.hidden_size, layer.sizes.heads * config.head_dim),
        }
        for name, shape in widths.items():
            tensors[f"{_LAYERS}.{i}.self_attn.{name}.weight"] = torch.zeros(shape, dtype=child.dtype)
            if config.attention_bias:
                tensors[f"{_LAYERS}.{i}.self_attn.{name}.bias"] = torch.zeros(shape[0], dtype=child.dtype)
        tensors[f"{_LAYERS}.{i}.{_LEAVES_WITH_ATTENTION}.weight"] = torch.ones(config.hidden_size, dtype=child.dtype)
    return tensors
