"""llama.cpp as a runner: what it computes, what it says, and where it does not talk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from families import COMMON, GROUPED, Case, Slices, tiny_model, tiny_parent, tokens
from transformers import PreTrainedModel

from llmprune.architecture import Architecture
from llmprune.deploy.gguf import write_gguf
from llmprune.errors import ModelError
from llmprune.measure import llamacpp_library, quality
from llmprune.measure.llamacpp import GgufModel, greedy, logits_of, window_nats
from llmprune.models.surgery import prune

LLAMA = Case("llama", "gqa", {**COMMON, **GROUPED, "tie_word_embeddings": True})


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    """A child with holes, and its file."""
    parent = tiny_parent(LLAMA)
    child = prune(parent, Architecture.of([(0, 30), (2, 0), (3, 40), (1, 9)]), Slices(parent))
    path = tmp_path_factory.mktemp("gguf") / "child.gguf"
    write_gguf(child, None, path, "f32")
    return child, path


def test_windows_have_the_nats_that_transformers_gives_them(written: tuple[PreTrainedModel, Path]) -> None:
    child, path = written
    windows_NT = tokens(5, 24)
    with GgufModel(path) as model:
        found = window_nats(model, windows_NT)
    # llama.cpp's cache is f16 by default.
    torch.testing.assert_close(found, quality.window_nats(child, windows_NT), rtol=1e-3, atol=0)


def test_greedy_text_is_that_of_transformers(written: tuple[PreTrainedModel, Path]) -> None:
    child, path = written
    for seed in range(4):
        prompt_BT = tokens(1, 9, seed=seed)
        expected = child.generate(prompt_BT, max_new_tokens=12, do_sample=False, eos_token_id=None)  # type: ignore[operator]
        with GgufModel(path) as model:
            assert greedy(model, prompt_BT[0].tolist(), 12, exact=True) == expected[0, 9:].tolist()


def test_sequences_of_a_batch_do_not_see_each_other(written: tuple[PreTrainedModel, Path]) -> None:
    child, path = written
    ids_BT = tokens(3, 11)
    with torch.inference_mode():
        expected_BV = child(ids_BT).logits[:, -1]
    with GgufModel(path) as model, model.session(3, 11, 1, exact=True) as session:
        session.read(ids_BT[:, :7].tolist())
        for position in range(7, 11):
            assert session.read(ids_BT[:, position : position + 1].tolist()) > 0
        # One token a sequence in the last pass.
        for row in range(3):
            torch.testing.assert_close(torch.from_numpy(session.logits(row)), expected_BV[row], rtol=0, atol=1e-4)
        session.clear()
        session.read(ids_BT.tolist())
        for row in range(3):
            last = torch.from_numpy(session.logits(row * 11 + 10))
            torch.testing.assert_close(last, expected_BV[row], rtol=0, atol=1e-4)


def test_texts_longer_than_a_pass_of_llama_cpp_are_read_whole(tmp_path: Path) -> None:
    """It cuts passes at 512 tokens, and rounds caches to 256."""
    model = tiny_model(Case("llama", "long", {**COMMON, **GROUPED, "max_position_embeddings": 1024}))
    write_gguf(model, None, tmp_path / "long.gguf", "f32")
    ids_BT = tokens(1, 700)
    with GgufModel(tmp_path / "long.gguf") as loaded, torch.inference_mode():
        assert float((logits_of(loaded, ids_BT) - model(ids_BT).logits).abs().max()) <= 1e-4


def test_a_full_cache_is_an_error(written: tuple[PreTrainedModel, Path]) -> None:
    with GgufModel(written[1]) as model, model.session(1, 256, 1) as session:
        session.read(tokens(1, 256).tolist())
        with pytest.raises(ModelError, match=r"child\.gguf"):
            session.read([[5]])


def test_what_is_no_gguf_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        GgufModel(tmp_path / "missing.gguf")
    (tmp_path / "text.gguf").write_text("not a model")
    with pytest.raises(ModelError, match=r"text\.gguf"):
        GgufModel(tmp_path / "text.gguf")


def test_a_file_without_a_tokenizer_says_so(written: tuple[PreTrainedModel, Path]) -> None:
    with GgufModel(written[1]) as model, pytest.raises(ModelError, match="no tokenizer"):
        model.tokenize("text")


def test_another_version_of_the_library_is_refused() -> None:
    unloaded = llamacpp_library.library.__wrapped__
    with patch("xllamacpp.__version__", "2099.1.1"), pytest.raises(ModelError, match="pip install xllamacpp=="):
        unloaded()
    with patch.dict(sys.modules, {"xllamacpp": None}), pytest.raises(ModelError, match=r"llmprune\[llamacpp\]"):
        unloaded()
    with (
        patch.dict(llamacpp_library._CONTEXT_DEFAULTS, {"n_ctx": 513}),
        pytest.raises(ModelError, match="cannot be trusted"),
    ):
        unloaded()


def test_llama_cpp_is_silent(written: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    """In a process of its own, whose file descriptors nobody has caught."""
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(written[1].read_bytes()[:2000])
    code = f"""
from pathlib import Path
from llmprune.errors import ModelError
from llmprune.measure.llamacpp import GgufModel, greedy
with GgufModel(Path({str(written[1])!r})) as model:
    greedy(model, [5, 6, 7], 4)
try:
    GgufModel(Path({str(broken)!r}))
except ModelError as error:
    print("refused")
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout == "refused\n" and finished.stderr == ""
