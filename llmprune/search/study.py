"""The search: an Optuna study over whole children, quality against measured speed, resumable after any end."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.exceptions import ExperimentalWarning
from optuna.samplers.nsgaii import BaseMutation
from optuna.trial import FrozenTrial, Trial, TrialState

from llmprune.architecture import Architecture
from llmprune.errors import ArchitectureError, ModelError
from llmprune.recipe import SearchRecipe
from llmprune.search.budgets import metric_value, parse_budget
from llmprune.search.evaluate import Judge, Record, is_finite
from llmprune.search.parameters import suggest, to_params
from llmprune.search.storage import WARM_START, reap_dead_trials
from llmprune.space import Space

# A sampler that proposes known architectures only must not spin for ever.
PROPOSALS_PER_TRIAL = 20

Report = Callable[[int, Record], None]


@dataclass(frozen=True)
class SearchOutcome:
    """Why a search stopped, and what it had done by then."""

    finished_trials: int
    new_trials: int
    seconds: float
    stopped_by: str


class OneRung(BaseMutation):
    """Move a block one rung up or down its ladder. Optuna's own choice is any rung: with sixty blocks that soon drops
    one that the model cannot do without."""

    def mutation(
        self, param: float, rng: np.random.RandomState, study: optuna.Study, search_space_bounds: NDArray[np.float64]
    ) -> float:
        return float(np.clip(param + rng.choice((-1.0, 1.0)), *search_space_bounds))


def open_study(storage: optuna.storages.BaseStorage, name: str, recipe: SearchRecipe) -> optuna.Study:
    """Create or load the study called `name`: minimise nats per token, maximise the measured speed-up."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # `load_if_exists` would add a line to the journal each time.
    if name in optuna.get_all_study_names(storage):
        study = optuna.load_study(storage=storage, study_name=name)
    else:
        study = optuna.create_study(storage=storage, study_name=name, directions=["minimize", "maximize"])
    # A resumed sampler must not repeat the draws of the session before.
    study.sampler = make_sampler(recipe, seed=recipe.seed + len(study.get_trials(deepcopy=False)))
    return study


def make_sampler(recipe: SearchRecipe, *, seed: int) -> optuna.samplers.BaseSampler:
    """The recipe's sampler, ready for two objectives and constraints."""
    samplers = optuna.samplers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        match recipe.sampler:
            case "nsga2":
                return samplers.NSGAIISampler(population_size=recipe.population, mutation=OneRung(), seed=seed)
            case "nsga3":
                return samplers.NSGAIIISampler(population_size=recipe.population, mutation=OneRung(), seed=seed)
            case "tpe":
                # Off by default with several objectives, and layers do depend on each other.
                return samplers.TPESampler(multivariate=True, seed=seed)
            case "gp":
                return samplers.GPSampler(seed=seed)
            case "random":
                return samplers.RandomSampler(seed=seed)


def run_study(
    study: optuna.Study,
    judge: Judge,
    recipe: SearchRecipe,
    space: Space,
    starts: Sequence[tuple[str, Architecture]],
    report: Report | None = None,
) -> SearchOutcome:
    """Judge architectures until the recipe's trials or minutes are used up.

    Finished trials of earlier sessions count. A trial that was in flight when a session died is judged again. An
    architecture that is proposed a second time is told its known figures, and does not count.
    """
    began = time.monotonic()
    reap_dead_trials(study)
    _enqueue_once(study, space, starts)
    known = {str(trial.user_attrs["hash"]): trial for trial in finished_trials(study)}
    before = len(known)
    proposals_left = PROPOSALS_PER_TRIAL * recipe.trials
    stopped_by = "trials"
    while len(known) < recipe.trials:
        if recipe.minutes is not None and time.monotonic() - began > 60 * recipe.minutes:
            stopped_by = "minutes"
            break
        if proposals_left == 0:
            stopped_by = "no new proposals"
            break
        proposals_left -= 1
        trial = study.ask()
        if isinstance(study.sampler, optuna.samplers.BaseGASampler):
            # A queued trial gets no generation by itself, and then never becomes a parent.
            study.sampler.get_trial_generation(study, study.get_trials(deepcopy=False)[trial.number])
        architecture = suggest(trial, space)
        if architecture.hash in known:
            _tell_again(study, trial, known[architecture.hash])
            continue
        record = _judge(study, trial, architecture, judge, recipe)
        if record is not None:
            known[architecture.hash] = study.get_trials(deepcopy=False)[trial.number]
            if report:
                report(len(known), record)
    return SearchOutcome(len(known), len(known) - before, time.monotonic() - began, stopped_by)


def finished_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that judged an architecture, each architecture once."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return [trial for trial in complete if "record" in trial.user_attrs]


def records(study: optuna.Study) -> list[Record]:
    """The record of every finished trial, measured on the search tokens."""
    return [trial.user_attrs["record"] for trial in finished_trials(study)]


def _judge(
    study: optuna.Study, trial: Trial, architecture: Architecture, judge: Judge, recipe: SearchRecipe
) -> Record | None:
    """Judge, store and tell one trial; None (and a failed trial) if the child cannot run or gives NaN."""
    trial.set_user_attr("hash", architecture.hash)
    trial.set_user_attr("architecture", architecture.to_json())
    try:
        record = judge.judge(architecture, f"trial-{trial.number}")
    except (ArchitectureError, ModelError) as error:
        _fail(study, trial, str(error))
        return None
    if not is_finite(record):
        _fail(study, trial, "the child computes no finite loss")
        return None
    trial.set_user_attr("record", record)
    for text in recipe.budgets:
        budget = parse_budget(text)
        trial.set_constraint(str(budget), budget.violation(metric_value(record, budget.metric)))
    study.tell(trial, [record["nats_per_token"], metric_value(record, f"{recipe.objective}_speedup")])
    return record


def _fail(study: optuna.Study, trial: Trial, reason: str) -> None:
    trial.set_user_attr("failed_because", reason)
    study.tell(trial, state=TrialState.FAIL)


def _tell_again(study: optuna.Study, trial: Trial, known: FrozenTrial) -> None:
    trial.set_user_attr("hash", known.user_attrs["hash"])
    trial.set_user_attr("repeats_trial", known.number)
    for key, value in known.constraints.items():
        trial.set_constraint(key, value)
    study.tell(trial, known.values)


def _enqueue_once(study: optuna.Study, space: Space, starts: Sequence[tuple[str, Architecture]]) -> None:
    """Queue the warm starts, unless an earlier session did; one that died between two of them is completed."""
    if study.user_attrs.get("warm_starts_queued"):
        return
    for label, architecture in starts:
        attributes: dict[str, Any] = {WARM_START: label}
        study.enqueue_trial(to_params(architecture, space), user_attrs=attributes, skip_if_exists=True)
    study.set_user_attr("warm_starts_queued", True)
