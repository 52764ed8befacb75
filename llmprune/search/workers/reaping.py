"""Trials that are to be judged again, since their worker is gone or judging raised: ended, and queued exactly once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages._heartbeat import BaseHeartbeat, is_heartbeat_enabled
from optuna.trial import FrozenTrial, Trial, TrialState

from llmprune.search.workers.liveness import BEAT, Life, Pulse, Worker, life_of
from llmprune.search.workers.storage import GRACE_SECONDS

WARM_START = "warm_start"
"""Trial's user attribute: the label of a trial that was queued as a starting point."""

WORKER = "worker"
"""Trial's user attribute: who works on it."""

FREED = "freed"
"""Trial's user attribute, written before it is failed: its parameters are to be queued again, and why."""

RETRY_OF = "retry_of"
"""Trial's user attribute: the number of the freed trial whose parameters it has."""

DEATHS = "deaths"
"""Trial's user attribute: how many workers died over these parameters."""

MAX_DEATHS = 10
"""What kills its worker each time (by the memory it takes, say) is given up, lest the search never ends."""

RAISED = "raised"
"""Trial's user attribute, written before it is freed: what judging it raised at a try that was not the last."""

TRIES = "tries"
"""Trial's user attribute: how often judging these parameters raised before."""

MAX_TRIES = 2
"""What raises once may be chance (a GPU that is shared, say); what raises again is this child's own."""

FAILED_BECAUSE = "failed_because"
"""Trial's user attribute: why it failed for good."""

NAMELESS_SECONDS = 5.0
"""A trial gets its worker's name a moment after it is begun; one that has none for so long lost its worker then."""

_GONE, _RELEASED = "its worker is gone", "released by its worker"


def was_queued(trial: FrozenTrial) -> bool:
    """Whether its parameters were queued, as a starting point's or a freed trial's are, and not proposed."""
    return "fixed_params" in trial.system_attrs


def why_failed(trial: FrozenTrial) -> str | None:
    """Why a trial was given up; None if it was not."""
    if trial.state != TrialState.FAIL:
        return None
    if _deaths(trial) >= MAX_DEATHS:
        return f"its worker died, {MAX_DEATHS} times"
    reason = trial.user_attrs.get(FAILED_BECAUSE)
    return None if reason is None else str(reason)


def _deaths(trial: FrozenTrial) -> int:
    return int(trial.user_attrs.get(DEATHS, 0)) + (trial.user_attrs.get(FREED) == _GONE)


def ask(study: optuna.Study, worker: Worker) -> tuple[Trial, Pulse]:
    """Optuna's `ask` for a worker that may die at any moment; enter the pulse for as long as the trial is worked on.

    The sampler is asked only after the trial has its first heartbeat, without which Optuna never calls one stale, and
    its worker's name. Optuna's own `ask` is for processes that cannot die, and warns of a storage with heartbeats.
    Raises UpdateFinishedTrialError if the trial was taken away in that moment.
    """
    storage = study._storage
    trial_id = _take_queued(study)
    if trial_id is None:
        trial_id = storage.create_new_trial(study._study_id)
    pulse = Pulse(storage, trial_id)
    pulse.beat()
    storage.set_trial_user_attr(trial_id, WORKER, worker)
    study._thread_local.cached_all_trials = None
    return Trial(study, trial_id), pulse


def _take_queued(study: optuna.Study) -> int | None:
    trials = study.get_trials(deepcopy=False)
    for trial in trials:
        if trial.state == TrialState.WAITING and _begin(study, trial):
            if not _is_duplicate(trial, trials):
                return trial._trial_id
            study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
    return None


def _begin(study: optuna.Study, trial: FrozenTrial) -> bool:
    """Take a queued trial; False if another worker was first."""
    try:
        return study._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
    except UpdateFinishedTrialError:
        return False


class Reaper:
    """Frees the trials of one study whose workers are gone."""

    def __init__(self, study: optuna.Study) -> None:
        self._study = study
        self._last_seen: dict[int, tuple[Any, float]] = {}

    def reap(self) -> list[FrozenTrial]:
        """Free what the dead left running; returns all trials as they are then.

        Safe beside other workers that do the same.
        """
        trials = self._study.get_trials(deepcopy=False)
        running = [trial for trial in trials if trial.state == TrialState.RUNNING]
        if [trial for trial in running if self._lost_its_worker(trial) and free(self._study, trial, _GONE)]:
            trials = self._study.get_trials(deepcopy=False)
        # Also what another reaper failed and, dying in its turn, did not queue.
        return self._study.get_trials(deepcopy=False) if queue_freed(self._study, trials) else trials

    def _lost_its_worker(self, trial: FrozenTrial) -> bool:
        worker = trial.user_attrs.get(WORKER)
        if worker is None:
            return self._unchanged(trial, None, NAMELESS_SECONDS)
        life = life_of(worker)
        if life is not Life.UNKNOWN:
            return life is Life.GONE
        storage = self._study._storage
        if is_heartbeat_enabled(storage):
            assert isinstance(storage, BaseHeartbeat)
            return trial._trial_id in storage._get_stale_trial_ids(self._study._study_id)
        return self._unchanged(trial, trial.user_attrs.get(BEAT), GRACE_SECONDS)

    def _unchanged(self, trial: FrozenTrial, sign: Any, seconds: float) -> bool:
        """Whether a sign of life is the same for so long, by this process's clock: those of hosts differ."""
        now = time.monotonic()
        known, since = self._last_seen.get(trial.number, (object(), now))
        if known != sign:
            self._last_seen[trial.number] = (sign, now)
            return False
        return now - since > seconds


def release(study: optuna.Study, trial: Trial) -> None:
    """Give a trial back that this worker cannot finish; its parameters are queued again."""
    free(study, study._storage.get_trial(trial._trial_id), _RELEASED)
    queue_freed(study, study.get_trials(deepcopy=False))


def try_again(study: optuna.Study, trial: Trial, reason: str) -> bool:
    """Queue a trial's parameters again after judging it raised; False if that was their last try.

    Raises UpdateFinishedTrialError if the trial was taken from this worker.
    """
    if trial.user_attrs.get(TRIES, 0) + 1 >= MAX_TRIES:
        return False
    trial.set_user_attr(RAISED, reason)
    release(study, trial)
    return True


def free(study: optuna.Study, trial: FrozenTrial, reason: str) -> bool:
    """End a running trial whose parameters are to be queued again; False if it was finished already.

    Of two that free one trial the storage lets one fail it. The reason is written first, so that whoever looks later
    knows a trial that is failed and has no successor, should this process die in between.
    """
    try:
        study._storage.set_trial_user_attr(trial._trial_id, FREED, reason)
        return study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
    except UpdateFinishedTrialError:
        return False


def queue_freed(study: optuna.Study, trials: Sequence[FrozenTrial]) -> int:
    """Queue the parameters of every freed trial that has no successor yet; returns how many.

    Two workers may find the same trial at once and both queue it. Numbers are given in order of creation, so each sees
    the other's if that is smaller, and drops its own; and one that died before it did is dropped when it is asked for.
    """
    succeeded = {trial.user_attrs[RETRY_OF] for trial in trials if RETRY_OF in trial.user_attrs}
    queued = 0
    for trial in trials:
        if trial.state != TrialState.FAIL or FREED not in trial.user_attrs or trial.number in succeeded:
            continue
        # A queued trial has parameters that it had not asked for yet when its process went.
        params = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        deaths = _deaths(trial)
        tries = trial.user_attrs.get(TRIES, 0) + (RAISED in trial.user_attrs)
        if params and deaths < MAX_DEATHS:
            label = {key: value for key, value in trial.user_attrs.items() if key == WARM_START}
            counts = {DEATHS: deaths, TRIES: tries}
            study.enqueue_trial(params, user_attrs={**label, RETRY_OF: trial.number, **counts})
            _drop_duplicates(study, trial.number)
            queued += 1
    return queued


def _drop_duplicates(study: optuna.Study, number: int) -> None:
    trials = study.get_trials(deepcopy=False)
    for trial in trials:
        waits = trial.state == TrialState.WAITING and trial.user_attrs.get(RETRY_OF) == number
        if waits and _is_duplicate(trial, trials) and _begin(study, trial):
            study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)


def _is_duplicate(trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> bool:
    """Whether another successor of the same freed trial came first."""
    retried = trial.user_attrs.get(RETRY_OF)
    return retried is not None and any(
        other.user_attrs.get(RETRY_OF) == retried for other in trials if other.number < trial.number
    )
