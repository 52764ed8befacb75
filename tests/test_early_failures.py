"""A run that fails before it made anything takes the corrected call; one that made something holds to its recipe."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Finished, Llmprune
from test_run import changed
from tiny import save_tiny_llama

from llmprune.core.errors import RunDirectoryError
from llmprune.core.files import write_json
from llmprune.core.recipe_text import apply_overrides, parse_recipe, to_yaml
from llmprune.pipeline.prepare import cut_text, lay_ground
from llmprune.pipeline.run import Run
from llmprune.pipeline.run_directory import RunDirectory


def unsupported_parent(parent: Path, to: Path) -> Path:
    shutil.copytree(parent, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, "model_type": "bert", "architectures": ["BertModel"]}))
    return to


@pytest.mark.parametrize(
    ("through", "override", "message"),
    [
        ("compress", "model.path={tmp}/nothing", "is not a directory"),
        ("search", "model.path={tmp}/bert", "bert"),
        # By then the parent and its dtype are noted.
        ("compress", "space.ffn_step=64", "space.ffn_step must be from 1 to"),
        # By then what the space can reach is measured, and the study's journal is there.
        ("search", "data.search_tokens=1000000", "search_tokens"),
    ],
)
def test_the_corrected_call_goes_on(
    through: str, override: str, message: str, llmprune: Llmprune, finished_run: Finished, tmp_path: Path
) -> None:
    recipe, out = tmp_path / "tiny.yaml", tmp_path / "run"
    # A tiny model is timed for real, and on a busy machine its smallest child is hardly faster.
    slow = changed(finished_run.recipe, "search.targets=[1.01]")
    recipe.write_text(to_yaml(slow), encoding="utf-8")
    unsupported_parent(Path(finished_run.recipe.model.path), tmp_path / "bert")
    begin = ["compress", recipe, "--out", out] if through == "compress" else ["search", out, "--recipe", recipe]
    failed = llmprune(*begin, override.format(tmp=tmp_path), "model.dtype=bfloat16", "--quiet")
    assert failed.code == 2 and message in failed.err and failed.err.count("\n") == 1, failed.err
    forecast = llmprune(*begin, "--dry-run", "--quiet", "--json")
    assert forecast.code == 0 and forecast.json["workload"]["dtype"] == "float32", forecast.err
    # `compress` itself goes on to the front and the proof; what it begins with is what `search` does.
    found = llmprune("search", out, "--recipe", recipe, "search.trials=1", "--quiet", "--json")
    assert found.code == 0 and found.json["new_trials"] == 1, found.err
    assert RunDirectory(out).read_provenance()["parent"]["dtype"] == "float32"
    refused = llmprune("search", out, override.format(tmp=tmp_path), "data.seq_len=32", "--quiet")
    assert refused.code == 2 and "was made with another" in refused.err


def test_another_model_may_stand_where_nothing_was_made_of_the_first(finished_run: Finished, tmp_path: Path) -> None:
    parent = Path(shutil.copytree(finished_run.recipe.model.path, tmp_path / "parent"))
    changes = [f"model.path={parent}"]
    recipe = parse_recipe(apply_overrides(finished_run.recipe.model_dump(mode="json"), changes), origin="test")
    run = Run.start(tmp_path / "run", recipe)
    cut_text(run, lay_ground(run))
    before = run.directory.read_provenance()
    shutil.rmtree(parent)
    save_tiny_llama(parent, ["other texts make another model"] * 40)
    again = Run.start(tmp_path / "run", recipe)
    assert again.directory.read_provenance()["stages"] == before["stages"], "what is asked for by its hash stays"
    assert lay_ground(again).parent_hash != before["parent"]["hash"]


def test_nothing_is_noted_anew_where_something_was_made(copied: Path) -> None:
    before = (copied / "provenance.json").read_bytes()
    Run.start(copied, Run.open(copied).recipe)
    assert (copied / "provenance.json").read_bytes() == before


def put(name: str, content: bytes) -> Callable[[Path], object]:
    def act(run: Path) -> None:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_bytes(content)

    return act


@pytest.mark.parametrize(
    "leave",
    [
        put("library/layer-0.safetensors", b"0"),
        put("tables.json", b"{}"),
        put("study.journal", b"{}\n"),
        put("notes.txt", b"of the user"),
        lambda run: (run / "library").symlink_to(run.parent),
        lambda run: write_json(run / "provenance.json", {"stages": {}, "study": {"run": "0123"}}),
    ],
)
def test_what_was_made_holds_a_run_to_its_recipe(
    leave: Callable[[Path], object], finished_run: Finished, tmp_path: Path
) -> None:
    path, recipe = tmp_path / "run", finished_run.recipe
    other = parse_recipe(apply_overrides(recipe.model_dump(mode="json"), ["data.seq_len=32"]), origin="test")
    directory = RunDirectory(path)
    directory.adopt(recipe)
    for name in ("tokens.safetensors", "reach.json", "study.journal", ".lock", ".tables.json.0123abcd.tmp"):
        (path / name).touch()
    (path / "library").mkdir()
    directory.adopt(other)
    directory.adopt(recipe)
    (path / "library").rmdir()
    leave(path)
    with pytest.raises(RunDirectoryError, match=r"was made with another data\.seq_len"):
        directory.adopt(other)
    assert directory.stored_recipe() == recipe
