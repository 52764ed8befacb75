"""Published methods beside the search: what each loses at the same measured speed-ups as the run's own children."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from optuna.trial import FrozenTrial

from llmprune.baselines.book import Book, Entry
from llmprune.baselines.contest import Entrant, compare, front_entries
from llmprune.baselines.given import Given
from llmprune.baselines.ledger import effort_of
from llmprune.baselines.match import RULE
from llmprune.baselines.methods import ALL_TABLES, METHODS
from llmprune.core.recipe import BaselineName, BaselinesRecipe
from llmprune.measure.record import Record
from llmprune.pipeline.judges import Judges
from llmprune.pipeline.prepare import Prepared
from llmprune.pipeline.run import Run
from llmprune.pipeline.run_directory import hash_of, read_front
from llmprune.pipeline.searching import study_name, trials_of
from llmprune.search.judging import quote
from llmprune.search.samplers.slp import FROM
from llmprune.search.warm_starts import MARGIN
from llmprune.search.workers.storage import opened_storage
from llmprune.tables.together import together_architectures
from llmprune.tables.walk import estimates_of


@dataclass(frozen=True)
class Compared:
    """The entries of every method, with the parent they lose to and the figure that is the same for all: a speed-up."""

    parent: Record
    speed: str
    results: Sequence[Entry]

    def to_json(self) -> dict[str, Any]:
        return {"parent": self.parent.to_json(), "speed": self.speed, "results": list(self.results)}


@dataclass(frozen=True, eq=False)
class Contest:
    """What every method of a comparison is given."""

    run: Run
    prepared: Prepared
    judges: Judges
    trials: Sequence[FrozenTrial]
    """Of the search: luck may draw as often."""

    @property
    def draws(self) -> int:
        draws = self.run.recipe.front.random_draws
        return len(self.trials) if draws is None else draws

    def greedy_tokens(self, name: BaselineName) -> int | None:
        return self.run.recipe.baselines.greedy_tokens if METHODS[name].greedy else None

    def entrant(self, name: BaselineName) -> Entrant:
        """A baseline, ready to choose and measure children as the run's own are."""
        recipe, prepared, judges = self.run.recipe, self.prepared, self.judges
        library = judges.libraries([name])[name]
        chooser = judges.judge("search", 1, name, tokens=self.greedy_tokens(name))
        phase, seed = recipe.search.phase, recipe.search.seed
        given = partial(Given, prepared.parent, library, prepared.tables, phase, self.draws, seed)
        return Entrant(
            name,
            partial(given, remember=chooser.scorer.remember),
            chooser,
            judges.judge("validation", recipe.front.repeats, name),
            judges.quoting(name),
            METHODS[name].preparation_tokens(prepared.tokens["calibration"].tokens, recipe.tables.tokens),
        )


def contest_of(run: Run, prepared: Prepared, judges: Judges) -> Contest:
    """A comparison beside the trials that the run has."""
    with opened_storage(run.storage, run.directory.journal) as storage:
        return Contest(run, prepared, judges, trials_of(storage, study_name(run, prepared)))


def compare_methods(contest: Contest, rules: BaselinesRecipe) -> Compared:
    """What each method loses at the same measured speed-ups, on the tokens and at the workload of the front, beside
    the children of the front if there is one; kept in `baselines.json`. Children are settled on by validation tokens,
    and then measured on the splits that are quoted."""
    run, prepared, judges = contest.run, contest.prepared, contest.judges
    book = Book.open(run.directory.baselines, run.directory.baseline_scores)
    same: list[Any] = [prepared.tables.to_json(), study_name(run, prepared), prepared.tokens["validation"].hash]
    same += [run.recipe.front.repeats, *prepared.quoted_hashes, RULE]
    parent = book.parent(hash_of(*same))
    if parent is None:
        with run.show("measuring the parent"):
            parent = judges.judge("validation", run.recipe.front.repeats).parent_record()
            parent = quote(parent, judges.quoting())
        book.put_parent(parent, hash_of(*same))
    targets, seed = sorted(set(rules.at)), run.recipe.search.seed
    keys = {
        name: hash_of(name, METHODS[name].facts(seed, contest.draws, contest.greedy_tokens(name)), *same)
        for name in rules.methods
    }
    # All at once, so that what several methods need of the calibration tokens comes from one pass.
    judges.libraries(name for name, key in keys.items() if book.missing(name, targets, key))
    found = compare(book, contest.entrant, keys, targets, parent, run.speed, run.show)
    return Compared(parent, run.speed, [*_of_front(contest, targets, book), *found])


def _of_front(contest: Contest, targets: Sequence[float], book: Book) -> list[Entry]:
    """The search itself; nothing if there is no front.

    Its evaluations are all windows that its trials and races have scored in this run directory, in full slices. An
    estimate along the path, or at an incumbent other than the parent, is a forward and a backward pass.
    """
    run, prepared, trials = contest.run, contest.prepared, contest.trials
    if not run.directory.front.is_file():
        return []
    split, rules = prepared.tokens["search"], run.recipe.tables
    windows = sum(len(source.windows) for source in split.sources.values())
    baselines_own = book.scored() - {str(trial.user_attrs["hash"]) for trial in trials}
    scored = contest.judges.scorer(split).store.windows()
    evaluations = round(sum(n for key, n in scored.items() if key not in baselines_own) / windows)
    tabled = {prepared.space.shape.architecture.hash}
    estimates = len({trial.user_attrs[FROM] for trial in trials if FROM in trial.user_attrs} - tabled)
    if run.directory.seeds.is_file():
        estimates += estimates_of([target * MARGIN for target in run.recipe.search.targets], rules.path_step)
    passes = ALL_TABLES + len(together_architectures(prepared.space, rules.together))
    read = prepared.tokens["calibration"].tokens + passes * rules.tokens + 3 * estimates * rules.path_tokens
    seconds = sum(trial.duration.total_seconds() for trial in trials if trial.duration)
    effort = effort_of(evaluations, split.tokens, read, seconds)
    return front_entries(read_front(run.directory), run.speed, targets, effort)
