"""A smaller vocabulary: the same text comes back, kept tokens stay what they were, and so do their logits."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from families import CASES, COMMON, GROUPED, HIDDEN, IDS, LAYERS, Case, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertTokenizer,
    GenerationConfig,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.tokenization_python import PythonBackend
from vocabularies import KINDS, LANGUAGES, SPECIAL, TEMPLATE, USERS, byte_level, random_texts, sentencepiece, unigram

from llmprune.core.errors import UnsupportedModelError, VocabularyError
from llmprune.data.bos import puts_bos
from llmprune.data.tokens import IntArray
from llmprune.formats.gguf import write_gguf
from llmprune.formats.gguf_tokenizer import tokenizer_problem
from llmprune.measure.speed.llamacpp import GgufModel
from llmprune.models import fresh_process
from llmprune.models.parent import make_parent
from llmprune.resize.derivations import derivations, with_parts
from llmprune.resize.rows import cut_vocabulary
from llmprune.resize.token_ids import named_ids
from llmprune.resize.tokenizers import cut_tokenizer, required_tokens, tokenizer_data, vocabulary_problem
from llmprune.resize.tokens import kept_tokens, token_counts

COUNTED = LANGUAGES[:2]
"""Text in two of the languages: of the others, most tokens go."""


def least_size(tokenizer: Any) -> int:
    with pytest.raises(VocabularyError, match=r"at least ([\d,]+) rows") as raised:
        kept_tokens(tokenizer, token_counts(tokenizer, COUNTED), 1)
    return int(str(raised.value).split("at least ")[1].split(" ")[0].replace(",", ""))


@cache
def parent(kind: str) -> PreTrainedTokenizerFast:
    return KINDS[kind]()


@cache
def kept_of(kind: str, share: float = 0.3) -> IntArray:
    """What must stay, and a share of the others."""
    tokenizer = parent(kind)
    least = least_size(tokenizer)
    return kept_tokens(tokenizer, token_counts(tokenizer, COUNTED), least + int(share * (len(tokenizer) - least)))


@cache
def cut_of(kind: str, share: float = 0.3) -> PreTrainedTokenizerFast:
    return cut_tokenizer(parent(kind), kept_of(kind, share))


def new_ids(kept: IntArray) -> dict[int, int]:
    return {int(old): new for new, old in enumerate(kept)}


def ids_of(tokenizer: Any, texts: list[str], special: bool = False) -> list[list[int]]:
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
    return encoded


def with_added(tokenizer: Any, texts: list[str]) -> list[str]:
    added = list(tokenizer.get_added_vocab())
    return [text + added[at % len(added)] + text[::-1] for at, text in enumerate(texts)]


@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_text_that_comes_back_is_the_parents(kind: str, share: float) -> None:
    tokenizer, cut = parent(kind), cut_of(kind, share)
    texts = [*LANGUAGES, *random_texts(10_000 if share else 1_000)]
    texts += with_added(tokenizer, texts[:1_000])
    before, after = ids_of(tokenizer, texts), ids_of(cut, texts)
    assert before != after
    for text, old, new in zip(texts, before, after, strict=True):
        assert cut.decode(new) == tokenizer.decode(old), repr(text)


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_needs_kept_tokens_alone_is_cut_as_before(kind: str) -> None:
    tokenizer, cut, kept = parent(kind), cut_of(kind), kept_of(kind)
    words = [word for text in LANGUAGES for word in text.split(" ")]
    pieces = [*words, *(" " + word for word in words), *(tokenizer.decode([int(token)]) for token in kept)]
    pieces += [*COUNTED, *with_added(tokenizer, words)]
    same = 0
    for old, new in zip(ids_of(tokenizer, pieces), ids_of(cut, pieces), strict=True):
        if np.isin(old, kept).all():
            assert new == [new_ids(kept)[token] for token in old]
            same += 1
    assert same > 200


@pytest.mark.parametrize("kind", KINDS)
def test_every_added_token_stays_and_is_read_whole(kind: str) -> None:
    tokenizer, cut, mapping = parent(kind), cut_of(kind), new_ids(kept_of(kind))
    assert cut.get_added_vocab() == {text: mapping[old] for text, old in tokenizer.get_added_vocab().items()}
    for text in tokenizer.get_added_vocab():
        assert ids_of(cut, [text]) == [[mapping[token] for token in ids] for ids in ids_of(tokenizer, [text])]
    assert type(cut) is type(tokenizer)
    assert cut.special_tokens_map == tokenizer.special_tokens_map
    assert cut.extra_special_tokens == tokenizer.extra_special_tokens
    for name in ("chat_template", "model_max_length", "padding_side", "truncation_side", "add_bos_token"):
        assert getattr(cut, name) == getattr(tokenizer, name)
    for name in ("bos", "eos", "unk", "pad"):
        old = getattr(tokenizer, f"{name}_token_id")
        assert getattr(cut, f"{name}_token_id") == (None if old is None else mapping[old])
    assert puts_bos(cut) == puts_bos(tokenizer)
    around = [ids_of(one, [LANGUAGES[0]], special=True)[0] for one in (tokenizer, cut)]
    assert (around[1][0], around[1][-1]) == (mapping[around[0][0]], mapping[around[0][-1]])
    pairs: Any = [one("a", "b")["input_ids"] for one in (tokenizer, cut)]
    assert pairs[1] == [mapping[token] for token in pairs[0]]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_happens_to_the_parent(kind: str) -> None:
    tokenizer = KINDS[kind]()
    before = tokenizer.backend_tokenizer.to_str(), repr(tokenizer.init_kwargs), repr(sorted(tokenizer.__dict__))
    kept = kept_tokens(tokenizer, token_counts(tokenizer, COUNTED), least_size(tokenizer) + 9)
    cut = cut_tokenizer(tokenizer, kept)
    cut.add_tokens(["another"])
    assert before == (
        tokenizer.backend_tokenizer.to_str(),
        repr(tokenizer.init_kwargs),
        repr(sorted(tokenizer.__dict__)),
    )


LOAD_TOKENIZERS = """
import json, sys
from pathlib import Path
from transformers import AutoTokenizer
texts = json.loads(Path(sys.argv[1]).read_text())
loaded = [AutoTokenizer.from_pretrained(place) for place in sys.argv[2:]]
print(json.dumps([[type(one).__name__, one(texts)["input_ids"], one.get_vocab(), one.chat_template] for one in loaded]))
"""


def in_another_process(script: str, directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A script in a process without llmprune, forked as proofs are."""
    (directory / "script.py").write_text(script)
    environment = {**os.environ, "HF_MODULES_CACHE": str(directory / "modules")}
    finished = fresh_process.run_script(str(directory / "script.py"), arguments, environment)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished


def test_a_saved_tokenizer_is_the_same_in_another_process(tmp_path: Path) -> None:
    texts = [*LANGUAGES, *random_texts(200), USERS[0] + "a </s>b" + USERS[1]]
    for at, kind in enumerate(KINDS):
        cut_of(kind).save_pretrained(tmp_path / str(at))
    places = [str(tmp_path / str(at)) for at in range(len(KINDS))]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    finished = in_another_process(LOAD_TOKENIZERS, tmp_path, str(tmp_path / "texts.json"), *places)
    for kind, (name, ids, vocab, template) in zip(KINDS, json.loads(finished.stdout), strict=True):
        cut = cut_of(kind)
        assert (name, vocab, template) == (type(cut).__name__, cut.get_vocab(), cut.chat_template), kind
        assert ids == ids_of(cut, texts, special=True), kind


def test_counts_are_of_ids_and_read_as_a_stream() -> None:
    tokenizer = byte_level()
    drawn: list[str] = []

    def stream() -> Iterator[str]:
        for text in LANGUAGES * 40:
            drawn.append(text)
            yield text

    ids = [token for text in LANGUAGES for token in ids_of(tokenizer, [text])[0]]
    counts = token_counts(tokenizer, stream())
    assert counts.tolist() == (40 * np.bincount(ids, minlength=len(tokenizer))).tolist()
    assert counts.sum() > 0 and not counts[tokenizer.bos_token_id]
    assert token_counts(tokenizer, []).tolist() == [0] * len(tokenizer)

    most: list[int] = []
    with patch.object(
        type(tokenizer), "__call__", side_effect=lambda texts, **_: most.append(len(drawn)) or {"input_ids": []}
    ):
        drawn.clear()
        token_counts(tokenizer, stream())
    assert most[0] <= 512 < len(drawn)


@pytest.mark.parametrize("kind", KINDS)
def test_kept_tokens_are_as_many_as_asked_for(kind: str) -> None:
    tokenizer = parent(kind)
    counts, least = token_counts(tokenizer, COUNTED), least_size(tokenizer)
    required = required_tokens(tokenizer, tokenizer_data(tokenizer))
    previous: set[int] = set()
    for size in (least, least + 1, (least + len(tokenizer)) // 2, len(tokenizer), len(tokenizer) + 50):
        kept = kept_tokens(tokenizer, counts, size)
        assert kept.dtype == np.int64 and (np.diff(kept) > 0).all()
        assert len(kept) == min(size, len(tokenizer))
        assert previous | required <= set(kept.tolist())
        previous = set(kept.tolist())
    with pytest.raises(VocabularyError, match=f"at least {least:,} rows.*got {least - 1:,}"):
        kept_tokens(tokenizer, counts, least - 1)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "nigram" not in kind and kind != "T5"])
def test_what_a_token_is_built_from_stays_with_it(kind: str) -> None:
    data = tokenizer_data(parent(kind))
    parts, ranks = derivations(data["model"])
    vocab = data["model"]["vocab"]
    merges = Tokenizer.from_str(json.dumps({**data, "model": {**data["model"], "ignore_merges": False}})).model
    for text, token in vocab.items():
        built = [found.id for found in merges.tokenize(text)] == [token]
        assert (token in parts) == (built and token in ranks), text
    assert len(parts) > 400
    for share in (0.1, 0.3, 0.7):
        kept = set(kept_of(kind, share).tolist())
        added = set(parent(kind).get_added_vocab().values())
        assert with_parts(kept - added, parts) <= kept
        model = cut_of(kind, share).backend_tokenizer.model
        mapping = new_ids(kept_of(kind, share))
        by_text = {text: token for text, token in vocab.items() if token in kept & parts.keys()}
        assert all([found.id for found in model.tokenize(text)] == [mapping[token]] for text, token in by_text.items())


def byte_pairs(merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with these merges, as far as their parts are there."""
    vocab = {text: token for token, text in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    possible = []
    for left, right in merges:
        if left in vocab and right in vocab:
            vocab.setdefault(left + right, len(vocab))
            possible.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab, possible))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)  # type: ignore[no-untyped-call]


WORDS = st.text("abc", min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(
    merges=st.lists(st.tuples(WORDS, WORDS), min_size=20, max_size=80),
    texts=st.lists(st.text("abc", max_size=14), min_size=5, max_size=30),
    counted=st.text("abc", max_size=40),
    more=st.integers(0, 12),
)
def test_merges_in_any_order_are_cut_rightly(
    merges: list[tuple[str, str]], texts: list[str], counted: str, more: int
) -> None:
    """Trained merges are orderly; these name parts after what they build, pairs twice, tokens that nothing becomes."""
    tokenizer = byte_pairs(sorted(merges, key=lambda pair: len("".join(pair))) + merges)
    parts, _ = derivations(tokenizer_data(tokenizer)["model"])
    vocab = tokenizer.get_vocab()
    model = tokenizer.backend_tokenizer.model
    built = {
        token for text, token in vocab.items() if len(text) > 1 and [t.id for t in model.tokenize(text)] == [token]
    }
    assert built == parts.keys()
    kept = kept_tokens(tokenizer, token_counts(tokenizer, [counted]), least_size(tokenizer) + more)
    cut = cut_tokenizer(tokenizer, kept)
    for text, old, new in zip(texts, ids_of(tokenizer, texts), ids_of(cut, texts), strict=True):
        assert cut.decode(new) == text
        if np.isin(old, kept).all():
            assert new == [new_ids(kept)[token] for token in old]


def test_the_tokens_that_text_needs_most_are_kept() -> None:
    tokenizer = byte_pairs([("t", "h"), ("th", "e"), ("q", "u"), ("qu", "o"), ("x", "y"), ("xy", "z"), ("x", "z")])
    vocab, least = tokenizer.get_vocab(), 256

    def words(text: str, more: int) -> set[str]:
        kept = set(kept_tokens(tokenizer, token_counts(tokenizer, [text]), least + more).tolist())
        return {word for word, token in vocab.items() if token in kept and len(word) > 1}

    # "th" alone is never used, and "the" is built from it.
    assert words("the" * 9 + "quo" * 5 + "xz", 1) == {"th"}
    assert words("the" * 9 + "quo" * 5 + "xz", 2) == {"th", "the"}
    assert words("the" * 9 + "quo" * 5 + "xz", 4) == {"th", "the", "qu", "quo"}
    assert words("quo" * 9 + "xz" * 30, 3) == {"qu", "quo", "xz"}
    # What is built from a token speaks for it, all together.
    shared = byte_pairs([("q", "u"), ("t", "h"), ("th", "e"), ("th", "a")])
    kept = kept_tokens(shared, token_counts(shared, ["the" * 30 + "tha" * 30 + "qu" * 50]), least + 1)
    assert shared.get_vocab()["th"] in kept
    # Of tokens that no text has, those go first that the parent merged last.
    assert words("", 4) == {"th", "the", "qu", "quo"}


def test_characters_that_nothing_stands_in_for_stay() -> None:
    data = json.loads(unigram().backend_tokenizer.to_str())
    rare = next(at for at, (text, _) in enumerate(data["model"]["vocab"]) if text == "河")
    data["model"]["vocab"][rare][0] = "河河"
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer.from_str(json.dumps(data)), unk_token="<unk>"
    )
    kept = kept_tokens(tokenizer, token_counts(tokenizer, COUNTED), least_size(tokenizer))
    cut = cut_tokenizer(tokenizer, kept)
    assert len(kept) < len(tokenizer) - 80
    # The price of what is unknown is set by the least of scores.
    assert min(data["model"]["vocab"], key=lambda piece: piece[1])[0] in cut.get_vocab()
    for text in [*LANGUAGES, "河河 a", "河", *random_texts(500)]:
        before, after = (ids_of(one, [text])[0] for one in (tokenizer, cut))
        assert before.count(tokenizer.unk_token_id) == after.count(cut.unk_token_id), text
        assert cut.decode(after) == tokenizer.decode(before)


def word_piece() -> PreTrainedTokenizerFast:
    return BertTokenizer(vocab={"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "[PAD]": 3, "[MASK]": 4, "a": 5})  # type: ignore[no-untyped-call]


def changed(tokenizer: PreTrainedTokenizerFast, **model: Any) -> PreTrainedTokenizerFast:
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    decoder = model.pop("decoder", data["decoder"])
    data = {**data, "decoder": decoder, "model": {**data["model"], **model}}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)))  # type: ignore[no-untyped-call]


def slow() -> PythonBackend:
    class Slow(PythonBackend):
        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

    return Slow()


def of_characters() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "<unk>": 3}, [("a", "b")], unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend)  # type: ignore[no-untyped-call]


def without_a_byte() -> PreTrainedTokenizerFast:
    vocab = {f"<0x{byte:02X}>": byte for byte in range(255)}
    backend = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    backend.decoder = decoders.ByteFallback()
    return PreTrainedTokenizerFast(tokenizer_object=backend)  # type: ignore[no-untyped-call]


BYTES_MERGED = {text: at for at, text in enumerate([*(f"<0x{byte:02X}>" for byte in range(256)), "a", "a<0x41>"])}


@pytest.mark.parametrize(
    ("tokenizer", "named"),
    [
        (slow, "fast tokenizers only.*got Slow"),
        (word_piece, "got WordPiece"),
        (
            lambda: PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a"))),  # type: ignore[no-untyped-call]
            "got WordLevel",
        ),
        (of_characters, "of characters"),
        (without_a_byte, r"lacks 1 \(<0xFF>"),
        (lambda: changed(sentencepiece(), decoder={"type": "Fuse"}), "must decode by ByteFallback"),
        (
            lambda: changed(sentencepiece(), vocab=BYTES_MERGED, merges=[("a", "<0x41>")], unk_token=None),
            "must not be merged, got 'a <0x41>'",
        ),
        (lambda: changed(byte_level(), end_of_word_suffix="</w>", merges=[]), "end_of_word_suffix '</w>'"),
    ],
)
def test_what_cannot_be_cut_is_refused(tokenizer: Any, named: str) -> None:
    other = tokenizer()
    with pytest.raises(VocabularyError, match=named) as raised:
        kept_tokens(other, np.zeros(9, dtype=np.int64), 9)
    assert str(raised.value) == vocabulary_problem(other)
    with pytest.raises(VocabularyError, match=named):
        cut_tokenizer(other, np.arange(3))


@pytest.mark.parametrize("kind", KINDS)
def test_what_can_be_cut_has_no_problem(kind: str) -> None:
    assert vocabulary_problem(parent(kind)) is None


def test_tokens_that_must_stay_cannot_be_left_out() -> None:
    tokenizer = byte_level()
    everything = np.arange(len(tokenizer))
    assert cut_tokenizer(tokenizer, everything).get_vocab() == tokenizer.get_vocab()
    for kept, named in (
        (np.delete(everything, 2), "1 tokens are not kept that must be"),
        (np.delete(everything, tokenizer.get_vocab()["Ġ"]), "not kept that must be"),
        (everything[::-1], "must ascend"),
        (np.append(everything, len(tokenizer)), "none of id"),
    ):
        with pytest.raises(VocabularyError, match=named):
            cut_tokenizer(tokenizer, kept)


def test_other_post_processors_and_padding_name_new_ids() -> None:
    data = json.loads(byte_level().backend_tokenizer.to_str())
    top = max(entry["id"] for entry in data["added_tokens"])
    backend = Tokenizer.from_str(json.dumps(data))
    backend.post_processor = processors.Sequence(
        [processors.ByteLevel(), processors.RobertaProcessing((USERS[1], top), (USERS[0], top - 1))]
    )
    backend.enable_padding(pad_id=top, pad_token=USERS[1], length=16)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)  # type: ignore[no-untyped-call]
    kept = kept_tokens(tokenizer, np.zeros(len(tokenizer), dtype=np.int64), 300)
    cut = cut_tokenizer(tokenizer, kept)
    mapping = new_ids(kept)
    ids = cut.backend_tokenizer.encode("a").ids
    assert ids == [mapping[token] for token in tokenizer.backend_tokenizer.encode("a").ids]
    assert (ids[0], ids[-1]) == (mapping[top - 1], mapping[top]) and len(ids) == 16


def tokenizer_of_300() -> PreTrainedTokenizerFast:
    return tiny_tokenizer(290)


@cache
def kept_of_300() -> IntArray:
    tokenizer = tokenizer_of_300()
    return kept_tokens(tokenizer, token_counts(tokenizer, ["The river and the café"]), 270)


@pytest.mark.parametrize("name", IDS)
def test_logits_of_kept_tokens_are_the_parents(name: str) -> None:
    model, kept = tiny_model(CASES[IDS.index(name)]), kept_of_300()
    before = make_parent(model, None).hash
    child, cut = cut_vocabulary(model, tokenizer_of_300(), kept)
    ids = torch.randint(len(kept), (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(torch.from_numpy(kept)[ids]).logits[..., kept]
        assert torch.equal(child(ids).logits, expected)
    assert make_parent(model, None).hash == before
    assert child.config.vocab_size == len(kept) == len(cut) and type(child) is type(model)
    ends = [one.get_input_embeddings().weight is one.get_output_embeddings().weight for one in (model, child)]
    assert ends[0] == ends[1]
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in child.parameters()}
    rows = [one.shape[0] for one in child.parameters() if one.shape[0] in (300, len(kept))]
    sizes = {module.vocab_size for module in child.modules() if hasattr(module, "vocab_size")}
    assert sizes <= {len(kept)}
    assert rows == [len(kept)] * (1 if ends[0] else 2)


LOAD_MODELS = """
import json, sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
for place in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(place, output_loading_info=True)
    assert not any(info.values()), info
    stored = load_file(place + "/../" + place.rsplit("/", 1)[1] + ".logits.safetensors")
    with torch.inference_mode():
        assert torch.equal(model.eval()(stored["ids"]).logits, stored["logits"]), place
print("all", len(sys.argv) - 1)
"""


def test_saved_models_load_whole_in_another_process(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    # Tied and not, of every family.
    named = zip(CASES, IDS, strict=True)
    names = {(one.model_type, one.values.get("tie_word_embeddings")): name for one, name in named}
    places = []
    for name in names.values():
        child, _ = cut_vocabulary(tiny_model(CASES[IDS.index(name)]), tokenizer_of_300(), kept_of_300())
        child.save_pretrained(tmp_path / name)
        places.append(str(tmp_path / name))
        ids = torch.arange(12)[None]
        with torch.inference_mode():
            logits = child(ids).logits
        save_file({"ids": ids, "logits": logits}, tmp_path / f"{name}.logits.safetensors")
    finished = in_another_process(LOAD_MODELS, tmp_path, *places)
    assert finished.stdout == f"all {len(names)}\n", finished.stderr


def llama_of(tokenizer: Any, **values: Any) -> PreTrainedModel:
    return tiny_model(Case("llama", "cut", {**COMMON, **GROUPED, "vocab_size": len(tokenizer), **values}))


def test_a_bias_of_the_head_is_cut_with_it() -> None:
    torch.manual_seed(0)
    model = PhiForCausalLM(
        PhiConfig(
            vocab_size=300, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=6, intermediate_size=40
        )
    ).eval()
    with torch.no_grad():
        model.lm_head.bias.copy_(torch.arange(300.0))
    kept = kept_of_300()
    child, _ = cut_vocabulary(model, tokenizer_of_300(), kept)
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(child(ids).logits, model(torch.from_numpy(kept)[ids]).logits[..., kept])
    assert child.lm_head.bias.tolist() == kept.tolist()


def test_configs_name_tokens_by_their_new_ids() -> None:
    tokenizer = byte_level()
    vocab = tokenizer.get_vocab()
    end, user, tool = vocab["</s>"], vocab[USERS[0]], vocab[USERS[1]]
    gone = vocab["Ġ"] + 400
    beyond = len(tokenizer) + 3
    model = llama_of(tokenizer, vocab_size=len(tokenizer) + 20, eos_token_id=[end, user], pad_token_id=vocab["<pad>"])
    model.config.task_specific_params = {"chat": {"bos_token_id": user, "max_length": 7}}
    model.generation_config = GenerationConfig(
        eos_token_id=[end, user, beyond],
        pad_token_id=beyond,
        bos_token_id=user,
        decoder_start_token_id=tool,
        forced_eos_token_id=user,
        suppress_tokens=[gone, tool],
        begin_suppress_tokens=[gone],
        bad_words_ids=[[tool, gone], [user], [user, tool]],
        sequence_bias={(tool, user): 1.5, (gone,): 2.0},
        temperature=0.5,
        do_sample=True,
    )
    kept = np.setdiff1d(np.arange(len(tokenizer)), np.arange(vocab["Ġ"] + 390, vocab["Ġ"] + 420))
    child, cut = cut_vocabulary(model, tokenizer, kept)
    mapping = new_ids(kept)
    assert (mapping[user], mapping[end]) == (user - 30, end)
    assert child.config.eos_token_id == [end, user - 30] and child.config.vocab_size == len(cut)
    assert child.config.task_specific_params == {"chat": {"bos_token_id": user - 30, "max_length": 7}}
    said = child.generation_config
    assert said is not None
    assert said.eos_token_id == [end, user - 30] and said.pad_token_id is None and said.bos_token_id == user - 30
    assert said.decoder_start_token_id == tool - 30 and said.forced_eos_token_id == user - 30
    assert said.suppress_tokens == [tool - 30] and said.begin_suppress_tokens == []
    assert said.bad_words_ids == [[user - 30], [user - 30, tool - 30]]
    assert said.sequence_bias == {(tool - 30, user - 30): 1.5}
    assert said.temperature == 0.5 and model.generation_config.eos_token_id == [end, user, beyond]
    assert (
        model.config.eos_token_id == [end, user] and model.config.task_specific_params["chat"]["bos_token_id"] == user
    )


def test_a_token_that_ends_text_is_kept_if_it_is_named() -> None:
    tokenizer = byte_level()
    late = max(set(range(len(tokenizer))) - set(tokenizer.get_added_vocab().values()))
    model = llama_of(tokenizer, eos_token_id=late)
    counts = token_counts(tokenizer, COUNTED)
    with pytest.raises(VocabularyError, match=f"eos_token_id is token {late}, which is not kept"):
        cut_vocabulary(model, tokenizer, kept_tokens(tokenizer, counts, 300))
    kept = kept_tokens(tokenizer, counts, 300, also=[*named_ids(model), 10**6])
    child, cut = cut_vocabulary(model, tokenizer, kept)
    # It can still be built.
    assert [built.id for built in cut.backend_tokenizer.model.tokenize(tokenizer.convert_ids_to_tokens(late))] == [
        child.config.eos_token_id
    ]
    assert child.config.eos_token_id == kept.tolist().index(late)
    assert named_ids(child) >= {child.config.eos_token_id}


@pytest.mark.parametrize(("padding_id", "expected"), [(0, 0), (299, None)])
def test_a_padding_row_stays_one(padding_id: int, expected: int | None) -> None:
    model = tiny_model(Case("opt", "pad", {**CASES[-1].values, "pad_token_id": padding_id}))
    child, _ = cut_vocabulary(model, tokenizer_of_300(), kept_of_300())
    assert child.get_input_embeddings().padding_idx == expected
    assert child.config.pad_token_id == expected


@pytest.mark.parametrize("multiple", [64, 50])
def test_rows_are_rounded_up_to_a_multiple(multiple: int) -> None:
    model, kept = tiny_model(CASES[0]), kept_of_300()
    child, cut = cut_vocabulary(model, tokenizer_of_300(), kept, multiple=multiple)
    rows = -(-len(kept) // multiple) * multiple
    weight, old = child.get_input_embeddings().weight, model.get_input_embeddings().weight
    assert weight.shape[0] == rows == child.config.vocab_size == child.get_output_embeddings().out_features
    assert len(cut) == len(kept) < rows
    assert torch.equal(weight[: len(kept)], old[kept])
    # Not kept before, and like tokens that are seldom said.
    assert torch.equal(weight[len(kept) : len(kept) + 10], old.flip(0)[:10])


def test_a_model_that_has_another_table_of_tokens_is_refused() -> None:
    model = tiny_model(CASES[0])
    model.add_module("second", torch.nn.Embedding(300, 4))
    with pytest.raises(UnsupportedModelError, match="second is another"):
        cut_vocabulary(model, tokenizer_of_300(), kept_of_300())
    with pytest.raises(VocabularyError, match="300 embeddings"):
        cut_vocabulary(tiny_model(CASES[0]), byte_level(), np.arange(len(byte_level())))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "nigram" not in kind and kind != "T5"])
def test_llama_cpp_reads_a_cut_tokenizer(kind: str, tmp_path: Path) -> None:
    tokenizer, cut = parent(kind), cut_of(kind)
    problem = tokenizer_problem(tokenizer, len(tokenizer))
    assert tokenizer_problem(cut, len(cut)) is None or problem is not None
    if problem:
        pytest.skip(problem)
    write_gguf(llama_of(cut), cut, tmp_path / "model.gguf")
    with GgufModel(tmp_path / "model.gguf") as model:
        for text in LANGUAGES[:-1]:
            assert model.tokenize(text) == ids_of(cut, [text])[0], text
            assert model.tokenize(text, special=True) == ids_of(cut, [text], special=True)[0]


def test_the_kinds_are_what_they_are_for() -> None:
    assert parent("byte-level").chat_template == TEMPLATE
    assert set(SPECIAL) < set(parent("byte-level").get_added_vocab())
    assert puts_bos(parent("Llama")) and puts_bos(parent("Gemma"))
    assert not parent("byte-level, bytes lacking").backend_tokenizer.encode("zzB", add_special_tokens=False).ids
    unknown = parent("unigram")
    assert unknown.unk_token_id in ids_of(unknown, [LANGUAGES[8]])[0]
