"""The journal after a kill: at most the trial in flight is lost, and damage is never papered over."""

from __future__ import annotations

import fcntl
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import optuna
import pytest

from llmprune.core.errors import RunDirectoryError
from llmprune.search.workers.journal import _KernelLock, cut_torn_line, open_journal

FINISHED = 3


def open_study(path: Path) -> optuna.Study:
    return optuna.load_study(study_name="s", storage=open_journal(path), sampler=optuna.samplers.RandomSampler(seed=0))


def judge_one(study: optuna.Study) -> None:
    trial = study.ask()
    trial.set_user_attr("é", trial.suggest_int("x", 0, 9))
    study.tell(trial, 1.0)


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    path = tmp_path / "study.journal"
    optuna.create_study(study_name="s", storage=open_journal(path))
    study = open_study(path)
    for _ in range(FINISHED):
        judge_one(study)
    return path


def states(path: Path) -> list[str]:
    return [trial.state.name for trial in open_study(path).get_trials(deepcopy=False)]


def test_every_cut_through_the_last_line_costs_that_line_only(journal: Path) -> None:
    whole = journal.read_bytes()
    start = whole.rstrip(b"\n").rfind(b"\n") + 1
    assert len(whole) - start > 40
    for end in range(start, len(whole)):
        journal.write_bytes(whole[:end])
        assert states(journal) == ["COMPLETE"] * (FINISHED - 1) + ["RUNNING"]
        assert journal.read_bytes() == whole[:start]


@pytest.mark.parametrize("left", [1, 30])
def test_a_journal_that_was_cut_goes_on(journal: Path, left: int) -> None:
    with journal.open("ab") as file:
        file.write(b'{"op_code":4,"worker_id":"x","study_id":0,"datetime_start"'[:left])
    for _ in range(2):
        judge_one(open_study(journal))
    assert states(journal) == ["COMPLETE"] * (FINISHED + 2)


def test_a_last_line_that_is_whole_and_not_json_is_cut(journal: Path) -> None:
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code": 6, \n')
    assert cut_torn_line(journal) == 16
    assert journal.read_bytes() == whole


def test_a_whole_journal_is_left_alone(journal: Path) -> None:
    whole = journal.read_bytes()
    assert cut_torn_line(journal) == 0
    assert states(journal) == ["COMPLETE"] * FINISHED
    assert journal.read_bytes() == whole


@pytest.mark.parametrize("content", [b"", b'{"op_co'])
def test_a_journal_that_never_began_begins(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "study.journal"
    path.write_bytes(content)
    optuna.create_study(study_name="s", storage=open_journal(path))
    assert states(path) == []


@pytest.mark.parametrize("line", range(4))
@pytest.mark.parametrize("damage", [b"\x00\xff", b"\n", b"{}}", b"[1]", b"{}"])
def test_damage_before_the_end_is_refused_and_nothing_is_lost(journal: Path, line: int, damage: bytes) -> None:
    lines = journal.read_bytes().splitlines()
    lines[line] = damage.rstrip(b"\n")
    damaged = b"\n".join(lines) + b"\n"
    journal.write_bytes(damaged)
    with pytest.raises(RunDirectoryError, match=rf"study\.journal is damaged at line {line + 1}, before its end"):
        open_study(journal)
    assert journal.read_bytes() == damaged


def test_a_lock_that_a_killed_process_left_is_no_obstacle(journal: Path) -> None:
    journal.with_name(journal.name + ".lock").symlink_to(journal)
    judge_one(open_study(journal))
    assert states(journal) == ["COMPLETE"] * (FINISHED + 1)


def test_writers_wait_for_each_other(journal: Path) -> None:
    study = open_study(journal)
    with journal.open("rb") as file, ThreadPoolExecutor(1) as pool:
        fcntl.flock(file, fcntl.LOCK_EX)
        writing = pool.submit(judge_one, study)
        with pytest.raises(TimeoutError):
            writing.result(timeout=0.2)
        fcntl.flock(file, fcntl.LOCK_UN)
        writing.result(timeout=10)
    assert states(journal) == ["COMPLETE"] * (FINISHED + 1)


@pytest.mark.parametrize("method", ["open", "close"])
def test_ctrl_c_stays_ctrl_c_wherever_it_comes(method: str, journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, lock = open_study(journal), getattr(os, method)

    def interrupted(*args: Any) -> None:
        lock(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, method, interrupted)
        judge_one(study)
    judge_one(open_study(journal))


def test_a_journal_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "study.journal").mkdir()
    with pytest.raises(RunDirectoryError, match=r"cannot open the study .*study\.journal: Is a directory"):
        open_journal(tmp_path / "study.journal")


def test_what_a_killed_writer_leaves_is_cut_before_another_writes(journal: Path) -> None:
    # Both have the journal open when a third is killed in the middle of a line.
    first, second = open_study(journal), open_study(journal)
    with journal.open("ab") as file:
        file.write(b'{"op_code":4,"worker_id":"x"' + b"," * 10_000)
    judge_one(first)
    judge_one(second)
    assert states(journal) == ["COMPLETE"] * (FINISHED + 2)
    assert [trial.state.name for trial in first.get_trials()] == ["COMPLETE"] * (FINISHED + 2)


def test_opening_waits_for_who_writes(journal: Path) -> None:
    # Half a line of a process that is alive is no torn line.
    with journal.open("ab") as file, ThreadPoolExecutor(1) as pool:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(b'{"op_code":5,')
        file.flush()
        opening = pool.submit(open_journal, journal)
        with pytest.raises(TimeoutError):
            opening.result(timeout=0.2)
        file.write(b'"worker_id":"x","trial_id":99}\n')
        file.flush()
        whole = journal.read_bytes()
        fcntl.flock(file, fcntl.LOCK_UN)
        opening.result(timeout=10)
    assert journal.read_bytes() == whole


def test_a_lock_that_an_interrupt_left_held_does_not_stop_its_own_process(tmp_path: Path) -> None:
    lock = _KernelLock(str(tmp_path / "study.journal"))
    lock.acquire()  # and Ctrl-C before anything could release it
    with ThreadPoolExecutor(1) as pool:
        try:
            assert pool.submit(lock.acquire).result(timeout=5)
        finally:
            lock.release()
    other = _KernelLock(str(tmp_path / "study.journal"))
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(other.acquire).result(timeout=5), "nothing of the first is left"
    other.release()
