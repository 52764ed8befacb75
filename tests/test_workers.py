"""Workers as the user starts them: who may join, who is refused and why, and what kills cost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Llmprune
from optuna.exceptions import StorageInternalError
from test_cli import assert_one_error
from tiny import contents

from llmprune.core.errors import RunDirectoryError, StorageError
from llmprune.core.recipe_inputs import SplitName
from llmprune.data.store import load_token_splits, save_token_splits
from llmprune.measure.speed.host import fingerprint
from llmprune.models.parent import Parent
from llmprune.pipeline import commands, prepare, searching
from llmprune.pipeline.commands import search, worker
from llmprune.pipeline.judges import Judges
from llmprune.pipeline.prepare import stock_up
from llmprune.pipeline.run import Run
from llmprune.pipeline.run_directory import RunDirectory
from llmprune.search.workers.storage import masked, open_storage, opened_storage

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
SECRET = "geheim7"


def elsewhere() -> dict[str, str | int]:
    return {**fingerprint(), "cpu": "another", "ram_gib": 3}


def test_a_worker_joins_and_writes_nothing(copied: Path) -> None:
    before = contents(copied)
    outcome = worker(Run.join(copied))
    assert (outcome.new_trials, outcome.stopped_by) == (0, "trials")
    assert contents(copied) == before


def test_a_worker_proposes_from_the_tables_of_the_search_and_makes_none(copied: Path) -> None:
    # As on another of several like GPUs: the tables' key is not the one that it would give them.
    directory = RunDirectory(copied)
    directory.mark_done("tables", "0" * 64)
    before = contents(copied)
    assert worker(Run.join(copied)).finished_trials == 5
    assert contents(copied) == before
    directory.tables.unlink()
    with pytest.raises(RunDirectoryError, match=r"a worker needs .*tables\.json; copy it from the run directory of"):
        worker(Run.join(copied))
    assert not directory.tables.exists()


def test_a_worker_of_one_of_optuna_s_samplers_needs_no_tables(copied: Path) -> None:
    run = Run.join(copied)
    run.directory.tables.unlink()
    rules = run.recipe.search.model_copy(update={"sampler": "random"})
    run.recipe = run.recipe.model_copy(update={"search": rules})
    assert worker(run).finished_trials == 5


def test_a_worker_does_not_wait_for_the_lock_of_search(copied: Path) -> None:
    with RunDirectory(copied).locked():
        assert worker(Run.join(copied)).finished_trials == 5


def test_a_run_without_a_study_is_no_workers(copied: Path, postgres_url: str) -> None:
    with pytest.raises(StorageError, match=r"holds none of this run; start it with llmprune search .* --storage postg"):
        worker(Run.join(copied, storage=postgres_url))
    (copied / "study.journal").unlink()
    with pytest.raises(StorageError, match=r"study\.journal of .* holds none of this run; start it with llmprune sea"):
        worker(Run.join(copied))
    assert not (copied / "study.journal").exists()


@pytest.mark.parametrize("name", ["calibration", "search"])
def test_other_tokens_are_refused(name: SplitName, copied: Path) -> None:
    path = copied / "tokens.safetensors"
    saved = load_token_splits(path)
    split = saved[name]
    source, tokens = next(iter(split.sources.items()))
    changed = replace(split, sources={**split.sources, source: replace(tokens, windows=tokens.windows.flip(0))})
    save_token_splits(replace(saved, splits={**saved.splits, name: changed}), path)
    with pytest.raises(StorageError, match=rf"the {name} tokens of a worker must be the study's.*copy tokens\.safe"):
        worker(Run.join(copied))


def test_another_parent_is_refused(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Parent, "hash", property(lambda self: "0" * 64))
    with pytest.raises(StorageError, match=r"the parent of a worker must be the study's, got 0{12} for .*model\.path"):
        worker(Run.join(copied))


def test_another_library_is_refused(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = stock_up(Run.join(copied)).library
    monkeypatch.setattr(type(library), "hash", property(lambda self: "1" * 64))
    with pytest.raises(StorageError, match=r"the library of a worker must be the study's, got 1{12} .*copy library/"):
        worker(Run.join(copied))


def test_other_hardware_is_refused_and_told_of(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (commands, prepare, searching):
        monkeypatch.setattr(module, "fingerprint", elsewhere)
    told: list[str] = []
    message = r"was measured on other hardware \(cpu '.*' there, 'another' here; ram_gib \d+ there, 3 here\)"
    with pytest.raises(StorageError, match=message):
        worker(Run.join(copied))
    # `search` starts a study of its own, and says what it does not look at.
    run = Run.open(copied)
    run.say = told.append
    storage = open_storage(None, run.directory.journal)
    prepared = prepare.prepare(run)
    searching.start_study(run, storage, prepared, Judges(run, prepared))
    assert told == ["study.journal also holds 5 trials of this run from other hardware; they are not compared"]
    assert len(storage.get_all_studies()) == 2


def test_search_and_worker_share_a_database(copied: Path, postgres_url: str) -> None:
    run = Run.open(copied)
    run.storage = postgres_url
    first = search(run)
    assert first.finished_trials == 5
    joined = worker(Run.join(copied, storage=postgres_url))
    assert (joined.finished_trials, joined.new_trials) == (5, 0)
    text = b"".join(contents(copied).values())
    password = postgres_url.split(":")[2].split("@")[0].encode()
    assert b"llmprune:***@" in text and password not in text


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ("sqlite:///trials.db", "--storage is postgresql://USER@HOST:PORT/DATABASE or grpc://HOST:PORT, got sqlite"),
        (f"mysql://me:{SECRET}@host/db", "got mysql://me:***@host/db"),
        (f"postgresql://me:{SECRET}@127.0.0.1:1/db", "cannot use the database postgresql://me:***@127.0.0.1:1/db"),
        (f"postgresql://me:{SECRET}@host", "needs a host and a database"),
        (f"postgresql://me@host/db?password={SECRET}", "takes no password behind a ?"),
        (f"me:{SECRET}@host", "got me:***"),
        (f"grpc://me:{SECRET}@host:1", "a proxy's address is grpc://HOST:PORT"),
        ("grpc://host:port", "a proxy's address is grpc://HOST:PORT"),
    ],
)
@pytest.mark.parametrize("command", ["search", "worker", "front"])
def test_a_storage_that_cannot_be_used_is_one_line_without_a_password(
    command: str,
    storage: str,
    message: str,
    copied: Path,
    llmprune: Llmprune,
) -> None:
    result = llmprune(command, copied, "--storage", storage, "--quiet")
    assert_one_error(result, message)
    assert SECRET not in result.err
    assert SECRET.encode() not in b"".join(contents(copied).values())


def test_a_proxy_stands_before_a_database(llmprune: Llmprune) -> None:
    assert_one_error(llmprune("storage-proxy", "--storage", "grpc://host:1"), "a proxy stands before a database")
    assert_one_error(llmprune("storage-proxy"), "a proxy stands before a database")


def test_nobody_loses_a_trial_when_workers_are_killed(postgres_url: str) -> None:
    result = killed("--storage", postgres_url, "--trials", "24", "--every", "1.5", "--kills", "4")
    assert result["kills"] >= 1


def test_nor_on_a_journal(tmp_path: Path) -> None:
    killed("--storage", "journal", "--trials", "12", "--every", "1", "--kills", "3")


def killed(*arguments: str) -> dict[str, Any]:
    ended = subprocess.run(
        [sys.executable, str(SCRIPTS / "kill_workers.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env=dict(os.environ),
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    result: dict[str, Any] = json.loads(ended.stdout)
    assert result["trials"] == result["wanted"]
    assert not any(result[figure] for figure in ("lost", "evaluated_twice", "overshoot", "left_running"))
    return result


def test_a_storage_that_goes_away_is_one_error(tmp_path: Path) -> None:
    url = f"postgresql://me:{SECRET}@host/db"
    journal = tmp_path / "study.journal"
    message = r"went away \(no route\); finished trials are safe"
    with pytest.raises(StorageError, match=message), opened_storage(None, journal):
        raise StorageInternalError("no route")
    assert SECRET not in masked(url)
