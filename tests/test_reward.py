"""MnasNet's reward: signs, scale and both exponents."""

from __future__ import annotations

import math

import pytest
from tiny import record_of

from llmprune.choices.architecture import Architecture
from llmprune.measure.record import Record
from llmprune.search.reward import HARD, SOFT, Exponents, reward


def record(delta_nats: float, decode: float, prefill: float = 1.0) -> Record:
    return record_of(Architecture.of([(1, 1)]), 3.0 + delta_nats, decode, prefill, ppl_ratio=math.exp(delta_nats))


def of(delta_nats: float, speedup: float, w: Exponents, target: float = 1.5) -> float:
    return reward(record(delta_nats, speedup), phase="decode", target=target, w=w)


def test_at_the_target_it_is_the_quality() -> None:
    assert of(0.3, 1.5, SOFT) == of(0.3, 1.5, HARD) == pytest.approx(math.exp(-0.3))
    assert of(0.0, 1.5, SOFT) == pytest.approx(1.0)


@pytest.mark.parametrize("w", [SOFT, HARD, Exponents(-1.0, -1.0)])
def test_better_and_faster_are_never_worth_less(w: Exponents) -> None:
    for speedup in (1.0, 1.4, 1.5, 2.0):
        assert of(0.2, speedup, w) > of(0.3, speedup, w) > 0
        assert of(0.2, speedup * 1.1, w) >= of(0.2, speedup, w)


def test_hard_pays_nothing_for_speed_beyond_the_target_and_charges_slowness_in_proportion() -> None:
    assert of(0.3, 3.0, HARD) == of(0.3, 1.5, HARD)
    assert of(0.3, 0.75, HARD) == pytest.approx(of(0.3, 1.5, HARD) / 2)


def test_soft_gives_the_paper_s_five_percent_for_half_the_time() -> None:
    assert of(0.3, 3.0, SOFT) / of(0.3, 1.5, SOFT) == pytest.approx(1.05, abs=0.001)
    # As the docstring says: in nats.
    assert of(0.05, 3.0, SOFT) == pytest.approx(of(0.0, 1.5, SOFT), rel=0.005)


def test_the_phase_says_whose_speed_counts() -> None:
    measured = record(0.0, 1.0, prefill=2.0)
    assert reward(measured, phase="prefill", target=2.0, w=HARD) == pytest.approx(1.0)
    assert reward(measured, phase="decode", target=2.0, w=HARD) == pytest.approx(0.5)
