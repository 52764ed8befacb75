"""What holds a forecast to a run: time by stage from the lines of a run, files from its directory."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import check_forecast
import pytest
from check_forecast import NOT_FORECAST, Actual
from tiny import tiny_recipe

from llmprune.core.recipe_text import to_yaml


def test_time_goes_to_the_stage_that_was_at_work() -> None:
    actual = Actual(since=10.0)
    for now, line in (
        (12.0, "loading the parent ..."),
        (13.0, "  loading the parent: done in 1 s"),
        (14.0, "searching ..."),
        (15.0, "  searching: 1/6, about 9 s left"),
        (16.0, "loading the parent ..."),
        (17.0, "  loading the parent: done in 1 s"),
        (20.0, "  searching: done in 6 s"),
        (21.0, "re-measuring on validation tokens ..."),
        (24.5, "  re-measuring on validation tokens: done in 4 s"),
    ):
        actual.line(line, now)
        actual.sample(int(now))
    actual.until(25.0)
    assert actual.seconds == {NOT_FORECAST: 2 + 1 + 1 + 1 + 0.5, "search": 6.0, "front": 3.5}
    assert actual.resident_bytes["search"] == 17 and actual.resident_bytes["front"] == 21


def test_a_whole_run_stands_beside_its_forecast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"front.checkpoints": "none"}
    changes |= {"search.trials": "2", "front.size": "1", "front.baselines": "[]"}
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(to_yaml(tiny_recipe(tmp_path)))
    overrides = [f"{key}={value}" for key, value in changes.items()]
    monkeypatch.setattr(sys, "argv", ["check_forecast.py", str(recipe), *overrides, "--out", str(run), "--json"])
    check_forecast.main()
    result = json.loads(capsys.readouterr().out)
    rows = {row["stage"]: row for row in result["stages"]}
    of_tables = {"estimate", "together", "probes"}
    assert {"tokens", "library", *of_tables, "path", "search", "front", "checkpoints"} == set(rows)
    for name, row in rows.items():
        assert row["actual_seconds"] > 0, name
    assert rows["library"]["forecast_disk_bytes"] == pytest.approx(rows["library"]["actual_disk_bytes"], rel=0.05)
    total = result["total"]
    assert total["actual_seconds"] == pytest.approx(
        result["not_forecast_seconds"] + sum(row["actual_seconds"] for row in rows.values())
    )
    assert total["actual_disk_bytes"] > rows["library"]["actual_disk_bytes"]
    assert result["python_and_torch_bytes"] > 50e6 and total["actual_memory_bytes"] < 2e9
    assert check_forecast.lines(result)[-2].startswith("in all")
    with pytest.raises(SystemExit, match="is there already"):
        check_forecast.main()
