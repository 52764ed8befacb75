"""A report tells what a run's files hold, in one page that needs nothing else, at any stage of the run."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import Finished, Llmprune
from hypothesis import given
from hypothesis import strategies as st
from test_run_recovery import repaired_run

from llmprune.pipeline.run import Run
from llmprune.pipeline.run_directory import read_front
from llmprune.recover.repair import DISTIL, Repair
from llmprune.report.charts import figures
from llmprune.report.facts import Facts, gather
from llmprune.report.page import page, write_figures
from llmprune.report.rows import covered, foretold, front_rows, map_rows, time_rows, within_use

__all__ = ["repaired_run"]

MOST_BYTES = 2_000_000


class Page(HTMLParser):
    """What of a page matters here."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.headings: list[str] = []
        self.scripts: dict[str, str] = {}
        self._open = ""
        self._script = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self._open, self._script = tag, given.get("id") or given.get("type") or ""
        self.fetched += [str(given[key]) for key in ("src", "href", "srcset", "data") if given.get(key)]

    def handle_data(self, data: str) -> None:
        if self._open in ("h1", "h2") and data.strip():
            self.headings.append(data.strip())
        if self._open == "script":
            self.scripts[self._script] = self.scripts.get(self._script, "") + data

    def handle_endtag(self, tag: str) -> None:
        self._open = ""


@pytest.fixture(scope="module")
def facts(finished_run: Finished) -> Facts:
    return gather(Run.join(finished_run.path))


def test_the_page_needs_nothing_else(facts: Facts) -> None:
    text = page(facts)
    read = Page(text)
    assert len(text.encode()) < MOST_BYTES
    assert all(link.startswith("#") for link in read.fetched)
    specs = json.loads(read.scripts["charts"])
    assert "http" not in json.dumps([{k: v for k, v in spec.items() if k != "$schema"} for spec in specs.values()])
    assert list(specs) == [figure.name for figure in figures(facts)]


def test_every_stage_has_its_chart(facts: Facts) -> None:
    names = [figure.name for figure in figures(facts)]
    assert names == ["front", "architecture", "time", "sensitivity", "trials", "progress", "foretold"]
    assert {figure.title for figure in figures(facts)} <= set(Page(page(facts)).headings)


def test_charts_are_vega_lite(facts: Facts, tmp_path: Path) -> None:
    for figure in figures(facts):
        figure.chart.to_dict(validate=True)
        assert re.search(r"\b(Measured|Estimated|Exact)\b", figure.caption)
    written = write_figures(facts, tmp_path / "figures")
    assert {path.suffix for path in written} == {".svg", ".png"}
    front = (tmp_path / "figures" / "front.svg").read_text()
    assert facts.front is not None
    assert all(child.id[:8] in front for child in facts.front.children)
    assert (tmp_path / "figures" / "front.png").read_bytes().startswith(b"\x89PNG")


def test_rows_are_what_was_measured(facts: Facts) -> None:
    assert facts.front is not None
    rows = {row["id"]: row for row in front_rows(facts.front, facts.phase)}
    for child in facts.front.children:
        assert child.test is not None
        row = rows[child.id]
        assert row["test_lost"] == child.test.nats_lost
        assert (row["slow"], row["speedup"], row["fast"]) == (
            child.decode_speedup.low,
            child.decode_speedup.median,
            child.decode_speedup.high,
        )
    kept = [row for row in map_rows(facts.front) if row["id"] == facts.front.children[-1].id]
    own = [choice.units for _, choice in facts.front.children[-1].architecture.blocks()]
    whole = [choice.units for _, choice in facts.front.parent.architecture.blocks()]
    assert [row["kept"] for row in kept] == [a / b for a, b in zip(own, whole, strict=True)]


def test_blocks_take_together_what_the_table_says_of_the_child(facts: Facts) -> None:
    assert facts.front is not None and facts.tables is not None
    rows = list(time_rows(facts.front, facts.tables, facts.phase))
    of = {id: sum(row["share"] for row in rows if row["id"] == id) for id in {row["id"] for row in rows}}
    for child in facts.front.children:
        saved = of[facts.front.parent.id] - of[child.id]
        assert saved == pytest.approx(1 - facts.tables.costs.relative_time(child.architecture, facts.phase))


def test_the_parent_is_foretold_as_itself(facts: Facts) -> None:
    assert facts.front is not None and facts.tables is not None
    told = foretold(facts.tables, facts.front.parent.architecture, facts.phase)
    assert told == {"foretold_speedup": 1.0, "foretold_lost": 0.0}


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=8), st.integers(1, 6))
def test_hypervolume_is_the_cells_that_are_covered(points: list[tuple[int, int]], worst: int) -> None:
    cells = {(x, y) for speed, nats in points for x in range(1, speed) for y in range(nats, worst)}
    assert covered(points, worst) == len(cells)


def test_a_search_that_has_just_begun(copied: Path) -> None:
    (copied / "front.json").unlink()
    shutil.rmtree(copied / "children", ignore_errors=True)
    assert [figure.name for figure in figures(gather(Run.join(copied)))] == [
        "sensitivity",
        "trials",
        "progress",
        "foretold",
    ]
    (copied / "study.journal").unlink()
    (copied / "tables.json").unlink()
    facts = gather(Run.join(copied))
    assert figures(facts) == []
    assert "none yet" in page(facts)


def test_tables_from_before_they_said_their_space(copied: Path) -> None:
    tables = json.loads((copied / "tables.json").read_text())
    del tables["space"]
    (copied / "tables.json").write_text(json.dumps(tables))
    facts = gather(Run.join(copied))
    assert facts.tables is None
    assert [figure.name for figure in figures(facts)] == ["front", "architecture", "trials", "progress"]
    assert "did not say their space" in page(facts)


def test_names_are_text_and_no_markup(finished_run: Finished, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished_run.path, tmp_path / "<b>a&lt;run"))
    provenance = json.loads((run / "provenance.json").read_text())
    provenance["parent"]["model"] = "</script><script id=charts>alert(1)</script>"
    (run / "provenance.json").write_text(json.dumps(provenance))
    front = json.loads((run / "front.json").read_text())
    front["baselines"] = [{**front["children"][0], "name": "</script><i>x"}]
    (run / "front.json").write_text(json.dumps(front))
    text = page(gather(Run.join(run)))
    read = Page(text)
    assert "<b>a&lt;run" in read.headings
    assert any("</script><i>x" in str(row) for row in json.loads(read.scripts["charts"])["front"].values())
    assert text.count("<script") == 2 + Page(text).scripts["module"].count("<script")


def test_repairs_are_drawn_from_before_to_after(repaired_run: Finished, tmp_path: Path) -> None:
    run = Path(shutil.copytree(repaired_run.path, tmp_path / "run"))
    front = read_front(Run.join(run).directory)
    assert front.one_shot
    course = {"checks": [[0, 3.0], [64, 2.5]], "seconds": 60.0, "ended": ""}
    Repair.of(DISTIL, {}, {"course": course}).write(run / "repairs" / f"{front.children[0].id}-distil.safetensors", "")
    facts = gather(Run.join(run))
    names = [figure.name for figure in figures(facts)]
    assert names[:4] == ["front", "architecture", "time", "recovery"]
    drawn = next(figure for figure in figures(facts) if figure.name == "front")
    assert "Dashed lines" in drawn.caption
    assert "1.0 minutes" in next(figure for figure in figures(facts) if figure.name == "recovery").caption


def test_the_command_writes_it(copied: Path, llmprune: Llmprune, tmp_path: Path) -> None:
    result = llmprune("report", copied, "--figures", tmp_path / "figures", "--json")
    assert result.code == 0
    told: dict[str, Any] = json.loads(result.out)
    assert told["report"] == str(copied / "report.html")
    assert told["bytes"] == (copied / "report.html").stat().st_size
    assert all(Path(path).is_file() for path in told["figures"])


def test_scores_without_end_are_left_out(facts: Facts) -> None:
    assert facts.tables is not None and facts.front is not None
    worthless = dict.fromkeys(facts.tables.delta_nats, math.inf)
    broken = replace(facts, tables=replace(facts.tables, delta_nats=worthless))
    specs = json.loads(Page(page(broken)).scripts["charts"])
    assert "Infinity" not in json.dumps(specs) and "foretold" in specs


def test_where_nothing_can_be_written(copied: Path, llmprune: Llmprune, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for options in (("--to", tmp_path), ("--figures", tmp_path / "file"), ("--to", tmp_path / "file" / "page.html")):
        result = llmprune("report", copied, *options)
        assert result.code == 2 and "cannot write" in result.err
    assert (tmp_path / "file").read_text() == "mine"


def test_what_is_damaged_is_named(copied: Path, llmprune: Llmprune, tmp_path: Path) -> None:
    assert llmprune("report", tmp_path / "nowhere").code == 2
    (copied / "repairs").mkdir(exist_ok=True)
    (copied / "repairs" / "0123456789abcdef-distil.safetensors").write_bytes(b"{}")
    result = llmprune("report", copied)
    assert result.code == 2
    assert "0123456789abcdef-distil.safetensors is damaged" in result.err
    assert not (copied / "report.html").exists()


def test_an_unusable_child_takes_no_room_from_the_others() -> None:
    def row(lost: float | None, *, usable: bool = True) -> dict[str, Any]:
        return {"test_lost": lost, "usable": usable}

    rows = [row(0.0), row(0.1), row(0.15, usable=False), row(3.9, usable=False), row(None, usable=False)]
    assert within_use(rows) == ([*rows[:3], rows[4]], [rows[3]])
    # Where nothing is usable, there is nothing to make room for.
    assert within_use([row(0.0), rows[3]]) == ([row(0.0), rows[3]], [])
