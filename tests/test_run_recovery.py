"""A run's children are repaired before they are measured, exported as they were measured, and never repaired twice."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
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
from llmprune.core.budgets import holding, parse_pick, pick_record
from llmprune.core.errors import ExportError, RecipeError, RunDirectoryError
from llmprune.core.recipe_recover import RecoverRecipe
from llmprune.measure.quality.perplexity import score
from llmprune.measure.record import child_id
from llmprune.models import fresh_process
from llmprune.pipeline import recovery
from llmprune.pipeline.commands import compress, export, front
from llmprune.pipeline.prepare import stock_up
from llmprune.pipeline.run import Run
from llmprune.pipeline.run_directory import read_front
from llmprune.recover.repair import DISTIL, REFIT, Repair
from llmprune.recover.team import Team
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
        repair = Repair.read(run.directory.repair_of(before.id, REFIT))
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
    repaired = Run.open(repaired_run.path).directory.repair_of(before.id, REFIT)
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
        noise = torch.Generator().manual_seed(0)
        spoilt = {name: 10 * torch.randn(value.shape, generator=noise) for name, value in found.tensors.items()}
        return type(found)(spoilt, found.blocks)

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
    course = Repair.read(Run.open(own).directory.repair_of(base.id, DISTIL))
    assert course is not None and len(course.facts["course"]["losses"]) > 0
    assert not list((own / "repairs").glob("*-state*")), "a training that is done leaves no state"
    again = llmprune(*asked)
    assert again.code == 0 and again.json == result.json, "what is recovered already is not recovered again"
    named = llmprune("recover", own, "--pick", base.id, *asked[asked.index("--pick") + 2 :])
    assert named.code == 0 and named.json == result.json, "by the id that it had"
    cut = own / "cut"
    export(Run.open(own), parse_pick(base.id), cut, force=True)
    by_place = llmprune("recover", cut, *asked[asked.index("--pick") + 2 :])
    assert by_place.code == 0 and by_place.json == result.json, "a checkpoint in the run stands for its child"
    alone = Path(shutil.copytree(cut, tmp_path / "alone"))
    refused = llmprune("recover", alone, "recover.tokens=480")
    assert refused.code == 2 and "alone lies in no run directory" in " ".join(refused.err.split())


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ([], "recovery needs recover.minutes or recover.tokens"),
        (
            ["recover.tokens=480", "recover.minutes=1.0"],
            "give one of minutes and tokens; got minutes=1, tokens=480. `llmprune schema`",
        ),
        (["recover.tokens=480", "--baselines", "--pick", "decode_speedup>=9"], "no child"),
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


def test_baselines_are_recovered_on_as_many_tokens(
    copied: Path, llmprune: Llmprune, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "measure_paired", paired_by_bytes)
    directory = Run.open(copied).directory
    before = read_front(directory)
    asked = ["recover", copied, "--pick", "decode_speedup>=1.25", "--minutes", "0.02", "--baselines"]
    result = llmprune(*asked, "recover.learning_rate=0.001", "data.recovery_tokens=1024", "--json")
    assert result.code == 0, result.err
    after, tokens = read_front(directory), set()
    assert after.baselines != before.baselines
    for record, base in zip(after.baselines, before.baselines, strict=True):
        assert record.hash == base.hash and record.library == base.library
        repair = Repair.read(directory.repair_of(base.id, DISTIL))
        if repair is None:
            assert record == base
            continue
        tokens.add(repair.facts["settings"]["tokens"])
        assert (record.nats_per_token < base.nats_per_token) == (record.done == (repair.name,))
        assert (after.before_repair(record) is not None) == bool(record.done)
    (child,) = [one for one in after.children if one.done]
    assert len(tokens) == 1 and f"{tokens.pop():,}" in result.err
    assert child.done


TEAM = """
import os, sys
from llmprune.cli.main import main

other = os.fork()
os.environ["RANK"] = os.environ["LOCAL_RANK"] = "0" if other else "1"
sys.argv[0] = "llmprune"
try:
    main()
finally:
    if other:
        assert os.waitpid(other, 0)[1] == 0, "the other process failed"
"""


def by_torchrun(arguments: Sequence[str], scratch: Path) -> subprocess.CompletedProcess[str]:
    """Two processes, started as a user starts them."""
    launch = ["--standalone", "--nproc_per_node", "2", "-m", "llmprune"]
    command = [sys.executable, "-m", "torch.distributed.run", *launch, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def by_forks(arguments: Sequence[str], scratch: Path) -> subprocess.CompletedProcess[str]:
    """Two processes that are told what torchrun tells, forked as proofs are."""
    (scratch / "team.py").write_text(TEAM)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    sizes = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "HF_MODULES_CACHE": str(scratch / "modules")}
    return fresh_process.run_script(str(scratch / "team.py"), arguments, {**os.environ, **place, **sizes})


@pytest.mark.parametrize(
    ("launched_by", "further"),
    [(by_torchrun, []), (by_forks, ["recover.shard=true"])],
    ids=["whole", "spread"],
)
def test_processes_that_train_together_give_what_one_gives(
    launched_by: Callable[[Sequence[str], Path], subprocess.CompletedProcess[str]],
    further: list[str],
    copied: Path,
    tmp_path: Path,
    llmprune: Llmprune,
) -> None:
    """Only sums in another order tell the two trainings apart."""
    alone = Path(shutil.copytree(copied, tmp_path / "alone"))
    asked = ["--pick", "decode_speedup>=1.25", "--json", "recover.tokens=960", "recover.learning_rate=0.001"]
    asked += ["data.recovery_tokens=1024", "recover.precision=float32"]
    expected = llmprune("recover", alone, *asked)
    assert expected.code == 0, expected.err
    launched = launched_by(["recover", str(copied), *asked, *further], tmp_path)
    assert launched.returncode == 0, launched.stderr
    # `accelerate launch --cpu` starts a single process, whatever number it is given.
    assert "by 2 processes" in launched.stderr and "processes" not in expected.err
    courses = []
    for path, told in ((alone, expected.json), (copied, json.loads(launched.stdout))):
        directory = Run.open(path).directory
        assert told == read_front(directory).stored()
        (record,) = [one for one in read_front(directory).children if one.done]
        base = read_front(directory).before_repair(record)
        assert base is not None
        repair = Repair.read(directory.repair_of(base.id, DISTIL))
        assert repair is not None
        courses.append(repair.facts["course"])
    one, several = courses
    assert len(one["losses"]) == len(several["losses"]) > 2
    assert several["losses"] == pytest.approx(one["losses"], rel=1e-3)
    assert several["checks"][-1][1] == pytest.approx(one["checks"][-1][1], rel=1e-3)


def test_a_step_has_to_be_shared_evenly(copied: Path, llmprune: Llmprune, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Team, "of_launch", classmethod(lambda cls, device: cls(size=3, device="cpu")))
    monkeypatch.setattr(Team, "__exit__", lambda *_: None)
    result = llmprune("recover", copied, "recover.tokens=480", "data.recovery_tokens=1024")
    told = " ".join(result.err.split())
    assert result.code == 2 and "recover.windows_a_step=2 cannot be shared by 3 processes; give a multiple of 3" in told


def test_a_child_is_spread_over_several_processes_alone(copied: Path, llmprune: Llmprune) -> None:
    result = llmprune("recover", copied, "recover.tokens=480", "data.recovery_tokens=1024", "recover.shard=true")
    assert result.code == 2 and "recover.shard spreads a child over several processes, and this is one" in result.err
    result = llmprune("recover", copied, "recover.tokens=480", "recover.shard=true", "recover.lora_rank=4")
    assert result.code == 2 and "shard spreads whole weights, not adapters; got lora_rank=4" in result.err


def test_the_best_of_some_children_goes_on(copied: Path, llmprune: Llmprune, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "measure_paired", paired_by_bytes)
    directory = Run.open(copied).directory
    before = read_front(directory)
    pick = parse_pick("decode_speedup>=1.0001")
    assert len(holding(before.children, pick)) >= 2, "there is something to choose"
    asked = ["recover", copied, "--pick", pick.text, "recover.candidates=2", "recover.tokens=8000", "--json"]
    asked += ["recover.learning_rate=0.0003", "data.recovery_tokens=1024", "recover.stored_logits=16"]
    result = llmprune(*asked)
    assert result.code == 0, result.err
    after = read_front(directory)
    cut = {one.id for one in before.children}
    trained = {path.name.partition("-")[0] for path in (copied / "repairs").glob("*-distil.safetensors")}
    assert len(trained & cut) == 2, "two were tried"
    assert [bool(one.done) for one in after.children].count(True) == 2, "and became better by it"
    best = pick_record(after.children, pick)
    # What it has become since is left out if it is no better by then.
    # And one that trying made no better goes on from what it was when cut, under that id.
    assert best.done and (trained - cut <= {best.id} or len(best.done) == 2)
    assert not directory.teacher.exists(), "nobody learns any more"
    assert "tried" in result.err and "goes on" in result.err
    again = llmprune(*asked)
    assert again.code == 0 and again.json == result.json, "what was tried is not tried again"


def test_parts_of_a_length() -> None:
    rules = RecoverRecipe(tokens=1000)
    assert (rules.part(0.3).tokens, rules.part(0.3).minutes) == (300, None)
    assert RecoverRecipe(minutes=10.0).part(0.25).minutes == 2.5
