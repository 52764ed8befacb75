"""The type of llama.cpp's KV cache: what is computed with it, what it weighs, and where it is said."""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import cache_types
import pytest
import torch
from families import COMMON, GROUPED, Case, Slices, tiny_model, tiny_parent, tokens
from test_run import changed
from tiny import tiny_recipe, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from llmprune.choices.architecture import Architecture
from llmprune.cli.front_tables import front_table
from llmprune.cli.terminal import bench_table
from llmprune.core.budgets import parse_pick
from llmprune.core.errors import LlmpruneError, ModelError, RecipeError, RunDirectoryError
from llmprune.core.progress import silent
from llmprune.core.recipe import CacheType, Recipe, WorkloadRecipe
from llmprune.core.recipe_inputs import ModelRecipe
from llmprune.evaluation.bench import bench
from llmprune.evaluation.comparing import measured_on
from llmprune.formats.gguf import write_gguf
from llmprune.formats.served_size import served_size
from llmprune.measure.speed.llamacpp import GgufModel, logits_of
from llmprune.measure.speed.throughput import Workload, running, token_ids
from llmprune.models.licence import Licence
from llmprune.models.surgery import prune
from llmprune.numerics.llamacpp_library import library
from llmprune.pipeline.commands import export, front, search
from llmprune.pipeline.inspection import forecast_run
from llmprune.pipeline.prepare import lay_ground, stock_up
from llmprune.pipeline.run import Run
from llmprune.pipeline.run_directory import RunDirectory
from llmprune.pipeline.searching import study_name
from llmprune.publish.card import model_card
from llmprune.publish.contents import read_contents
from llmprune.report.facts import gather
from llmprune.report.page import page

BLOCKY = Case("llama", "blocky", {**COMMON, **GROUPED, "head_dim": 32})
TYPES: tuple[CacheType, ...] = ("f16", "q8_0")


def workload(cache_type: CacheType) -> Workload:
    rules = WorkloadRecipe(
        engine="llamacpp", cache_type=cache_type, prompt_tokens=20, generated_tokens=4, threads=1, batch=2
    )
    return Workload.from_recipe(rules, "float32", "cpu", "f32")


def test_what_is_timed_reads_the_cache_that_is_named() -> None:
    parent = tiny_parent(BLOCKY)
    child = prune(parent, Architecture.of([(0, 30), (2, 0), (3, 40), (1, 9)]), Slices(parent))
    found: dict[str, torch.Tensor] = {}
    for cache_type in TYPES:
        timed = workload(cache_type)
        ids_BT = token_ids(parent.model, timed)
        with running((parent.model, child), ids_BT, timed) as runs, torch.inference_mode():
            for run, model in zip(runs, (parent.model, child), strict=True):
                assert run.prefill() > 0 and all(run.decode_step() > 0 for _ in range(4))
                logits_BV = torch.stack([torch.from_numpy(run._session.logits(row)) for row in range(2)])  # type: ignore[attr-defined]
                # Eight bits of a number leave a 250th of the largest in 32.
                torch.testing.assert_close(logits_BV, model(ids_BT).logits[:, -1], rtol=0, atol=0.06)
                found[cache_type] = logits_BV
    assert (found["f16"] - found["q8_0"]).abs().max() > 1e-3, "both were computed with one cache"


def test_logits_of_a_whole_text_pass_through_the_cache(tmp_path: Path) -> None:
    model, ids_BT = tiny_model(BLOCKY), tokens(2, 24)
    write_gguf(model, None, tmp_path / "model.gguf", "f32")
    with GgufModel(tmp_path / "model.gguf") as loaded, torch.inference_mode():
        expected = model(ids_BT).logits
        exact, half, eight = (
            float((logits_of(loaded, ids_BT, cache_type=type_) - expected).abs().max()) for type_ in (None, *TYPES)
        )
    assert exact < 1e-4 < half < 0.01 < eight < 0.1


def test_heads_that_are_no_whole_blocks_have_no_such_cache(tmp_path: Path) -> None:
    write_gguf(tiny_model(Case("llama", "gqa", {**COMMON, **GROUPED})), None, tmp_path / "model.gguf", "f32")
    with (
        GgufModel(tmp_path / "model.gguf") as loaded,
        pytest.raises(ModelError, match=r"block size 32 does not divide n_embd_head_k=8"),
        loaded.session(1, 8, 1, cache_type="q8_0"),
    ):
        pass


@pytest.mark.parametrize("layers", [[(3, 40)] * 4, [(0, 30), (2, 0), (3, 40), (1, 9)]])
def test_bytes_of_the_cache_are_llama_cpps(layers: list[tuple[int, int]], tmp_path: Path) -> None:
    """Its own count, of one sequence's part of the cache: what it grows by beside the position of each token."""
    parent, architecture = tiny_parent(BLOCKY), Architecture.of(layers)
    child = prune(parent, architecture, Slices(parent))
    write_gguf(child, None, tmp_path / "child.gguf", "f32")
    said = {type_: served_size(child, parent.shape, architecture, "f32", type_).kv_bytes_per_token for type_ in TYPES}
    with GgufModel(tmp_path / "child.gguf") as loaded:
        grows = {type_: cache_growth(loaded, type_) for type_ in TYPES}
    assert grows["f16"] - grows["q8_0"] == said["f16"] - said["q8_0"] > 0
    assert said["q8_0"] / said["f16"] == 8.5 / 16
    assert 0 <= grows["q8_0"] - said["q8_0"] <= 16


def cache_growth(model: GgufModel, cache_type: CacheType) -> float:
    """Bytes a token."""
    count = library().llama_state_seq_get_size
    count.restype, count.argtypes = ctypes.c_size_t, [ctypes.c_void_p, ctypes.c_int32]
    sizes = []
    with model.session(1, 64, 1, cache_type=cache_type) as session:
        for _ in range(2):
            session.read(tokens(1, 32).tolist())
            sizes.append(count(session._context, 0))
    return float((sizes[1] - sizes[0]) / 32)


def test_a_workload_with_the_cache_of_before_is_written_as_before() -> None:
    assert "cache_type" not in workload("f16").to_json()
    assert workload("q8_0").to_json() == {**workload("f16").to_json(), "cache_type": "q8_0"}


def cached_recipe(root: Path, *changes: str) -> Recipe:
    """A run in llama.cpp whose heads are whole blocks."""
    recipe = changed(tiny_recipe(root), "workload.engine=llamacpp", "workload.threads=1", *changes)
    config = LlamaConfig.from_pretrained(recipe.model.path)
    config.head_dim = 32
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(recipe.model.path)
    return recipe


def test_a_run_says_in_which_cache_it_was_timed(tmp_path: Path) -> None:
    recipe = cached_recipe(tmp_path, "workload.cache_type=q8_0", "search.trials=3")
    directory = RunDirectory(tmp_path / "run")
    with directory.locked():
        run = Run.start(directory.path, recipe)
        search(run)
        found = front(run)
        export(run, parse_pick(recipe.export.pick), tmp_path / "child")
        with pytest.raises(RunDirectoryError, match=r"made with another workload\.cache_type"):
            Run.start(directory.path, changed(recipe, "workload.cache_type=f16"))
        plain = Run(directory, changed(recipe, "workload.cache_type=f16"))
        assert study_name(run, stock_up(run)) != study_name(plain, stock_up(plain)), "trials of two caches compare not"
        report = page(gather(run))
    assert found.parent.kv_bytes_per_token == 2 * 3 * 2 * 34
    for record in (found.parent, *found.children):
        # A key and a value of 32 numbers for each head: 128 bytes in f16.
        assert 0 < record.kv_bytes_per_token <= 408 and record.kv_bytes_per_token % 68 == 0
        assert record.measured_on.workload["cache_type"] == "q8_0"
    told = "llama.cpp, f16 weights, q8_0 KV cache"
    assert "timed in llama.cpp with a KV cache of q8_0, from f16 GGUF files, scored in torch" in str(
        front_table(found).caption
    )
    assert f"Speed in {told}: batch 1" in model_card(read_contents(tmp_path / "child"), "user/tiny", Licence("mit"))
    assert f"speeds in {told}." in measured_on([{"figures": found.parent.to_json()}])
    assert "speed in llamacpp with a q8_0 KV cache (batch" in report


def test_a_forecast_counts_the_cache_that_is_named(tmp_path: Path) -> None:
    recipe = cached_recipe(tmp_path, "workload.cache_type=q8_0")
    assert forecast_run(tmp_path / "run", recipe, "search")["kv_bytes_per_token"] == 2 * 6 * 34


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["workload.cache_type=q8_0"], r"cache_type=q8_0 is llama\.cpp's; leave it out with engine=torch"),
        (["workload.engine=llamacpp", "workload.cache_type=q4_0"], r"workload\.cache_type"),
        (
            ["workload.engine=llamacpp", "workload.cache_type=q8_0"],
            r"head_dim must be a multiple of 32 for workload\.cache_type=q8_0, got 6; use f16",
        ),
    ],
)
def test_a_cache_that_cannot_be_is_refused_at_once(changes: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        lay_ground(Run.start(tmp_path / "run", changed(tiny_recipe(tmp_path), *changes)))


def test_checkpoints_are_timed_with_the_cache_that_is_named(tmp_path: Path) -> None:
    def timed(head_dim: int) -> dict[str, Any]:
        recipe = tiny_recipe(tmp_path)
        config = LlamaConfig.from_pretrained(recipe.model.path)
        config.head_dim = head_dim
        LlamaForCausalLM(config).save_pretrained(recipe.model.path)
        rules = WorkloadRecipe(engine="llamacpp", cache_type="q8_0", prompt_tokens=4, generated_tokens=2, repeats=1)
        return bench([ModelRecipe(path=recipe.model.path, device="cpu")], rules, silent, gguf_type="f32")

    result = timed(32)
    assert result["measured_on"]["workload"]["cache_type"] == "q8_0"
    assert "(llama.cpp, f32 weights, q8_0 KV cache)" in str(bench_table(result).title)
    with pytest.raises(
        LlmpruneError, match=r"cannot run .*parent: head_dim must be a multiple of 32 .* got 16; use f16"
    ):
        timed(16)


def test_the_script_says_what_a_smaller_cache_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model(BLOCKY).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "a bee and an ant " * 40}) + "\n")
    arguments = ["--weights", "f32", "--windows", "2", "--tokens", "24", "--depths", "8", "--threads", "1", "--json"]
    monkeypatch.setattr(
        sys, "argv", ["cache_types.py", str(tmp_path / "model"), "--text", str(tmp_path / "text.jsonl"), *arguments]
    )
    cache_types.main()
    found = json.loads(capsys.readouterr().out)
    assert found["kv_bytes_per_token, f16"] == 4 * 3 * 2 * 64 and found["kv_bytes_per_token, q8_0"] == 4 * 3 * 2 * 34
    assert 0 < found["kl_nats"] < 1e-3 and abs(found["nats_lost"]) < 0.01 and found["same_top"] > 0.8
    assert found["decode_speedup at 8"] > 0
