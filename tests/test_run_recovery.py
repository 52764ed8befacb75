"""A run's children are repaired before they are measured, exported as they were measured, and never repaired twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import Finished, Llmprune
from test_run import judged
from tiny import paired_by_bytes
from transformers import AutoModelForCausalLM

from llmprune.cli.front_tables import front_table
from llmprune.core.budgets import parse_pick
from llmprune.core.errors import ExportError, RecipeError, RunDirectoryError
from llmprune.measure.quality.perplexity import score
from llmprune.measure.record import child_id
from llmprune.pipeline import recovery
from llmprune.pipeline.commands import compress, export, front
from llmprune.pipeline.prepare import stock_up
from llmprune.pipeline.run import Run
from llmprune.pipeline.run_directory import read_front
from llmprune.recover.repair import Repair
from llmprune.search import judging

__all__ = ["judged"]


@pytest.fixture(scope="module")
def repaired_run(finished_run: Finished, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The finished run with its front made anew, repaired; and text to recover on."""
    root = tmp_path_factory.mktemp("repaired")
    path = Path(shutil.copytree(finished_run.path, root / "run"))
    shutil.rmtree(path / "children")
    recipe = finished_run.recipe
    changes: dict[str, Any] = {
        "recover": recipe.recover.model_copy(update={"refit": True}),
        "data": recipe.data.model_copy(update={"recovery_tokens": 1024}),
    }
    run = Run.start(path, recipe.model_copy(update=changes))
    with patch.object(judging, "measure_paired", paired_by_bytes):
        front(run)
        export(run, parse_pick(recipe.export.pick), root / "child", force=True)
    return Finished(run.recipe, path, root / "child")


@pytest.fixture
def own(repaired_run: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the repaired run, to change."""
    monkeypatch.setattr(judging, "measure_paired", paired_by_bytes)
    return Path(shutil.copytree(repaired_run.path, tmp_path / "run"))


def test_children_are_repaired_and_their_one_shot_forms_stay_beside_them(repaired_run: Finished) -> None:
    run = Run.open(repaired_run.path)
    measured, library = read_front(run.directory), stock_up(run).library
    repaired = [record for record in (*measured.children, *measured.baselines) if record.done]
    assert repaired, "the refit helps a model that has learnt something"
    assert len(measured.one_shot) == len(repaired)
    for record in repaired:
        before = measured.before_repair(record)
        assert before is not None and before.hash == record.hash and not before.done
        assert (before.id, record.id) == (
            child_id(record.hash, library.hash),
            child_id(record.hash, library.hash, record.done),
        )
        assert record.decode_speedup == before.decode_speedup and record.params == before.params
        assert record.test is not None and before.test is not None
        repair = Repair.read(run.directory.repair_of(before.id, recovery.REFIT))
        assert repair is not None and (repair.name,) == record.done
        assert repair.facts["nats_after"] < repair.facts["nats_before"]
    for record in (*measured.children, *measured.baselines):
        assert record.done or measured.before_repair(record) is None
    shown = [str(cell) for column in front_table(measured).columns for cell in column.cells]
    assert any(repaired[0].done[0] in cell for cell in shown)


def test_an_exported_child_is_the_repaired_one(repaired_run: Finished) -> None:
    run = Run.open(repaired_run.path)
    facts = json.loads((repaired_run.export / "llmprune.json").read_text())
    records = {record.id: record for record in read_front(run.directory).children}
    record = records[facts["id"]]
    assert facts["figures"]["done"] == list(record.done) and record.done
    model = AutoModelForCausalLM.from_pretrained(repaired_run.export, trust_remote_code=True)
    assert record.test is not None
    found = score(model.eval(), stock_up(run).tokens["test"]).nats_per_token
    assert found == pytest.approx(record.test.nats_per_token, rel=1e-5)


def test_the_one_shot_form_is_exported_too(repaired_run: Finished, own: Path, tmp_path: Path) -> None:
    run = Run.open(own)
    before = read_front(run.directory).one_shot[0]
    export(run, parse_pick(before.id), tmp_path / "child", force=True)
    repaired = Run.open(repaired_run.path).directory.repair_of(before.id, recovery.REFIT)
    repair = Repair.read(repaired)
    assert repair is not None
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "child", trust_remote_code=True)
    own = model.state_dict()
    assert any(not torch.equal(own[name], value) for name, value in repair.tensors.items())


def test_a_repair_is_made_once(own: Path, judged: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.open(own)
    before = read_front(run.directory)
    run.directory.front.unlink()
    monkeypatch.setattr(recovery, "refit_sequentially", _never)
    assert front(run) == before


def _never(*arguments: Any, **others: Any) -> Any:
    raise AssertionError("it is there already")


def test_without_refit_children_are_one_shot(
    repaired_run: Finished, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "measure_paired", paired_by_bytes)
    monkeypatch.setattr(recovery, "refit_sequentially", _never)
    recipe = repaired_run.recipe
    plain = recipe.model_copy(update={"recover": recipe.recover.model_copy(update={"refit": False})})
    measured = front(Run.start(own, plain))
    assert not measured.one_shot and not any(record.done for record in measured.every)


def test_a_repair_that_does_not_help_is_left_out(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the refit makes a child worse on held-out tokens, it is said, and the child stays as it was."""
    monkeypatch.setattr(judging, "measure_paired", paired_by_bytes)
    shutil.rmtree(own / "repairs")
    solve = recovery.refit_sequentially

    def worse(*arguments: Any, **others: Any) -> Any:
        found = solve(*arguments, **others)
        return type(found)({name: value + 1.0 for name, value in found.tensors.items()}, found.blocks)

    monkeypatch.setattr(recovery, "refit_sequentially", worse)
    run = Run.open(own)
    said: list[str] = []
    run.say = said.append
    run.directory.front.unlink()
    measured = front(run)
    assert not measured.one_shot and not any(record.done for record in measured.every)
    assert any("is left out" in line for line in said)


def test_a_lost_or_damaged_repair_is_an_error_with_its_file(own: Path, tmp_path: Path) -> None:
    run = Run.open(own)
    record = next(record for record in read_front(run.directory).children if record.done)
    (path,) = [file for file in (own / "repairs").iterdir() if Repair.read(file).name in record.done]  # type: ignore[union-attr]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RunDirectoryError, match=f"{path.name} is damaged"):
        export(run, parse_pick(record.id), tmp_path / "child", force=True)
    path.unlink()
    with pytest.raises(ExportError, match=f"{path.name} does not hold the repair {record.done[0]}"):
        export(run, parse_pick(record.id), tmp_path / "child", force=True)


def test_recovery_puts_what_it_makes_in_the_childs_place(
    copied: Path, llmprune: Llmprune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = copied
    monkeypatch.setattr(judging, "measure_paired", paired_by_bytes)
    before = read_front(Run.open(own).directory)
    # The fastest child has most to win back.
    asked = ["recover", own, "--pick", "decode_speedup>=1.25", "recover.tokens=4800", "recover.learning_rate=0.001"]
    asked += ["data.recovery_tokens=1024", "--json"]
    result = llmprune(*asked)
    assert result.code == 0, result.err
    after = read_front(Run.open(own).directory)
    assert result.json == after.stored()
    changed = [record for record in after.children if record.id not in {one.id for one in before.children}]
    assert len(changed) == 1, result.err
    assert len(after.children) == len(before.children)
    (record,) = changed
    assert [name.rpartition("-")[0] for name in record.done][-1] == "distil" and record.usable
    base = next(one for one in before.children if one.hash == record.hash)
    assert record.nats_per_token < base.nats_per_token and record.decode_speedup == base.decode_speedup
    assert record.test is not None and base.test is not None and record.test != base.test
    assert after.before_repair(record) is not None and not after.before_repair(record).done  # type: ignore[union-attr]
    written = export(Run.open(own), parse_pick(record.id), tmp_path / "child", force=True)
    assert written["id"] == record.id
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "child", trust_remote_code=True)
    found = score(model.eval(), stock_up(Run.open(own)).tokens["test"]).nats_per_token
    assert found == pytest.approx(record.test.nats_per_token, rel=1e-5)
    course = Repair.read(Run.open(own).directory.repair_of(base.id, recovery.DISTIL))
    assert course is not None and len(course.facts["course"]["losses"]) > 0
    assert not list((own / "repairs").glob("*-state*")), "a training that is done leaves no state"
    again = llmprune(*asked)
    assert again.code == 0 and again.json == result.json, "what is recovered already is not recovered again"


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ([], "recovery needs recover.minutes or recover.tokens"),
        (["recover.tokens=480", "recover.minutes=1.0"], "give one of minutes and tokens"),
        (["recover.tokens=480", "data.recovery_tokens=0"], "recovery needs text of its own"),
        (["--pick", "0123456789abcdef", "recover.tokens=480"], "no child has id or hash 0123456789abcdef"),
    ],
)
def test_recovery_refuses_what_it_cannot_do(own: Path, llmprune: Llmprune, asked: list[str], told: str) -> None:
    before = (own / "front.json").read_bytes()
    result = llmprune("recover", own, *asked)
    assert result.code == 2 and told in " ".join(result.err.split()) and (own / "front.json").read_bytes() == before


def test_a_recovery_without_text_is_refused_before_the_search(repaired_run: Finished, tmp_path: Path) -> None:
    recipe = repaired_run.recipe
    changes: dict[str, Any] = {
        "recover": recipe.recover.model_copy(update={"tokens": 480}),
        "data": recipe.data.model_copy(update={"recovery_tokens": 0}),
    }
    run = Run.start(tmp_path / "run", recipe.model_copy(update=changes))
    with pytest.raises(RecipeError, match=r"recovery needs text of its own; for example data\.recovery_tokens=262144"):
        compress(run, tmp_path / "child")
    assert not run.directory.library.exists()
