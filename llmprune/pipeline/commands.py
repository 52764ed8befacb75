"""What can be asked of a run. `compress` is every stage in order; the others are some of them. A stage whose stored
input hash matches is skipped: that is the whole resume mechanism."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmprune.baselines.methods import check_methods
from llmprune.core.budgets import Pick, parse_pick, pick_record
from llmprune.core.errors import RunDirectoryError, StorageError
from llmprune.core.recipe import BaselinesRecipe
from llmprune.measure.record import Front
from llmprune.measure.speed.host import fingerprint
from llmprune.models.checkpoint import check_destination
from llmprune.pipeline.comparison import Compared, compare_methods, contest_of
from llmprune.pipeline.crew import search_together
from llmprune.pipeline.distilling import check_recovery
from llmprune.pipeline.drafting import check_objective, export_draft
from llmprune.pipeline.exports import export_pick, exported_id, refuse_trained, write_children
from llmprune.pipeline.fronts import make_front
from llmprune.pipeline.judges import Judges
from llmprune.pipeline.prepare import lay_ground, prepare, stock_up, tell_reach
from llmprune.pipeline.recovery import as_called_now, recover_pick
from llmprune.pipeline.run import Run
from llmprune.pipeline.run_directory import read_front
from llmprune.pipeline.searching import go_on_with_study, join_stock, run_trials, start_study, tell_of_other_hardware
from llmprune.recover.team import ALONE, Team
from llmprune.search.failures import told
from llmprune.search.front import unusable
from llmprune.search.study import Report, SearchOutcome
from llmprune.search.workers.storage import opened_storage
from llmprune.search.workers.studies import on_this_hardware, studies_of_run


def compress(run: Run, to: Path, *, report: Report | None = None, force: bool = False) -> dict[str, Any]:
    """Every stage in order: search, front, recovery of the recipe's pick if the recipe names its length, the front's
    checkpoints, and the pick exported to `to`.

    A checkpoint that is at `to` already and is the picked child is left as it is. An unusable one is not exported:
    then `exported` is None, and `not_exported` says why.
    """
    if not force:
        refuse_trained(to)
    written = exported_id(to)
    replaces_own = written is not None and to == run.directory.export
    # Found out now rather than after the search; whether a checkpoint that is there is the pick, only then.
    check_destination(to, force=force or written is not None)
    if run.recipe.recover.distils:
        check_recovery(run.recipe)
    with opened_storage(run.storage, run.directory.journal) as storage:
        ground = lay_ground(run)
        tell_reach(run, ground)
        prepared = prepare(run, ground)
        judges = Judges(run, prepared)
        study = start_study(run, storage, prepared, judges)
        outcome = search_together(run, study, judges, report)
        for line in (*told(outcome.failed_because), *outcome.lost_workers):
            run.say(line)
        measured = make_front(run, storage, prepared, judges)
    if run.recipe.recover.distils:
        measured = recover_pick(run, judges, measured, parse_pick(run.recipe.export.pick))
    if run.recipe.front.checkpoints == "all":
        write_children(run, judges, measured)
    pick = parse_pick(run.recipe.export.pick)
    picked = pick_record(measured.children, pick)
    if not picked.usable:
        why = unusable(picked, run.recipe.front.usable_ppl_ratio)
        return {**measured.stored(), "exported": None, "not_exported": why}
    exported = {"directory": str(to), "id": picked.id, "hash": picked.hash}
    if written != picked.id:
        check_destination(to, force=force or replaces_own)
        exported = export_pick(run, judges, measured, parse_pick(picked.id), to, force=force or replaces_own)
    return {**measured.stored(), "exported": exported}


def search(run: Run, report: Report | None = None) -> SearchOutcome:
    """Search until the recipe's trials or minutes are used up, together with the run's workers; trials that are there,
    and other workers', count.

    Raises RecipeError, before the library is built, if a target is beyond what the space can reach.
    """
    # Opened first: a storage that cannot be used is found out before the hours that the library may take.
    with opened_storage(run.storage, run.directory.journal) as storage:
        ground = lay_ground(run)
        tell_reach(run, ground)
        prepared = prepare(run, ground)
        judges = Judges(run, prepared)
        study = start_study(run, storage, prepared, judges)
        return search_together(run, study, judges, report)


def worker(run: Run, report: Report | None = None) -> SearchOutcome:
    """Work on the study that `search` made, until the trials or minutes are used up. The run is a joined one.

    Raises StorageError if the storage cannot be used, there is no study of this run in it, or this worker's inputs or
    hardware are not the study's.
    """
    key = run.directory.read_provenance().get("study", {}).get("run")
    place = run.place_of_run if run.storage is None else run.place
    command = f"llmprune search {run.directory.path}" + (f" --storage {place}" if run.storage else "")
    missing = StorageError(f"a worker joins a study, and {place} holds none of this run; start it with {command}")
    if key is None or (run.storage is None and not run.directory.journal.is_file()):
        raise missing
    with opened_storage(run.storage, run.directory.journal) as storage:
        found = studies_of_run(storage, key)
        if not found:
            raise missing
        tell_of_other_hardware(run, found)
        joined = on_this_hardware(found, fingerprint(), place)
        stock = join_stock(run, joined)
        judges = Judges(run, stock)
        study = go_on_with_study(run, storage, joined.name, stock, judges)
        return run_trials(run, study, judges, report)


def front(run: Run) -> Front:
    """Re-measure the best trials and the baselines, and write the front (see `make_front`).

    Raises RunDirectoryError if no trial has finished, BudgetError if none holds the recipe's budgets.
    """
    with opened_storage(run.storage, run.directory.journal) as storage:
        prepared = prepare(run)
        return make_front(run, storage, prepared, Judges(run, prepared))


def baselines(run: Run, rules: BaselinesRecipe) -> Compared:
    """What published methods lose at the same measured speed-ups (see `compare_methods`).

    Raises RunDirectoryError if the run has no tables.
    """
    if not run.directory.tables.is_file():
        raise RunDirectoryError(f"{run.directory.path} has no tables yet; run llmprune search first")
    prepared = prepare(run)
    check_methods(rules.methods, prepared.parent, prepared.workload.engine, "--method")
    return compare_methods(contest_of(run, prepared, Judges(run, prepared)), rules)


def recover(run: Run, pick: Pick, team: Team = ALONE, *, baselines: bool = False) -> Front:
    """Distil the picked child of the front from its parent, as the recipe's `recover` says (see `recover_pick`)."""
    measured = read_front(run.directory)
    # Found out before anything is loaded.
    check_recovery(run.recipe, team)
    pick = as_called_now(measured, pick)
    pick_record(measured.children, pick)
    stock = team.after_the_first(lambda: stock_up(run))
    return recover_pick(run, Judges(run, stock), measured, pick, team, baselines=baselines)


def draft(run: Run, pick: Pick, to: Path, *, prompts: int, new_tokens: int, force: bool = False) -> dict[str, Any]:
    """Write the picked child of the front to `to` as its parent's draft, and measure it as one (see `export_draft`)."""
    check_objective(run)
    check_destination(to, force=force)
    measured = read_front(run.directory)
    judges = Judges(run, stock_up(run))
    return export_draft(run, judges, measured, pick, to, prompts=prompts, new_tokens=new_tokens, force=force)


def export(run: Run, pick: Pick, to: Path, *, force: bool = False) -> dict[str, Any]:
    """Write the picked child of the front to `to`, proven in a fresh process (see `export_pick`)."""
    check_destination(to, force=force)
    measured = read_front(run.directory)
    return export_pick(run, Judges(run, stock_up(run)), measured, pick, to, force=force)
