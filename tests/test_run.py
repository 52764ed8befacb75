"""A whole run of a tiny model: its files, what a second session leaves alone, and what kills and damage cost."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import optuna
import pytest
import torch
from conftest import Finished
from contract import FRONT_KEYS, MEASURED_ON_KEYS, QUOTED_KEYS
from rich.console import Console
from safetensors.torch import load
from tiny import contents, numbered_documents, paired_by_bytes, tiny_recipe, write_front, write_jsonl

from llmprune.choices.architecture import Architecture
from llmprune.cli.front_tables import baselines_table, front_table
from llmprune.cli.terminal import PIPED_WIDTH
from llmprune.core.budgets import parse_pick
from llmprune.core.errors import BudgetError, ExportError, LlmpruneError, RunDirectoryError
from llmprune.core.files import write_json
from llmprune.core.recipe import Recipe
from llmprune.core.recipe_text import apply_overrides, parse_recipe
from llmprune.measure.quality.perplexity import score
from llmprune.measure.record import Front, Quoted, Record, child_id
from llmprune.measure.value import SCHEMA
from llmprune.models import checkpoint
from llmprune.models.expected import Proof
from llmprune.models.licence import Licence
from llmprune.models.parent import load_parent
from llmprune.models.surgery import prune
from llmprune.pipeline.commands import baselines, compress, export, front, search
from llmprune.pipeline.judges import Judges
from llmprune.pipeline.prepare import lay_ground, stock_up
from llmprune.pipeline.run import Run
from llmprune.pipeline.run_directory import RunDirectory
from llmprune.pipeline.searching import study_name
from llmprune.publish.card import model_card
from llmprune.publish.contents import read_contents
from llmprune.search import judging
from llmprune.search.judging import Judge
from llmprune.search.study import finished_trials
from llmprune.search.workers.storage import open_journal
from llmprune.tables import block_tables, reach

# A test run in the background of a script ignores Ctrl-C, and so would its processes.
SEARCH = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); sys.argv[0] = 'llmprune'; "
    "from llmprune.cli.main import main; main()"
)


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fills with the hash of every architecture that is judged or scored, and with the checkpoints proven."""
    calls: list[str] = []

    def counted(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(self: Judge, architecture: Architecture, *args: Any) -> Any:
            calls.append(f"{name} {architecture.hash}")
            return method(self, architecture, *args)

        return wrapper

    def prove(expected: Any, directory: Path) -> Proof:
        calls.append("prove")
        return Proof(0.0, 0.0, 1, False)

    for name in ("judge", "score"):
        monkeypatch.setattr(Judge, name, counted(name, getattr(Judge, name)))
    monkeypatch.setattr(checkpoint, "prove", prove)
    return calls


def changed(recipe: Recipe, *overrides: str) -> Recipe:
    return parse_recipe(apply_overrides(recipe.model_dump(mode="json"), list(overrides)), origin="changed")


def finished_hashes(run: Path) -> list[str]:
    """Of the trials in a run's journal; the journal itself is left as it is."""
    copy = run.parent / "journal-to-read"
    shutil.copyfile(run / "study.journal", copy)
    study = optuna.load_study(storage=open_journal(copy), study_name=study_name(Run.open(run), stock_up(Run.open(run))))
    return [str(trial.user_attrs["hash"]) for trial in finished_trials(study)]


def strict_json(path: Path) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{path} holds {constant}")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def test_the_front_is_what_scripts_rely_on(finished_run: Finished) -> None:
    measured = strict_json(finished_run.path / "front.json")
    assert list(measured) == ["schema", "parent", "children", "baselines"] and measured["schema"] == SCHEMA
    library = stock_up(Run.open(finished_run.path)).library
    assert 1 <= len(measured["children"]) <= finished_run.recipe.front.size
    assert {record["name"] for record in measured["baselines"]} <= {"uniform", "shortgpt", "random"}
    for record in (measured["parent"], *measured["children"], *measured["baselines"]):
        assert record.keys() - {"exportable"} == FRONT_KEYS
        assert Architecture.from_json(record["architecture"]).hash == record["hash"]
        assert record["id"] == child_id(record["hash"], library.hash), "these baselines have no library of their own"
        assert record["ppl"] == pytest.approx(math.exp(record["nats_per_token"]))
        assert record["ppl_ratio"] == pytest.approx(record["ppl"] / measured["parent"]["ppl"])
        assert set(record["per_source"]) == {"ant", "bee"}
        for figure in ("prefill_tokens_per_s", "decode_tokens_per_s", "prefill_speedup", "decode_speedup"):
            speed = record[figure]
            assert speed.keys() == {"median", "low", "high"}
            assert 0 < speed["low"] <= speed["median"] <= speed["high"]
        on = record["measured_on"]
        assert on.keys() == MEASURED_ON_KEYS
        assert (on["dataset"], on["split"], on["seq_len"], on["tokens"]) == ("ant+bee", "validation", 16, 60)
        quoted, parents = record["test"], measured["parent"]["test"]
        likeness = quoted.pop("likeness", None)
        assert (likeness is None) == (record["name"] == "parent")
        assert likeness is None or likeness.keys() == {"kl", "same_top"}
        assert quoted.keys() == QUOTED_KEYS and "unseen" not in record, "its recipe names no unseen text"
        assert (quoted["dataset"], quoted["seq_len"], quoted["tokens"], quoted["bos"]) == ("ant+bee", 16, 60, False)
        assert quoted["nats_per_token"] != record["nats_per_token"]
        assert quoted["nats_lost"] == pytest.approx(quoted["nats_per_token"] - parents["nats_per_token"])
        assert quoted["ppl_ratio"] == pytest.approx(math.exp(quoted["nats_lost"]))
        assert record["usable"] is True
        assert on["workload"]["generated_tokens"] == 4 and on["host"]["cpu"]
    assert measured["parent"]["hash"] == Architecture.of([(2, 32)] * 3).hash
    assert measured["parent"]["decode_speedup"] == {"median": 1.0, "low": 1.0, "high": 1.0}


def test_what_is_quoted_is_scored_on_the_test_split(finished_run: Finished) -> None:
    run = Run.open(finished_run.path)
    measured = strict_json(finished_run.path / "front.json")
    child = measured["children"][0]
    stock = stock_up(run)
    pruned = prune(stock.parent, Architecture.from_json(child["architecture"]), stock.library)
    found = score(pruned, stock.tokens["test"])
    assert child["test"]["nats_per_token"] == pytest.approx(found.nats_per_token, abs=1e-6)
    scorer = Judges(run, stock).scorer(stock.tokens["test"])
    for record in (measured["parent"], *measured["children"]):
        scorer.score(Architecture.from_json(record["architecture"]))
    assert scorer.scored_windows == 0, "it is stored, so that a front that was stopped does not score it again"


def test_no_figure_of_the_test_split_decides_the_front(finished_run: Finished, copied: Path) -> None:
    honest = Judge.quoted

    def lying(self: Judge, architecture: Architecture) -> Quoted:
        told = {"nats_lost": -float(architecture.hash[:4].encode()[0]), "ppl_ratio": 1e9}
        return honest(self, architecture).model_copy(update=told)

    before = strict_json(copied / "front.json")
    (copied / "front.json").unlink()
    with (
        patch.object(Judge, "quoted", lying),
        patch.object(judging, "measure_paired", paired_by_bytes),
    ):
        after = front(Run.open(copied))
    assert [child.id for child in after.children] == [child["id"] for child in before["children"]]
    assert all(child.quoted["test"].ppl_ratio == 1e9 and child.usable for child in after.children)


def test_an_unusable_child_is_marked_and_exported_by_force_alone(
    finished_run: Finished, copied: Path, judged: list[str], tmp_path: Path
) -> None:
    measured = strict_json(copied / "front.json")
    for child in measured["children"]:
        child["ppl_ratio"] = 20.5
    write_json(copied / "front.json", measured)
    shutil.rmtree(copied / "children")
    result = compress(Run.open(copied), tmp_path / "child")
    assert judged == [], "a mark is no measurement, and nothing unusable is written"
    assert result["exported"] is None and "unusable beyond front.usable_ppl_ratio=10;" in result["not_exported"]
    stored = strict_json(copied / "front.json")
    assert [child["usable"] for child in stored["children"]] == [False] * len(stored["children"])
    assert stored["parent"]["usable"] and "unusable" in rendered(front_table(Front.from_json(stored)))
    for pick in ("ppl_ratio<=1000", stored["children"][0]["id"]):
        with pytest.raises(ExportError, match=r"times its parent's perplexity.* --force"):
            export(Run.open(copied), parse_pick(pick), tmp_path / "child")
    assert not (tmp_path / "child").exists()
    recipe = changed(finished_run.recipe, "front.usable_ppl_ratio=21")
    assert all(child.usable for child in front(Run.start(copied, recipe)).children)
    front(Run.start(copied, finished_run.recipe))
    export(Run.open(copied), parse_pick("ppl_ratio<=1000"), tmp_path / "child", force=True)
    assert strict_json(tmp_path / "child" / "llmprune.json")["figures"]["usable"] is False


def test_unseen_text_is_quoted_and_decides_nothing(
    finished_run: Finished, judged: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (judging, block_tables, reach):
        monkeypatch.setattr(module, "measure_paired", paired_by_bytes)
    source = write_jsonl(tmp_path / "cat.jsonl", numbered_documents("cat"))
    data = finished_run.recipe.model_dump(mode="json")
    data["data"] |= {"unseen": [source.model_dump()], "unseen_seq_len": 32, "unseen_tokens": 128}
    recipe = parse_recipe(data, origin="with unseen text")
    run = Run.start(tmp_path / "run", recipe)
    search(run)
    measured = front(run)
    before = strict_json(finished_run.path / "front.json")
    assert [child.id for child in measured.children] == [child["id"] for child in before["children"]]
    for record in measured.every:
        unseen = record.quoted["unseen"]
        assert unseen.to_json().keys() == QUOTED_KEYS and set(unseen.per_source) == {"cat"}
        assert (unseen.dataset, unseen.seq_len, unseen.tokens) == ("cat", 32, 4 * 31)
        assert record.quoted["test"].dataset == "ant+bee"
    export(run, parse_pick("ppl_ratio<=1000"), tmp_path / "child")
    card = model_card(read_contents(tmp_path / "child"), "user/tiny", Licence("mit"))
    assert "Unseen: cat, 124 tokens scored, in windows of 32" in card and "cat.jsonl" in card
    result = baselines(run, recipe.baselines.model_copy(update={"methods": ("shortgpt",), "at": (1.2,)}))
    assert all(entry["unseen"]["nats_lost"] is not None for entry in result.results)
    assert "unseen (cat, 124 tokens in windows of 32" in " ".join(rendered(baselines_table(result)).split())


def rendered(table: Any) -> str:
    console = Console(width=PIPED_WIDTH, file=io.StringIO())
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_table_of_a_front_quotes_test_and_unseen_text(finished_run: Finished) -> None:
    measured = strict_json(finished_run.path / "front.json")
    for record in (measured["parent"], *measured["children"], *measured["baselines"]):
        record["unseen"] = {**record["test"], "dataset": "code", "seq_len": 1024, "nats_per_token": 7.125}
    text = rendered(front_table(Front.from_json(measured)))
    own = measured["children"][0]
    assert f"{own['test']['nats_per_token']:.3f} ({own['test']['nats_lost']:+.3f})" in text and "7.125 (" in text
    assert f"{own['nats_per_token']:.3f} " not in text and "…" not in text
    told = " ".join(text.split())
    assert "test (ant+bee, 60 tokens in windows of 16, no BOS); unseen (code, 60 tokens in windows of 1024" in told
    assert "Unusable" not in text


def test_a_run_directory_holds_what_the_design_says(finished_run: Finished) -> None:
    names = {path.name for path in finished_run.path.iterdir()}
    inputs = {"recipe.yaml", "provenance.json", "tokens.safetensors", "library", "tables.json", "seeds.json"}
    assert names == {*inputs, "reach.json", "study.journal", "front.json", "children", "scores", ".lock"}
    children = strict_json(finished_run.path / "front.json")["children"]
    assert {path.name for path in (finished_run.path / "children").iterdir()} == {child["id"] for child in children}
    assert len(finished_hashes(finished_run.path)) == finished_run.recipe.search.trials


def test_an_exported_checkpoint_says_what_it_is_and_not_where_it_was_made(finished_run: Finished) -> None:
    metadata = strict_json(finished_run.export / "llmprune.json")
    told = {"format", "id", "hash", "architecture", "proof", "files", "figures", "library", "parent", "provenance"}
    told |= {"recipe", "samples"}
    assert metadata.keys() == told
    measured = strict_json(finished_run.path / "front.json")
    assert metadata["parent"]["figures"] == measured["parent"] and metadata["parent"]["shape"]["ffn_width"] == 32
    assert Architecture.from_json(metadata["architecture"]).hash == metadata["hash"] == metadata["figures"]["hash"]
    assert metadata["id"] == metadata["figures"]["id"] and metadata["figures"]["schema"] == SCHEMA
    assert metadata["proof"]["params"] == metadata["figures"]["params"]
    assert metadata["provenance"]["parent"]["hash"] and metadata["provenance"]["versions"]["torch"]
    for path in finished_run.export.rglob("*.json"):
        assert str(finished_run.path.parent) not in path.read_text(encoding="utf-8"), path.name


def test_a_run_notes_what_licence_its_parent_states(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    (Path(recipe.model.path) / "README.md").write_text("---\nlicense: llama3.2\n---\n")
    run = Run.start(tmp_path / "run", recipe)
    lay_ground(run)
    noted = run.directory.read_provenance()["parent"]
    assert noted["licence"] == {"id": "llama3.2", "name": None, "link": None} and not noted["on_hub"]


def test_a_machine_path_in_the_recipe_does_not_travel(
    finished_run: Finished, judged: list[str], tmp_path: Path
) -> None:
    tokenizer, to = finished_run.recipe.model.path, tmp_path / "made-here" / "child"
    recipe = changed(finished_run.recipe, f"export.to={to}")
    run = Run.start(
        tmp_path / "another", changed(recipe, f"model.tokenizer={tokenizer}", "search.trials=2", "front.random_draws=0")
    )
    search(run)
    front(run)
    export(run, parse_pick("ppl_ratio<=1000"), to)
    text = (to / "llmprune.json").read_text()
    assert str(tmp_path) not in text and str(finished_run.path.parent) not in text


def test_a_second_compress_does_nothing_new(finished_run: Finished, copied: Path, judged: list[str]) -> None:
    shutil.copytree(finished_run.export, copied / "export")
    before = contents(copied)
    times = {name: (copied / name).stat().st_mtime_ns for name in before}
    result = compress(Run.start(copied, finished_run.recipe), copied / "export")
    assert judged == []
    assert contents(copied) == before
    rewritten = {name for name, then in times.items() if (copied / name).stat().st_mtime_ns != then}
    assert rewritten <= {"recipe.yaml", "provenance.json"}
    metadata = strict_json(finished_run.export / "llmprune.json")
    told = {"directory": str(copied / "export"), "id": metadata["id"], "hash": metadata["hash"]}
    assert result["exported"] == told


def test_raising_the_trials_goes_on(finished_run: Finished, copied: Path, judged: list[str]) -> None:
    before = finished_hashes(copied)
    run = Run.start(copied, changed(finished_run.recipe, "search.trials=7"))
    outcome = search(run)
    assert (outcome.finished_trials, outcome.new_trials, outcome.stopped_by) == (7, 2, "trials")
    assert finished_hashes(copied)[:5] == before
    assert [line.split()[0] for line in judged].count("judge") == 2
    old = (copied / "front.json").read_bytes()
    front(run)
    assert (copied / "front.json").read_bytes() != old, "new trials, new front"


@pytest.mark.parametrize(
    "override",
    ["data.seq_len=32", "workload.batch=2", "importance.method=flap", "space.drop=false", "model.dtype=bfloat16"],
)
def test_what_figures_depend_on_is_fixed(override: str, finished_run: Finished, copied: Path) -> None:
    before, key = contents(copied), override.partition("=")[0]
    with pytest.raises(RunDirectoryError, match=rf"was made with another {key}; .*use another --out"):
        Run.start(copied, changed(finished_run.recipe, override))
    assert contents(copied) == before


def test_a_parent_that_changed_is_refused(finished_run: Finished, copied: Path, tmp_path: Path) -> None:
    run = Run.open(copied)
    run.directory.note(parent={**run.directory.read_provenance()["parent"], "hash": "0" * 64})
    with pytest.raises(RunDirectoryError, match=r"is not the model this run was made with"):
        search(run)


def test_a_parent_may_move(finished_run: Finished, tmp_path: Path) -> None:
    moved = shutil.copytree(finished_run.recipe.model.path, tmp_path / "elsewhere")
    recipes = (finished_run.recipe, changed(finished_run.recipe, f"model.path={moved}"))
    assert len({load_parent(recipe.model).hash for recipe in recipes}) == 1


def test_a_directory_that_is_no_run_is_refused_and_left_as_it_was(finished_run: Finished, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with (
        pytest.raises(RunDirectoryError, match="exists and is not a run directory; use an empty or a new one"),
        RunDirectory(tmp_path).locked(),
    ):
        Run.start(tmp_path, finished_run.recipe)
    assert contents(tmp_path) == {"thesis.txt": b"years of work"}
    with pytest.raises(RunDirectoryError, match=r"is not a run directory \(no recipe.yaml\)"):
        Run.open(tmp_path)


def test_a_file_is_no_run_directory(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    locked = pytest.raises(RunDirectoryError, match=r"cannot use .*run as a run directory")
    with locked, RunDirectory(tmp_path / "run").locked():
        pass


def test_what_a_kill_leaves_of_the_first_moment_is_no_obstacle(finished_run: Finished, tmp_path: Path) -> None:
    for name in (".lock", ".recipe.yaml.0123abcd.tmp"):
        (tmp_path / name).touch()
    with RunDirectory(tmp_path).locked():
        assert Run.start(tmp_path, finished_run.recipe).recipe == finished_run.recipe


def test_a_run_is_held_by_one_process_at_a_time(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    refused = pytest.raises(RunDirectoryError, match="is in use by another llmprune process")
    with directory.locked(), refused, directory.locked():
        pass
    with directory.locked():
        pass


def search_again(run: Path) -> None:
    search(Run.open(run))


def front_again(run: Path) -> None:
    front(Run.open(run))


@pytest.mark.parametrize(
    ("name", "content", "stage"),
    [
        ("recipe.yaml", b"model: [", search_again),
        ("recipe.yaml", b"model: {}", search_again),
        ("recipe.yaml", b"", search_again),
        ("provenance.json", b"{", search_again),
        ("provenance.json", b"[]", search_again),
        ("provenance.json", b'{"stages": {}, "parent": 7}', search_again),
        ("tokens.safetensors", b"", search_again),
        ("tokens.safetensors", b"\x08" + b"\0" * 30, search_again),
        ("tables.json", b"{", search_again),
        ("tables.json", b"{}", search_again),
        ("tables.json", b"[1]", search_again),
        ("reach.json", b"[]", search_again),
        ("reach.json", b'{"decode": {}}', search_again),
        ("seeds.json", b"{", search_again),
        ("seeds.json", b"7", search_again),
        ("seeds.json", b"{}{}", search_again),
        ("seeds.json", b'[{"label": "path-1.2x"}]', search_again),
        ("seeds.json", b'[{"label": "path-1.2x", "architecture": {"layers": []}}]', search_again),
        ("study.journal", b"{}\n{}\n", search_again),
        ("front.json", b"\xff", front_again),
        ("front.json", b"[]", front_again),
        ("front.json", b'{"parent": {}}', front_again),
    ],
)
def test_a_damaged_file_is_named_in_one_error(
    name: str, content: bytes, stage: Callable[[Path], None], copied: Path
) -> None:
    (copied / name).write_bytes(content)
    with pytest.raises(RunDirectoryError) as caught:
        stage(copied)
    assert name in str(caught.value)
    assert (copied / name).read_bytes() == content, "damage is for a person to look at"


@pytest.mark.parametrize(
    "name", ["tokens.safetensors", "reach.json", "tables.json", "seeds.json", "provenance.json", "library"]
)
def test_a_missing_file_is_made_again(name: str, copied: Path) -> None:
    def hashes() -> tuple[str, str, str]:
        run = Run.open(copied)
        stock = stock_up(run)
        return stock.library.hash, stock.tokens["search"].hash, study_name(run, stock)

    before = hashes()
    path = copied / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert search(Run.open(copied)).new_trials == 0
    assert hashes() == before
    assert path.exists()


def test_a_damaged_layer_of_the_library_is_built_again(copied: Path) -> None:
    layer = next((copied / "library").iterdir())
    whole = layer.read_bytes()
    tensors = load(whole)
    layer.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert search(Run.open(copied)).new_trials == 0
    again = load(layer.read_bytes())
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)


def test_a_front_needs_trials(finished_run: Finished, copied: Path) -> None:
    (copied / "study.journal").unlink()
    with pytest.raises(RunDirectoryError, match=r"has no finished trial; run llmprune search first"):
        front(Run.open(copied))


def test_an_export_needs_a_front(copied: Path, tmp_path: Path) -> None:
    (copied / "front.json").unlink()
    with pytest.raises(RunDirectoryError, match=r"has no front yet; run llmprune front first"):
        export(Run.open(copied), parse_pick("ppl<=9"), tmp_path / "child")


def test_what_cannot_be_exported_is_said_before_anything_is_loaded(
    finished_run: Finished, copied: Path, judged: list[str], tmp_path: Path
) -> None:
    run = Run.open(copied)
    with pytest.raises(BudgetError, match=r"no child on the front holds 'decode_speedup>=99'; the nearest is"):
        export(run, parse_pick("decode_speedup>=99"), tmp_path / "child")
    before = contents(finished_run.export)
    with pytest.raises(ExportError, match="exists and is not empty; use --force"):
        export(run, parse_pick("ppl_ratio<=1000"), finished_run.export)
    assert contents(finished_run.export) == before
    assert not (tmp_path / "child").exists() and "parent" not in run.__dict__


def test_a_baseline_is_exported_by_its_name(copied: Path, judged: list[str], tmp_path: Path) -> None:
    baseline = strict_json(copied / "front.json")["baselines"][0]
    for name in ("id", "hash"):
        written = export(Run.open(copied), parse_pick(baseline[name]), tmp_path / name)
        assert written["id"] == baseline["id"] and written["directory"] == str(tmp_path / name)
        assert checkpoint_id(tmp_path / name) == baseline["id"]


def test_a_baseline_without_a_child_is_told_of(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = strict_json(copied / "front.json")
    searched = {child["hash"] for child in found["children"]}
    lacking = next(record["name"] for record in found["baselines"] if record["hash"] not in searched)

    def judged(self: Judge, architecture: Architecture, name: str, *, own: Any = Judge.judge) -> Record:
        record: Record = own(self, architecture, name)
        return record.model_copy(update={"nats_per_token": math.inf}) if name == lacking else record

    monkeypatch.setattr(Judge, "judge", judged)
    run, said = Run.open(copied), list[str]()
    run.say = said.append
    run.directory.front.unlink()
    assert lacking not in {record.name for record in front(run).baselines}
    (line,) = (line for line in said if "left out" in line)
    assert line.startswith(f"the baseline {lacking} is left out: the child ") and "no finite loss" in line


def test_children_that_are_there_are_not_written_again(copied: Path, judged: list[str]) -> None:
    run = Run.open(copied)
    paths = write_front(run)
    assert judged == [] and all(checkpoint_id(path) == path.name for path in paths)
    shutil.rmtree(paths[0])
    assert write_front(run) == paths
    assert judged == ["prove"] and checkpoint_id(paths[0]) == paths[0].name


def checkpoint_id(directory: Path) -> str:
    return str(strict_json(directory / "llmprune.json")["id"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("export.pick=fast", "a budget is METRIC>=NUMBER"),
        ("search.budgets=['speed>=2']", "unknown metric 'speed'"),
    ],
)
def test_limits_are_read_before_a_run_begins(
    override: str, message: str, finished_run: Finished, tmp_path: Path
) -> None:
    with pytest.raises(BudgetError, match=message):
        Run.start(tmp_path / "run", changed(finished_run.recipe, override))
    assert not (tmp_path / "run").exists()


@contextmanager
def searching(run: Path) -> Iterator[subprocess.Popen[str]]:
    """`llmprune search` in a process of its own, with more trials than anyone waits for."""
    with subprocess.Popen(
        [sys.executable, "-c", SEARCH, "search", str(run), "search.trials=500"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_trials(run: Path, more: int, process: subprocess.Popen[str]) -> None:
    journal = run / "study.journal"
    wanted = journal.read_bytes().count(b'"record"') + more
    deadline = time.monotonic() + 60
    while journal.read_bytes().count(b'"record"') < wanted:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "the search does not get on"
        time.sleep(0.02)


def test_interrupts_and_kills_cost_the_trial_in_flight_and_nothing_else(copied: Path) -> None:
    hashes = finished_hashes(copied)

    with searching(copied) as process:
        wait_for_trials(copied, 3, process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == "" and "Traceback" not in err
    assert err.splitlines()[-1] == "interrupted; the same command continues where this one stopped"
    interrupted = finished_hashes(copied)
    assert interrupted[: len(hashes)] == hashes and len(interrupted) >= len(hashes) + 2

    with searching(copied) as process:
        wait_for_trials(copied, 2, process)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
    killed = finished_hashes(copied)
    assert killed[: len(interrupted)] == interrupted and len(killed) >= len(interrupted) + 1

    with (copied / "study.journal").open("ab") as file:
        file.write(b'{"op_code":6,"worker_id":"torn')
    run = Run.start(copied, changed(Run.open(copied).recipe, f"search.trials={len(killed) + 2}"))
    outcome = search(run)
    assert (outcome.finished_trials, outcome.new_trials) == (len(killed) + 2, 2)
    resumed = finished_hashes(copied)
    assert resumed[: len(killed)] == killed and len(set(resumed)) == len(resumed) == len(killed) + 2


def test_all_errors_of_a_user_are_of_one_family() -> None:
    assert issubclass(LlmpruneError, ValueError)
