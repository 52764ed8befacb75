"""A tokenizer with fewer tokens: the same text comes back from it, in the ids of the rows that a model keeps.

Three kinds can be cut, since each can still say any text without most of its tokens: byte-level BPE (GPT-2's, Llama
3's, SmolLM's, Qwen's), BPE with byte fallback (Llama 2's, Mistral's, Gemma's) and Unigram (T5's, XGLM's). An id becomes
its position among those kept, so the order stays.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llmprune.core.errors import VocabularyError, quoted
from llmprune.data.tokens import IntArray
from llmprune.resize.derivations import merge_list

BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
_BYTES = frozenset(BYTE_TOKENS)

_STEPS = ("normalizer", "pre_tokenizer", "decoder")
_CUTTABLE = "byte-level BPE, BPE with byte fallback and Unigram"


def vocabulary_problem(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Why a tokenizer's vocabulary cannot be cut, as a sentence with what can be done; None if it can be."""
    try:
        tokenizer_data(tokenizer)
    except VocabularyError as error:
        return str(error)
    return None


def tokenizer_data(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a tokenizer.json says. Raises VocabularyError if the vocabulary cannot be cut."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise VocabularyError(
            f"a vocabulary can be cut of fast tokenizers only (those with a tokenizer.json), got "
            f"{type(tokenizer).__name__}; convert it first, or keep all rows"
        )
    data: dict[str, Any] = json.loads(backend.to_str())
    if problem := _problem(data):
        raise VocabularyError(problem)
    return data


def texts_by_id(data: Mapping[str, Any]) -> dict[int, str]:
    """Each token as its tokenizer.json writes it, by id, in order of ids; an id that no token has is not in it."""
    vocab = data["model"]["vocab"]
    pairs = enumerate(text for text, _ in vocab) if isinstance(vocab, list) else ((vocab[text], text) for text in vocab)
    texts = dict(pairs) | {entry["id"]: entry["content"] for entry in data["added_tokens"]}
    return dict(sorted(texts.items()))


def required_tokens(tokenizer: PreTrainedTokenizerBase, data: Mapping[str, Any]) -> set[int]:
    """Ids that no cut may take: added tokens, those that settings name, and the alphabet that can say any text."""
    model = data["model"]
    required = {entry["id"] for entry in data["added_tokens"]} | set(_ids_put_around(data["post_processor"]))
    if data["padding"]:
        required.add(data["padding"]["pad_id"])
    known = texts_by_id(data).keys()
    required |= {token for token in tokenizer.all_special_ids if token in known}
    if model["type"] == "Unigram":
        # Text may spell a byte's token; where longer pieces kept it from being taken for one, they still must.
        spelled = (found.id for name in BYTE_TOKENS for found in tokenizer.backend_tokenizer.model.tokenize(name))
        return required | _unigram_alphabet(data) | set(spelled if model["byte_fallback"] else ())
    vocab = model["vocab"]
    alphabet = {model["unk_token"], *(_characters_of_steps(data) if model["byte_fallback"] else ByteLevel.alphabet())}
    if model["byte_fallback"]:
        alphabet.update(BYTE_TOKENS)
    return required | {vocab[text] for text in alphabet if text in vocab}


def cut_tokenizer(tokenizer: PreTrainedTokenizerBase, kept: IntArray) -> PreTrainedTokenizerFast:
    """A copy of a tokenizer, of its class, that has the tokens `kept` (n,) alone: ascending ids, which become 0..n-1.

    Decoding what it encodes gives the text that the tokenizer itself would give. Text that was encoded in kept tokens
    alone is encoded in the same ones, if each has kept what it is built from (as `kept_tokens` sees to). Merges stay
    whose both parts and result do; chat template, special tokens, post-processor and settings stay. Raises
    VocabularyError if the vocabulary cannot be cut, or if `kept` is no such list or lacks what must stay.
    """
    data = tokenizer_data(tokenizer)
    texts = texts_by_id(data)
    _check_kept(kept, texts, required_tokens(tokenizer, data))
    new_ids = {int(old): new for new, old in enumerate(kept)}
    model = _cut_unigram(data["model"], new_ids) if data["model"]["type"] == "Unigram" else _cut_bpe(data, new_ids)
    cut = {
        **data,
        "model": model,
        "added_tokens": [{**entry, "id": new_ids[entry["id"]]} for entry in data["added_tokens"]],
        "post_processor": _around(data["post_processor"], new_ids),
        "padding": data["padding"] and {**data["padding"], "pad_id": new_ids[data["padding"]["pad_id"]]},
    }
    backend = Tokenizer.from_str(json.dumps(cut))
    assert backend.get_vocab() == {texts[old]: new for old, new in new_ids.items()}
    return _with_backend(tokenizer, backend, model, new_ids)


def _problem(data: Mapping[str, Any]) -> str | None:
    model, otherwise = data["model"], f"name a model with another tokenizer ({_CUTTABLE} can be cut), or keep all rows"
    if model["type"] not in ("BPE", "Unigram"):
        return f"a vocabulary must be {_CUTTABLE} to be cut, got {model['type']}, which needs every token; {otherwise}"
    fallback = bool(model.get("byte_fallback"))
    decoders = set(_step_types(data["decoder"]))
    vocab = {text for text, _ in model["vocab"]} if model["type"] == "Unigram" else model["vocab"].keys()
    if fallback and (missing := [token for token in BYTE_TOKENS if token not in vocab]):
        return (
            f"a vocabulary with byte fallback must have all 256 bytes to be cut, this one lacks {len(missing)} "
            f"({missing[0]}, ...); {otherwise}"
        )
    if fallback and "ByteFallback" not in decoders:
        return (
            f"a tokenizer with byte fallback must decode by ByteFallback to be cut, got {sorted(decoders)}; {otherwise}"
        )
    if model["type"] == "BPE" and not fallback:
        cutters = set(_step_types(data["pre_tokenizer"])) | set(_step_types(data["normalizer"]))
        if "ByteLevel" not in cutters or "ByteLevel" not in decoders:
            return f"BPE must be of bytes or fall back to them to be cut, and this is of characters; {otherwise}"
    return _bpe_problem(data, otherwise) if model["type"] == "BPE" else None


def _bpe_problem(data: Mapping[str, Any], otherwise: str) -> str | None:
    model = data["model"]
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            return f"BPE must mark no parts of words to be cut, got {name} {quoted(model[name])}; {otherwise}"
    top = max(model["vocab"].values())
    if len(set(model["vocab"].values())) < len(model["vocab"]):
        return f"every token must have an id of its own, and two of this vocabulary share one; {otherwise}"
    joined = next((pair for pair in merge_list(model) if not _BYTES.isdisjoint(pair)), None)
    if model["byte_fallback"] and joined:
        return f"bytes that characters fall back to must not be merged, got {quoted(' '.join(joined))}; {otherwise}"
    for entry in data["added_tokens"]:
        if entry["content"] not in model["vocab"] and entry["id"] < top:
            return (
                f"added tokens must have ids after the vocabulary's {top}, got {entry['id']} of "
                f"{quoted(entry['content'])}; {otherwise}"
            )
    return None


def _check_kept(kept: IntArray, texts: Mapping[int, str], required: set[int]) -> None:
    ids = kept.tolist()
    if any(second <= first for first, second in pairwise(ids)):
        raise VocabularyError("the ids of kept tokens must ascend, each once; sort them")
    if strangers := [token for token in ids if token not in texts]:
        raise VocabularyError(f"kept ids must be tokens, and the tokenizer has none of id {strangers[0]}; leave it out")
    if missing := sorted(required.difference(ids)):
        raise VocabularyError(
            f"{len(missing)} tokens are not kept that must be ({quoted(texts[missing[0]])}, ...): added tokens, and "
            "the alphabet that says any text; take what kept_tokens gives"
        )


def _unigram_alphabet(data: Mapping[str, Any]) -> set[int]:
    """Pieces without which some text would become unknown, or become it at another price."""
    model = data["model"]
    pieces = [text for text, _ in model["vocab"]]
    # What an unknown character costs follows from the lowest score.
    required = {int(np.argmin([score for _, score in model["vocab"]]))}
    if model["unk_id"] is not None:
        required.add(model["unk_id"])
    if model["byte_fallback"]:
        alphabet = {*BYTE_TOKENS, *_characters_of_steps(data)}
        return required | {token for token, text in enumerate(pieces) if text in alphabet}
    single = {text for text in pieces if len(text) == 1}
    return required | {
        token
        for token, text in enumerate(pieces)
        if len(text) == 1 or any(character not in single for character in text)
    }


def _steps(step: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """A step of a tokenizer.json, or those of a sequence, however deep."""
    if step is None:
        return
    if step["type"] != "Sequence":
        yield step
    for name in ("normalizers", "pretokenizers", "decoders", "processors"):
        for part in step.get(name, ()):
            yield from _steps(part)


def _step_types(step: Mapping[str, Any] | None) -> Iterator[str]:
    return (part["type"] for part in _steps(step))


def _characters_of_steps(data: Mapping[str, Any]) -> set[str]:
    """Characters that steps around the model put in or take out, as ▁ for a space: as bytes, decoders miss them."""
    found: set[str] = set()
    for name in _STEPS:
        for step in _steps(data[name]):
            pattern = step.get("pattern")
            literal = pattern.get("String") if isinstance(pattern, Mapping) else None
            for text in (literal, *(step.get(key) for key in ("replacement", "content", "prepend"))):
                found.update(text if isinstance(text, str) else ())
    return found


def _ids_put_around(processor: Mapping[str, Any] | None) -> Iterator[int]:
    """Ids that a post-processor puts around text."""
    for step in _steps(processor):
        for token in step["special_tokens"].values() if step["type"] == "TemplateProcessing" else ():
            yield from token["ids"]
        yield from (step[name][1] for name in ("cls", "sep") if name in step)


def _around(processor: Mapping[str, Any] | None, new_ids: Mapping[int, int]) -> dict[str, Any] | None:
    """A post-processor with new ids."""
    if processor is None:
        return None
    changed = dict(processor)
    if changed["type"] == "Sequence":
        changed["processors"] = [_around(step, new_ids) for step in changed["processors"]]
    if changed["type"] == "TemplateProcessing":
        changed["special_tokens"] = {
            name: {**token, "ids": [new_ids[old] for old in token["ids"]]}
            for name, token in changed["special_tokens"].items()
        }
    return changed | {name: [changed[name][0], new_ids[changed[name][1]]] for name in ("cls", "sep") if name in changed}


def _cut_bpe(data: Mapping[str, Any], new_ids: Mapping[int, int]) -> dict[str, Any]:
    model = data["model"]
    vocab = {text: new_ids[old] for text, old in model["vocab"].items() if old in new_ids}
    merges = [pair for pair in merge_list(model) if all(text in vocab for text in (*pair, "".join(pair)))]
    return {**model, "vocab": vocab, "merges": merges}


def _cut_unigram(model: Mapping[str, Any], new_ids: Mapping[int, int]) -> dict[str, Any]:
    pieces = [piece for old, piece in enumerate(model["vocab"]) if old in new_ids]
    unknown = model["unk_id"]
    return {**model, "vocab": pieces, "unk_id": None if unknown is None else new_ids[unknown]}


def _with_backend(
    tokenizer: PreTrainedTokenizerBase, backend: Tokenizer, model: Mapping[str, Any], new_ids: Mapping[int, int]
) -> PreTrainedTokenizerFast:
    """A copy of the tokenizer around another backend. The parts that follow from the old one are not copied."""
    old: Any = tokenizer
    copies: dict[int, Any] = {id(old.backend_tokenizer): backend}
    vocab = [tuple(piece) for piece in model["vocab"]] if model["type"] == "Unigram" else model["vocab"]
    parts = {"vocab": vocab, "vocab_scores": vocab, "merges": model.get("merges"), "unk_id": model.get("unk_id")}
    parts["added_tokens_decoder"] = {new_ids[key]: token for key, token in old.added_tokens_decoder.items()}
    # A file that holds the whole vocabulary is not this tokenizer's.
    parts["vocab_file"] = parts["merges_file"] = parts["tokenizer_file"] = None
    for place in (old.__dict__, old.init_kwargs):
        copies |= {id(place[name]): parts[key] for key in parts for name in (key, f"_{key}") if _is_held(place, name)}
    cut = copy.deepcopy(old, copies)
    assert isinstance(cut, PreTrainedTokenizerFast)
    for place in (cut.__dict__, cut.init_kwargs):
        for name in [name for name in place if name.strip("_") in parts]:
            place[name] = parts[name.strip("_")]
    return cut


def _is_held(place: Mapping[str, Any], name: str) -> bool:
    return isinstance(place.get(name), (dict, list))
