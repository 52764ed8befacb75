"""The stage that searches: what guides it, the study it fills, and the trials that are there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

from llmprune.blocks.library import BlockLibrary
from llmprune.choices.architecture import Architecture
from llmprune.core.budgets import parse_pick
from llmprune.core.files import read_json, write_json
from llmprune.core.progress import SEARCHING
from llmprune.core.recipe import Recipe, SearchRecipe
from llmprune.data.tokens import TokenSplits
from llmprune.measure.speed.host import fingerprint
from llmprune.measure.speed.throughput import Workload
from llmprune.pipeline.judges import Judges
from llmprune.pipeline.prepare import Ground, Prepared, Stock, cut_text, lay_ground, score_choices, solve_blocks
from llmprune.pipeline.run import Run
from llmprune.pipeline.run_directory import hash_of
from llmprune.search.guidance import Estimates, Seed, seeds_from_json, seeds_to_json, walked_seeds, winner
from llmprune.search.samplers.guide import Guide
from llmprune.search.samplers.make import GUIDED
from llmprune.search.study import Report, SearchOutcome, finished_trials, join_study, open_study, prepare_study, work
from llmprune.search.trial_records import check_records
from llmprune.search.warm_starts import MARGIN, parents_in_types, warm_starts
from llmprune.search.workers.studies import Candidate, StudyFacts, check_inputs, elsewhere, studies_of_run
from llmprune.tables.allocate import Allocator

GUIDED_STARTS = ("parent", "typed", "path", "allocated", "uniform")
"""Kinds of starting points of a guided sampler. Over a short way the knapsack at the parent may beat the path, whose
later estimates are of fewer tokens."""


def estimates_for(run: Run, prepared: Prepared) -> Estimates:
    """Estimated nats of every choice at any architecture."""
    rules = run.recipe.tables
    return Estimates(
        prepared.parent,
        prepared.tokens["estimate"],
        prepared.library,
        rules.path_tokens,
        prepared.workload.device,
        prepared.shrinkage,
        prepared.tables.together,
        of_parent=prepared.scores,
        caution=rules.caution,
    )


def walk_path(run: Run, prepared: Prepared, estimates: Estimates) -> list[Seed]:
    """Labelled seeds, one for each of the recipe's targets that a path from the parent reaches."""
    search, rules, tables = run.recipe.search, run.recipe.tables, prepared.tables
    file = run.directory.seeds
    made_of = [prepared.library.hash, prepared.tokens["estimate"].hash, tables.to_json()]
    key = hash_of(*made_of, search.objective, search.targets, rules.model_dump())
    if not run.directory.is_done("seeds", key, file):
        write_json(file, seeds_to_json(walked_seeds(estimates.at, tables.costs, search, rules, run.show)))
        run.directory.mark_done("seeds", key)
    return seeds_from_json(prepared.space, read_json(file), file)


def guide_for(run: Run, prepared: Prepared, judges: Judges, estimates: Estimates) -> Guide | None:
    """What a guided sampler knows; None if the recipe's is none."""
    search, split = run.recipe.search, prepared.tokens["search"]
    if search.sampler not in GUIDED:
        return None

    def raced(candidates: Sequence[Architecture]) -> Architecture:
        return winner(judges.scorer(split), split, candidates, prepared.workload.device)

    allocator = Allocator(prepared.scores, prepared.tables.costs)
    return Guide(allocator, search.axes, _aims(run), raced, estimates.at)


def _aims(run: Run) -> tuple[float, ...]:
    """The targets; those that the export's pick demands are aimed at from above, since a pick is a hard limit."""
    demanded = {b.limit for b in parse_pick(run.recipe.export.pick).budgets if b.metric == run.speed}
    return tuple(target * MARGIN if target in demanded else target for target in run.recipe.search.targets)


def start_study(run: Run, storage: BaseStorage, prepared: Prepared, judges: Judges) -> optuna.Study:
    """The study of a search, its starting points queued, ready for workers."""
    rules, tables, facts = run.recipe.search, prepared.tables, study_facts(run, prepared)
    estimates = estimates_for(run, prepared)
    study = open_study(storage, facts.name, rules, guide_for(run, prepared, judges, estimates))
    facts.write(study, rules.trials)
    path = walk_path(run, prepared, estimates)
    if rules.objective == "draft":
        # In fewer bits alone a parent may be its own best draft.
        path = [*((f"typed-{name}", whole) for name, whole in parents_in_types(prepared.space)), *path]
    starts = warm_starts(prepared.scores, tables.influence, tables.costs, rules.phase, rules.targets, path)
    if rules.sampler in GUIDED:
        # They need somewhere to start from, and must not end behind the plainest child; a population needs variety.
        starts = [start for start in starts if start[0].partition("-")[0] in GUIDED_STARTS]
    prepare_study(study, rules, prepared.space, starts)
    noted = {"run": facts.run, "storage": run.place}
    if run.directory.read_provenance().get("study") != noted:
        run.directory.note(study=noted)
    tell_of_other_hardware(run, studies_of_run(storage, facts.run))
    return study


def go_on_with_study(run: Run, storage: BaseStorage, name: str, stock: Stock, judges: Judges) -> optuna.Study:
    """The study that another process started, for a worker; only guided samplers need the tables."""
    guide = None
    if run.recipe.search.sampler in GUIDED:
        prepared = score_choices(run, stock)
        guide = guide_for(run, prepared, judges, estimates_for(run, prepared))
    return join_study(storage, name, run.recipe.search, guide)


def run_trials(
    run: Run,
    study: optuna.Study,
    judges: Judges,
    report: Report | None,
    look: Callable[[], None] = lambda: None,
) -> SearchOutcome:
    """Judge architectures until the study's trials or the recipe's minutes are used up; `look` is called now and then,
    between trials."""
    rules = run.recipe.search
    check_records(finished_trials(study), run.place_of_run)
    judge = judges.judge("search", run.recipe.workload.repeats)
    with run.show(SEARCHING) as advance:

        def progress(done: int, total: int) -> None:
            advance(done, total)
            look()

        return work(study, judge, rules, judges.stock.space, report, progress)


def tell_of_other_hardware(run: Run, found: Sequence[Candidate]) -> None:
    if others := elsewhere(found, fingerprint()):
        run.say(f"{run.place} also holds {others} trials of this run from other hardware; they are not compared")


def trials_of(storage: BaseStorage, name: str) -> list[FrozenTrial]:
    """A study's finished trials, none if there is no study yet."""
    if name not in optuna.get_all_study_names(storage):
        return []
    return finished_trials(optuna.load_study(storage=storage, study_name=name))


def study_name(run: Run, stock: Stock) -> str:
    """Trials of one study compare: same children, same tokens, same workload, same kind of machine."""
    search = run.recipe.search
    return hash_of(
        stock.library.hash,
        stock.tokens["search"].hash,
        _on_any_device(stock.workload),
        fingerprint(),
        [search.objective, list(search.budgets), *_rewarded(search)],
    )[:16]


def study_facts(run: Run, stock: Stock) -> StudyFacts:
    """What `search` writes into its study, for workers to compare."""
    hashes = _of_recipe(run.recipe) | _of_ground(stock) | _of_tokens(stock.tokens) | _of_library(stock.library)
    # The number of threads is the hardware's, unless the recipe names it.
    workload = {**_on_any_device(stock.workload), "threads": run.recipe.workload.threads}
    key = hash_of({**hashes, "workload": hash_of(workload)})[:16]
    return StudyFacts(study_name(run, stock), key, hashes, fingerprint())


def join_stock(run: Run, joined: Candidate) -> Stock:
    """What a worker cuts children from, each part held to the study's as soon as it is there, the cheap ones first.

    Raises StorageError if one is not the study's.
    """
    check_inputs(joined, _of_recipe(run.recipe).items())
    ground = lay_ground(run)
    check_inputs(joined, _of_ground(ground).items())
    tokens = cut_text(run, ground)
    check_inputs(joined, _of_tokens(tokens).items())
    library = solve_blocks(run, ground, tokens)
    check_inputs(joined, _of_library(library).items())
    return Stock(**vars(ground), tokens=tokens, library=library)


# Name and hash of all that decides what a trial means.


def _of_recipe(recipe: Recipe) -> dict[str, str]:
    search = recipe.search
    # Studies from before there were these choices have a hash without the words.
    unsaid = {
        word for word in ("merge_kv", "precision", "vocabulary", "hidden_size") if not getattr(recipe.space, word)
    }
    return {
        "objective and budgets": hash_of(search.objective, list(search.budgets), *_rewarded(search)),
        "space": hash_of(recipe.space.model_dump(mode="json", exclude=unsaid)),
    }


def _of_ground(ground: Ground) -> dict[str, str]:
    return {"parent": ground.parent_hash, "workload": hash_of(_on_any_device(ground.workload))}


def _of_tokens(tokens: TokenSplits) -> dict[str, str]:
    return {"calibration tokens": tokens["calibration"].hash, "search tokens": tokens["search"].hash}


def _of_library(library: BlockLibrary) -> dict[str, str]:
    return {"library": library.hash}


def _on_any_device(workload: Workload) -> dict[str, Any]:
    """One of several like GPUs is as good as another."""
    return {**workload.to_json(), "device": workload.device.partition(":")[0]}


def _rewarded(search: SearchRecipe) -> list[Any]:
    """What a scalar reward depends on; nothing where there is none."""
    return [] if search.reward == "front" else [search.reward, list(search.targets)]
