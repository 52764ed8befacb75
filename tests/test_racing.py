"""Races whose outcome is known: from tables of figures, and once from a real scorer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from closeness import tolerance
from families import CASES, Slices, tiny_parent, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from transformers import PreTrainedModel

from llmprune.choices.architecture import Architecture
from llmprune.choices.ffn import FfnChoice
from llmprune.core.errors import ModelError
from llmprune.data.tokens import SourceTokens, Split
from llmprune.measure.quality import prefix
from llmprune.measure.quality.held_children import HeldChildren, own_bytes
from llmprune.measure.quality.perplexity import quality_from_windows, score
from llmprune.measure.quality.prefix import PrefixScorer
from llmprune.measure.quality.racing import (
    ALPHA,
    FloatArray,
    mixture_samples,
    p_value_of_worse,
    race,
    smallest_p_value,
    stages_of,
    still_racing,
)
from llmprune.measure.quality.scores import Counts, WindowScores
from llmprune.models.parent import Parent
from llmprune.models.surgery import Repairs, prune

SEQ_LEN = 8
FIGURES = st.floats(1, 100)


def split_of(windows: Mapping[str, int], weights: Mapping[str, float] | None = None) -> Split:
    sources = {name: SourceTokens(tokens(n, SEQ_LEN), torch.full((n,), 30)) for name, n in windows.items()}
    total = sum(windows.values())
    return Split("search", sources, weights or {name: n / total for name, n in windows.items()}, SEQ_LEN, bos=False)


SPLIT = split_of({"news": 24, "code": 8})
ALL = {"news": 24, "code": 8}


def named(number: int) -> Architecture:
    return Architecture.of([(1, number)])


class Table:
    """A scorer that looks figures up, and counts what it is asked for. Candidate `number` is `named(number)`."""

    def __init__(self, figures_CN: FloatArray, batch_windows: int = 1) -> None:
        self.figures_CN = figures_CN
        self.batch_windows = batch_windows
        self.asked: Counter[tuple[int, str, int]] = Counter()
        self.held: set[Architecture] = set()

    def hold(self, architecture: Architecture) -> None:
        self.held.add(architecture)

    def let_go(self, architecture: Architecture) -> None:
        self.held.discard(architecture)

    def all_of(self, number: int) -> WindowScores:
        news, code = np.split(self.figures_CN[number], [ALL["news"]])
        return WindowScores({"news": torch.from_numpy(news), "code": torch.from_numpy(code)})

    def score_range(self, architecture: Architecture, start: Counts, stop: Counts) -> WindowScores:
        number = architecture.layers[0].ffn.ffn_width
        self.asked.update((number, name, i) for name in stop for i in range(start[name], stop[name]))
        found = self.all_of(number).between(start, stop)
        if any(values.isnan().any() for values in found.nats.values()):
            raise ModelError("NaN")
        return found


def table(*means: float, noise: float = 0.1, seed: int = 0) -> Table:
    """Windows differ a lot, candidates by their mean and a little noise."""
    draws = np.random.default_rng(seed)
    windows_N = 30 + 10 * draws.standard_normal(32)
    return Table(np.array(means)[:, None] + windows_N + noise * draws.standard_normal((len(means), 32)))


def candidates(scorer: Table) -> list[Architecture]:
    return [named(number) for number in range(len(scorer.figures_CN))]


def test_the_best_is_kept_and_losers_leave_early() -> None:
    scorer = table(0.0, 3.0, 6.0, 0.05)
    raced = race(scorer, SPLIT, candidates(scorer), shares=(0.25, 0.5, 1.0))
    assert [lane.kept for lane in raced] == [True, False, False, True]
    assert [lane.stage for lane in raced] == [2, 0, 0, 2]
    assert [lane.windows for lane in raced] == [32, 8, 8, 32]
    assert max(scorer.asked.values()) == 1 and sum(scorer.asked.values()) == 2 * 32 + 2 * 8
    for number in (0, 3):
        scores = raced[number].scores
        assert scores is not None
        for name, values in scorer.all_of(number).nats.items():
            assert torch.equal(scores.nats[name], values)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(means=st.lists(st.integers(0, 5), min_size=2, max_size=6), seed=st.integers(0, 99), batch=st.integers(1, 6))
def test_clear_differences_end_as_a_full_evaluation_does(means: list[int], seed: int, batch: int) -> None:
    scorer = table(*[5.0 * mean for mean in means], noise=0.0, seed=seed)
    scorer.batch_windows = batch
    raced = race(scorer, SPLIT, candidates(scorer))
    assert [lane.kept for lane in raced] == [mean == min(means) for mean in means]
    assert max(scorer.asked.values()) == 1
    finished = [lane.windows == 32 for lane in raced if lane.kept]
    assert all(finished)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    figures_CN=arrays(np.float64, (4, 32), elements=FIGURES),
    worse_N=arrays(np.float64, 32, elements=st.floats(0, 5)),
    alpha=st.floats(0.001, 0.5),
)
def test_an_equal_of_the_incumbent_is_never_rejected(figures_CN: FloatArray, worse_N: FloatArray, alpha: float) -> None:
    incumbent_N = figures_CN.min(axis=0)
    scorer = Table(np.vstack([figures_CN + worse_N, incumbent_N]))
    raced = race(scorer, SPLIT, candidates(scorer), incumbent=scorer.all_of(4), alpha=alpha, survivors=0)
    assert raced[4].kept and raced[4].windows == 32


def test_the_incumbent_is_neither_scored_nor_dropped() -> None:
    scorer = table(0.0, 5.0, 6.0)
    incumbent = scorer.all_of(0)
    raced = race(scorer, SPLIT, candidates(scorer)[1:], incumbent=incumbent, survivors=0)
    assert [lane.kept for lane in raced] == [False, False]
    assert {number for number, _, _ in scorer.asked} == {1, 2}
    kept = race(scorer, SPLIT, candidates(scorer)[1:], incumbent=incumbent, survivors=1)
    assert [lane.kept for lane in kept] == [True, False] and kept[0].windows == 32
    assert [lane.kept for lane in race(scorer, SPLIT, candidates(scorer)[:1], incumbent=scorer.all_of(2))] == [True]


def test_a_scorer_holds_who_is_asked_for_again_and_nobody_else() -> None:
    scorer, held = table(0.0, 3.0, 6.0, 0.05), []
    race(scorer, SPLIT, candidates(scorer), shares=(0.25, 0.5, 1.0), progress=lambda *_: held.append(len(scorer.held)))
    assert held == [1, 2, 3, 4, 2, 2, 1, 0], "two leave after the first stage; in the last each leaves at once"
    assert scorer.held == set()


def test_a_race_that_is_stopped_holds_nobody() -> None:
    def interrupted(stage: int, done: int, racing: int) -> None:
        if (stage, done) == (1, 1):
            raise KeyboardInterrupt

    scorer = table(0.0, 0.0)
    with pytest.raises(KeyboardInterrupt):
        race(scorer, SPLIT, candidates(scorer), progress=interrupted)
    assert scorer.held == set()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_child_loses_at_once(value: float) -> None:
    scorer = table(0.0, -50.0, 0.0)
    scorer.figures_CN[1, 3] = value
    raced = race(scorer, SPLIT, candidates(scorer), survivors=3)
    assert [lane.kept for lane in raced] == [True, False, True]
    assert raced[1].stage == 1
    assert raced[1].windows < 32
    alone = race(scorer, SPLIT, [named(1)])
    assert not alone[0].kept


def test_a_child_that_is_broken_from_the_start_has_no_scores() -> None:
    scorer = table(0.0, 0.0)
    scorer.figures_CN[1] = math.nan
    broken = race(scorer, SPLIT, candidates(scorer))[1]
    assert (broken.scores, broken.windows, broken.kept, broken.stage) == (None, 0, False, 0)


def test_progress_counts_candidates_of_a_stage() -> None:
    seen: list[tuple[int, int, int]] = []
    scorer = table(0.0, 9.0, 0.0)
    race(scorer, SPLIT, candidates(scorer), shares=(0.5, 1.0), progress=lambda *now: seen.append(now))
    assert seen == [(0, 1, 3), (0, 2, 3), (0, 3, 3), (1, 1, 2), (1, 2, 2)]


def test_a_race_by_kl() -> None:
    nats = {name: torch.ones(count, dtype=torch.float64) for name, count in ALL.items()}

    class ByKl(Table):
        def score_range(self, architecture: Architecture, start: Counts, stop: Counts) -> WindowScores:
            kl = super().score_range(architecture, start, stop).nats
            return WindowScores(WindowScores(nats).between(start, stop).nats, kl)

    scorer = ByKl(table(0.0, 5.0).figures_CN)
    assert [lane.kept for lane in race(scorer, SPLIT, candidates(scorer), figure="kl")] == [True, False]
    assert [lane.kept for lane in race(scorer, SPLIT, candidates(scorer))] == [True, True]


@settings(deadline=None)
@given(st.data())
def test_decisions(data: st.DataObject) -> None:
    rows, windows = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 12))
    figures = st.one_of(FIGURES, st.sampled_from([math.nan, math.inf]))
    samples_CN = data.draw(arrays(np.float64, (rows, windows), elements=figures))
    survivors = data.draw(st.integers(0, 6))
    kept_C = still_racing(samples_CN, survivors=survivors)
    finite_C = np.isfinite(samples_CN).all(axis=1)
    assert not (kept_C & ~finite_C).any()
    assert kept_C.sum() >= min(survivors, finite_C.sum())
    if finite_C.any():
        best = np.where(finite_C, np.where(finite_C[:, None], samples_CN, 0).sum(axis=1), np.inf).argmin()
        assert kept_C[best]
    if windows < 4:
        assert (kept_C == finite_C).all(), "too few windows to reject anything"
    order = data.draw(st.permutations(range(rows)))
    if survivors == 0:
        assert (still_racing(samples_CN[order], survivors=0) == kept_C[order]).all()


@settings(deadline=None)
@given(st.integers(1, 12))
def test_the_smallest_p_value_is_reached(windows: int) -> None:
    reference_N = np.arange(1.0, windows + 1)
    worse_N = reference_N * 1.5
    assert p_value_of_worse(worse_N, reference_N) == pytest.approx(smallest_p_value(windows))
    assert p_value_of_worse(reference_N, worse_N) == 1
    assert (smallest_p_value(windows) <= ALPHA) == (windows >= 4)


def test_rounding_is_no_difference() -> None:
    reference_N = np.linspace(100, 200, 40)
    assert p_value_of_worse(reference_N * (1 + 1e-7), reference_N) == 1
    assert p_value_of_worse(reference_N * (1 + 1e-5), reference_N) < 1e-6


def test_equals_are_rejected_as_rarely_as_alpha_says() -> None:
    draws = np.random.default_rng(0)
    pairs = draws.standard_normal((400, 2, 24)) + 50
    rejected = np.mean([p_value_of_worse(one, other) <= ALPHA for one, other in pairs])
    assert 0.02 < rejected < 0.08


def test_samples_add_up_to_the_mixture() -> None:
    figures = {"news": np.array([1.0, 3.0]), "code": np.array([5.0])}
    samples_N = mixture_samples(figures, {"news": 0.25, "code": 0.75})
    assert samples_N.tolist() == [0.125, 0.375, 3.75]
    assert samples_N.sum() == pytest.approx(0.25 * 2 + 0.75 * 5)


def test_stages_grow_by_weight_in_whole_batches() -> None:
    split = split_of({"news": 24, "code": 8})
    assert stages_of(split) == [
        {"news": 3, "code": 1},
        {"news": 6, "code": 2},
        {"news": 12, "code": 4},
        {"news": 24, "code": 8},
    ]
    assert stages_of(split, multiple=5) == [
        {"news": 5, "code": 5},
        {"news": 10, "code": 5},
        {"news": 15, "code": 5},
        {"news": 24, "code": 8},
    ]
    assert stages_of(split, multiple=100) == [{"news": 24, "code": 8}]
    skewed = split_of({"news": 16, "code": 16}, {"news": 0.25, "code": 0.75})
    assert skewed.first_windows(0.25) == {"news": 2, "code": 6}
    assert skewed.first_windows(1) == {"news": 16, "code": 16}


@given(
    windows=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    shares=st.lists(st.floats(0.01, 1), min_size=2, max_size=4).map(sorted),
    multiple=st.integers(1, 9),
)
def test_growing_shares_never_take_windows_back(windows: list[int], shares: list[float], multiple: int) -> None:
    split = split_of({str(i): count for i, count in enumerate(windows)})
    before = dict.fromkeys(split.sources, 1)
    for share in shares:
        counts = split.first_windows(share, multiple)
        for name, source in split.sources.items():
            assert before[name] <= counts[name] <= len(source.windows)
            assert counts[name] % multiple == 0 or counts[name] == len(source.windows)
        before = counts


def test_the_head_of_a_split_is_a_split() -> None:
    head = SPLIT.head({"news": 3, "code": 1})
    assert {name: len(source.windows) for name, source in head.sources.items()} == {"news": 3, "code": 1}
    assert head.tokens == 4 * SEQ_LEN and head.hash != SPLIT.hash and head.weights == SPLIT.weights
    assert SPLIT.head(ALL).hash == SPLIT.hash


def test_a_race_of_real_children_repeats_nothing() -> None:
    parent = tiny_parent(CASES[0])
    library, whole = Slices(parent), parent.shape.architecture
    racing = [whole, *(whole.with_choice(layer, FfnChoice(0)) for layer in range(4))]
    scorer = PrefixScorer(parent, library, SPLIT, batch_tokens=4 * SEQ_LEN)
    raced = race(scorer, SPLIT, racing)
    assert any(lane.kept for lane in raced)
    for lane in raced:
        assert lane.scores is not None
        head = SPLIT.head(lane.scores.counts)
        expected = score(prune(parent, lane.architecture, library), head).nats_per_token
        assert quality_from_windows(head, lane.scores.nats).nats_per_token == pytest.approx(
            expected, rel=tolerance(1.0)
        )
    windows = sum(lane.windows for lane in raced)
    assert scorer.work.plain == 4 * SEQ_LEN * windows
    assert scorer.work.candidates + scorer.work.parent < scorer.work.plain


@pytest.mark.parametrize("room", [True, False])
def test_a_candidate_is_cut_once_if_there_is_room(room: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = tiny_parent(CASES[0])
    library, whole = Slices(parent), parent.shape.architecture
    racing = [whole.with_choice(layer, FfnChoice(7)) for layer in range(4)]
    cut: Counter[Architecture] = Counter()
    most = 0

    def counted(parent: Parent, architecture: Architecture, library: Repairs) -> PreTrainedModel:
        cut[architecture] += 1
        return prune(parent, architecture, library)

    def watched(stage: int, done: int, racing: int) -> None:
        nonlocal most
        most = max(most, scorer.children_bytes)

    monkeypatch.setattr(prefix, "prune", counted)
    limit = sum(own_bytes(prune(parent, architecture, library), parent) for architecture in racing)
    scorer = PrefixScorer(parent, library, SPLIT, children_bytes=limit if room else 0, batch_tokens=SEQ_LEN)
    raced = race(scorer, SPLIT, racing, survivors=4, progress=watched)
    stages = len(stages_of(SPLIT))
    assert [lane.stage for lane in raced] == [stages - 1] * 4
    assert list(cut.values()) == [1 if room else stages] * 4
    assert scorer.children_bytes == 0 and (0 < most <= limit if room else most == 0)
    plain = PrefixScorer(parent, library, SPLIT, children_bytes=0, batch_tokens=SEQ_LEN)
    for lane in raced:
        assert lane.scores is not None
        for name, nats in plain.score(lane.architecture).nats.items():
            assert torch.equal(lane.scores.nats[name], nats)


def test_a_child_takes_what_is_not_its_parents() -> None:
    parent = tiny_parent(CASES[0])
    library, whole, hidden = Slices(parent), parent.shape.architecture, parent.shape.hidden_size
    assert own_bytes(prune(parent, whole, library), parent) == 0
    narrow = whole.with_choice(1, FfnChoice(7)).with_choice(2, FfnChoice(0))
    assert own_bytes(prune(parent, narrow, library), parent) == 3 * 7 * hidden * 4


def test_a_held_child_is_of_use_from_its_own_first_layer_on() -> None:
    parent = tiny_parent(CASES[0])
    architecture, children = parent.shape.architecture.with_choice(3, FfnChoice(7)), HeldChildren(parent, 10**6)
    children.hold(architecture)
    cuts = [prune(parent, architecture, Slices(parent)) for _ in range(2)]
    given = iter(cuts)
    assert children.child(architecture, 2, lambda: next(given)) is children.child(architecture, 2, lambda: next(given))
    assert children.child(architecture, 0, lambda: next(given)) is cuts[1]
    children.let_go(architecture)
    assert children.nbytes == 0
