"""Claims: whatever the order in which workers write and read, one judges an architecture, and the budget holds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import FrozenTrial, TrialState, create_trial

from llmprune.search.workers.claims import Answer, has_room, weigh


def trial(number: int, state: TrialState, **attributes: Any) -> FrozenTrial:
    made = create_trial(state=state, values=[1.0, 1.0] if state == TrialState.COMPLETE else None, user_attrs=attributes)
    made.number = number
    return made


class Worker:
    """One claim, step by step: write the claim, then read and decide until decided, then write the outcome, then end.

    Between any two steps others may take any number of theirs.
    """

    def __init__(self, board: dict[int, FrozenTrial], number: int, hash_: str, budget: int) -> None:
        self.board, self.number, self.hash, self.budget = board, number, hash_, budget
        self.answer: Answer | None = None
        self.judged = False
        board[number] = trial(number, TrialState.RUNNING)
        self.steps = self._steps()

    def _steps(self) -> Iterator[None]:
        self.board[self.number] = trial(self.number, TrialState.RUNNING, hash=self.hash)
        yield
        while True:
            verdict = weigh(self.number, self.hash, list(self.board.values()), self.budget)
            yield
            if verdict.answer is not Answer.UNDECIDED:
                break
        self.answer = verdict.answer
        if self.answer is not Answer.GO_ON:
            self.board[self.number] = trial(self.number, TrialState.FAIL, hash=self.hash)
            return
        self.judged = True
        self.board[self.number] = trial(self.number, TrialState.RUNNING, hash=self.hash, judging=True)
        yield
        self.board[self.number] = trial(self.number, TrialState.COMPLETE, hash=self.hash, record={})

    def step(self) -> bool:
        """Whether there was one to take."""
        return next(self.steps, self) is not self


def play(numbers: tuple[int, ...], hashes: str, budget: int, order: list[int]) -> list[Worker]:
    board: dict[int, FrozenTrial] = {}
    workers = [Worker(board, number, hash_, budget) for number, hash_ in zip(numbers, hashes, strict=True)]
    for i in order:
        workers[i % len(workers)].step()
    # Those that wait end once the others have.
    for _ in range(50):
        for worker in workers:
            worker.step()
    assert all(worker.answer for worker in workers), "a claim that is never decided"
    return workers


@pytest.mark.parametrize("numbers", [(0, 1), (1, 0)])
def test_one_of_two_goes_on_in_every_order(numbers: tuple[int, int]) -> None:
    for order in itertools.product((0, 1), repeat=8):
        workers = play(numbers, "aa", 5, list(order))
        assert sum(worker.judged for worker in workers) == 1, order


@pytest.mark.parametrize("numbers", [(0, 1), (1, 0)])
def test_one_place_is_taken_once_in_every_order(numbers: tuple[int, int]) -> None:
    for order in itertools.product((0, 1), repeat=8):
        workers = play(numbers, "ab", 1, list(order))
        assert sum(worker.judged for worker in workers) == 1, order


@given(
    st.permutations(range(4)),
    st.text("abc", min_size=4, max_size=4),
    st.integers(1, 4),
    st.lists(st.integers(0, 3), max_size=40),
)
def test_four_workers_in_any_order(numbers: list[int], hashes: str, budget: int, order: list[int]) -> None:
    workers = play(tuple(numbers), hashes, budget, order)
    judged = [worker.hash for worker in workers if worker.judged]
    assert len(judged) == len(set(judged)) <= budget
    # Whoever gave way gave way to somebody.
    assert judged
    assert all(worker.hash in judged for worker in workers if worker.answer in (Answer.REPEATS,))


def test_what_is_known_is_a_repeat_and_names_its_trial() -> None:
    known = trial(3, TrialState.COMPLETE, hash="a", record={})
    verdict = weigh(5, "a", [known, trial(5, TrialState.RUNNING, hash="a")], 1)
    assert verdict == (Answer.REPEATS, known)


def test_a_repeat_and_a_failed_trial_take_no_place() -> None:
    trials = [
        trial(0, TrialState.COMPLETE, hash="a", record={}),
        trial(1, TrialState.COMPLETE, hash="a", repeats_trial=0),
        trial(2, TrialState.FAIL, hash="b", judging=True),
        trial(3, TrialState.WAITING),
    ]
    assert has_room(trials, 2) and not has_room(trials, 1)
    assert weigh(4, "b", trials, 2).answer is Answer.GO_ON
    running = trial(5, TrialState.RUNNING)
    assert not has_room([*trials, running], 2)
    # Who has not claimed yet decides after us.
    assert weigh(6, "b", [*trials, running], 2).answer is Answer.GO_ON
