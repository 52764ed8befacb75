"""GGUF files, held to transformers in a real llama.cpp."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gguf
import pytest
import torch
from closeness import tolerance
from families import CASES, COMMON, GROUPED, IDS, Case, Slices, tiny_model, tiny_parent, tokens
from tiny import tiny_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from llmprune.choices.architecture import Architecture, LayerChoice
from llmprune.choices.ffn import FfnChoice
from llmprune.choices.kv_groups import AttentionChoice
from llmprune.core.errors import ExportError, RunDirectoryError, UnsupportedModelError
from llmprune.core.recipe import DeployRecipe, GgufType
from llmprune.formats.gguf import write_gguf
from llmprune.formats.gguf_families import GGUF_FAMILIES
from llmprune.formats.gguf_limits import gguf_child_problem, gguf_choice_problem, gguf_problem
from llmprune.formats.gguf_tokenizer import _LLAMA3, _QWEN2, tokenizer_problem
from llmprune.formats.limits import check_parent
from llmprune.measure.speed.llamacpp import GgufModel, logits_of
from llmprune.models.expected import PROOF_TEXT
from llmprune.models.surgery import prune

LLAMA_SHAPED = [name for name, family in GGUF_FAMILIES.items() if family.layers_differ]
WRITABLE = [name for name in IDS if name.split("-")[0] in LLAMA_SHAPED and not name.endswith("sliding")]
# Rows that q8_0 can store; heads of 16.
BLOCKY = {
    **COMMON,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "intermediate_size": 96,
}
ROTATED = {
    "rope_type": "linear",
    "rope_theta": 10_000.0,
    "factor": 4.0,
}
AWKWARD = (
    PROOF_TEXT,
    "I've TOLD you'Re 12345 times:\n\n  two   spaces\t\ttabs  \r\n",
    "  leading, trailing  ",
    "naïve ÉCOLE 東京都 🙂🇫🇷 ½ ٣٤",
)


def case_of(name: str) -> Case:
    return CASES[IDS.index(name)]


def difference(child: PreTrainedModel, path: Path, weights: GgufType = "f32") -> float:
    """Largest difference of a logit between transformers and llama.cpp on the child's file; the largest logit is 1."""
    write_gguf(child, None, path, weights)
    ids_BT = tokens()
    with torch.inference_mode(), GgufModel(path) as model:
        expected = child(ids_BT).logits
        return float((logits_of(model, ids_BT) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", WRITABLE)
def test_dense_models_compute_the_same(name: str, tmp_path: Path) -> None:
    assert difference(tiny_model(case_of(name)), tmp_path / "dense.gguf") <= tolerance(1.0)


def test_linearly_scaled_rotary_embedding_computes_the_same(tmp_path: Path) -> None:
    case = Case("llama", "linear", {**COMMON, **GROUPED, "rope_parameters": ROTATED})
    assert difference(tiny_model(case), tmp_path / "linear.gguf") <= tolerance(1.0)


# (KV groups, FFN width) of a parent with 3 groups of 2 query heads and 40 channels.
SHAPES: dict[str, list[tuple[int, int]]] = {
    "varying": [(3, 40), (1, 13), (2, 7), (3, 31)],
    "layer 0 narrower": [(1, 40), (3, 40), (2, 40), (3, 40)],
    "no attention first": [(0, 40), (3, 20), (2, 40), (1, 40)],
    "no attention first, twice": [(0, 40), (0, 20), (2, 40), (1, 40)],
    "no attention in the middle": [(3, 40), (3, 20), (0, 40), (1, 40)],
    "no attention last": [(3, 40), (3, 20), (1, 40), (0, 40)],
    "no FFN first": [(3, 0), (3, 20), (2, 40), (1, 40)],
    "no FFN in the middle": [(3, 40), (3, 0), (2, 0), (1, 40)],
    "no FFN last": [(3, 40), (3, 20), (2, 40), (1, 0)],
    "first layer gone": [(0, 0), (3, 20), (2, 40), (1, 40)],
    "middle layers gone": [(3, 40), (0, 0), (0, 0), (2, 17)],
    "last layer gone": [(3, 40), (3, 20), (2, 40), (0, 0)],
    "holes everywhere": [(0, 5), (2, 0), (0, 0), (0, 33)],
    "uniform": [(1, 8)] * 4,
}


@pytest.mark.parametrize("family", ["llama-gqa", "llama-biased", "llama-llama3-rope", "mistral-gqa", "qwen2-gqa"])
@pytest.mark.parametrize("shape", SHAPES)
def test_children_compute_the_same(shape: str, family: str, tmp_path: Path) -> None:
    parent = tiny_parent(case_of(family))
    child = prune(parent, Architecture.of(SHAPES[shape]), Slices(parent))
    assert difference(child, tmp_path / "child.gguf") <= tolerance(1.0)


def test_fewer_query_heads_a_group_compute_the_same(tmp_path: Path) -> None:
    parent = tiny_parent(case_of("llama-gqa"))
    few, whole = AttentionChoice(2, queries_per_group=1), AttentionChoice(3)
    layers = [LayerChoice(choice, FfnChoice(40)) for choice in (few, whole, few, whole)]
    child = prune(parent, Architecture(tuple(layers)), Slices(parent))
    assert difference(child, tmp_path / "child.gguf") <= tolerance(1.0)


@pytest.mark.parametrize(("weights", "bound"), [("f32", tolerance(1.0)), ("f16", 0.005), ("q8_0", 0.05)])
def test_smaller_types_stay_near(weights: GgufType, bound: float, tmp_path: Path) -> None:
    """What the smaller types lose is more than f32 does, too."""
    parent = tiny_parent(Case("llama", "blocky", BLOCKY))
    child = prune(parent, Architecture.of([(0, 96), (2, 64), (4, 0), (2, 32)]), Slices(parent))
    path = tmp_path / "child.gguf"
    found = difference(child, path, weights)
    assert found <= bound
    assert weights == "f32" or found > tolerance(1.0)
    stored = {tensor.name: tensor.tensor_type.name.lower() for tensor in gguf.GGUFReader(path).tensors}
    assert stored["blk.1.attn_q.weight"] == stored["token_embd.weight"] == weights
    assert stored["blk.1.attn_norm.weight"] == stored["output_norm.weight"] == "f32"


def test_tied_embeddings_are_written_once(tmp_path: Path) -> None:
    for name, output in (("qwen2-tied", False), ("qwen2-gqa", True)):
        write_gguf(tiny_model(case_of(name)), None, tmp_path / "model.gguf")
        names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
        assert ("output.weight" in names) == output


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        ("opt-mha", {}, "opt"),
        ("mistral-sliding", {}, "8 positions"),
        ("qwen2-sliding", {}, "8 positions"),
        ("llama-gqa", {"hidden_act": "gelu"}, "gelu"),
        ("llama-gqa", {"rope_parameters": {**ROTATED, "rope_type": "dynamic"}}, "dynamic"),
        ("llama-gqa", {"head_dim": 7}, "7"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    family: str, change: dict[str, Any], named: str, tmp_path: Path
) -> None:
    case = case_of(family)
    model = tiny_model(case)
    for key, value in change.items():
        setattr(model.config, key, value)
    problem = gguf_problem(model.config)
    assert problem is not None and named in problem
    with pytest.raises(ExportError, match=named):
        write_gguf(model, None, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_a_window_as_long_as_the_context_is_no_window() -> None:
    model = tiny_model(case_of("mistral-sliding"))
    model.config.sliding_window = model.config.max_position_embeddings
    assert gguf_problem(model.config) is None


def test_rows_that_q8_0_cannot_store_are_refused(tmp_path: Path) -> None:
    parent = tiny_parent(Case("llama", "blocky", BLOCKY))
    shape, config = parent.shape, parent.model.config
    for choice in (FfnChoice(96), FfnChoice(0), AttentionChoice(3), AttentionChoice(2, queries_per_group=1)):
        assert gguf_choice_problem(config, shape, choice, "q8_0") is None
    assert gguf_choice_problem(config, shape, FfnChoice(50), "f16") is None
    problem = gguf_choice_problem(config, shape, FfnChoice(50), "q8_0")
    assert problem is not None and "multiple of 32 for gguf in q8_0, got 50; use 32 or 64, or" in problem
    problem = gguf_choice_problem(config, shape, AttentionChoice(1, queries_per_group=1), "q8_0")
    assert problem is not None and "got 1 x 16;" in problem
    child = prune(parent, Architecture.of([(4, 96), (4, 96), (4, 50), (4, 96)]), Slices(parent))
    assert gguf_child_problem(child.config, "f16") is None
    assert "got 50 in layer 2" in (gguf_child_problem(child.config, "q8_0") or "")
    with pytest.raises(ExportError, match="got 50 in layer 2"):
        write_gguf(child, None, tmp_path / "child.gguf", "q8_0")
    assert not list(tmp_path.iterdir())
    narrow = tiny_model(case_of("llama-gqa")).config
    assert "got 48" in (gguf_problem(narrow, "q8_0") or "")


def test_numbers_that_f16_cannot_hold_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    for value in (1e6, float("nan")):
        model = tiny_model(case_of("llama-gqa"))
        with torch.no_grad():
            model.get_submodule("model.layers.2.mlp.up_proj").weight[0, 0] = value
        with pytest.raises(ExportError, match=r"blk\.2\.ffn_up\.weight"):
            write_gguf(model, None, tmp_path / "model.gguf", "f16")
        assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    model, path = tiny_model(case_of("llama-gqa")), tmp_path / "model.gguf"
    path.write_text("old")
    with (
        patch.object(gguf.GGUFWriter, "write_tensor_data", side_effect=OSError(28, "No space left on device")),
        pytest.raises(RunDirectoryError, match="No space left"),
    ):
        write_gguf(model, None, path)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def byte_level(*steps: pre_tokenizers.PreTokenizer, ignore_merges: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that cuts text by `steps`, trained on the awkward texts."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>", "<|user|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text for text in AWKWARD for _ in range(3)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")  # type: ignore[no-untyped-call]


def regex(pattern: str) -> list[pre_tokenizers.PreTokenizer]:
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return [pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_only]


def sentencepiece(*, prefix: bool, cut: pre_tokenizers.PreTokenizer | None = None) -> PreTrainedTokenizerFast:
    """A BPE tokenizer with byte fallback, as Llama 2's was converted; cut at nothing, as Gemma's is."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace] if prefix else [replace])
    tokenizer.decoder = decoders.ByteFallback()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator([text for text in AWKWARD[:3] for _ in range(3)], trainer)
    # Byte tokens are no special tokens; training with them as such is how they come into the vocabulary.
    loaded = json.loads(tokenizer.to_str())
    loaded["added_tokens"] = [entry for entry in loaded["added_tokens"] if not entry["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(loaded))
    if cut is not None:
        tokenizer.pre_tokenizer = cut
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
TOKENIZERS: dict[str, Any] = {
    "gpt-2": lambda: byte_level(words),
    "smollm": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True), words),
    "llama-bpe": lambda: byte_level(*regex(_LLAMA3), ignore_merges=True),
    "dbrx": lambda: byte_level(*regex(_LLAMA3)),
    "qwen2": lambda: byte_level(*regex(_QWEN2)),
    "default": lambda: sentencepiece(prefix=True),
    "default without prefix": lambda: sentencepiece(prefix=False),
    "default with a cut": lambda: sentencepiece(
        prefix=False, cut=pre_tokenizers.Split(" ", "merged_with_previous", invert=False)
    ),
}


def tiny_with_vocabulary(size: int) -> PreTrainedModel:
    return tiny_model(Case("llama", "vocabulary", {**COMMON, **GROUPED, "vocab_size": size}))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_text_becomes_the_same_token_ids(name: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[name]()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    # More embeddings than tokens, as models often have.
    write_gguf(tiny_with_vocabulary(400), tokenizer, tmp_path / "model.gguf")
    with GgufModel(tmp_path / "model.gguf") as model:
        for text in AWKWARD:
            assert model.tokenize(text) == tokenizer(text, add_special_tokens=False)["input_ids"], text
            assert model.tokenize(text, special=True) == tokenizer(text)["input_ids"], text
        assert model.chat_template == tokenizer.chat_template
        assert model.is_end(tokenizer.eos_token_id) and not model.is_end(tokenizer.bos_token_id)
    pre = gguf.GGUFReader(tmp_path / "model.gguf").get_field("tokenizer.ggml.pre")
    assert pre is not None and pre.contents() == name.split()[0]


def test_special_tokens_are_read_whole(tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["gpt-2"]()
    write_gguf(tiny_with_vocabulary(400), tokenizer, tmp_path / "model.gguf")
    text = "<|user|>one </s>two<s>"
    with GgufModel(tmp_path / "model.gguf") as model:
        assert model.tokenize(text, special=True) == tokenizer(text)["input_ids"]


def test_a_tokenizer_that_adds_nothing_has_nothing_added(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    write_gguf(tiny_with_vocabulary(300), tokenizer, tmp_path / "model.gguf")
    with GgufModel(tmp_path / "model.gguf") as model:
        assert model.tokenize("one two", special=True) == tokenizer("one two")["input_ids"]
        assert model.chat_template is None


def bytes_alone() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that merges nothing."""
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_tokenizer_that_llama_cpp_reads_has_no_problem() -> None:
    assert tokenizer_problem(tiny_tokenizer(), 300) is None


@pytest.mark.parametrize(
    ("tokenizer", "named"),
    [
        (lambda: byte_level(pre_tokenizers.Punctuation(), words), "Punctuation"),
        (lambda: byte_level(*regex(_QWEN2), ignore_merges=True), "another way"),
        (lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)), "add_prefix_space"),
        (bytes_alone, "without merges"),
    ],
)
def test_tokenizers_without_a_name_in_llama_cpp_are_refused(tokenizer: Any, named: str, tmp_path: Path) -> None:
    problem = tokenizer_problem(tokenizer(), 400)
    assert problem is not None and named in problem
    with pytest.raises(ExportError, match=named):
        write_gguf(tiny_with_vocabulary(400), tokenizer(), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_no_file_can_hold_is_refused_before_the_search() -> None:
    parent = replace(tiny_parent(Case("llama", "bytes", COMMON)), tokenizer=bytes_alone())
    check_parent(parent, DeployRecipe(formats=("hf",)), "medium")
    with pytest.raises(UnsupportedModelError, match=r"the tokenizer of .*without merges"):
        check_parent(parent, DeployRecipe(formats=("hf", "gguf")), "medium")


def test_more_tokens_than_embeddings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="100 embeddings"):
        write_gguf(tiny_with_vocabulary(100), tiny_tokenizer(), tmp_path / "model.gguf")
