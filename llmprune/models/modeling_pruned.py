"""Causal LMs whose layers differ: each layer keeps its own number of heads and FFN channels, or lacks a block.

The widths stand in the config under transformers' own `per_layer_config` schema, in the family's own attribute
names, plus `skip` for blocks that are not there. A pruned class builds the stock model of its family and then
shrinks every layer to what its entry says, so the forward pass is the family's own.

This file needs torch and transformers (tested with 5.23) only: it is copied beside the weights of a checkpoint
(`auto_map`), so that the checkpoint loads with `trust_remote_code=True` where llmprune is not installed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import DynamicCache, PreTrainedModel

PRUNED_PREFIX = "llmprune_"


@dataclass(frozen=True)
class BlockNames:
    """Where the tensors of one block live, relative to its layer.

    `rows` maps each projection (or norm) whose output rows belong to units to a layout: segments separated by
    "|", each a run of units, each unit the parts named by its letters in turn. For attention a unit is a KV group:
    "q" is the rows of its query heads, "k" and "v" those of its KV head; for the FFN "c" is one channel.
    """

    module: str
    rows: Mapping[str, str]
    output: str
    leave_with_block: tuple[str, ...]
    output_norm: str | None = None
    """The norm that the block's output passes before it is added to the residual stream, if there is one."""


@dataclass(frozen=True)
class Family:
    """One model family as data: names and dimensions, nothing else."""

    config: str
    causal_lm: str
    attention: BlockNames
    ffn: BlockNames
    layers: str = "model.layers"
    heads: str = "num_attention_heads"
    kv_heads: str | None = "num_key_value_heads"
    ffn_width: str = "intermediate_size"
    derives_head_dim: bool = False
    residual_scale: str | None = None
    """The config's word for what a block's output is multiplied by before it is added to the residual stream."""
    parallel_residual: str | None = None
    """The config's word for whether both blocks of a layer read the same residual stream."""


_LLAMA = Family(
    config="LlamaConfig",
    causal_lm="LlamaForCausalLM",
    attention=BlockNames("self_attn", {"q_proj": "q", "k_proj": "k", "v_proj": "v"}, "o_proj", ("input_layernorm",)),
    ffn=BlockNames("mlp", {"gate_proj": "c", "up_proj": "c"}, "down_proj", ("post_attention_layernorm",)),
)
_GEMMA2 = replace(
    _LLAMA,
    config="Gemma2Config",
    causal_lm="Gemma2ForCausalLM",
    attention=replace(
        _LLAMA.attention,
        leave_with_block=("input_layernorm", "post_attention_layernorm"),
        output_norm="post_attention_layernorm",
    ),
    ffn=replace(
        _LLAMA.ffn,
        leave_with_block=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
        output_norm="post_feedforward_layernorm",
    ),
)

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": replace(_LLAMA, config="MistralConfig", causal_lm="MistralForCausalLM"),
    "qwen2": replace(_LLAMA, config="Qwen2Config", causal_lm="Qwen2ForCausalLM"),
    "qwen3": replace(_LLAMA, config="Qwen3Config", causal_lm="Qwen3ForCausalLM"),
    "smollm3": replace(_LLAMA, config="SmolLM3Config", causal_lm="SmolLM3ForCausalLM"),
    "granite": replace(
        _LLAMA, config="GraniteConfig", causal_lm="GraniteForCausalLM", residual_scale="residual_multiplier"
    ),
    "gemma2": _GEMMA2,
    "gemma3_text": replace(_GEMMA2, config="Gemma3TextConfig", causal_lm="Gemma3ForCausalLM"),
    "olmo2": replace(
        _LLAMA,
        config="Olmo2Config",
        causal_lm="Olmo2ForCausalLM",
        # OLMo 2 normalises queries and keys over all heads at once, and its layer norms follow the block.
        attention=replace(
            _LLAMA.attention,
            rows={**_LLAMA.attention.rows, "q_norm": "q", "k_norm": "k"},
            leave_with_block=("post_attention_layernorm",),
            output_norm="post_attention_layernorm",
        ),
        ffn=replace(
            _LLAMA.ffn,
            leave_with_block=("post_feedforward_layernorm",),
            output_norm="post_feedforward_layernorm",
        ),
    ),
    "phi3": replace(
        _LLAMA,
        config="Phi3Config",
        causal_lm="Phi3ForCausalLM",
        attention=replace(_LLAMA.attention, rows={"qkv_proj": "q|k|v"}),
        ffn=replace(_LLAMA.ffn, rows={"gate_up_proj": "c|c"}),
        derives_head_dim=True,
    ),
    "gpt_neox": Family(
        config="GPTNeoXConfig",
        causal_lm="GPTNeoXForCausalLM",
        attention=BlockNames("attention", {"query_key_value": "qkv"}, "dense", ("input_layernorm",)),
        ffn=BlockNames("mlp", {"dense_h_to_4h": "c"}, "dense_4h_to_h", ("post_attention_layernorm",)),
        layers="gpt_neox.layers",
        kv_heads=None,
        derives_head_dim=True,
        parallel_residual="use_parallel_residual",
    ),
    "gpt2": Family(
        config="GPT2Config",
        causal_lm="GPT2LMHeadModel",
        attention=BlockNames("attn", {"c_attn": "q|k|v"}, "c_proj", ("ln_1",)),
        ffn=BlockNames("mlp", {"c_fc": "c"}, "c_proj", ("ln_2",)),
        layers="transformer.h",
        heads="n_head",
        kv_heads=None,
        ffn_width="n_inner",
        derives_head_dim=True,
    ),
    "opt": Family(
        config="OPTConfig",
        causal_lm="OPTForCausalLM",
        attention=BlockNames(
            "self_attn", {"q_proj": "q", "k_proj": "k", "v_proj": "v"}, "out_proj", ("self_attn_layer_norm",)
        ),
        # OPT's FFN has no module of its own: its projections hang on the layer.
        ffn=BlockNames("", {"fc1": "c"}, "fc2", ("final_layer_norm", "fc1", "activation_fn")),
        layers="model.decoder.layers",
        kv_heads=None,
        ffn_width="ffn_dim",
        derives_head_dim=True,
    ),
}


def part_rows(queries_per_group: int, head_dim: int) -> dict[str, int]:
    """Rows that each letter of a row layout stands for, in one unit."""
    return {"q": queries_per_group * head_dim, "k": head_dim, "v": head_dim, "c": 1}


def input_axis(module: nn.Module) -> int:
    """Axis of a projection's weight that runs over its inputs: 1 for nn.Linear, 0 for GPT-2's Conv1D."""
    return 0 if isinstance(module, transformers.pytorch_utils.Conv1D) else 1


class NoAttention(nn.Module):
    """An attention block that is not there: it adds nothing to the residual stream and caches nothing."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None


class NoFfn(nn.Module):
    """An FFN block that is not there: it adds nothing to the residual stream."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


class _LayerConfig:
    """A layer's own head counts over the model's config; everything else is read through, so that a later
    change of the model's config (the attention implementation, say) reaches the layer."""

    def __init__(self, config: Any, **own: int) -> None:
        self.__dict__.update(own)
        self._config = config

    def __getattr__(self, name: str) -> Any:
        if name == "_config":  # not there yet while copying
            raise AttributeError(name)
        return getattr(self._config, name)


def _shrink(module: nn.Module, features: int, *, of_input: bool) -> None:
    """Cut a projection, norm or bias to its first `features` inputs or outputs (the weights come later)."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    axis = input_axis(module) if of_input else (1 - input_axis(module) if weight.ndim == 2 else 0)
    module.weight = nn.Parameter(weight.detach().narrow(axis, 0, features).clone(), requires_grad=weight.requires_grad)
    bias = getattr(module, "bias", None)
    if bias is not None and not of_input:
        module.bias = nn.Parameter(bias.detach()[:features].clone(), requires_grad=bias.requires_grad)
    for name in ("in_features", "nx") if of_input else ("out_features", "nf"):
        if hasattr(module, name):
            setattr(module, name, features)


def _shrink_block(layer: nn.Module, names: BlockNames, units: int, parts: Mapping[str, int], output_part: str) -> None:
    block = layer.get_submodule(names.module)
    for name, layout in names.rows.items():
        rows = units * sum(parts[letter] for letter in layout if letter != "|")
        _shrink(block.get_submodule(name), rows, of_input=False)
    _shrink(block.get_submodule(names.output), units * parts[output_part], of_input=True)


def _remove_block(layer: nn.Module, names: BlockNames, nothing: nn.Module) -> None:
    for name in names.leave_with_block:
        setattr(layer, name, nn.Identity())
    setattr(layer, names.module or names.output, nothing)


def _fit_layer(layer: nn.Module, family: Family, config: Any, layer_config: Any) -> None:
    """Shrink one stock layer, built at the parent's widths, to what `layer_config` says."""
    skip = layer_config.skip
    heads = getattr(layer_config, family.heads)
    kv_heads = getattr(layer_config, family.kv_heads) if family.kv_heads else heads
    parts = part_rows(heads // kv_heads, layer_config.head_dim)
    if "attention" in skip:
        _remove_block(layer, family.attention, NoAttention())
    else:
        _shrink_block(layer, family.attention, kv_heads, parts, "q")
        attention = layer.get_submodule(family.attention.module)
        for name, value in {
            "num_heads": heads,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "num_key_value_groups": heads // kv_heads,
            "split_size": heads * layer_config.head_dim,
        }.items():
            if hasattr(attention, name):
                setattr(attention, name, value)
        attention.config = _LayerConfig(config, num_attention_heads=heads, num_key_value_heads=kv_heads)  # type: ignore[assignment]
    if "mlp" in skip:
        _remove_block(layer, family.ffn, NoFfn())
    else:
        _shrink_block(layer, family.ffn, getattr(layer_config, family.ffn_width), parts, "c")


def _fit_cache(model: PreTrainedModel, args: Any, kwargs: Mapping[str, Any]) -> None:
    """Give a bare `DynamicCache()` the config's layers: its own would measure length and mask on layer 0, whose
    attention may not be there."""
    cache = kwargs.get("past_key_values")
    if isinstance(cache, DynamicCache) and not cache.layers:
        cache.layers = DynamicCache(config=model.config).layers
        cache.layer_class_to_replicate = None


def _dense(config: Any) -> Any:
    """The config with the parent's dimensions in every layer."""
    dense = copy.copy(config)
    dense.per_layer_config = None
    return dense


class PrunedConfigMixin:
    """What a pruned config adds to its family's: layers may differ, and some keep no cache."""

    @property
    def kv_sharing_modes(self) -> list[str | None] | None:
        """transformers' word for layers without a cache of their own: without it, a cache whose layer 0 has no
        attention reports length 0 (DynamicCache) or masks wrongly (StaticCache)."""
        if not self.is_heterogeneous:  # type: ignore[attr-defined]
            return None
        layers = self.per_layer_config  # type: ignore[attr-defined]
        return ["reuse" if "attention" in layer.skip else None for layer in layers]

    def validate_architecture(self) -> None:
        """Stock configs demand that the heads divide the hidden size; a pruned layer's need not."""

    def validate_rope(self) -> None:
        """The rotary embedding is the parent's, so it is the parent's head count that it must agree with."""
        super(PrunedConfigMixin, _dense(self)).validate_rope()  # type: ignore[misc]


class PrunedModelMixin:
    """Builds the family's stock model at the parent's widths, then shrinks each layer to its own."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        family = FAMILIES[config.model_type.removeprefix(PRUNED_PREFIX)]
        dense = _dense(config)
        super().__init__(dense, *args, **kwargs)  # type: ignore[call-arg]
        config._attn_implementation_internal = dense._attn_implementation_internal
        assert isinstance(self, PreTrainedModel)
        for module in self.modules():
            if isinstance(module, PreTrainedModel):
                module.config = config
                module.register_forward_pre_hook(_fit_cache, with_kwargs=True)
        for i, layer in enumerate(self.get_submodule(family.layers).children()):
            _fit_layer(layer, family, config, config.per_layer_config[i])

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers looks for the attention code in the source of a class's module; ours is in the family's.
        return True


def pruned_class_names(model_type: str) -> tuple[str, str]:
    """Names of the pruned config and model classes of a family."""
    family = FAMILIES[model_type]
    return f"Pruned{family.config}", f"Pruned{family.causal_lm}"


def _pruned_classes(model_type: str) -> dict[str, type]:
    family = FAMILIES[model_type]
    config_name, model_name = pruned_class_names(model_type)
    # `strict` collects a class's validators when it decorates it: without it the stock ones would stay in force.
    config_class: type = strict(
        type(
            config_name,
            (PrunedConfigMixin, getattr(transformers, family.config)),
            {"__module__": __name__, "model_type": PRUNED_PREFIX + model_type, "_auto_class": "AutoConfig"},
        )
    )
    model_class = type(
        model_name,
        (PrunedModelMixin, getattr(transformers, family.causal_lm)),
        {
            "__module__": __name__,
            "__annotations__": {"config": config_class},
            "config_class": config_class,
            "_auto_class": "AutoModelForCausalLM",
            "_supports_attention_backend": True,
        },
    )
    return {config_name: config_class, model_name: model_class}


def __getattr__(name: str) -> type:
    """Make a family's classes when they are first asked for: importing thirteen families would take seconds."""
    for model_type in FAMILIES:
        if name in pruned_class_names(model_type):
            globals().update(_pruned_classes(model_type))
            return globals()[name]  # type: ignore[no-any-return]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
