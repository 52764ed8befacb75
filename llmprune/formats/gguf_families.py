"""How llama.cpp has each family of models: its architecture, its names of tensors and settings, and what it asks of the
config. Data, found by experiment: tests/test_gguf_families.py holds every entry to llama.cpp's own logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from llmprune.formats.layers import stock_type

Rewrite = Literal["heads turned", "kinds apart", "transposed", "plus one"]
"""How a tensor of the file differs from the child's, apart from its name (see `gguf_tensors`)."""


@dataclass(frozen=True)
class GgufFamily:
    """One family in llama.cpp's words.

    `layer` and `whole` name tensors by the module that has them, within a layer and outside; where embeddings are tied
    there is no `output`. `needs` are the values that a config may have for llama.cpp to compute the same. `settings`
    are keys of the file and the config's words for them, `optional` those that a config may leave out.
    """

    architecture: str
    layer: Mapping[str, str]
    whole: Mapping[str, str]
    needs: Mapping[str, tuple[object, ...]]
    settings: Mapping[str, str]
    optional: Mapping[str, str] = field(default_factory=dict)
    rewrites: Mapping[str, Rewrite] = field(default_factory=dict)
    ropes: tuple[str, ...] = ("default", "linear")
    """Kinds of rotary embedding, all of them one table of frequencies, whatever the length of the text."""
    rope_divisors: bool = False
    """Whether a scaled rotary embedding is a tensor of the file, not settings."""
    part_turns: bool = False
    """Whether the rotary embedding may turn a part of each head."""
    layers_differ: bool = False
    """Whether heads and FFN width are read layer by layer, and blocks may be missing."""
    heads_fill_hidden: bool = False
    """Whether query heads x head_dim must be the hidden size."""
    slides: bool = False
    """Whether some layers have a sliding window: the file says which."""
    unturned_every: int | None = None
    """Every so many layers, llama.cpp does without the rotary embedding."""
    scaled_by_heads_at: int | None = None
    """With so many layers, and only then, llama.cpp scales attention by hidden size / heads, not by head_dim."""


_PARTS = {
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
_HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_NORMS_AFTER = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
_RMS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
_SILU = {"hidden_act": ("silu", "swish")}
_GELU_TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
_UNBIASED = {"attention_bias": (False,)}

_DECI = GgufFamily(
    architecture="deci",
    layer=_PARTS,
    whole={"model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm"},
    needs=_SILU,
    settings=_RMS,
    rewrites={"attn_q": "heads turned", "attn_k": "heads turned"},
    ropes=("default", "linear", "llama3"),
    rope_divisors=True,
    layers_differ=True,
)
_QWEN3 = GgufFamily(
    architecture="qwen3",
    layer={**_PARTS, **_HEAD_NORMS},
    whole=_DECI.whole,
    needs={**_SILU, **_UNBIASED},
    settings=_RMS,
)
_GEMMA2 = replace(
    _QWEN3,
    architecture="gemma2",
    layer={**_PARTS, **_NORMS_AFTER, "pre_feedforward_layernorm": "ffn_norm"},
    needs={"hidden_activation": _GELU_TANH, **_UNBIASED, "tie_word_embeddings": (True,)},
    settings={
        **_RMS,
        "attention.sliding_window": "sliding_window",
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    rewrites=dict.fromkeys(
        ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm", "output_norm"), "plus one"
    ),
    slides=True,
    scaled_by_heads_at=46,
)

GGUF_FAMILIES: Mapping[str, GgufFamily] = {
    "llama": _DECI,
    "mistral": _DECI,
    "qwen2": _DECI,
    "qwen3": _QWEN3,
    "smollm3": replace(
        _QWEN3,
        architecture="smollm3",
        layer=_PARTS,
        needs={**_SILU, **_UNBIASED, "mlp_bias": (False,)},
        rewrites=_DECI.rewrites,
        unturned_every=4,
    ),
    "granite": replace(
        _QWEN3,
        architecture="granite",
        layer=_PARTS,
        needs=_SILU,
        settings={
            **_RMS,
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
        rewrites=_DECI.rewrites,
    ),
    "olmo2": replace(
        _QWEN3,
        architecture="olmo2",
        # It has no norm before a block.
        layer={own: name for own, name in {**_PARTS, **_HEAD_NORMS, **_NORMS_AFTER}.items() if name != "attn_norm"},
        needs={**_SILU, **_UNBIASED, "tie_word_embeddings": (False,)},
        heads_fill_hidden=True,
    ),
    "gemma2": _GEMMA2,
    "gemma3_text": replace(
        _GEMMA2,
        architecture="gemma3",
        layer={**_GEMMA2.layer, **_HEAD_NORMS},
        needs={
            "hidden_activation": _GELU_TANH,
            **_UNBIASED,
            "use_bidirectional_attention": (False, None),
            "attn_logit_softcapping": (None,),
        },
        settings={**_RMS, "attention.sliding_window": "sliding_window"},
        optional={"final_logit_softcapping": "final_logit_softcapping"},
        rewrites={**_GEMMA2.rewrites, "attn_q_norm": "plus one", "attn_k_norm": "plus one"},
        scaled_by_heads_at=62,
    ),
    "phi3": replace(
        _QWEN3,
        architecture="phi3",
        layer={
            "input_layernorm": "attn_norm",
            "self_attn.qkv_proj": "attn_qkv",
            "self_attn.o_proj": "attn_output",
            "post_attention_layernorm": "ffn_norm",
            "mlp.gate_up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        },
        needs=_SILU,
        ropes=("default",),
        part_turns=True,
        heads_fill_hidden=True,
    ),
    "gpt_neox": GgufFamily(
        architecture="gptneox",
        layer={
            "input_layernorm": "attn_norm",
            "attention.query_key_value": "attn_qkv",
            "attention.dense": "attn_output",
            "post_attention_layernorm": "ffn_norm",
            "mlp.dense_h_to_4h": "ffn_up",
            "mlp.dense_4h_to_h": "ffn_down",
        },
        whole={"gpt_neox.embed_in": "token_embd", "lm_head": "output", "gpt_neox.final_layer_norm": "output_norm"},
        # llama.cpp has the tanh form of GELU for the exact one too: they differ by less than its rounding of either.
        needs={"hidden_act": ("gelu", *_GELU_TANH), "attention_bias": (True,), "tie_word_embeddings": (False,)},
        settings={
            "attention.layer_norm_epsilon": "layer_norm_eps",
            "use_parallel_residual": "use_parallel_residual",
        },
        rewrites={"attn_qkv": "kinds apart"},
        part_turns=True,
        heads_fill_hidden=True,
    ),
    "gpt2": GgufFamily(
        architecture="gpt2",
        layer={
            "ln_1": "attn_norm",
            "attn.c_attn": "attn_qkv",
            "attn.c_proj": "attn_output",
            "ln_2": "ffn_norm",
            "mlp.c_fc": "ffn_up",
            "mlp.c_proj": "ffn_down",
        },
        whole={
            "transformer.wte": "token_embd",
            "transformer.wpe": "position_embd",
            "lm_head": "output",
            "transformer.ln_f": "output_norm",
        },
        needs={
            "activation_function": _GELU_TANH,
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
        },
        settings={"attention.layer_norm_epsilon": "layer_norm_epsilon"},
        rewrites=dict.fromkeys(("attn_qkv", "attn_output", "ffn_up", "ffn_down"), "transposed"),
        heads_fill_hidden=True,
    ),
}
"""By the stock model type."""


def gguf_family(config: Any) -> GgufFamily:
    """Of a config, stock or pruned, of a family that llama.cpp knows."""
    return GGUF_FAMILIES[stock_type(config)]
