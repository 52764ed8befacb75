"""A whole run in a space of merged KV heads; and what is refused before a search."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import Finished
from families import CASES, IDS, tiny_model
from test_run import changed
from tiny import paired_by_bytes, tiny_recipe, tiny_tokenizer, write_front

from llmprune.choices.kv_groups import AttentionChoice
from llmprune.choices.merged import MergedChoice
from llmprune.core.budgets import parse_pick
from llmprune.core.errors import RunDirectoryError, UnsupportedModelError
from llmprune.core.recipe import Recipe
from llmprune.measure.record import Record
from llmprune.models import checkpoint
from llmprune.pipeline.commands import export, front, search
from llmprune.pipeline.prepare import lay_ground, prepare, stock_up
from llmprune.pipeline.run import Run
from llmprune.pipeline.run_directory import RunDirectory, hash_of
from llmprune.pipeline.searching import study_facts
from llmprune.search import judging
from llmprune.tables import block_tables, reach

MERGED = MergedChoice(1)


@pytest.fixture
def merging_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """FFNs stay whole, and nothing is dropped: all that can change is merged."""
    for module in (judging, block_tables, reach):
        monkeypatch.setattr(module, "measure_paired", paired_by_bytes)
    return changed(
        tiny_recipe(tmp_path),
        *("space.merge_kv=true", "space.drop=false", "space.kv_groups_step=2", "space.ffn_step=32"),
        *("search.sampler=slp", "search.targets=[1.02]", "front.checkpoints=none", "export.pick=ppl_ratio<=1000"),
        "front.baselines=[uniform, milp, random]",
    )


def assert_merged(records: Sequence[Record]) -> None:
    assert any(layer.attention == MERGED for record in records for layer in record.architecture.layers)
    for record in records:
        heads = sum(layer.attention.kv_groups for layer in record.architecture.layers)
        assert record.kv_bytes_per_token == heads * 2 * 6 * 4


def test_a_run_finds_scores_and_proves_merged_children(
    merging_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunDirectory(tmp_path / "run").locked():
        run = Run.start(tmp_path / "run", merging_recipe)
        assert lay_ground(run).space.attention == (MERGED, AttentionChoice(2))
        search(run)
        measured = front(run)
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "prove", lambda *_: checkpoint.Proof(0.0, 0.0, 1, False))
            write_front(run)
        once, again = prepare(run), prepare(Run.open(tmp_path / "run"))
        assert again.tables == once.tables and again.library.hash == once.library.hash
        # Proven in a fresh process.
        export(run, parse_pick(merging_recipe.export.pick), tmp_path / "child")
    assert_merged(measured.children)
    metadata = json.loads((tmp_path / "child" / checkpoint.METADATA_FILE).read_text())
    assert "merged_kv_groups" in json.dumps(metadata["architecture"])


@pytest.mark.parametrize("sampler", ["evopress", "nsga2"])
def test_other_samplers_find_merged_children(sampler: str, merging_recipe: Recipe, tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run").locked():
        run = Run.start(tmp_path / "run", changed(merging_recipe, f"search.sampler={sampler}", "front.baselines=[]"))
        search(run)
        assert_merged(front(run).children)


def test_a_family_that_cannot_say_it_is_refused_before_anything_is_run(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    tiny_model(CASES[IDS.index("gpt2-mha")]).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    recipe = changed(recipe, f"model.path={tmp_path / 'gpt2'}", "space.merge_kv=true")
    with pytest.raises(UnsupportedModelError, match=r"no number of KV heads: .* set space\.merge_kv=false"):
        search(Run.start(tmp_path / "run", recipe))
    assert not (tmp_path / "run" / "library").exists() and not (tmp_path / "run" / "tables.json").exists()


def test_a_run_without_merging_is_the_run_it_was(finished_run: Finished, copied: Path) -> None:
    run = Run.open(copied)
    before = run.recipe.space.model_dump(mode="json")
    for word in ("merge_kv", "precision", "vocabulary", "hidden_size"):
        del before[word]
    stock = stock_up(run)
    assert study_facts(run, stock).hashes["space"] == hash_of(before), "studies from before these words go on"
    with pytest.raises(RunDirectoryError, match=r"made with another space\.merge_kv"):
        RunDirectory(copied).check_recipe(changed(finished_run.recipe, "space.merge_kv=true"))
    merging = Run.open(copied)
    merging.recipe = changed(merging.recipe, "space.merge_kv=true")
    assert study_facts(merging, stock).hashes["space"] != study_facts(run, stock).hashes["space"]
