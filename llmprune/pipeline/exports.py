"""The stage that writes children: proven checkpoints of a front, and the one that is picked."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from llmprune.baselines.methods import METHODS
from llmprune.blocks.library import BlockLibrary
from llmprune.core.budgets import Pick, pick_record
from llmprune.core.errors import ExportError, RunDirectoryError
from llmprune.core.files import exists, read_json
from llmprune.measure.record import Front, Record, child_id
from llmprune.measure.value import newer_schema
from llmprune.models.checkpoint import METADATA_FILE, write_checkpoint
from llmprune.models.drafting import note_drafting
from llmprune.models.loading import dtype_of
from llmprune.models.parent import Parent
from llmprune.models.samples import samples
from llmprune.models.surgery import prune
from llmprune.models.waiting import with_children
from llmprune.pipeline.judges import Judges
from llmprune.pipeline.repairs import repairs_of
from llmprune.pipeline.run import Run
from llmprune.pipeline.run_directory import RunDirectory
from llmprune.publish.conversion import write_formats
from llmprune.recover.repair import TRAINED
from llmprune.search.front import unusable

# Facts of a run directory that are no part of a checkpoint's provenance.
_LOCAL = ("stages", "study")


def export_pick(run: Run, judges: Judges, front: Front, pick: Pick, to: Path, *, force: bool = False) -> dict[str, Any]:
    """Write the picked child to `to`, proven in a fresh process; returns what was written.

    Raises BudgetError if no child holds the pick, ExportError if the directory is taken, the child is unusable or the
    proof fails; without `force` only, but for the proof.
    """
    # By its architecture's hash a child is picked as the front has it.
    others = [*front.baselines, *(one for one in front.one_shot if one.id == pick.child)] if pick.child else []
    record = pick_record([*front.children, *others], pick)
    if record.exportable is False:
        raise ExportError(
            f"{record.id} is a {record.name} child, whose biases no {judges.stock.parent.model.config.model_type} "
            "checkpoint holds; it is there to compare, pick another"
        )
    if not record.usable and not force:
        raise ExportError(unusable(record, run.recipe.front.usable_ppl_ratio))
    with run.show(f"exporting {record.id} and proving it"):
        return _write(run, judges, front, record, to, force=force, formats=True)


def write_children(run: Run, judges: Judges, front: Front) -> list[Path]:
    """Write every usable child of the front to the run's `children/ID`, unless it is there already."""
    children = [record for record in front.children if record.usable]
    paths = [run.directory.children / record.id for record in children]
    with run.show("writing and proving the front's checkpoints") as advance:
        for done, (path, record) in enumerate(zip(paths, children, strict=True), start=1):
            if not path.exists():
                _write(run, judges, front, record, path, force=False)
            advance(done, len(paths))
    return paths


def _write(
    run: Run, judges: Judges, front: Front, record: Record, to: Path, *, force: bool, formats: bool = False
) -> dict[str, Any]:
    parent, library = judges.stock.parent, _library_of(run, judges, record)
    child = child_of(run, judges, record)
    if record.draft is not None:
        note_drafting(child, record.draft.drafted)
    written: list[dict[str, Any]] = []

    def further(staging: Path) -> None:
        if formats:
            written.extend(write_formats(child, parent.tokenizer, run.recipe.deploy, staging))

    metadata = _metadata(run, judges, front, record, library)
    if formats and parent.tokenizer is not None:
        metadata["samples"] = samples(parent.model, child, parent.tokenizer, run.recipe.export.prompts)
    proof = write_checkpoint(child, parent.tokenizer, record.architecture, metadata, to, force=force, further=further)
    return {
        "directory": str(to),
        "id": record.id,
        "hash": record.hash,
        "proof": asdict(proof),
        "formats": written,
        "figures": record.to_json(),
    }


def child_of(run: Run, judges: Judges, record: Record) -> PreTrainedModel:
    """The child of a record, with all that was done to it since it was cut. Raises ExportError if the run no longer has
    what it was made of."""
    library = _library_of(run, judges, record)
    parent = judges.stock.parent
    child = with_children(parent.model, lambda: prune(parent, record.architecture, library))
    for repair in repairs_of(run, record, library):
        repair.apply(child)
    return child


def _library_of(run: Run, judges: Judges, record: Record) -> BlockLibrary:
    """The library that a measured child was cut from. Raises ExportError if it is not as it was."""
    own = [name for name, m in METHODS.items() if m.importance and m.importance.method == record.library]
    library = judges.libraries(own)[own[0]] if own else judges.stock.library
    if child_id(record.hash, library.hash, record.done) != record.id:
        raise ExportError(
            f"{record.id} was measured with another block library than the run has now; delete {run.directory.front} "
            "and run llmprune front again"
        )
    return library


def _metadata(run: Run, judges: Judges, front: Front, record: Record, library: BlockLibrary) -> dict[str, Any]:
    """What a checkpoint says of itself."""
    parent = judges.stock.parent
    of_parent = {"shape": asdict(parent.shape), "figures": front.parent.to_json()}
    return {
        "id": record.id,
        "library": library.hash,
        "figures": record.stored(),
        "parent": of_parent,
        **travelling(run, parent),
        **({"resized": front.resized.stored()} if front.resized else {}),
    }


def travelling(run: Run, parent: Parent) -> dict[str, Any]:
    """What a checkpoint says of the run that made it: it names files, not the places they had on this machine."""
    provenance = {key: value for key, value in run.directory.read_provenance().items() if key not in _LOCAL}
    recipe = run.recipe.model_dump(mode="json")
    recipe["model"]["path"], recipe["export"]["to"] = parent.source, None
    recipe["model"]["dtype"] = dtype_of(parent.model)
    if (tokenizer := recipe["model"]["tokenizer"]) and exists(tokenizer):
        recipe["model"]["tokenizer"] = Path(tokenizer).name
    for source in (*recipe["data"]["sources"], *recipe["data"]["unseen"], *recipe["vocabulary"]["keep_text"]):
        source["path"] = source["path"] and Path(source["path"]).name
    return {"provenance": provenance, "recipe": recipe}


def exported_id(directory: Path) -> str | None:
    """Id of the child in a checkpoint directory of ours, "" if it is older than ids; None if it is no such directory.

    Raises RunDirectoryError if a newer llmprune wrote it.
    """
    file = directory / METADATA_FILE
    if not file.is_file():
        return None
    metadata = read_json(file)
    if not isinstance(metadata, dict):
        raise RunDirectoryError(f"{file} is not an object; take {directory} away, and export again")
    if problem := newer_schema(metadata.get("figures")):
        raise RunDirectoryError(f"{file} {problem}")
    return str(metadata.get("id", ""))


def run_behind(directory: Path) -> tuple[Path, str]:
    """The run that an exported checkpoint lies in, and the id of the child: what was done to it, and what can be done
    further, is in the run's files. Raises RunDirectoryError if it lies in none."""
    child = exported_id(directory)
    assert child is not None, "it is a checkpoint of ours"
    above = directory.expanduser().resolve().parents
    run = next((place for place in above if RunDirectory(place).front.is_file()), None)
    if run is None:
        raise RunDirectoryError(
            f"{directory} lies in no run directory, and recovery needs the parent, text and block library of the run "
            "that it is of; name that run, or train it by other means and prove it anew with llmprune prove"
        )
    return run, child


def refuse_trained(directory: Path) -> None:
    """Raises ExportError if a checkpoint was trained since it was exported: no run could write it again."""
    metadata = read_json(directory / METADATA_FILE) if exported_id(directory) else {}
    done = [name for name in metadata.get("figures", {}).get("done", []) if str(name).startswith(f"{TRAINED}-")]
    if done:
        raise ExportError(
            f"{directory} holds a child that was trained since it was exported ({done[-1]}); use --force to replace "
            "it, or another --to"
        )
