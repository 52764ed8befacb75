"""A whole run whose children have to be served elsewhere: proposed within limits, exported in every format."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from families import COMMON, GROUPED, Case, tiny_model
from test_run import changed
from tiny import paired_by_bytes, spread, tiny_recipe, tiny_tokenizer

from llmprune.choices.kv_groups import AttentionChoice
from llmprune.choices.merged import MergedChoice
from llmprune.core.budgets import parse_pick
from llmprune.core.errors import RecipeError
from llmprune.core.recipe import Recipe
from llmprune.formats.gguf import tensor_bytes, write_gguf
from llmprune.measure.speed.throughput import Speed
from llmprune.pipeline.commands import baselines, export, front, search
from llmprune.pipeline.prepare import lay_ground
from llmprune.pipeline.run import Run
from llmprune.pipeline.run_directory import RunDirectory
from llmprune.publish.contents import VLLM_DIRECTORY
from llmprune.search import judging
from llmprune.tables import block_tables, reach


def test_a_run_for_gguf_and_vllm_exports_both(tmp_path: Path) -> None:
    recipe = changed(tiny_recipe(tmp_path), "deploy.formats=[hf, gguf, vllm]", "deploy.gguf_type=f32")
    with (
        RunDirectory(tmp_path / "run").locked(),
        patch.object(judging, "measure_paired", paired_by_bytes),
        patch.object(block_tables, "measure_paired", paired_by_bytes),
    ):
        run = Run.start(tmp_path / "run", recipe)
        search(run)
        front(run)
        written = export(run, parse_pick(recipe.export.pick), tmp_path / "child")
        assert lay_ground(run).space.attention == (AttentionChoice(0), MergedChoice(1), AttentionChoice(2))
    assert [entry["format"] for entry in written["formats"]] == ["gguf", "vllm"]
    assert written["formats"][0]["proof"].startswith("run in llama.cpp")
    assert (tmp_path / "child" / "model-F32.gguf").is_file()
    assert (tmp_path / "child" / VLLM_DIRECTORY / "configuration_decilm.py").is_file()


def recipe_of(root: Path, model_type: str, *changes: str, **values: Any) -> Recipe:
    """A run of a parent of another family, whose children llama.cpp reads."""
    recipe = changed(
        tiny_recipe(root), "workload.engine=llamacpp", "deploy.formats=[hf, gguf]", "deploy.gguf_type=f32", *changes
    )
    tiny_model(Case(model_type, "run", {**COMMON, **GROUPED, **values})).save_pretrained(recipe.model.path)
    tiny_tokenizer().save_pretrained(recipe.model.path)
    return recipe


@contextmanager
def timed_by_bytes(directory: Path) -> Iterator[None]:
    """Every model that is timed is written as a file, and as fast as that is small."""

    def measure(reference: Any, candidates: Any, *_: Any) -> tuple[Speed, list[Speed]]:
        for model in (reference, *candidates):
            write_gguf(model, None, directory / "timed.gguf", "f32")
        sizes = [sum(tensor_bytes(model, "f32").values()) for model in (reference, *candidates)]
        speeds = [Speed(spread(100.0), spread(10.0), *[spread(sizes[0] / size)] * 2) for size in sizes]
        return speeds[0], speeds[1:]

    with (
        patch.object(judging, "measure_paired", measure),
        patch.object(block_tables, "measure_paired", measure),
        patch.object(reach, "measure_paired", measure),
    ):
        yield


@pytest.mark.parametrize(
    ("model_type", "size", "values"),
    [
        ("smollm3", "small", {"num_hidden_layers": 4}),
        ("gemma2", "layer", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}),
    ],
)
def test_a_run_whose_layers_have_to_be_alike(
    model_type: str, size: str, values: dict[str, Any], tmp_path: Path
) -> None:
    """Nothing is timed, in tables and trials or beside the front, that no file holds."""
    recipe = recipe_of(tmp_path, model_type, f"space.size={size}", "search.targets=[1.1]", **values)
    with RunDirectory(tmp_path / "run").locked(), timed_by_bytes(tmp_path):
        run = Run.start(tmp_path / "run", recipe)
        search(run)
        found = front(run)
        written = export(run, parse_pick(found.children[0].id), tmp_path / "child")
        with pytest.raises(RecipeError, match="--method has flap, blockpruner, whose children have layers that differ"):
            baselines(run, recipe.baselines)
    assert found.baselines
    assert written["formats"][0]["proof"].startswith("run in llama.cpp")
    assert (tmp_path / "child" / "model-F32.gguf").is_file()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("space.size=medium", "deploy.formats names gguf, .*space.size must be small or layer for parent; got medium"),
        ("deploy.formats=[hf]", "workload.engine=llamacpp .*children of parent whose layers are all alike: space.size"),
        ("front.baselines=[uniform, flap]", "front.baselines has flap, whose children have layers that differ"),
    ],
)
def test_what_cannot_be_alike_is_refused_before_the_search(change: str, named: str, tmp_path: Path) -> None:
    size = "medium" if change.startswith("deploy") else "small"
    recipe = recipe_of(tmp_path, "qwen3", f"space.size={size}", change, head_dim=8)
    with RunDirectory(tmp_path / "run").locked(), pytest.raises(RecipeError, match=named):
        lay_ground(Run.start(tmp_path / "run", recipe))


def test_types_of_blocks_are_refused_where_weights_lie_the_other_way_round(tmp_path: Path) -> None:
    changes = ("space.size=small", "space.precision=[q4_0]", "deploy.gguf_type=q8_0", "deploy.formats=[hf]")
    recipe = recipe_of(tmp_path, "gpt2", *changes, hidden_size=64, num_attention_heads=4)
    with (
        RunDirectory(tmp_path / "run").locked(),
        pytest.raises(RecipeError, match=r"space.precision=\['q4_0'\] is no choice for parent: weights of gpt2"),
    ):
        lay_ground(Run.start(tmp_path / "run", recipe))
