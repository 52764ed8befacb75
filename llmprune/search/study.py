"""The search: an Optuna study over whole children, quality against measured speed, by any number of workers."""

from __future__ import annotations

import secrets
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState

from llmprune.choices.architecture import Architecture
from llmprune.choices.space import Space
from llmprune.core.budgets import parse_budget
from llmprune.core.progress import Advance
from llmprune.core.recipe import SearchRecipe
from llmprune.measure.record import Record
from llmprune.search.failures import Failure, Fault, Streak, attempt, counted_reasons
from llmprune.search.judging import Judge
from llmprune.search.parameters import suggest, to_params
from llmprune.search.reward import directions_of, names_of, values_of
from llmprune.search.samplers.guide import Guide
from llmprune.search.samplers.make import make_sampler
from llmprune.search.trial_records import RECORD, record_of
from llmprune.search.workers.claims import GAVE_WAY_TO, Answer, claim, has_room, known_trials
from llmprune.search.workers.liveness import Worker, at_work
from llmprune.search.workers.reaping import FAILED_BECAUSE, WARM_START, Reaper, ask, release, try_again, was_queued
from llmprune.search.workers.studies import READY, TRIALS, set_attributes

# A sampler that proposes known architectures only must not spin for ever.
PROPOSALS_PER_TRIAL = 20

SECONDS_BETWEEN_LOOKS = 0.5
"""How often a worker that found no trial to do looks whether another died over one."""

Report = Callable[[Sequence[FrozenTrial], Record], None]
"""Told of all finished trials, other workers' among them, and of the one that this worker has just made."""


@dataclass(frozen=True)
class SearchOutcome:
    """Why a worker stopped, how many trials the study had by then, how many of them this worker added, and how many
    failed for good, with the reasons (at most 200 characters each) and how many failed for each."""

    finished_trials: int
    new_trials: int
    seconds: float
    stopped_by: str
    failed_trials: int
    failed_because: dict[str, int]
    lost_workers: tuple[str, ...] = ()
    """How each worker that the search had started ended, if it was before its time (at most 200 characters each)."""


def open_study(
    storage: optuna.storages.BaseStorage, name: str, recipe: SearchRecipe, guide: Guide | None = None
) -> optuna.Study:
    """Create or load the study called `name`: minimise nats per token and maximise the measured speed-up, or maximise
    the recipe's reward. Guided samplers need a `guide` to propose."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # `load_if_exists` would add a line to the journal each time.
    try:
        if name not in optuna.get_all_study_names(storage):
            optuna.create_study(storage=storage, study_name=name, directions=directions_of(recipe))
    except DuplicatedStudyError:
        pass  # A search on another host made it in this moment.
    study = optuna.load_study(storage=storage, study_name=name)
    # A resumed sampler must not repeat the draws of the session before.
    study.sampler = make_sampler(recipe, draws=len(study.get_trials(deepcopy=False)), guide=guide)
    return study


def join_study(
    storage: optuna.storages.BaseStorage, name: str, recipe: SearchRecipe, guide: Guide | None = None
) -> optuna.Study:
    """Load a study that `search` made, to work on it beside others."""
    study = optuna.load_study(storage=storage, study_name=name)
    # Two workers that start at once must not draw alike.
    study.sampler = make_sampler(recipe, draws=secrets.randbits(32), guide=guide)
    return study


def run_study(
    study: optuna.Study,
    judge: Judge,
    recipe: SearchRecipe,
    space: Space,
    starts: Sequence[tuple[str, Architecture]],
    report: Report | None = None,
) -> SearchOutcome:
    """Set the study up for workers, and be the first of them."""
    prepare_study(study, recipe, space, starts)
    return work(study, judge, recipe, space, report)


def prepare_study(
    study: optuna.Study, recipe: SearchRecipe, space: Space, starts: Sequence[tuple[str, Architecture]]
) -> None:
    """Set the trial budget that all workers share, and queue the starting points, unless an earlier session did."""
    set_attributes(study, {TRIALS: recipe.trials})
    _name_values(study, names_of(recipe))
    _enqueue_once(study, space, starts)


def _name_values(study: optuna.Study, names: list[str]) -> None:
    """For those who look at the study with Optuna's own tools."""
    if study.metric_names != names:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            study.set_metric_names(names)


def work(
    study: optuna.Study,
    judge: Judge,
    recipe: SearchRecipe,
    space: Space,
    report: Report | None = None,
    progress: Advance = lambda done, total: None,
) -> SearchOutcome:
    """Judge architectures, beside any number of other workers, until the study's trials or our minutes are used up.

    `progress` is told, between two trials and while it waits for others, how many the study has, and how many it shall.
    Finished trials of earlier sessions count. A trial that was in flight when its worker died is judged again. An
    architecture that is proposed a second time is told its known figures, and does not count. One whose judging raises
    is tried once more, and then fails with the reason. Raises SearchError after ten failures in a row.
    """
    with at_work() as worker:
        return _work(study, judge, recipe, space, report, progress, worker)


def _work(
    study: optuna.Study,
    judge: Judge,
    recipe: SearchRecipe,
    space: Space,
    report: Report | None,
    progress: Advance,
    worker: Worker,
) -> SearchOutcome:
    began = time.monotonic()
    reaper, streak, own = Reaper(study), Streak(study), 0
    proposals_left = PROPOSALS_PER_TRIAL * recipe.trials

    def outcome(stopped_by: str) -> SearchOutcome:
        trials, seconds = study.get_trials(deepcopy=False), time.monotonic() - began
        because = counted_reasons(trials)
        return SearchOutcome(len(known_trials(trials)), own, seconds, stopped_by, sum(because.values()), because)

    while True:
        trials, budget = reaper.reap(), study.user_attrs[TRIALS]
        progress(len(known_trials(trials)), budget)
        if len(known_trials(trials)) >= budget:
            return outcome("trials")
        if recipe.minutes is not None and time.monotonic() - began > 60 * recipe.minutes:
            return outcome("minutes")
        if not has_room(trials, budget):
            # Others work on all that is left, but may die over it.
            time.sleep(SECONDS_BETWEEN_LOOKS)
            continue
        if proposals_left == 0:
            return outcome("no new proposals")
        proposals_left -= 1
        try:
            number, judged = _one_trial(study, judge, recipe, space, reaper, worker, budget)
        except UpdateFinishedTrialError:
            # This worker was silent for so long that another one took its trial.
            continue
        if isinstance(judged, Failure):
            streak.add(number, judged)
        elif judged is not None:
            streak.end()
            own += 1
            if report:
                report(finished_trials(study), judged)


def _one_trial(
    study: optuna.Study,
    judge: Judge,
    recipe: SearchRecipe,
    space: Space,
    reaper: Reaper,
    worker: Worker,
    budget: int,
) -> tuple[int, Record | Failure | None]:
    """Ask for an architecture, claim it, judge it; the trial's number, and None if there was nothing to judge.

    Raises UpdateFinishedTrialError if the trial was taken from this worker.
    """
    trial, pulse = ask(study, worker)
    try:
        with pulse:
            if isinstance(study.sampler, optuna.samplers.BaseGASampler):
                # A queued trial gets no generation by itself, and then never becomes a parent.
                study.sampler.get_trial_generation(study, study.get_trials(deepcopy=False)[trial.number])
            architecture = suggest(trial, space)
            answer, other = claim(study, trial, architecture, budget, reaper)
            if answer is Answer.GO_ON:
                return trial.number, _judge(study, trial, architecture, judge, recipe)
    except UpdateFinishedTrialError:
        raise
    except BaseException:
        # Ctrl-C, or a fault: what was in flight is done by whoever comes next.
        release(study, trial)
        raise
    if answer is Answer.REPEATS:
        assert other is not None
        _tell_again(study, trial, other)
    elif answer is Answer.NO_PLACE and was_queued(study.get_trials(deepcopy=False)[trial.number]):
        # A starting point, or what a dead worker left: kept for a search that goes on.
        release(study, trial)
    else:
        trial.set_user_attr(GAVE_WAY_TO, None if other is None else other.number)
        study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
    return trial.number, None


def finished_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that judged an architecture, each architecture once."""
    return list(known_trials(study.get_trials(deepcopy=False)).values())


def records(study: optuna.Study) -> list[Record]:
    """The record of every finished trial, measured on the search tokens."""
    return [record_of(trial) for trial in finished_trials(study)]


def _judge(
    study: optuna.Study, trial: Trial, architecture: Architecture, judge: Judge, recipe: SearchRecipe
) -> Record | Failure | None:
    """Judge, store and tell one trial; None if it was taken from this worker meanwhile."""
    record = attempt(judge, architecture, f"trial-{trial.number}")
    if isinstance(record, Failure):
        if record.fault is not Fault.JUDGING or not try_again(study, trial, record.reason):
            trial.set_user_attr(FAILED_BECAUSE, record.reason)
            study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        return record
    trial.set_user_attr(RECORD, record.stored())
    for text in recipe.budgets:
        budget = parse_budget(text)
        trial.set_constraint(str(budget), budget.violation(record.value(budget.metric)))
    told = study.tell(trial, values_of(record, recipe), skip_if_finished=True)
    return record if told.state == TrialState.COMPLETE else None


def _tell_again(study: optuna.Study, trial: Trial, known: FrozenTrial) -> None:
    trial.set_user_attr("repeats_trial", known.number)
    for key, value in known.constraints.items():
        trial.set_constraint(key, value)
    study.tell(trial, known.values, skip_if_finished=True)


def _enqueue_once(study: optuna.Study, space: Space, starts: Sequence[tuple[str, Architecture]]) -> None:
    """Queue the warm starts, unless an earlier session did; one that died between two of them is completed."""
    if study.user_attrs.get(READY):
        return
    for label, architecture in starts:
        attributes: dict[str, Any] = {WARM_START: label}
        study.enqueue_trial(to_params(architecture, space), user_attrs=attributes, skip_if_exists=True)
    study.set_user_attr(READY, True)
