"""The pipeline in order. A stage whose stored input hash matches is skipped: that is the whole resume mechanism."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage

from llmprune.baselines.contest import Entrant, choose_beside
from llmprune.baselines.methods import METHODS
from llmprune.blocks.library import BlockLibrary
from llmprune.choices.architecture import Architecture
from llmprune.core.budgets import Pick, parse_budget, parse_pick, pick_record
from llmprune.core.errors import ExportError, ModelError, RunDirectoryError, StorageError
from llmprune.core.files import exists, read_json
from llmprune.measure.record import Front, Record, child_id, newer_schema
from llmprune.measure.speed.host import fingerprint
from llmprune.models.checkpoint import METADATA_FILE, check_destination, write_checkpoint
from llmprune.models.loading import dtype_of
from llmprune.models.surgery import prune
from llmprune.pipeline.comparison import entrant, trials_of
from llmprune.pipeline.run_directory import hash_of, read_front
from llmprune.pipeline.workspace import Run
from llmprune.publish.conversion import write_formats
from llmprune.search.failures import told
from llmprune.search.front import (
    candidates_for_front,
    holding_budgets,
    non_dominated,
    unusable,
    with_verdicts,
)
from llmprune.search.judging import quote
from llmprune.search.samplers.guide import HOLDS_WITHIN
from llmprune.search.samplers.make import GUIDED
from llmprune.search.study import (
    Report,
    SearchOutcome,
    finished_trials,
    join_study,
    open_study,
    prepare_study,
    work,
)
from llmprune.search.trial_records import check_records, record_of
from llmprune.search.warm_starts import MARGIN, warm_starts
from llmprune.search.workers.storage import masked, opened_storage
from llmprune.search.workers.studies import Candidate, check_inputs, elsewhere, on_this_hardware, studies_of_run
from llmprune.tables.reach import check_reach, described

# Facts of a run directory that are no part of a checkpoint's provenance.
_LOCAL = ("stages", "study")
GUIDED_STARTS = ("parent", "path", "allocated", "uniform")
"""Kinds of starting points of a guided sampler. Over a short way the knapsack at the parent may beat the path, whose
later estimates are of fewer tokens."""


def search(run: Run, report: Report | None = None) -> SearchOutcome:
    """Search until the recipe's trials or minutes are used up; trials that are there, and other workers', count.

    Raises RecipeError, before the library is built, if a target is beyond what the space can reach.
    """
    # Opened first: a storage that cannot be used is found out before the hours that the library may take.
    with opened_storage(run.storage, run.directory.journal) as storage:
        warnings = check_reach(run.reach, run.recipe)
        for line in (described(run.reach), *warnings):
            run.say(line)
        return _work(run, start_study(run, storage), report)


def start_study(run: Run, storage: BaseStorage) -> optuna.Study:
    """All that the trials of a search need, made or loaded, and its study, ready for workers."""
    rules = run.recipe.search
    tables, facts = run.tables, run.study_facts()
    study = open_study(storage, facts.name, rules, run.guide)
    facts.write(study, rules.trials)
    starts = warm_starts(run.scores, tables.influence, tables.costs, rules.objective, rules.targets, run.path)
    if rules.sampler in GUIDED:
        # They need somewhere to start from, and must not end behind the plainest child; a population needs variety.
        starts = [start for start in starts if start[0].partition("-")[0] in GUIDED_STARTS]
    prepare_study(study, rules, run.space, starts)
    noted = {"run": facts.run, "storage": _place(run)}
    if run.directory.read_provenance().get("study") != noted:
        run.directory.note(study=noted)
    _tell_of_other_hardware(run, studies_of_run(storage, facts.run))
    return study


def worker(run: Run, report: Report | None = None) -> SearchOutcome:
    """Work on the study that `search` made, until the trials or minutes are used up. The run is a joined one.

    Raises StorageError if the storage cannot be used, there is no study of this run in it, or this worker's inputs or
    hardware are not the study's.
    """
    key = run.directory.read_provenance().get("study", {}).get("run")
    place = f"{_place(run)} of {run.directory.path}" if run.storage is None else _place(run)
    command = f"llmprune search {run.directory.path}" + (f" --storage {place}" if run.storage else "")
    missing = StorageError(f"a worker joins a study, and {place} holds none of this run; start it with {command}")
    if key is None or (run.storage is None and not run.directory.journal.is_file()):
        raise missing
    with opened_storage(run.storage, run.directory.journal) as storage:
        found = studies_of_run(storage, key)
        if not found:
            raise missing
        _tell_of_other_hardware(run, found)
        joined = on_this_hardware(found, fingerprint(), place)
        check_inputs(joined, run.study_inputs())
        return _work(run, join_study(storage, joined.name, run.recipe.search, run.guide), report)


def _work(run: Run, study: optuna.Study, report: Report | None) -> SearchOutcome:
    rules = run.recipe.search
    check_records(finished_trials(study), f"{_place(run)} of {run.directory.path}")
    judge = run.judge("search", run.recipe.workload.repeats)
    with run.show("searching") as advance:

        def on_trial(finished: int, record: Record) -> None:
            advance(finished, rules.trials)
            if report:
                report(finished, record)

        advance(0, rules.trials)
        return work(study, judge, rules, run.space, on_trial)


def _place(run: Run) -> str:
    """The storage, as may be shown and written down."""
    return run.directory.journal.name if run.storage is None else masked(run.storage)


def _tell_of_other_hardware(run: Run, found: Sequence[Candidate]) -> None:
    if others := elsewhere(found, fingerprint()):
        run.say(f"{_place(run)} also holds {others} trials of this run from other hardware; they are not compared")


def front(run: Run) -> Front:
    """Re-measure the best trials and the baselines on validation tokens, choose among them, and measure what is quoted
    of the chosen on text that nothing was chosen on; writes and returns `front.json`.

    Raises RunDirectoryError if no trial has finished, BudgetError if none holds the recipe's budgets.
    """
    rules, pick = run.recipe.front, parse_pick(run.recipe.export.pick)
    with opened_storage(run.storage, run.directory.journal) as storage:
        facts = run.study_facts()
        place = f"{_place(run)} of {run.directory.path}"
        found = [record_of(trial, place) for trial in trials_of(storage, facts.name)]
        trials = [record for record in found if record.architecture != run.parent.shape.architecture]
        _tell_of_other_hardware(run, studies_of_run(storage, facts.run))
    if not trials:
        raise RunDirectoryError(f"{run.directory.path} has no finished trial; {_where_trials_are(run)}")
    holding = holding_budgets(trials, [parse_budget(text) for text in run.recipe.search.budgets])
    # Every target was searched for, and held within what timing can tell; something has to stand beside the baselines;
    # and what only just holds in the search may miss when it is timed again, so stricter ones follow.
    speeds = dict.fromkeys((*run.recipe.search.targets, rules.baselines_at))
    aims = [parse_pick(f"{run.speed}>={speed * (1 - HOLDS_WITHIN):.17g}") for speed in speeds]
    wanted = [pick, *aims, pick.stricter(MARGIN), *(aim.stricter(MARGIN) for aim in aims)]
    chosen = candidates_for_front(holding, run.speed, rules.size, wanted)
    ids = [sorted(record.id for record in records) for records in (trials, chosen)]
    split_hashes = [run.tokens["validation"].hash, *run.quoted_hashes]
    key = hash_of(run.study_name, ids, split_hashes, rules.decisive())
    if not run.directory.is_done("front", key, run.directory.front):
        run.baseline_libraries(rules.baselines)
        entrants = [entrant(run, name) for name in dict.fromkeys(rules.baselines)]
        beside = choose_beside(entrants, rules.baselines_at, run.show)
        measured = _measure_front(run, chosen, beside)
        run.directory.write_front(with_verdicts(measured, rules.usable_ppl_ratio))
        run.directory.mark_done("front", key)
    measured = read_front(run.directory)
    # What counts as usable may change without anything being measured again.
    judged = with_verdicts(measured, rules.usable_ppl_ratio)
    if judged != measured:
        run.directory.write_front(judged)
    return judged


def _where_trials_are(run: Run) -> str:
    searched = run.directory.read_provenance().get("study", {}).get("storage", _place(run))
    if searched == _place(run):
        return "run llmprune search first"
    if searched == run.directory.journal.name:
        return "its search was made without --storage"
    return f"its search was made with --storage {searched}"


def _measure_front(run: Run, chosen: Sequence[Record], beside: Mapping[Entrant, Architecture]) -> Front:
    judge = run.judge("validation", run.recipe.front.repeats)
    with run.show("re-measuring on validation tokens") as advance:
        parent = judge.parent_record()
        children: list[Record] = []
        for record in chosen:
            advance(len(children), len(chosen) + len(beside))
            children.append(judge.judge(record.architecture, record.name))
        baselines: list[tuple[Record, Entrant]] = []
        for rival, architecture in beside.items():
            advance(len(children) + len(baselines), len(chosen) + len(beside))
            # A child whose logits are NaN is no baseline.
            with suppress(ModelError):
                baselines.append((rival.measure(architecture), rival))
        advance(len(chosen) + len(beside), len(chosen) + len(beside))
    chosen_children = non_dominated((record for record in children if record.is_finite), run.speed)
    with run.show("measuring what is quoted, on text that nothing was chosen on"):
        quoting = run.quoting()
        return Front(
            parent=quote(parent, quoting),
            children=tuple(quote(record, quoting) for record in chosen_children),
            baselines=tuple(quote(record, rival.quoting) for record, rival in baselines),
        )


def export(run: Run, pick: Pick, to: Path, *, force: bool = False) -> dict[str, Any]:
    """Write the picked child to `to`, proven in a fresh process; returns what was written.

    Raises BudgetError if no child holds the pick, ExportError if the directory is taken, the child is unusable or the
    proof fails; without `force` only, but for the proof.
    """
    check_destination(to, force=force)
    measured = read_front(run.directory)
    record = pick_record([*measured.children, *measured.baselines] if pick.child else measured.children, pick)
    if record.exportable is False:
        raise ExportError(
            f"{record.id} is a {record.name} child, whose biases no {run.parent.model.config.model_type} "
            "checkpoint holds; it is there to compare, pick another"
        )
    if not record.usable and not force:
        raise ExportError(unusable(record, run.recipe.front.usable_ppl_ratio))
    with run.show(f"exporting {record.id} and proving it"):
        return _write(run, record, to, force=force, formats=True)


def write_children(run: Run) -> list[Path]:
    """Write every usable child of the front to the run's `children/ID`, unless it is there already."""
    children = [record for record in read_front(run.directory).children if record.usable]
    paths = [run.directory.children / record.id for record in children]
    with run.show("writing and proving the front's checkpoints") as advance:
        for done, (path, record) in enumerate(zip(paths, children, strict=True), start=1):
            if not path.exists():
                _write(run, record, path, force=False)
            advance(done, len(paths))
    return paths


def _write(run: Run, record: Record, to: Path, *, force: bool, formats: bool = False) -> dict[str, Any]:
    child = prune(run.parent, record.architecture, _library_of(run, record))
    provenance = {key: value for key, value in run.directory.read_provenance().items() if key not in _LOCAL}
    recipe = run.recipe.model_dump(mode="json")
    # A checkpoint travels: it names files, not the places they had on this machine.
    recipe["model"]["path"], recipe["export"]["to"] = run.parent.source, None
    recipe["model"]["dtype"] = dtype_of(run.parent.model)
    if (tokenizer := recipe["model"]["tokenizer"]) and exists(tokenizer):
        recipe["model"]["tokenizer"] = Path(tokenizer).name
    for source in (*recipe["data"]["sources"], *recipe["data"]["unseen"]):
        source["path"] = source["path"] and Path(source["path"]).name
    parent = {"shape": asdict(run.parent.shape), "figures": read_front(run.directory).parent.to_json()}
    metadata = {
        "id": record.id,
        "figures": record.stored(),
        "parent": parent,
        "provenance": provenance,
        "recipe": recipe,
    }
    written: list[dict[str, Any]] = []

    def further(staging: Path) -> None:
        if formats:
            written.extend(write_formats(child, run.parent.tokenizer, run.recipe.deploy, staging))

    proof = write_checkpoint(
        child, run.parent.tokenizer, record.architecture, metadata, to, force=force, further=further
    )
    return {
        "directory": str(to),
        "id": record.id,
        "hash": record.hash,
        "proof": asdict(proof),
        "formats": written,
        "figures": record.to_json(),
    }


def _library_of(run: Run, record: Record) -> BlockLibrary:
    """The library that a measured child was cut from. Raises ExportError if it is not as it was."""
    own = [name for name, m in METHODS.items() if m.importance and m.importance.method == record.library]
    library = run.baseline_libraries(own)[own[0]] if own else run.library
    if child_id(record.hash, library.hash, record.done) != record.id:
        raise ExportError(
            f"{record.id} was measured with another block library than the run has now; delete {run.directory.front} "
            "and run llmprune front again"
        )
    return library


def compress(run: Run, to: Path, *, report: Report | None = None, force: bool = False) -> dict[str, Any]:
    """Every stage in order: search, front, the front's checkpoints, and the recipe's pick exported to `to`.

    A checkpoint that is at `to` already and is the picked child is left as it is. An unusable one is not exported:
    then `exported` is None, and `not_exported` says why.
    """
    written = exported_id(to)
    replaces_own = written is not None and to == run.directory.export
    # Found out now rather than after the search; whether a checkpoint that is there is the pick, only then.
    check_destination(to, force=force or written is not None)
    for line in told(search(run, report).failed_because):
        run.say(line)
    measured = front(run)
    if run.recipe.front.checkpoints == "all":
        write_children(run)
    pick = parse_pick(run.recipe.export.pick)
    picked = pick_record(measured.children, pick)
    if not picked.usable:
        why = unusable(picked, run.recipe.front.usable_ppl_ratio)
        return {**measured.stored(), "exported": None, "not_exported": why}
    exported = {"directory": str(to), "id": picked.id, "hash": picked.hash}
    if written != picked.id:
        exported = export(run, parse_pick(picked.id), to, force=force or replaces_own)
    return {**measured.stored(), "exported": exported}


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
