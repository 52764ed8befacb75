"""Significance, held to scipy, to enumeration, and to simulated models whose true difference is known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.stats import binomtest, multinomial

from llmprune.measure.quality.significance import Floats, mcnemar, paired_bootstrap


def answers(both: int, gained: int, lost: int, neither: int) -> tuple[list[float], list[float]]:
    reference = [1.0] * both + [0.0] * gained + [1.0] * lost + [0.0] * neither
    candidate = [1.0] * both + [1.0] * gained + [0.0] * lost + [0.0] * neither
    return reference, candidate


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (0, 1), (3, 3), (1, 9), (12, 5), (0, 30)])
def test_mcnemar_is_the_binomial_test_of_the_questions_that_differ(gained: int, lost: int) -> None:
    found = mcnemar(*answers(40, gained, lost, 17))
    n = gained + lost
    assert found.p == pytest.approx(1.0 if n == 0 else binomtest(min(gained, lost), n).pvalue)
    assert found.difference == pytest.approx((gained - lost) / (57 + n))
    assert (found.samples, found.flips) == (57 + n, n) and found.test == "mcnemar"
    assert found.low < found.difference < found.high


def test_mcnemar_is_what_enumeration_gives() -> None:
    """Every way in which 9 differing questions could have fallen, each as likely: those as uneven as 2 to 7."""
    ways = [sum(way) for way in itertools.product((0, 1), repeat=9)]
    uneven = sum(abs(2 * gained - 9) >= 5 for gained in ways)
    assert mcnemar(*answers(5, 2, 7, 5)).p == pytest.approx(uneven / len(ways))


@pytest.mark.parametrize(("gain", "loss"), [(0.1, 0.1), (0.05, 0.25), (0.02, 0.5), (0.0, 0.1)])
def test_the_interval_of_mcnemar_holds_its_confidence(gain: float, loss: float) -> None:
    """Its exact coverage: the probability of all outcomes of 30 questions whose interval holds the true difference."""
    n, covered = 30, 0.0
    for gained in range(n + 1):
        for lost in range(n + 1 - gained):
            same = n - gained - lost
            found = mcnemar(*answers(same, gained, lost, 0))
            if found.low <= gain - loss <= found.high:
                covered += multinomial.pmf([gained, lost, same], n, [gain, loss, 1 - gain - loss])
    assert covered > 0.94


def test_the_bootstrap_holds_its_confidence() -> None:
    """Two models whose losses on a document rise and fall together, the one 0.3 worse: 300 simulated evaluations."""
    generator = np.random.default_rng(5)
    covered = significant = 0
    for trial in range(300):
        hardness = generator.gamma(2.0, 1.0, (60, 1))
        reference = hardness + 0.5 * generator.standard_normal((60, 1))
        candidate = hardness + 0.3 + 0.5 * generator.standard_normal((60, 1))
        found = paired_bootstrap([reference], [candidate], draws=400, seed=trial)
        covered += found.low <= 0.3 <= found.high
        significant += found.p < 0.05
    assert 0.91 <= covered / 300 <= 0.98
    # Unpaired, the scatter of the documents (variance 2 each) would hide the difference nine times in ten.
    assert significant / 300 > 0.8


def test_the_bootstrap_finds_nothing_where_nothing_is() -> None:
    generator = np.random.default_rng(6)
    false_alarms = 0
    for trial in range(300):
        reference, candidate = generator.standard_normal((2, 80, 1))
        false_alarms += paired_bootstrap([reference], [candidate], draws=400, seed=trial).p < 0.05
    assert 0.02 <= false_alarms / 300 <= 0.09
    same = [generator.standard_normal((9, 1))]
    assert paired_bootstrap(same, same, draws=50).p == 1.0


def test_every_draw_takes_the_same_samples_of_both_models() -> None:
    """A candidate that is worse by exactly 1 on each sample is worse by exactly 1 in each draw."""
    reference = np.random.default_rng(7).standard_normal((50, 1)) * 100
    found = paired_bootstrap([reference], [reference + 1], draws=99)
    assert (found.low, found.difference, found.high) == pytest.approx((1.0, 1.0, 1.0))
    assert found.p == pytest.approx(2 / 100)


def test_strata_are_drawn_apart_and_a_ratio_is_a_ratio_of_means() -> None:
    """Constant strata cannot scatter, if no draw mixes them; and words weigh as words, not as documents."""
    strata = [np.full((4, 2), (-10.0, 5.0)), np.full((3, 2), (-2.0, 4.0))]
    worse = [np.full((4, 2), (-20.0, 5.0)), np.full((3, 2), (-4.0, 4.0))]

    def nats_a_word(means: Sequence[Floats]) -> Floats:
        return np.asarray(sum(-mean[..., 0] / mean[..., 1] for mean in means))

    found = paired_bootstrap(strata, worse, nats_a_word, draws=200)
    assert (found.low, found.difference, found.high) == pytest.approx((2.5, 2.5, 2.5))
    documents = np.array([[-1.0, 1.0], [-30.0, 10.0]])

    def perplexity(means: Sequence[Floats]) -> Floats:
        return np.exp(-means[0][..., 0] / means[0][..., 1])

    found = paired_bootstrap([documents], [documents * (2, 1)], perplexity)
    assert found.difference == pytest.approx(math.exp(62 / 11) - math.exp(31 / 11))


def test_the_bootstrap_is_the_same_each_time_and_in_any_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, candidate = np.random.default_rng(8).standard_normal((2, 30, 1))
    first = paired_bootstrap([reference], [candidate], draws=100)
    assert paired_bootstrap([reference], [candidate], draws=100) == first
    monkeypatch.setattr("llmprune.measure.quality.significance._ENTRIES", 70)
    chunked = paired_bootstrap([reference], [candidate], draws=100)
    assert chunked == first
