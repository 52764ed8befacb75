"""Turns on one host: who times is alone, who scores is not, and a killed holder holds nothing."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llmprune.core.errors import RunDirectoryError
from llmprune.measure.speed.turns import scoring, timing

HOLD = """
import time
from llmprune.measure.speed.turns import timing
with timing('cpu'):
    print('held')
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def of_this_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMPRUNE_TURNS", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def entered(pool: ThreadPoolExecutor, turn: Any, device: str) -> Future[None]:
    def body() -> None:
        with turn(device):
            pass

    return pool.submit(body)


def waits(future: Future[None]) -> bool:
    time.sleep(0.1)
    return not future.done()


def test_many_score_and_one_times() -> None:
    with ThreadPoolExecutor(4) as pool:
        with scoring("cpu"):
            entered(pool, scoring, "cpu").result(5)
            wants_to_time = entered(pool, timing, "cpu")
            assert waits(wants_to_time)
        wants_to_time.result(5)
        with timing("cpu"):
            blocked = [entered(pool, turn, "cpu") for turn in (scoring, timing)]
            assert all(map(waits, blocked))
            # Another kind of device is another turn; several of one kind share it.
            entered(pool, timing, "cuda:0").result(5)
        for future in blocked:
            future.result(5)


def test_who_waits_to_time_is_not_passed_for_ever() -> None:
    with ThreadPoolExecutor(4) as pool:
        with scoring("cpu"):
            wants_to_time = entered(pool, timing, "cpu")
            assert waits(wants_to_time)
            late = entered(pool, scoring, "cpu")
            assert waits(late)
        wants_to_time.result(5)
        late.result(5)


def test_a_killed_holder_holds_nothing() -> None:
    with subprocess.Popen([sys.executable, "-u", "-c", HOLD], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        with ThreadPoolExecutor(1) as pool:
            future = entered(pool, scoring, "cpu")
            assert waits(future)
            process.kill()
            future.result(5)


def test_other_users_can_lock_the_files(tmp_path: Path) -> None:
    with timing("cpu"):
        pass
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"llmprune-cpu.gate": 0o644, "llmprune-cpu.room": 0o644}


def test_a_lock_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "llmprune-cpu.room").symlink_to(tmp_path / "elsewhere")
    with (
        pytest.raises(RunDirectoryError, match=r"llmprune-cpu\.room, which cannot be opened: .*; remove it"),
        timing("cpu"),
    ):
        pass
    assert not (tmp_path / "elsewhere").exists()
