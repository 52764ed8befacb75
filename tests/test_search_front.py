"""The front against its definition, and what is worth re-measuring."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tiny import record_of

from llmprune.choices.architecture import Architecture
from llmprune.core.budgets import Axes, parse_budget, parse_pick, pick_record
from llmprune.core.errors import BudgetError
from llmprune.measure.record import Record
from llmprune.search.front import candidates_for_front, holding_budgets, non_dominated

SPEED = "decode_speedup"
AXES = Axes("nats_per_token", SPEED)
# Few values, so that ties happen.
POINTS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=14)


def records(points: list[tuple[int, int]]) -> list[Record]:
    return [record_of(Architecture.of([(1, i + 1)]), nats / 2, speed / 3) for i, (nats, speed) in enumerate(points)]


def point(record: Record) -> tuple[float, float]:
    return record.nats_per_token, record.value(SPEED)


def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] <= other[0] and one[1] >= other[1] and one != other


@given(POINTS)
def test_the_front_is_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    everything = [point(record) for record in records(points)]
    front = [point(record) for record in non_dominated(records(points), AXES)]
    assert set(front) == {p for p in everything if not any(beats(other, p) for other in everything)}
    assert len(set(front)) == len(front), "of two alike, one"
    assert front == sorted(front), "slowest first, which is best first"


# Parameters grow with the place in the list.
PICKS = ["decode_speedup>=1.3", "decode_speedup>=2.5", "ppl_ratio<=2", "params<=2", "decode_speedup>=99"]


@example([(1, 1), (9, 9)], 1, ["decode_speedup>=2.5", "params<=2"])
@example([(1, 1), (9, 9)], 1, ["ppl_ratio<=2", "decode_speedup>=1.3"])
@given(POINTS, st.integers(1, 6), st.lists(st.sampled_from(PICKS), max_size=3, unique=True))
def test_candidates_are_few_and_hold_what_the_picks_would_choose(
    points: list[tuple[int, int]], size: int, picks: list[str]
) -> None:
    front = non_dominated(records(points), AXES)
    chosen = candidates_for_front(records(points), AXES, size, [parse_pick(pick) for pick in picks])
    ids = [record.id for record in chosen]
    assert len(chosen) == len(set(ids)) == min(size, len(front))
    assert set(ids) <= {record.id for record in front}
    assert [point(record) for record in chosen] == sorted(point(record) for record in chosen)
    wanted: dict[str, None] = {}
    for pick in picks:
        with suppress(BudgetError):
            wanted[pick_record(front, parse_pick(pick)).id] = None
    assert set(list(wanted)[:size]) <= set(ids), "earlier picks come first"


@pytest.mark.parametrize(("size", "speeds"), [(1, [8.0]), (2, [1.0, 8.0]), (3, [1.0, 2.8, 8.0])])
def test_candidates_spread_over_the_speeds_on_a_log_scale(size: int, speeds: list[float]) -> None:
    front = [
        record_of(Architecture.of([(1, i)]), 1 + i, speed)
        for i, speed in enumerate((1.0, 1.1, 1.2, 2.8, 6.5, 7.0, 8.0), start=1)
    ]
    assert [record.value(SPEED) for record in candidates_for_front(front, AXES, size, [])] == speeds


def test_a_child_that_is_named_is_re_measured_though_another_beats_it() -> None:
    beaten, best = records([(4, 3), (2, 6)])
    for name in (beaten.id, beaten.hash):
        chosen = candidates_for_front([beaten, best], AXES, 2, [parse_pick(name)])
        assert {record.id for record in chosen} == {beaten.id, best.id}


def test_only_trials_that_hold_the_budgets_reach_the_front() -> None:
    all_three = records([(1, 3), (2, 6), (3, 9)])
    assert holding_budgets(all_three, []) == all_three
    assert holding_budgets(all_three, [parse_budget("decode_speedup>=2"), parse_budget("nats_per_token<=1")]) == [
        all_three[1]
    ]
    with pytest.raises(BudgetError, match=r"none of 3 trials holds the budgets decode_speedup>=9"):
        holding_budgets(all_three, [parse_budget("decode_speedup>=9")])
