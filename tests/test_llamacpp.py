"""llama.cpp as a runner: what it computes, what it says, and where it does not talk."""

from __future__ import annotations

import gc
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from closeness import FORWARD_TERMS, assert_close
from families import CASES, COMMON, GROUPED, IDS, Case, Slices, tiny_model, tiny_parent, tokens
from tiny import tiny_recipe
from transformers import PreTrainedModel

from llmprune.choices.architecture import Architecture
from llmprune.cli.front_tables import front_table
from llmprune.core.errors import ExportError, ModelError, RecipeError
from llmprune.core.recipe import Recipe, WorkloadRecipe
from llmprune.core.recipe_text import parse_recipe
from llmprune.formats.gguf import write_gguf
from llmprune.formats.limits import rounding_warning
from llmprune.measure.quality import perplexity
from llmprune.measure.speed import llamacpp_engine
from llmprune.measure.speed.llamacpp import GgufModel, greedy, logits_of, window_nats
from llmprune.measure.speed.throughput import Workload, measure_paired, running, token_ids
from llmprune.models.surgery import prune
from llmprune.numerics import llamacpp_library
from llmprune.pipeline.commands import front, search
from llmprune.pipeline.prepare import lay_ground, stock_up
from llmprune.pipeline.run import Run
from llmprune.pipeline.run_directory import RunDirectory
from llmprune.pipeline.searching import study_name

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
    torch.testing.assert_close(found, perplexity.window_nats(child, windows_NT), rtol=1e-3, atol=0)


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
            assert_close(torch.from_numpy(session.logits(row)), expected_BV[row])
        session.clear()
        session.read(ids_BT.tolist())
        for row in range(3):
            last = torch.from_numpy(session.logits(row * 11 + 10))
            assert_close(last, expected_BV[row])


def test_texts_longer_than_a_pass_of_llama_cpp_are_read_whole(tmp_path: Path) -> None:
    """It cuts passes at 512 tokens, and rounds caches to 256."""
    model = tiny_model(Case("llama", "long", {**COMMON, **GROUPED, "max_position_embeddings": 1024}))
    write_gguf(model, None, tmp_path / "long.gguf", "f32")
    ids_BT = tokens(1, 700)
    with GgufModel(tmp_path / "long.gguf") as loaded, torch.inference_mode():
        assert_close(logits_of(loaded, ids_BT), model(ids_BT).logits, terms=FORWARD_TERMS + 4 * 700)


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
from llmprune.core.errors import ModelError
from llmprune.measure.speed.llamacpp import GgufModel, greedy
with GgufModel(Path({str(written[1])!r})) as model:
    greedy(model, [5, 6, 7], 4)
try:
    GgufModel(Path({str(broken)!r}))
except ModelError as error:
    print("refused")
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout == "refused\n" and finished.stderr == ""


def in_llamacpp(**changes: Any) -> Workload:
    rules = WorkloadRecipe(engine="llamacpp", prompt_tokens=9, generated_tokens=5, threads=1, **changes)
    return Workload.from_recipe(rules, "float32", "cuda:1", "f32")


@contextmanager
def files_counted() -> Iterator[list[Path]]:
    """The GGUF files that the engine writes."""
    written: list[Path] = []

    def counted(*arguments: Any) -> None:
        written.append(arguments[2])
        write_gguf(*arguments)

    with patch.object(llamacpp_engine, "write_gguf", counted):
        yield written


def test_a_workload_of_torch_is_written_as_it_was() -> None:
    plain = Workload.from_recipe(WorkloadRecipe(threads=2), "float32", "xpu:1", "q8_0").to_json()
    assert plain == {
        "batch": 1,
        "prompt_tokens": 128,
        "generated_tokens": 32,
        "dtype": "float32",
        "threads": 2,
        "device": "xpu:1",
    }
    named = in_llamacpp().to_json()
    assert (named["engine"], named["gguf_type"], named["device"]) == ("llamacpp", "f32", "cpu")


@pytest.mark.parametrize("batch", [1, 3])
def test_what_is_timed_is_the_models_own_work(batch: int) -> None:
    parent = tiny_parent(LLAMA)
    child = prune(parent, Architecture.of([(0, 30), (2, 0), (3, 40), (1, 9)]), Slices(parent))
    workload = in_llamacpp(batch=batch)
    ids_BT = token_ids(parent.model, workload)
    models = (parent.model, child, parent.model)
    with running(models, ids_BT, workload) as runs, torch.inference_mode():
        for _ in range(2):
            assert all(run.prefill() > 0 for run in runs)
            for read in range(workload.prompt_tokens + 1, ids_BT.shape[1] + 1):
                assert all(run.decode_step() > 0 for run in runs)
                for run, model in zip(runs, models, strict=True):
                    expected_BV = model(ids_BT[:, :read]).logits[:, -1]
                    found_BV = torch.stack([torch.from_numpy(run._session.logits(row)) for row in range(batch)])  # type: ignore[attr-defined]
                    # The cache is f16, as it is for llama.cpp's users.
                    torch.testing.assert_close(found_BV, expected_BV, rtol=0, atol=0.01)


def test_the_reference_is_written_once_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    parent = tiny_parent(LLAMA)
    child = prune(parent, Architecture.of([(1, 8)] * 4), Slices(parent))
    told: list[tuple[int, int]] = []
    with files_counted() as written:
        for _ in range(2):
            reference, (speed,) = measure_paired(
                parent.model, [child], in_llamacpp(), 2, lambda done, total: told.append((done, total))
            )
        measure_paired(parent.model, [parent.model], in_llamacpp(), 1)
    # Parent and child, then the child once more.
    assert len(written) == 3
    assert told == [(1, 2), (2, 2)] * 2
    assert not list(tmp_path.iterdir())
    assert reference.decode_speedup.median == 1 and speed.decode_tokens_per_s.median > 0
    kept = llamacpp_engine._kept[parent.model]["f32"]
    assert kept._model
    del parent, child
    gc.collect()
    assert not kept._model, "weights outlive the model that they are copies of"


def test_a_model_that_is_no_gguf_file_is_not_timed() -> None:
    model = tiny_model(CASES[IDS.index("opt-mha")])
    with pytest.raises(ExportError, match="opt"):
        measure_paired(model, [model], in_llamacpp(), 1)


def changed(recipe: Recipe, **sections: dict[str, Any]) -> Recipe:
    data = recipe.model_dump(mode="json")
    for section, values in sections.items():
        data[section] |= values
    return parse_recipe(data, origin="changed")


def test_a_search_is_timed_in_llama_cpp(tmp_path: Path) -> None:
    recipe = changed(tiny_recipe(tmp_path), workload={"engine": "llamacpp", "threads": 1})
    directory = RunDirectory(tmp_path / "run")
    with directory.locked(), files_counted() as written:
        run = Run.start(directory.path, recipe)
        plain = Run(directory, tiny_recipe(tmp_path))
        search(run)
        found = front(run)
    assert len(written) > recipe.search.trials, "every child has a file"
    for record in (found.parent, *found.children):
        workload = record.measured_on.workload
        assert workload["engine"] == "llamacpp" and workload["gguf_type"] == "f16"
    told = "timed in llama.cpp with a KV cache of f16, from f16 GGUF files, scored in torch"
    assert told in str(front_table(found).caption)
    assert study_name(run, stock_up(run)) != study_name(plain, stock_up(plain)), "trials of two engines do not compare"


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"workload": {"engine": "llamacpp", "compile": True}}, "compile is torch's"),
        ({"workload": {"engine": "llamacpp"}, "deploy": {"gguf_type": "q8_0"}}, "hidden_size"),
        ({"workload": {"engine": "tensorrt"}}, "workload.engine"),
    ],
)
def test_recipes_that_llama_cpp_cannot_time_are_refused_at_once(
    sections: dict[str, Any], named: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=named):
        lay_ground(Run.start(tmp_path / "run", changed(tiny_recipe(tmp_path), **sections)))


def test_a_run_says_what_its_figures_leave_out(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    assert rounding_warning(recipe) is None
    for weights, told in (("q4_0", True), ("q8_0", False), ("f16", False)):
        served = changed(recipe, deploy={"formats": ("gguf",), "gguf_type": weights})
        assert (rounding_warning(served) is not None) == told
    warning = rounding_warning(changed(recipe, deploy={"formats": ("gguf",), "gguf_type": "q4_0"}))
    assert warning is not None and "space.precision=[q4_0]" in warning
