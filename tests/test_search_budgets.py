"""Budgets and picks: how they read, what holds them, and which child they choose."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import record_of

from llmprune.choices.architecture import Architecture
from llmprune.core.budgets import METRICS, Budget, parse_budget, parse_pick, pick_record
from llmprune.core.errors import BudgetError
from llmprune.measure.record import Record

ANY = Architecture.of([(1, 1)])


def child(name: str, nats: float, decode: float, prefill: float, params: int) -> Record:
    return record_of(ANY, nats, decode, prefill, id=name * 16, params=params)


FRONT = [child("a", 1.1, 1.2, 1.9, 90), child("b", 1.2, 1.5, 1.4, 80), child("c", 1.6, 2.0, 1.7, 50)]


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("decode_speedup>=1.5", Budget("decode_speedup", ">=", 1.5)),
        ("  params <= 1e8 ", Budget("params", "<=", 1e8)),
        ("bytes<=500_000_000", Budget("bytes", "<=", 5e8)),
        ("ppl_ratio<=1.2", Budget("ppl_ratio", "<=", 1.2)),
        ("kv_bytes_per_token<=2.5E+3", Budget("kv_bytes_per_token", "<=", 2500)),
    ],
)
def test_budgets_read(text: str, budget: Budget) -> None:
    assert parse_budget(text) == budget


@given(st.sampled_from(METRICS), st.sampled_from([">=", "<="]), st.integers(1, 10**5).map(lambda n: n / 100))
def test_a_budget_prints_as_it_reads(metric: str, relation: str, limit: float) -> None:
    budget = Budget(metric, relation, limit)
    assert parse_budget(str(budget)) == budget


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a budget is METRIC>=NUMBER"),
        ("decode_speedup", "a budget is METRIC>=NUMBER"),
        ("decode_speedup>1.5", "a budget is METRIC>=NUMBER"),
        ("decode_speedup==1.5", "a budget is METRIC>=NUMBER"),
        ("1.5<=decode_speedup", "a budget is METRIC>=NUMBER"),
        ("decode_speedup>=fast", "a budget is METRIC>=NUMBER"),
        ("decode_speedup>=-1", "a budget is METRIC>=NUMBER"),
        ("decode_speedup>=1.2.3", "a budget is METRIC>=NUMBER"),
        ("decode_speedup>=1__0", "a budget is METRIC>=NUMBER"),
        ("params<=1e999", "a budget is METRIC>=NUMBER"),
        ("speed>=1.5", "unknown metric 'speed' in 'speed>=1.5'; known are: ppl_ratio"),
        ("params<=0", "the limit of a budget is positive; got 'params<=0'"),
    ],
)
def test_anything_else_is_refused(text: str, message: str) -> None:
    with pytest.raises(BudgetError) as caught:
        parse_budget(text)
    assert message in str(caught.value)


@given(limit=st.floats(1e-3, 1e9), value=st.floats(1e-3, 1e9))
def test_a_violation_is_the_gap_as_a_share_of_the_limit(limit: float, value: float) -> None:
    least, most = Budget("params", ">=", limit), Budget("params", "<=", limit)
    assert (least.violation(value) <= 0) == (value >= limit)
    assert (most.violation(value) <= 0) == (value <= limit)
    assert most.violation(value) == -least.violation(value) == pytest.approx(value / limit - 1)


def test_a_measured_speed_means_its_median() -> None:
    assert FRONT[0].value("decode_speedup") == 1.2
    assert FRONT[0].value("params") == 90


@pytest.mark.parametrize(
    ("pick", "chosen"),
    [
        # A speed or a size: the best quality there. Medians count, though the spread reaches further.
        ("decode_speedup>=1.1", "a"),
        ("decode_speedup>=1.2", "a"),
        ("decode_speedup>=1.3", "b"),
        ("decode_speedup>=1.6", "c"),
        ("prefill_speedup>=1.5", "a"),
        ("params<=85", "b"),
        ("params<=60", "c"),
        # A quality: the fastest there, in decode unless the pick says prefill.
        ("ppl_ratio<=1.2", "b"),
        ("ppl_ratio<=1.2, prefill", "a"),
        ("ppl_ratio<=9, decode", "c"),
        ("nats_per_token<=1.15", "a"),
        # Both: what holds all of them, then quality.
        ("decode_speedup>=1.3, ppl_ratio<=1.3", "b"),
        ("params<=95,decode_speedup>=1.3", "b"),
        ("c" * 16, "c"),
    ],
)
def test_a_pick_chooses(pick: str, chosen: str) -> None:
    for front in (FRONT, FRONT[::-1]):
        assert pick_record(front, parse_pick(pick)).id == chosen * 16


@pytest.mark.parametrize(
    ("pick", "message"),
    [
        ("decode_speedup>=2.1", "no child on the front holds 'decode_speedup>=2.1'; the nearest is cccccccccccccccc"),
        ("ppl_ratio<=1.05", "the nearest is aaaaaaaaaaaaaaaa with ppl_ratio 1.1"),
        ("decode_speedup>=1.9,ppl_ratio<=1.3", "with decode_speedup 1.5, ppl_ratio 1.2"),
        ("0" * 16, "no child has id or hash 0000000000000000; the front has: aaaaaaaaaaaaaaaa, bbbb"),
    ],
)
def test_a_pick_that_nothing_holds_names_the_nearest(pick: str, message: str) -> None:
    with pytest.raises(BudgetError) as caught:
        pick_record(FRONT, parse_pick(pick))
    assert message in str(caught.value)


@pytest.mark.parametrize("pick", ["decode_speedup>=1.5", "0" * 16])
def test_an_empty_front_says_so(pick: str) -> None:
    with pytest.raises(BudgetError, match=r"the front is empty; raise search\.trials"):
        pick_record([], parse_pick(pick))


@pytest.mark.parametrize("text", ["", "prefill", "fast", "decode_speedup>=1.5;params<=5", "0" * 15, "A" * 16])
def test_what_is_no_pick_is_refused(text: str) -> None:
    with pytest.raises(BudgetError):
        parse_pick(text)


@pytest.mark.parametrize("text", ["decode_speedup>=1.5, prefill", "params<=50, decode", "ppl<=9, prefill, decode"])
def test_a_word_that_would_not_count_is_refused(text: str) -> None:
    with pytest.raises(BudgetError, match=r"prefill(, decode)? or d"):
        parse_pick(text)


def test_a_stricter_pick_moves_every_limit_to_its_strict_side() -> None:
    stricter = parse_pick("decode_speedup>=1.5,params<=100").stricter(1.25)
    assert stricter.budgets == (Budget("decode_speedup", ">=", 1.875), Budget("params", "<=", 80))
    assert parse_pick("0" * 16).stricter(2).child == "0" * 16
