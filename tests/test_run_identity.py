"""Two children of one shape in a run's front are never taken for each other; what another llmprune wrote is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Finished
from test_run import checkpoint_id, judged, strict_json
from tiny import paired_by_bytes, write_front

from llmprune.baselines.book import Book
from llmprune.cli.front_tables import front_table
from llmprune.core.budgets import parse_pick, pick_record
from llmprune.core.errors import BudgetError, ExportError, LlmpruneError, RunDirectoryError
from llmprune.core.files import sha256_file, write_json
from llmprune.evaluation.subjects import find_subjects
from llmprune.measure.record import Record
from llmprune.pipeline.commands import compress, export, front, search
from llmprune.pipeline.comparison import contest_of
from llmprune.pipeline.exports import exported_id
from llmprune.pipeline.inspection import forecast_run
from llmprune.pipeline.judges import Judges
from llmprune.pipeline.prepare import prepare
from llmprune.pipeline.run import Run
from llmprune.pipeline.run_directory import read_front
from llmprune.publish.contents import read_contents
from llmprune.search import judging
from llmprune.search.judging import quote

__all__ = ["judged"]

Twins = tuple[Path, Record, Record]


@pytest.fixture
def twins(copied: Path, judged: list[str], monkeypatch: pytest.MonkeyPatch) -> Twins:
    """A run whose front holds the recipe's pick and, as a baseline, that very shape as magnitude cuts it."""
    monkeypatch.setattr(judging, "measure_paired", paired_by_bytes)
    run = Run.open(copied)
    measured = read_front(run.directory)
    child = pick_record(measured.children, parse_pick(run.recipe.export.pick))
    prepared = prepare(run)
    rival = contest_of(run, prepared, Judges(run, prepared)).entrant("magnitude")
    twin = quote(rival.measure(child.architecture), rival.quoting).model_copy(update={"usable": True})
    run.directory.write_front(measured.model_copy(update={"baselines": (twin,)}))
    return copied, child, twin


def test_two_children_of_one_shape_are_told_apart(twins: Twins, tmp_path: Path) -> None:
    path, child, twin = twins
    assert child.hash == twin.hash and child.id != twin.id and twin.library == "magnitude"
    told = rf"{child.hash} is the architecture of 2 children, .*{child.id} \({child.name}, .*{twin.id} \(magnitude, "
    with pytest.raises(BudgetError, match=told):
        export(Run.open(path), parse_pick(child.hash), tmp_path / "child")
    for record in (child, twin):
        written = export(Run.open(path), parse_pick(record.id), tmp_path / record.id)
        assert (written["id"], written["hash"]) == (record.id, child.hash)
        assert written["figures"]["nats_per_token"] == record.nats_per_token
        assert checkpoint_id(tmp_path / record.id) == record.id
    weights = {sha256_file(tmp_path / record.id / "model.safetensors") for record in (child, twin)}
    assert len(weights) == 2, "each from its own library"
    assert [path.name for path in write_front(Run.open(path))].count(child.id) == 1
    assert not (path / "children" / twin.id).exists(), "no child of the search's"
    told_of = [str(cell) for cell in front_table(read_front(Run.open(path).directory)).columns[0].cells]
    assert any(child.id in cell for cell in told_of) and any(twin.id in cell for cell in told_of)


def test_an_export_of_the_twin_is_not_the_picked_child(twins: Twins) -> None:
    path, child, twin = twins
    run = Run.open(path)
    export(run, parse_pick(twin.id), run.directory.export)
    assert exported_id(run.directory.export) == twin.id
    left = next(row for row in forecast_run(path, run.recipe, "export")["stages"] if row["stage"] == "checkpoints")
    assert not left["done"]
    exported = compress(Run.open(path), run.directory.export)["exported"]
    assert exported["id"] == checkpoint_id(run.directory.export) == child.id


def test_an_export_from_before_ids_is_replaced(twins: Twins, finished_run: Finished) -> None:
    path, child, _ = twins
    old = Path(shutil.copytree(finished_run.export, path / "export"))
    metadata = strict_json(old / "llmprune.json")
    del metadata["id"], metadata["figures"]["id"], metadata["figures"]["schema"]
    write_json(old / "llmprune.json", metadata)
    assert metadata["hash"] == child.hash and exported_id(old) == ""
    assert compress(Run.open(path), old)["exported"]["proof"], "written anew"
    assert checkpoint_id(old) == child.id
    assert exported_id(path / "nowhere") is None


def test_a_child_of_a_library_that_is_gone_is_not_exported(twins: Twins, tmp_path: Path) -> None:
    path, child, _ = twins
    directory = Run.open(path).directory
    stale = child.model_copy(update={"id": "0" * 16})
    directory.write_front(read_front(directory).model_copy(update={"children": (stale,)}))
    with pytest.raises(ExportError, match=r"0{16} was measured with another block library .* delete .*front\.json and"):
        export(Run.open(path), parse_pick("ppl_ratio<=1000"), tmp_path / "child")


def in_front(path: Path, schema: int | None) -> str:
    return _in_json(path / "front.json", schema)


def in_book(path: Path, schema: int | None) -> str:
    Book(path / "baselines.json", path / "baseline-scores.json").write()
    return _in_json(path / "baselines.json", schema)


def in_journal(path: Path, schema: int | None) -> str:
    text = (path / "study.journal").read_text()
    said = "" if schema is None else f'"schema":{schema},'
    changed = re.sub(r'"record":\{"schema":2,', f'"record":{{{said}', text)
    assert changed != text
    (path / "study.journal").write_text(changed)
    return f"the record of trial [0-9]+ in study.journal of {path}"


def in_checkpoint(path: Path, schema: int | None) -> str:
    return _in_json(path / "export" / "llmprune.json", schema, "figures")


def _in_json(file: Path, schema: int | None, *below: str) -> str:
    data = strict_json(file)
    place = data
    for key in below:
        place = place[key]
    place["schema"] = schema
    if schema is None:
        del place["schema"]
    file.write_text(json.dumps(data))
    return str(file)


def evaluated(path: Path) -> Any:
    return find_subjects([str(path / "export")], None, device="cpu", dtype="auto", say=lambda _: None)[-1].id


PLACES: list[tuple[Callable[[Path, int | None], str], Callable[[Path], Any]]] = [
    (in_front, lambda path: front(Run.open(path))),
    (in_front, lambda path: export(Run.open(path), parse_pick("ppl<=1e9"), path / "child")),
    (in_front, lambda path: write_front(Run.open(path))),
    (in_book, lambda path: Book.open(path / "baselines.json", path / "baseline-scores.json")),
    (in_journal, lambda path: search(Run.open(path))),
    (in_journal, lambda path: front(Run.open(path))),
    (in_checkpoint, lambda path: compress(Run.open(path), path / "export")),
    (in_checkpoint, evaluated),
    (in_checkpoint, lambda path: read_contents(path / "export")),
]
NAMES = [
    *("front", "export", "children", "baselines", "search", "front of trials", "compress", "eval"),
    "push",
]


@pytest.fixture
def with_export(copied: Path, finished_run: Finished) -> Path:
    shutil.copytree(finished_run.export, copied / "export")
    return copied


@pytest.mark.parametrize(("change", "read"), PLACES, ids=NAMES)
def test_a_newer_schema_is_refused_in_one_line(change: Any, read: Any, with_export: Path) -> None:
    where = change(with_export, 3)
    with pytest.raises(LlmpruneError) as caught:
        read(with_export)
    told = str(caught.value)
    assert re.fullmatch(rf"{where} is of schema 3, and this llmprune reads schema 2; upgrade llmprune", told), told


@pytest.mark.parametrize(
    ("change", "read", "remedy"),
    [
        (*PLACES[0], "delete it and run llmprune front again"),
        (*PLACES[1], "delete it and run llmprune front again"),
        (*PLACES[3], "delete it and run llmprune baselines again"),
        (*PLACES[4], "use another --out"),
        (*PLACES[5], "use another --out"),
        (*PLACES[8], "write it again with llmprune export"),
    ],
)
def test_a_record_of_llmprune_0_1_is_refused_with_what_to_do(
    change: Any, read: Any, remedy: str, with_export: Path
) -> None:
    where = change(with_export, None)
    with pytest.raises(LlmpruneError) as caught:
        read(with_export)
    told = str(caught.value)
    assert re.match(rf"{where} is damaged, or of an older llmprune \(no schema, this one reads schema 2\); ", told), (
        told
    )
    assert remedy in told


def test_an_older_checkpoint_is_still_evaluated(with_export: Path) -> None:
    assert evaluated(with_export) == checkpoint_id(with_export / "export")
    in_checkpoint(with_export, None)
    metadata = strict_json(with_export / "export" / "llmprune.json")
    del metadata["id"]
    write_json(with_export / "export" / "llmprune.json", metadata)
    assert evaluated(with_export) is None


@pytest.mark.parametrize("missing", ["test", "usable", "id"])
def test_a_record_of_a_front_is_whole(missing: str, copied: Path) -> None:
    data = strict_json(copied / "front.json")
    del data["children"][0][missing]
    (copied / "front.json").write_text(json.dumps(data))
    with pytest.raises(RunDirectoryError, match=rf"front\.json is damaged.*{missing}.* run llmprune front again"):
        front(Run.open(copied))
