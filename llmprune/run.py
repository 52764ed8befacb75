"""The pipeline in order. A stage whose stored input hash matches is skipped: that is the whole resume mechanism."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

from llmprune.architecture import Architecture
from llmprune.errors import ExportError, ModelError, RunDirectoryError, StorageError
from llmprune.files import read_json, write_json
from llmprune.measure.host import fingerprint
from llmprune.models.checkpoint import METADATA_FILE, check_destination, write_checkpoint
from llmprune.models.surgery import prune
from llmprune.recipe import BaselineName, BaselinesRecipe
from llmprune.run_directory import RunDirectory, hash_of
from llmprune.search.baselines.book import Book, Entry
from llmprune.search.baselines.contest import Entrant, choose_beside, compare, front_entries
from llmprune.search.baselines.given import Given
from llmprune.search.baselines.ledger import effort_of
from llmprune.search.baselines.methods import ALL_TABLES, METHODS
from llmprune.search.budgets import Pick, parse_budget, parse_pick, pick_record
from llmprune.search.evaluate import RECORD_KEYS, Record, is_finite
from llmprune.search.front import candidates_for_front, holding_budgets, non_dominated
from llmprune.search.samplers.guide import HOLDS_WITHIN
from llmprune.search.samplers.make import GUIDED
from llmprune.search.storage import masked, opened_storage
from llmprune.search.studies import Candidate, check_inputs, elsewhere, on_this_hardware, studies_of_run
from llmprune.search.study import (
    Report,
    SearchOutcome,
    finished_trials,
    join_study,
    open_study,
    prepare_study,
    work,
)
from llmprune.search.warm_starts import MARGIN, warm_starts
from llmprune.workspace import Run

# Facts of a run directory that are no part of a checkpoint's provenance.
_LOCAL = ("stages", "study")


def search(run: Run, report: Report | None = None) -> SearchOutcome:
    """Search until the recipe's trials or minutes are used up; trials that are there, and other workers', count."""
    # Opened first: a storage that cannot be used is found out before the hours that the library may take.
    with opened_storage(run.storage, run.directory.journal) as storage:
        return _work(run, start_study(run, storage), report)


def start_study(run: Run, storage: BaseStorage) -> optuna.Study:
    """All that the trials of a search need, made or loaded, and its study, ready for workers."""
    rules = run.recipe.search
    tables, facts = run.tables, run.study_facts()
    study = open_study(storage, facts.name, rules, run.guide)
    facts.write(study, rules.trials)
    starts = warm_starts(tables.delta_nats, tables.influence, tables.costs, rules.objective, rules.targets, run.path)
    if rules.sampler in GUIDED:
        # They need somewhere to start from; a population would need variety as well.
        starts = [start for start in starts if start[0] == "parent" or start in run.path]
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


def front(run: Run) -> dict[str, Any]:
    """Re-measure the best trials and the baselines on validation tokens; writes and returns `front.json`.

    Raises RunDirectoryError if no trial has finished, BudgetError if none holds the recipe's budgets.
    """
    rules, pick = run.recipe.front, parse_pick(run.recipe.export.pick)
    with opened_storage(run.storage, run.directory.journal) as storage:
        facts = run.study_facts()
        found = [trial.user_attrs["record"] for trial in _trials_of(storage, facts.name)]
        trials = [record for record in found if record["hash"] != run.parent.shape.architecture.hash]
        _tell_of_other_hardware(run, studies_of_run(storage, facts.run))
    if not trials:
        raise RunDirectoryError(f"{run.directory.path} has no finished trial; {_where_trials_are(run)}")
    hashes = sorted(record["hash"] for record in trials)
    key = hash_of(
        run.study_name, hashes, run.tokens["validation"].hash, rules.model_dump(), pick.text, run.recipe.search.targets
    )
    if not run.directory.is_done("front", key, run.directory.front):
        holding = holding_budgets(trials, [parse_budget(text) for text in run.recipe.search.budgets])
        # Every target was searched for, and held within what timing can tell; something has to stand beside the
        # baselines; and what only just holds in the search may miss when it is timed again, so stricter ones follow.
        speeds = dict.fromkeys((*run.recipe.search.targets, rules.baselines_at))
        aims = [parse_pick(f"{run.speed}>={speed * (1 - HOLDS_WITHIN):.17g}") for speed in speeds]
        wanted = [pick, *aims, pick.stricter(MARGIN), *(aim.stricter(MARGIN) for aim in aims)]
        chosen = candidates_for_front(holding, run.speed, rules.size, wanted)
        run.baseline_libraries(rules.baselines)
        entrants = [_entrant(run, name) for name in dict.fromkeys(rules.baselines)]
        beside = choose_beside(entrants, rules.baselines_at, run.show)
        write_json(run.directory.front, _measure_front(run, chosen, beside))
        run.directory.mark_done("front", key)
    return read_front(run.directory)


def _where_trials_are(run: Run) -> str:
    searched = run.directory.read_provenance().get("study", {}).get("storage", _place(run))
    if searched == _place(run):
        return "run llmprune search first"
    if searched == run.directory.journal.name:
        return "its search was made without --storage"
    return f"its search was made with --storage {searched}"


def _trials_of(storage: BaseStorage, name: str) -> list[FrozenTrial]:
    """A study's finished trials, none if there is no study yet."""
    if name not in optuna.get_all_study_names(storage):
        return []
    return finished_trials(optuna.load_study(storage=storage, study_name=name))


def _measure_front(run: Run, chosen: Sequence[Record], beside: Mapping[Entrant, Architecture]) -> dict[str, Any]:
    candidates = [(record["name"], Architecture.from_json(record["architecture"])) for record in chosen]
    judge = run.judge("validation", run.recipe.front.repeats)
    with run.show("re-measuring on validation tokens") as advance:
        parent = judge.parent_record()
        children: list[Record] = []
        for name, architecture in candidates:
            advance(len(children), len(candidates) + len(beside))
            children.append(judge.judge(architecture, name))
        baselines: list[Record] = []
        for entrant, architecture in beside.items():
            advance(len(children) + len(baselines), len(candidates) + len(beside))
            # A child whose logits are NaN is no baseline.
            with suppress(ModelError):
                baselines.append(entrant.measure(architecture))
        advance(len(candidates) + len(beside), len(candidates) + len(beside))
    return {
        "parent": parent,
        "children": non_dominated(filter(is_finite, children), run.speed),
        "baselines": baselines,
    }


def _entrant(run: Run, name: BaselineName) -> Entrant:
    rules = run.recipe.search
    library = run.baseline_libraries([name])[name]
    chooser = run.judge("search", 1, name, tokens=_greedy_tokens(run, name))
    given = partial(Given, run.parent, library, run.tables, rules.objective, _draws(run), rules.seed)
    return Entrant(
        name,
        partial(given, remember=chooser.scorer.remember),
        chooser,
        run.judge("validation", run.recipe.front.repeats, name),
        METHODS[name].preparation_tokens(run.tokens["calibration"].tokens, run.recipe.tables.tokens),
    )


def _greedy_tokens(run: Run, name: BaselineName) -> int | None:
    return run.recipe.baselines.greedy_tokens if METHODS[name].greedy else None


def baselines(run: Run, rules: BaselinesRecipe) -> dict[str, Any]:
    """What each method loses at the same measured speed-ups, on the tokens and at the workload of the front, beside
    the children of the front if there is one; kept in `baselines.json`.

    Raises RunDirectoryError if the run has no tables.
    """
    if not run.directory.tables.is_file():
        raise RunDirectoryError(f"{run.directory.path} has no tables yet; run llmprune search first")
    book = Book.open(run.directory.baselines, run.directory.baseline_scores)
    same = [run.tables.to_json(), run.study_name, run.tokens["validation"].hash, run.recipe.front.repeats]
    parent = book.parent(hash_of(*same))
    if parent is None:
        with run.show("measuring the parent"):
            parent = run.judge("validation", run.recipe.front.repeats).parent_record()
        book.put_parent(parent, hash_of(*same))
    targets = sorted(set(rules.at))
    keys = {
        name: hash_of(
            name, METHODS[name].facts(run.recipe.search.seed, _draws(run), run.recipe.baselines.greedy_tokens), *same
        )
        for name in rules.methods
    }
    # All at once, so that what several methods need of the calibration tokens comes from one pass.
    run.baseline_libraries(name for name, key in keys.items() if book.missing(name, targets, key))
    found = compare(book, partial(_entrant, run), keys, targets, parent, run.speed, run.show)
    return {"parent": parent, "speed": run.speed, "results": [*_of_front(run, targets), *found]}


def _of_front(run: Run, targets: Sequence[float]) -> list[Entry]:
    """The search itself; nothing if there is no front."""
    if not run.directory.front.is_file():
        return []
    trials = _trials(run)
    prepared = run.tokens["calibration"].tokens + ALL_TABLES * run.recipe.tables.tokens
    seconds = sum(trial.duration.total_seconds() for trial in trials if trial.duration)
    effort = effort_of(len(trials), run.tokens["search"].tokens, prepared, seconds)
    return front_entries(read_front(run.directory), run.speed, targets, effort)


def _draws(run: Run) -> int:
    draws = run.recipe.front.random_draws
    return len(_trials(run)) if draws is None else draws


def _trials(run: Run) -> list[FrozenTrial]:
    with opened_storage(run.storage, run.directory.journal) as storage:
        return _trials_of(storage, run.study_name)


def read_front(directory: RunDirectory) -> dict[str, Any]:
    """The front that is stored. Raises RunDirectoryError if there is none, or it is damaged."""
    if not directory.front.is_file():
        raise RunDirectoryError(f"{directory.path} has no front yet; run llmprune front first")
    data = read_json(directory.front)
    if not _is_front(data):
        raise RunDirectoryError(f"{directory.front} is damaged; delete it and run llmprune front again")
    return data


def _is_front(data: Any) -> TypeGuard[dict[str, Any]]:
    if not isinstance(data, dict) or {"parent", "children", "baselines"} - data.keys():
        return False
    if not isinstance(data["children"], list) or not isinstance(data["baselines"], list):
        return False
    every = [data["parent"], *data["children"], *data["baselines"]]
    return all(isinstance(record, dict) and record.keys() >= RECORD_KEYS for record in every)


def export(run: Run, pick: Pick, to: Path, *, force: bool = False) -> dict[str, Any]:
    """Write the picked child to `to`, proven in a fresh process; returns what was written.

    Raises BudgetError if no child holds the pick, ExportError if the directory is taken or the proof fails.
    """
    check_destination(to, force=force)
    measured = read_front(run.directory)
    record = pick_record([*measured["children"], *measured["baselines"]] if pick.hash else measured["children"], pick)
    if not record.get("exportable", True):
        raise ExportError(
            f"{record['hash']} is a {record['name']} child, whose biases no {run.parent.model.config.model_type} "
            "checkpoint holds; it is there to compare, pick another"
        )
    with run.show(f"exporting {record['hash']} and proving it"):
        return _write(run, dict(record), to, force=force)


def write_children(run: Run) -> list[Path]:
    """Write every child of the front to the run's `children/HASH`, unless it is there already."""
    children = read_front(run.directory)["children"]
    paths = [run.directory.children / record["hash"] for record in children]
    with run.show("writing and proving the front's checkpoints") as advance:
        for done, (path, record) in enumerate(zip(paths, children, strict=True), start=1):
            if not path.exists():
                _write(run, record, path, force=False)
            advance(done, len(paths))
    return paths


def _write(run: Run, record: Record, to: Path, *, force: bool) -> dict[str, Any]:
    architecture = Architecture.from_json(record["architecture"])
    own = [name for name, method in METHODS.items() if name == record["name"] and method.importance]
    library = run.baseline_libraries(own)[own[0]] if own else run.library
    child = prune(run.parent, architecture, library)
    provenance = {key: value for key, value in run.directory.read_provenance().items() if key not in _LOCAL}
    recipe = run.recipe.model_dump(mode="json")
    # A checkpoint travels: it names files, not the places they had on this machine.
    recipe["model"]["path"], recipe["export"]["to"] = run.parent.source, None
    if (tokenizer := recipe["model"]["tokenizer"]) and Path(tokenizer).expanduser().exists():
        recipe["model"]["tokenizer"] = Path(tokenizer).name
    for source in recipe["data"]["sources"]:
        source["path"] = source["path"] and Path(source["path"]).name
    metadata = {"figures": record, "provenance": provenance, "recipe": recipe}
    proof = write_checkpoint(child, run.parent.tokenizer, architecture, metadata, to, force=force)
    return {"directory": str(to), "hash": record["hash"], "proof": asdict(proof), "figures": record}


def compress(run: Run, to: Path, *, report: Report | None = None, force: bool = False) -> dict[str, Any]:
    """Every stage in order: search, front, the front's checkpoints, and the recipe's pick exported to `to`.

    A checkpoint that is at `to` already and is the picked child is left as it is.
    """
    written = exported_hash(to)
    replaces_own = written is not None and to == run.directory.export
    # Found out now rather than after the search; whether a checkpoint that is there is the pick, only then.
    check_destination(to, force=force or written is not None)
    search(run, report)
    measured = front(run)
    if run.recipe.front.checkpoints == "all":
        write_children(run)
    pick = parse_pick(run.recipe.export.pick)
    picked = pick_record(measured["children"], pick)
    exported = {"directory": str(to), "hash": written}
    if written != picked["hash"]:
        exported = export(run, pick, to, force=force or replaces_own)
    return {**measured, "exported": exported}


def exported_hash(directory: Path) -> str | None:
    """Hash of the child in a checkpoint directory of ours, if it is one."""
    metadata = directory / METADATA_FILE
    return str(read_json(metadata).get("hash")) if metadata.is_file() else None
