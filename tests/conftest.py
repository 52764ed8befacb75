"""What must stand before torch and huggingface_hub are imported, and a run that several test files read.

xdist's controller reads this file as well, before it starts the processes that run tests: what takes seconds to import
is imported where it is used.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest.mock import patch

import pytest

# No test reaches the network.
os.environ["HF_HUB_OFFLINE"] = "1"
# Tensors of tests are slower on several threads (`make test-numerics` asks for two all the same), and processes that
# tests start must make the same host fingerprint.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests take turns among themselves, not with a search that runs on this host: each would wait for the other.
os.environ["LLMPRUNE_TURNS"] = tempfile.mkdtemp(prefix="llmprune-turns-")

import postgres
from forked import Interpreters

if TYPE_CHECKING:
    from llmprune.core.recipe import Recipe


# These take longest, and share no fixture of a file.
FIRST = (
    *("test_nobody_loses_a_trial_when_workers_are_killed", "test_nor_on_a_journal"),
    "test_interrupts_and_kills_cost_the_trial_in_flight_and_nothing_else",
    "test_a_kill_costs_a_trial_and_ctrl_c_ends_all",
    "test_processes_that_train_together_give_what_one_gives",
    "test_a_large_model_of_the_hub_is_forecast_from_its_config",
    "test_every_model_has_a_graph_for_prompts_and_one_for_tokens",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A process that has run out of tests takes the last ones of another's: no long one may be among them."""
    items.sort(key=lambda item: getattr(item, "originalname", item.name) not in FIRST)


def pytest_collection_finish() -> None:
    """Whatever is timed collects garbage first: not among all that torch, transformers and the tests have imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def quick_forecasts() -> Iterator[None]:
    """What a machine does in a second is asked for a twentieth of one, and how long a process takes to start once."""
    from llmprune.forecast import rates

    with (
        patch.object(rates, "BUDGET_S", rates.BUDGET_S / 20),
        patch.object(rates, "process_seconds", cache(rates.process_seconds)),
    ):
        yield


@pytest.fixture(scope="session", autouse=True)
def forked_proofs() -> Iterator[Callable[..., Any]]:
    """Proofs in forks of an interpreter that has imported torch and transformers. Gives what they replace."""
    from llmprune.models import fresh_process

    interpreters, replaced = Interpreters(), fresh_process.run_script
    with patch.object(fresh_process, "run_script", interpreters.run_script):
        yield replaced
    interpreters.stop()


@pytest.fixture
def started(forked_proofs: Callable[..., Any]) -> Callable[..., Any]:
    """What runs the scripts of proofs outside of this suite."""
    return forked_proofs


def pytest_sessionfinish() -> None:
    shutil.rmtree(os.environ["LLMPRUNE_TURNS"], ignore_errors=True)


@dataclass(frozen=True)
class Finished:
    """A run that went through every stage. Tests that change it work on a copy."""

    recipe: Recipe
    path: Path
    """The run directory."""
    export: Path
    """The exported child, outside of the run."""


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The tiny recipe, searched, re-measured and exported: the same run each time, since no clock is read.

    Only the export is proven in a fresh process.
    """
    from tiny import paired_by_bytes, tiny_recipe, write_front

    from llmprune.core.budgets import parse_pick
    from llmprune.models import checkpoint
    from llmprune.models.expected import Proof
    from llmprune.pipeline.commands import export, front, search
    from llmprune.pipeline.run import Run
    from llmprune.pipeline.run_directory import RunDirectory
    from llmprune.search import judging
    from llmprune.tables import block_tables, reach

    root = tmp_path_factory.mktemp("finished")
    finished = Finished(tiny_recipe(root), root / "run", root / "exported" / "child")
    with (
        RunDirectory(finished.path).locked(),
        patch.object(judging, "measure_paired", paired_by_bytes),
        patch.object(block_tables, "measure_paired", paired_by_bytes),
        patch.object(reach, "measure_paired", paired_by_bytes),
    ):
        run = Run.start(finished.path, finished.recipe)
        search(run)
        front(run)
        with patch.object(checkpoint, "prove", return_value=Proof(0.0, 0.0, 1, False)):
            write_front(run)
        export(run, parse_pick(finished.recipe.export.pick), finished.export)
    return finished


@pytest.fixture
def copied(finished_run: Finished, tmp_path: Path) -> Path:
    """A copy of the finished run's directory, to change."""
    return Path(shutil.copytree(finished_run.path, tmp_path / "run"))


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one object on stdout, of which nothing is left over."""
        data = json.loads(self.out)
        assert isinstance(data, dict)
        return data


Llmprune = Callable[..., Result]


@pytest.fixture
def llmprune(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Llmprune:
    from llmprune.cli.main import main

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["llmprune", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        assert isinstance(code, int)
        return Result(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A throw-away PostgreSQL server. Without PostgreSQL the test is skipped, but fails where it is required."""
    if postgres.programs() is None or importlib.util.find_spec("psycopg") is None:
        missing = "needs PostgreSQL's programs (Debian: apt-get install postgresql) and psycopg"
        if os.environ.get("CI") or os.environ.get("LLMPRUNE_REQUIRE_POSTGRES") == "1":
            pytest.fail(missing)
        pytest.skip(missing)
    with postgres.running() as url:
        yield url


@pytest.fixture(scope="session")
def proxy_url(postgres_url: str) -> Iterator[str]:
    """`llmprune storage-proxy` before that server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = "import sys; sys.argv[0] = 'llmprune'; from llmprune.cli.main import main; main()"
    command = [sys.executable, "-c", code, "storage-proxy", "--host", "127.0.0.1", "--port", str(port)]
    with subprocess.Popen(
        command, env={**os.environ, "LLMPRUNE_STORAGE": postgres_url}, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert f"grpc://127.0.0.1:{port}" in line and "llmprune:***@" in line, line + process.stderr.read()
        try:
            yield f"grpc://127.0.0.1:{port}"
        finally:
            process.kill()
