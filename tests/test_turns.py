"""Turns on one host: who times is alone, who scores is not, and a killed holder holds nothing."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmprune.core.errors import RunDirectoryError
from llmprune.measure.speed.turns import SHARED_BY, scoring, timing

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
            # Another device is another turn.
            entered(pool, timing, "cuda:0").result(5)
        for future in blocked:
            future.result(5)


def test_each_gpu_has_turns_of_its_own() -> None:
    with ThreadPoolExecutor(4) as pool, timing("cuda:0"):
        entered(pool, timing, "cuda:1").result(5)
        same = entered(pool, scoring, "cuda:0")
        with timing("cuda:1"):
            assert waits(same)


def test_a_gpu_is_the_same_by_whatever_number(monkeypatch: pytest.MonkeyPatch) -> None:
    # As CUDA_VISIBLE_DEVICES=1 has it in one process, and not in the other.
    uuids = {"cuda:0": "a", "cuda:1": "b"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda name: SimpleNamespace(uuid=uuids[name]))
    with ThreadPoolExecutor(4) as pool:
        with timing("cuda:1"):
            entered(pool, timing, "cuda:0").result(5)
            uuids["cuda:0"] = "b"
            same = entered(pool, timing, "cuda:0")
            assert waits(same)
        same.result(5)


def test_who_scores_beside_others_takes_a_share_of_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    monkeypatch.setenv(SHARED_BY, "2")
    try:
        for turn, device, expected in ((scoring, "cpu", 2), (timing, "cpu", 5), (scoring, "cuda:0", 5)):
            with turn(device):
                assert torch.get_num_threads() == expected, (turn, device)
            assert torch.get_num_threads() == 5
        monkeypatch.setenv(SHARED_BY, "9")
        with scoring("cpu"):
            assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


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
