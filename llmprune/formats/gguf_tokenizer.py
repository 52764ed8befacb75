"""A fast tokenizer's vocabulary, merges, special tokens and chat template, under the keys that llama.cpp reads.

Two kinds are known: byte-level BPE (GPT-2's, Llama 3's, SmolLM's, Qwen 2's) and SentencePiece's BPE with byte fallback
(Llama 2's, Mistral's, Gemma's). llama.cpp knows how text is cut before merging by name only, so the name is looked up
by what the tokenizer does; one that does something else is refused rather than written under a name that is nearly
right.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import gguf
from transformers import PreTrainedTokenizerBase

from llmprune.core.errors import ExportError
from llmprune.data.bos import puts_bos

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_PRE_TOKENIZERS: Mapping[tuple[tuple[str, ...], bool], str] = {
    (("bytes+words",), False): "gpt-2",
    (("digits", "bytes+words"), False): "smollm",
    ((_LLAMA3, "bytes"), True): "llama-bpe",
    ((_LLAMA3, "bytes"), False): "dbrx",
    ((_QWEN2, "bytes"), False): "qwen2",
}
"""llama.cpp's name for the steps of a pre-tokenizer, and whether a word that is a token skips the merges."""

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


def add_tokenizer(
    writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocab_size: int, generation_config: Any = None
) -> None:
    """Add a tokenizer to a GGUF file that is being written.

    Raises ExportError if llama.cpp would read text otherwise.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(f"gguf needs a fast tokenizer (with a tokenizer.json), got {type(tokenizer).__name__}")
    data = json.loads(backend.to_str())
    model = data["model"]
    if model["type"] != "BPE":
        raise ExportError(f"gguf knows BPE tokenizers only, got {model['type']}")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if model.get("byte_fallback"):
        _add_sentencepiece(writer, data, merges, vocab_size)
    elif not merges:
        raise ExportError("llama.cpp reads no byte-level tokenizer without merges, and this one has none; use hf")
    else:
        _add_byte_level(writer, data, merges, vocab_size)
    _add_special_tokens(writer, tokenizer, generation_config)


def tokenizer_problem(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> str | None:
    """Why no GGUF file can hold a tokenizer; None if one can. Writes nothing."""
    try:
        add_tokenizer(gguf.GGUFWriter(None, "none"), tokenizer, vocab_size)
    except ExportError as error:
        return str(error)
    return None


def _add_byte_level(writer: gguf.GGUFWriter, data: Mapping[str, Any], merges: list[str], vocab_size: int) -> None:
    tokens, types = _tokens(data, vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(data))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)


def _add_sentencepiece(writer: gguf.GGUFWriter, data: Mapping[str, Any], merges: list[str], vocab_size: int) -> None:
    tokens, types = _tokens(data, vocab_size)
    # llama.cpp merges the pair whose union has the highest score: a token's score is its first merge, counted down.
    scores: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        scores.setdefault("".join(merge.split(" ", 1)), -float(rank))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([scores.get(token, -float(len(merges))) for token in tokens])
    writer.add_token_types(types)
    writer.add_add_space_prefix(_prepends_space(data))


def _tokens(data: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Texts and types of all ids; ids that the tokenizer does not use are named as such.

    Raises ExportError if the tokenizer has ids that the model has no embedding for.
    """
    by_id = {token_id: token for token, token_id in data["model"]["vocab"].items()}
    added = {entry["id"]: entry for entry in data["added_tokens"]}
    by_id |= {token_id: entry["content"] for token_id, entry in added.items()}
    if max(by_id) >= vocab_size:
        raise ExportError(f"the model has {vocab_size} embeddings, and the tokenizer has a token {max(by_id)}")
    unknown = data["model"].get("unk_token")
    fallback = bool(data["model"].get("byte_fallback"))
    tokens, types = [], []
    for token_id in range(vocab_size):
        token = by_id.get(token_id, f"[PAD{token_id}]")
        if token_id not in by_id:
            kind = gguf.TokenType.UNUSED
        elif fallback and token == unknown:
            kind = gguf.TokenType.UNKNOWN
        elif token_id in added:
            special = added[token_id]["special"]
            kind = gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED
        elif fallback and _BYTE_TOKEN.fullmatch(token):
            kind = gguf.TokenType.BYTE
        else:
            kind = gguf.TokenType.NORMAL
        tokens.append(token)
        types.append(int(kind))
    return tokens, types


def pre_tokenizer_name(data: Mapping[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer (its tokenizer.json) cuts text. Raises ExportError."""
    entry = data["pre_tokenizer"] or {"type": "none"}
    steps = entry["pretokenizers"] if entry["type"] == "Sequence" else [entry]
    signature = tuple(_step(step) for step in steps)
    name = _PRE_TOKENIZERS.get((signature, bool(data["model"].get("ignore_merges"))))
    if name is None:
        raise ExportError(
            f"gguf knows the pre-tokenizers {', '.join(sorted(set(_PRE_TOKENIZERS.values())))} by what they do; this "
            f"tokenizer cuts text in another way: {json.dumps(steps)[:300]}"
        )
    return name


def _step(step: Mapping[str, Any]) -> str:
    """One step of a pre-tokenizer as a word, or as its regular expression."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": words}:
            return "bytes+words" if words else "bytes"
        case {"type": "Digits", "individual_digits": True}:
            return "digits"
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            return str(pattern)
    return json.dumps(step, sort_keys=True)


def _prepends_space(data: Mapping[str, Any]) -> bool:
    """Whether a SentencePiece tokenizer puts a space before text. Raises ExportError if it cuts text besides."""
    normalizer, cut = data["normalizer"] or {"type": "Sequence", "normalizers": []}, data["pre_tokenizer"]
    steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    match steps, cut:
        case [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "content": "▁"}], None:
            return True
        case [{"type": "Replace", "content": "▁"}], None:
            return False
        # Gemma's: once spaces are turned, there is none to cut at.
        case [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}], {
            "type": "Split",
            "pattern": {"String": " "},
        }:
            return False
        case [], {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}:
            return bool(scheme != "never")
    raise ExportError(
        "gguf knows SentencePiece tokenizers that turn spaces to ▁ and do no more; this one normalises by "
        f"{json.dumps(steps)[:150]} and cuts by {json.dumps(cut)[:150]}"
    )


def _add_special_tokens(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, generation_config: Any) -> None:
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    for name, token_id in ids.items():
        if token_id is not None:
            getattr(writer, f"add_{name}_token_id")(token_id)
    ends = getattr(generation_config, "eos_token_id", None)
    turns = [token_id for token_id in ends if token_id != ids["eos"]] if isinstance(ends, list) else []
    if turns:
        writer.add_eot_token_id(turns[0])
    writer.add_add_bos_token(puts_bos(tokenizer))
    encoded = tokenizer("a")["input_ids"]
    writer.add_add_eos_token(ids["eos"] is not None and len(encoded) > 1 and encoded[-1] == ids["eos"])
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        writer.add_chat_template(template)
