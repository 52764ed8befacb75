"""The stage that writes children: proven checkpoints of a front, and the one that is picked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmprune.baselines.methods import METHODS
from llmprune.blocks.library import BlockLibrary
from llmprune.choices.architecture import Architecture
from llmprune.core.budgets import Pick, pick_record
from llmprune.core.errors import ExportError
from llmprune.core.files import exists, read_json
from llmprune.models.checkpoint import METADATA_FILE, write_checkpoint
from llmprune.models.loading import dtype_of
from llmprune.models.surgery import prune
from llmprune.pipeline.judges import Judges
from llmprune.pipeline.run import Run
from llmprune.publish.conversion import write_formats
from llmprune.search.front import unusable
from llmprune.search.judging import Record

# Facts of a run directory that are no part of a checkpoint's provenance.
_LOCAL = ("stages", "study")


def export_pick(
    run: Run, judges: Judges, front: Mapping[str, Any], pick: Pick, to: Path, *, force: bool = False
) -> dict[str, Any]:
    """Write the picked child to `to`, proven in a fresh process; returns what was written.

    Raises BudgetError if no child holds the pick, ExportError if the directory is taken, the child is unusable or the
    proof fails; without `force` only, but for the proof.
    """
    record = pick_record([*front["children"], *front["baselines"]] if pick.hash else front["children"], pick)
    if not record.get("exportable", True):
        raise ExportError(
            f"{record['hash']} is a {record['name']} child, whose biases no "
            f"{judges.stock.parent.model.config.model_type} checkpoint holds; it is there to compare, pick another"
        )
    if not record["usable"] and not force:
        raise ExportError(unusable(record, run.recipe.front.usable_ppl_ratio))
    with run.show(f"exporting {record['hash']} and proving it"):
        return _write(run, judges, front, dict(record), to, force=force, formats=True)


def write_children(run: Run, judges: Judges, front: Mapping[str, Any]) -> list[Path]:
    """Write every usable child of the front to the run's `children/HASH`, unless it is there already."""
    children = [record for record in front["children"] if record["usable"]]
    paths = [run.directory.children / record["hash"] for record in children]
    with run.show("writing and proving the front's checkpoints") as advance:
        for done, (path, record) in enumerate(zip(paths, children, strict=True), start=1):
            if not path.exists():
                _write(run, judges, front, record, path, force=False)
            advance(done, len(paths))
    return paths


def _write(
    run: Run, judges: Judges, front: Mapping[str, Any], record: Record, to: Path, *, force: bool, formats: bool = False
) -> dict[str, Any]:
    parent = judges.stock.parent
    architecture = Architecture.from_json(record["architecture"])
    child = prune(parent, architecture, _library(judges, record))
    written: list[dict[str, Any]] = []

    def further(staging: Path) -> None:
        if formats:
            written.extend(write_formats(child, parent.tokenizer, run.recipe.deploy, staging))

    metadata = _metadata(run, judges, front, record)
    proof = write_checkpoint(child, parent.tokenizer, architecture, metadata, to, force=force, further=further)
    return {
        "directory": str(to),
        "hash": record["hash"],
        "proof": asdict(proof),
        "formats": written,
        "figures": record,
    }


def _library(judges: Judges, record: Record) -> BlockLibrary:
    """What the record's child was cut from."""
    own = [name for name, method in METHODS.items() if name == record["name"] and method.importance]
    return judges.libraries(own)[own[0]] if own else judges.stock.library


def _metadata(run: Run, judges: Judges, front: Mapping[str, Any], record: Record) -> dict[str, Any]:
    """What a checkpoint says of itself. It travels: it names files, not the places they had on this machine."""
    parent = judges.stock.parent
    provenance = {key: value for key, value in run.directory.read_provenance().items() if key not in _LOCAL}
    recipe = run.recipe.model_dump(mode="json")
    recipe["model"]["path"], recipe["export"]["to"] = parent.source, None
    recipe["model"]["dtype"] = dtype_of(parent.model)
    if (tokenizer := recipe["model"]["tokenizer"]) and exists(tokenizer):
        recipe["model"]["tokenizer"] = Path(tokenizer).name
    for source in (*recipe["data"]["sources"], *recipe["data"]["unseen"]):
        source["path"] = source["path"] and Path(source["path"]).name
    of_parent = {"shape": asdict(parent.shape), "figures": front["parent"]}
    return {"figures": record, "parent": of_parent, "provenance": provenance, "recipe": recipe}


def exported_hash(directory: Path) -> str | None:
    """Hash of the child in a checkpoint directory of ours, if it is one."""
    metadata = directory / METADATA_FILE
    return str(read_json(metadata).get("hash")) if metadata.is_file() else None
