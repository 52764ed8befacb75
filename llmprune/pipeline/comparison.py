"""Published methods beside the search: what each loses at the same measured speed-ups as the run's own children."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

from llmprune.baselines.book import Book, Entry
from llmprune.baselines.contest import Entrant, compare, front_entries
from llmprune.baselines.given import Given
from llmprune.baselines.ledger import effort_of
from llmprune.baselines.methods import ALL_TABLES, METHODS
from llmprune.core.errors import RunDirectoryError
from llmprune.core.recipe import BaselineName, BaselinesRecipe
from llmprune.measure.record import Record
from llmprune.pipeline.run_directory import hash_of, read_front
from llmprune.pipeline.workspace import Run
from llmprune.search.judging import quote
from llmprune.search.samplers.slp import FROM
from llmprune.search.study import finished_trials
from llmprune.search.warm_starts import MARGIN
from llmprune.search.workers.storage import opened_storage
from llmprune.tables.walk import estimates_of


@dataclass(frozen=True)
class Compared:
    """The entries of every method, with the parent they lose to and the figure that is the same for all: a speed-up."""

    parent: Record
    speed: str
    results: Sequence[Entry]

    def to_json(self) -> dict[str, Any]:
        return {"parent": self.parent.to_json(), "speed": self.speed, "results": list(self.results)}


def baselines(run: Run, rules: BaselinesRecipe) -> Compared:
    """What each method loses at the same measured speed-ups, on the tokens and at the workload of the front, beside
    the children of the front if there is one; kept in `baselines.json`. Children are settled on by validation tokens,
    and then measured on the splits that are quoted.

    Raises RunDirectoryError if the run has no tables.
    """
    if not run.directory.tables.is_file():
        raise RunDirectoryError(f"{run.directory.path} has no tables yet; run llmprune search first")
    book = Book.open(run.directory.baselines, run.directory.baseline_scores)
    same = [run.tables.to_json(), run.study_name, run.tokens["validation"].hash, run.recipe.front.repeats]
    same += run.quoted_hashes
    parent = book.parent(hash_of(*same))
    if parent is None:
        with run.show("measuring the parent"):
            parent = run.judge("validation", run.recipe.front.repeats).parent_record()
            parent = quote(parent, run.quoting())
        book.put_parent(parent, hash_of(*same))
    targets = sorted(set(rules.at))
    keys = {
        name: hash_of(name, METHODS[name].facts(run.recipe.search.seed, _draws(run), _greedy_tokens(run, name)), *same)
        for name in rules.methods
    }
    # All at once, so that what several methods need of the calibration tokens comes from one pass.
    run.baseline_libraries(name for name, key in keys.items() if book.missing(name, targets, key))
    found = compare(book, partial(entrant, run), keys, targets, parent, run.speed, run.show)
    return Compared(parent, run.speed, [*_of_front(run, targets, book), *found])


def _of_front(run: Run, targets: Sequence[float], book: Book) -> list[Entry]:
    """The search itself; nothing if there is no front.

    Its evaluations are all windows that its trials and races have scored in this run directory, in full slices. An
    estimate along the path, or at an incumbent, is a forward and a backward pass.
    """
    if not run.directory.front.is_file():
        return []
    trials, split, rules = _trials(run), run.tokens["search"], run.recipe.tables
    windows = sum(len(source.windows) for source in split.sources.values())
    baselines_own = book.scored() - {str(trial.user_attrs["hash"]) for trial in trials}
    scored = run.scorer(split).store.windows()
    evaluations = round(sum(n for key, n in scored.items() if key not in baselines_own) / windows)
    estimates = len({trial.user_attrs[FROM] for trial in trials if FROM in trial.user_attrs})
    if run.directory.seeds.is_file():
        estimates += estimates_of([target * MARGIN for target in run.recipe.search.targets], rules.path_step)
    prepared = run.tokens["calibration"].tokens + ALL_TABLES * rules.tokens + 3 * estimates * rules.path_tokens
    seconds = sum(trial.duration.total_seconds() for trial in trials if trial.duration)
    effort = effort_of(evaluations, split.tokens, prepared, seconds)
    return front_entries(read_front(run.directory), run.speed, targets, effort)


def _draws(run: Run) -> int:
    draws = run.recipe.front.random_draws
    return len(_trials(run)) if draws is None else draws


def _trials(run: Run) -> list[FrozenTrial]:
    with opened_storage(run.storage, run.directory.journal) as storage:
        return trials_of(storage, run.study_name)


def entrant(run: Run, name: BaselineName) -> Entrant:
    """A baseline, ready to choose and measure children as the run's own are."""
    rules = run.recipe.search
    library = run.baseline_libraries([name])[name]
    chooser = run.judge("search", 1, name, tokens=_greedy_tokens(run, name))
    given = partial(Given, run.parent, library, run.tables, rules.objective, _draws(run), rules.seed)
    return Entrant(
        name,
        partial(given, remember=chooser.scorer.remember),
        chooser,
        run.judge("validation", run.recipe.front.repeats, name),
        run.quoting(name),
        METHODS[name].preparation_tokens(run.tokens["calibration"].tokens, run.recipe.tables.tokens),
    )


def _greedy_tokens(run: Run, name: BaselineName) -> int | None:
    return run.recipe.baselines.greedy_tokens if METHODS[name].greedy else None


def trials_of(storage: BaseStorage, name: str) -> list[FrozenTrial]:
    """A study's finished trials, none if there is no study yet."""
    if name not in optuna.get_all_study_names(storage):
        return []
    return finished_trials(optuna.load_study(storage=storage, study_name=name))
