"""`llmprune baselines` on a finished run: the table, resuming, its errors; and the baselines beside a front."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from closeness import tolerance
from tiny import paired_by_bytes

from llmprune.baselines.flap import BIAS
from llmprune.cli.main import main
from llmprune.core.budgets import parse_pick
from llmprune.core.errors import ExportError
from llmprune.core.recipe import BASELINE_NAMES
from llmprune.measure.quality.perplexity import score
from llmprune.models.expected import Proof
from llmprune.pipeline import exports
from llmprune.pipeline.commands import export, front
from llmprune.pipeline.prepare import stock_up
from llmprune.pipeline.run import Run
from llmprune.search import judging


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was timed, by name."""
    seen: list[str] = []
    judge = judging.Judge.judge

    def watched(self: judging.Judge, architecture: Any, name: str) -> Any:
        seen.append(name)
        return judge(self, architecture, name)

    monkeypatch.setattr(judging, "measure_paired", paired_by_bytes)
    monkeypatch.setattr(judging.Judge, "judge", watched)
    return seen


def llmprune(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Any:
    monkeypatch.setattr(sys, "argv", ["llmprune", *map(str, arguments)])
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code, *capfd.readouterr()


def test_every_method_in_one_table(
    copied: Path, timed: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    at = ("--at", 1.2, "--at", 30)
    code, out, _ = llmprune(capfd, monkeypatch, "baselines", copied, *at, "--json")
    data = json.loads(out)
    assert code == 0 and data["speed"] == "decode_speedup"
    cells = {(entry["method"], entry["at"]): entry for entry in data["results"]}
    assert list(cells) == [(name, at) for name in ("llmprune", *BASELINE_NAMES) for at in (1.2, 30)]
    assert all(cells[name, 30]["why"].startswith("out of reach") for name, _ in cells)
    # The space has no types of weights to allocate.
    reaching = [name for name in BASELINE_NAMES if cells[name, 1.2]["nats_lost"] is not None]
    assert set(BASELINE_NAMES) - set(reaching) == {"bits"}
    assert all(cells[name, 1.2]["test"]["nats_lost"] is not None for name in reaching)
    for name in ("magnitude", "wanda-sp", "flap"):
        assert len(list((copied / f"library-{name}").glob("*.safetensors"))) == 3
    count = len(timed)
    code, out, _ = llmprune(capfd, monkeypatch, "baselines", copied, *at, "--quiet")
    assert code == 0 and len(timed) == count and out.count("out of reach") == 13
    assert all(name in out for name in BASELINE_NAMES) and "~" in out
    milp = cells["milp", 1.2]
    assert f"{milp['test']['nats_lost']:+.3f}" in out and f"{milp['nats_lost']:+.3f}" in out
    assert "test (ant+bee, 60 tokens in windows of 16, no BOS); validation (ant+bee, 60 tokens" in " ".join(out.split())
    stored = json.loads((copied / "baselines.json").read_text())
    assert {(entry["method"], entry["at"]) for entry in stored["results"]} == {c for c in cells if c[0] != "llmprune"}


def test_asking_for_more_measures_what_is_missing(
    copied: Path, timed: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert llmprune(capfd, monkeypatch, "baselines", copied, "--at", 1.2, "--method", "shortgpt")[0] == 0
    assert set(timed) == {"shortgpt"} and not list(copied.glob("library-*"))
    del timed[:]
    code, out, _ = llmprune(
        capfd, monkeypatch, "baselines", copied, "--at", 1.2, "--method", "shortgpt", "--method", "flap", "--json"
    )
    assert code == 0 and set(timed) == {"flap"}
    assert {entry["method"] for entry in json.loads(out)["results"]} == {"llmprune", "shortgpt", "flap"}


def test_unknown_methods_and_runs_without_tables_are_one_line(
    copied: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (copied / "tables.json").unlink()
    for arguments, message in (
        ((copied, "--method", "slip"), "got 'slip'"),
        ((copied, "--at", 0.5), "greater than 1"),
        ((copied, "--quiet"), "has no tables yet; run llmprune search first"),
        ((copied.parent / "nowhere",), "is not a run directory yet"),
    ):
        code, out, err = llmprune(capfd, monkeypatch, "baselines", *arguments)
        assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_a_front_has_the_baselines_that_its_recipe_names(
    copied: Path, timed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = yaml.safe_load((copied / "recipe.yaml").read_text())
    assert data["front"]["baselines"] == ["uniform", "shortgpt", "random"]
    data["front"]["baselines"] = ["milp", "flap", "magnitude"]
    (copied / "recipe.yaml").write_text(yaml.safe_dump(data))
    run = Run.open(copied)
    measured = front(run)
    assert [record.name for record in measured.baselines] == ["milp", "flap", "magnitude"]
    milp, flap, magnitude = measured.baselines
    assert [record.exportable for record in measured.baselines] == [True, False, True]
    assert [record.library for record in measured.baselines] == [None, "flap", "magnitude"]
    assert [record.done for record in measured.baselines] == [(), (BIAS,), ()]
    assert milp.nats_per_token > 0
    with pytest.raises(ExportError, match=f"{flap.id} is a flap child, whose biases no llama checkpoint holds"):
        export(run, parse_pick(flap.id), tmp_path / "child")
    written: list[Any] = []
    monkeypatch.setattr(
        exports, "write_checkpoint", lambda child, *_, **__: written.append(child) or Proof(0, 0, 1, True)
    )
    assert export(run, parse_pick(magnitude.id), tmp_path / "child")["id"] == magnitude.id
    found = score(written[0], stock_up(run).tokens["validation"]).nats_per_token
    assert found == pytest.approx(magnitude.nats_per_token, rel=tolerance(1.0))
