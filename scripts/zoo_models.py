"""The zoo's models as data: one small config for each supported family, its byte tokenizer, and the text it is read.

Sizes are alike (8 layers, hidden size 128, FFN width 384 or 512, heads of 16): families differ by anatomy alone.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from llmprune.core.files import atomic_path
from llmprune.core.recipe_inputs import DataRecipe, SourceRecipe
from llmprune.models.modeling_pruned import FAMILIES

SPECIAL_TOKENS = ("<s>", "</s>", "<pad>")
VOCABULARY = 256 + len(SPECIAL_TOKENS)
LAYERS, HIDDEN, HEADS, HEAD_DIM, FFN_GATED, FFN_PLAIN, CONTEXT = 8, 128, 8, 16, 384, 512, 256
SOURCES = ("wikipedia", "web")
HELD_OUT_SHARE = 0.2

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 4, "intermediate_size": FFN_GATED}
_GEMMA = {
    **_GROUPED,
    "head_dim": HEAD_DIM,
    "query_pre_attn_scalar": HEAD_DIM,
    "sliding_window": 64,
}

VALUES: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "mistral": {**_GROUPED, "head_dim": HEAD_DIM, "sliding_window": 128},
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": HEAD_DIM},
    "smollm3": {**_GROUPED, "no_rope_layer_interval": 4},
    # Multipliers of the sizes that published Granite models have.
    "granite": {
        **_GROUPED,
        "embedding_multiplier": 6.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.125,
        "logits_scaling": 2.0,
    },
    "gemma2": {**_GEMMA, "attn_logit_softcapping": 30.0, "final_logit_softcapping": 20.0},
    "gemma3_text": _GEMMA,
    "olmo2": _GROUPED,
    "phi3": _GROUPED,
    "gpt_neox": {**_COMMON, "intermediate_size": FFN_PLAIN, "use_parallel_residual": True, "attention_bias": True},
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": HIDDEN,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_inner": FFN_PLAIN,
        "n_positions": CONTEXT,
        **{f"{part}_pdrop": 0.0 for part in ("resid", "embd", "attn")},
        **{key: _COMMON[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")},
    },
    "opt": {**_COMMON, "ffn_dim": FFN_PLAIN, "word_embed_proj_dim": HIDDEN, "dropout": 0.0},
}
"""What each family's config is given; the rest is the family's default."""


def new_model(family: str, *, layers: int = LAYERS) -> PreTrainedModel:
    """A model of the family with its initial weights, in eager attention where the family caps its logits."""
    names = FAMILIES[family]
    depth = "n_layer" if "n_layer" in VALUES[family] else "num_hidden_layers"
    config = getattr(transformers, names.config)(**{**VALUES[family], depth: layers})
    if getattr(config, "attn_logit_softcapping", None) is not None:
        config._attn_implementation = "eager"
    model = getattr(transformers, names.causal_lm)(config)
    assert isinstance(model, PreTrainedModel)
    return model


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, after `<s>` 0, `</s>` 1 and `<pad>` 2; puts nothing before a text."""
    names = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    bos, eos, pad = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad, model_max_length=CONTEXT
    )


def split_text(assets: Path, to: Path) -> str:
    """Divide the documents of each source into `to/train` and `to/held_out`; the SHA-256 of all of them.

    No document, nor an exact copy of one, is on both sides.
    """
    digest, seen = hashlib.sha256(), set[str]()
    for name in SOURCES:
        texts = [text for text in documents(assets / f"{name}.jsonl") if not (text in seen or seen.add(text))]
        random.Random(0).shuffle(texts)
        held_out = round(HELD_OUT_SHARE * len(texts))
        for side, part in (("held_out", texts[:held_out]), ("train", texts[held_out:])):
            content = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in part).encode()
            digest.update(content)
            path = to / side / f"{name}.jsonl"
            if not path.is_file() or path.read_bytes() != content:
                with atomic_path(path) as temporary:
                    temporary.write_bytes(content)
    return digest.hexdigest()


def documents(path: Path) -> Iterator[str]:
    """The texts of a file of JSON lines."""
    for line in path.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)["text"]


def training_text(text: Path) -> Iterator[str]:
    """The documents that the models are trained on."""
    for name in SOURCES:
        yield from documents(text / "train" / f"{name}.jsonl")


def held_out_data(text: Path, **tokens: int) -> DataRecipe:
    """Splits of text that the models have not seen, in windows of their context: `calibration_tokens=...` and so on."""
    sources = tuple(SourceRecipe(name=name, path=str(text / "held_out" / f"{name}.jsonl")) for name in SOURCES)
    return DataRecipe(sources=sources, seq_len=CONTEXT, **tokens)
