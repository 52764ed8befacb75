"""A whole run whose children have to be served elsewhere: proposed within limits, exported in every format."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

from test_run import changed
from tiny import paired_by_bytes, tiny_recipe

from llmprune.choices.kv_groups import AttentionChoice
from llmprune.choices.merged import MergedChoice
from llmprune.core.budgets import parse_pick
from llmprune.pipeline.commands import export, front, search
from llmprune.pipeline.prepare import lay_ground
from llmprune.pipeline.run import Run
from llmprune.pipeline.run_directory import RunDirectory
from llmprune.publish.contents import VLLM_DIRECTORY
from llmprune.search import judging
from llmprune.tables import block_tables


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
