"""Which worker judges what: no architecture twice, and no more of them than the trial budget.

Optuna's storages have no lock that workers could share, but they agree on the order of writes and reads: a journal
because every operation locks the one file, a database because a read sees all that was committed before it began (a
trial's state and attributes are read anew until it is finished), a proxy because it asks the database. On that the
claim rests. A worker

1. writes its claim: the trial, which is RUNNING, gets the attribute `hash`;
2. reads all trials, and only then decides;
3. writes `judging` if it goes on.

Of two trials with one hash let A be the one that wrote its claim last. A reads after that, so it sees B's claim. Is B
judging or complete, A gives way. Is B neither yet, the smaller number goes on: if that is B, A gives way; if that is A,
it waits until B has decided, because B may have read before A's claim was there (B gives way if it did not). So at
most one goes on, and at least one does: a trial gives way only to one that is judging, complete, or smaller and still
in the race. "The smaller number wins" alone would not do: numbers are given before claims are made, and a queued
trial's long before. The same argument, with places in the budget for hashes, keeps the total exact.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import NamedTuple

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from llmprune.choices.architecture import Architecture
from llmprune.search.trial_records import RECORD
from llmprune.search.workers.reaping import Reaper, was_queued, why_failed

HASH = "hash"
"""Trial's user attribute: the claim on an architecture."""

JUDGING = "judging"
"""Trial's user attribute: it won its claim, and takes one place of the trial budget."""

GAVE_WAY_TO = "gave_way_to"
"""Trial's user attribute: the number of the trial that judges the same architecture or failed over it, or None if the
budget is taken."""

_SECONDS_BETWEEN_LOOKS = 0.02


class Answer(Enum):
    """What a claim came to."""

    GO_ON = "go on"
    REPEATS = "repeats"
    GIVE_WAY = "give way"
    NO_PLACE = "no place"
    UNDECIDED = "undecided"


class Verdict(NamedTuple):
    """What a claim came to, and the trial that decided it."""

    answer: Answer
    other: FrozenTrial | None = None


def claim(study: optuna.Study, trial: Trial, architecture: Architecture, budget: int, reaper: Reaper) -> Verdict:
    """Claim an architecture for a running trial; returns once it is decided.

    What failed for good is judged again only if it was queued: a sampler that is told of no failure may propose it time
    and again.
    `budget` is the number of distinct architectures that the study shall finish. Raises UpdateFinishedTrialError if
    the trial was taken from this worker.
    """
    trial.set_user_attr("architecture", architecture.to_json())
    trial.set_user_attr(HASH, architecture.hash)
    trials = study.get_trials(deepcopy=False)
    failed = failed_trials(trials)
    if architecture.hash in failed and not was_queued(trials[trial.number]):
        return Verdict(Answer.GIVE_WAY, failed[architecture.hash])
    while (verdict := weigh(trial.number, architecture.hash, trials, budget)).answer is Answer.UNDECIDED:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
        # Who should decide may be dead.
        trials = reaper.reap()
    if verdict.answer is Answer.GO_ON:
        trial.set_user_attr(JUDGING, True)
    return verdict


def weigh(number: int, hash_: str, trials: Sequence[FrozenTrial], budget: int) -> Verdict:
    """Decide the claim of trial `number` by what all trials say after it was written."""
    complete = known_trials(trials)
    if hash_ in complete:
        return Verdict(Answer.REPEATS, complete[hash_])
    claimed = [
        trial
        for trial in trials
        if trial.number != number and trial.state == TrialState.RUNNING and HASH in trial.user_attrs
    ]
    ahead = [trial for trial in claimed if trial.user_attrs.get(JUDGING) or trial.number < number]
    behind = [trial for trial in claimed if not trial.user_attrs.get(JUDGING) and trial.number > number]
    for trial in ahead:
        if trial.user_attrs[HASH] == hash_:
            return Verdict(Answer.GIVE_WAY, trial)
    if len(complete) + len(ahead) >= budget:
        return Verdict(Answer.NO_PLACE)
    # Those behind give way if they see this claim, but may have decided before it was there.
    if any(trial.user_attrs[HASH] == hash_ for trial in behind) or len(complete) + len(claimed) >= budget:
        return Verdict(Answer.UNDECIDED)
    return Verdict(Answer.GO_ON)


def known_trials(trials: Sequence[FrozenTrial]) -> Mapping[str, FrozenTrial]:
    """The finished trial of every architecture that was judged, by hash; repeats have no record of their own."""
    return {
        trial.user_attrs[HASH]: trial
        for trial in trials
        if trial.state == TrialState.COMPLETE and RECORD in trial.user_attrs
    }


def failed_trials(trials: Sequence[FrozenTrial]) -> Mapping[str, FrozenTrial]:
    """The last failed trial of every architecture that was given up, by hash; not of those that were judged since."""
    known = known_trials(trials)
    failed = (trial for trial in trials if HASH in trial.user_attrs and why_failed(trial) is not None)
    return {hash_: trial for trial in failed if (hash_ := trial.user_attrs[HASH]) not in known}


def has_room(trials: Sequence[FrozenTrial], budget: int) -> bool:
    """Whether another trial would find a place in the budget, as far as can be seen before it is begun."""
    running = sum(trial.state == TrialState.RUNNING for trial in trials)
    return len(known_trials(trials)) + running < budget
