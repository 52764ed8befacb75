"""Trials that come to nothing: what counts as a failure, why it happened, and when a search gives up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import NamedTuple

import optuna
from optuna.trial import FrozenTrial

from llmprune.choices.architecture import Architecture
from llmprune.core.errors import ArchitectureError, ModelError, SearchError, shortened
from llmprune.core.memory import tells_of_memory, what_takes_less
from llmprune.core.progress import SEARCHING
from llmprune.measure.record import Record
from llmprune.search.judging import Judge
from llmprune.search.workers.claims import failed_trials
from llmprune.search.workers.reaping import WARM_START, why_failed

FAILURES_IN_A_ROW = 10
"""So many trials of one worker that came to nothing, one after the other: it is not the children."""

REASONS_TOLD = 3


class Fault(Enum):
    """Whose fault a failure is."""

    SPACE = "no such child can be"
    CHILD = "the child computes nothing of use"
    JUDGING = "judging raised"


class Failure(NamedTuple):
    """Why the judge has no record of a child."""

    reason: str
    fault: Fault


def attempt(judge: Judge, architecture: Architecture, name: str) -> Record | Failure:
    """Judge an architecture; whatever that raises is a failure with its reason, but for the user's interrupt."""
    try:
        record = judge.judge(architecture, name)
    except ArchitectureError as error:
        return Failure(shortened(error), Fault.SPACE)
    except ModelError as error:
        return Failure(shortened(error), Fault.CHILD)
    except Exception as error:  # noqa: BLE001 - a search of hours outlives whatever one child does to a device
        return Failure(shortened(f"{type(error).__name__}: {error}"), Fault.JUDGING)
    return record if record.is_finite else Failure("the child computes no finite loss", Fault.CHILD)


class Streak:
    """The failures of one worker since its last success."""

    def __init__(self, study: optuna.Study) -> None:
        self._study = study
        self._reasons: list[str] = []
        self._given_up: list[int] = []

    def end(self) -> None:
        """A trial was judged."""
        self._reasons, self._given_up = [], []

    def add(self, number: int, failure: Failure) -> None:
        """Count the failure of a trial. Raises SearchError if it is one too many in a row.

        Then the starting points that were given up meanwhile are queued again, since they are not to blame.
        """
        if failure.fault is Fault.SPACE:
            return
        self._reasons.append(failure.reason)
        if failure.fault is Fault.JUDGING:
            self._given_up.append(number)
        if len(self._reasons) < FAILURES_IN_A_ROW:
            return
        self._queue_starting_points()
        less = f"; {what_takes_less(failure.reason, SEARCHING)}" if tells_of_memory(failure.reason) else ""
        raise SearchError(
            f"{FAILURES_IN_A_ROW} trials in a row came to nothing here, the last because of: {failure.reason}; mend "
            f"that{less}, and start the same command again: it goes on with the trials and starting points that are "
            "there"
        )

    def _queue_starting_points(self) -> None:
        trials = self._study.get_trials(deepcopy=False)
        for trial in (trials[number] for number in self._given_up):
            if WARM_START in trial.user_attrs and why_failed(trial) is not None:
                self._study.enqueue_trial(trial.params, user_attrs={WARM_START: trial.user_attrs[WARM_START]})


def counted_reasons(trials: Sequence[FrozenTrial]) -> dict[str, int]:
    """Why architectures failed for good, and how many of them for each reason, the most frequent first."""
    return dict(Counter(str(why_failed(trial)) for trial in failed_trials(trials).values()).most_common())


def told(failed_because: Mapping[str, int]) -> list[str]:
    """How many failed and why, in a few lines; none if none failed."""
    if not failed_because:
        return []
    total = sum(failed_because.values())
    lines = [f"{total} trial{'s' if total > 1 else ''} failed:"]
    lines += [f"  {count} x {reason}" for reason, count in list(failed_because.items())[:REASONS_TOLD]]
    if (others := sum(list(failed_because.values())[REASONS_TOLD:])) > 0:
        lines.append(f"  {others} for other reasons")
    return lines
