"""Scores on disk: found again to the bit, extended, never trusted when damaged."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import tokens

from llmprune.choices.architecture import Architecture
from llmprune.core.errors import RunDirectoryError
from llmprune.data.tokens import SourceTokens, Split
from llmprune.measure.quality.score_store import ScoreStore, StoredScorer
from llmprune.measure.quality.scores import Counts, WindowScores

SEQ_LEN = 8
ALL = {"news": 6, "a source: with/odd characters": 3}
NONE = dict.fromkeys(ALL, 0)
ODD = "a source: with/odd characters"
FIRST, SECOND = Architecture.of([(2, 8), (0, 4)]), Architecture.of([(2, 8), (1, 4)])


def split_of(seed: int = 0) -> Split:
    sources = {name: SourceTokens(tokens(n, SEQ_LEN, seed), torch.full((n,), 30)) for name, n in ALL.items()}
    return Split("search", sources, {"news": 0.7, ODD: 0.3}, SEQ_LEN, bos=False)


def figures(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(n, dtype=torch.float64, generator=generator) for name, n in ALL.items()}


def same(one: WindowScores | None, other: WindowScores | None) -> bool:
    if one is None or other is None or (one.kl is None) != (other.kl is None):
        return one is other
    pairs = [(one.nats, other.nats), *([(one.kl, other.kl)] if one.kl is not None and other.kl is not None else [])]
    return all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)


class Counting:
    """A scorer of known figures that counts windows."""

    batch_windows = 1

    def __init__(self, *, kl: bool = False) -> None:
        self.whole = WindowScores(figures(), figures(1) if kl else None)
        self.windows = 0

    def score_range(self, architecture: Architecture, start: Counts, stop: Counts) -> WindowScores:
        self.windows += sum(stop[name] - start[name] for name in stop)
        return self.whole.between(start, stop)


@pytest.mark.parametrize("kl", [False, True])
def test_what_was_put_is_found_again(tmp_path: Path, kl: bool) -> None:
    scores = WindowScores(figures(), figures(1) if kl else None)
    scores.nats["news"][2] = math.inf
    ScoreStore(tmp_path, "library", split_of(), 16 if kl else None).put(FIRST, scores)
    store = ScoreStore(tmp_path, "library", split_of(), 16 if kl else None)
    assert same(store.get(FIRST), scores)
    assert store.get(SECOND) is None
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".safetensors"]


def test_another_library_slice_or_k_is_another_score(tmp_path: Path) -> None:
    ScoreStore(tmp_path, "library", split_of(), 16).put(FIRST, WindowScores(figures(), figures()))
    for store in (
        ScoreStore(tmp_path, "other", split_of(), 16),
        ScoreStore(tmp_path, "library", split_of(1), 16),
        ScoreStore(tmp_path, "library", replace(split_of(), weights={"news": 0.6, ODD: 0.4}), 16),
        ScoreStore(tmp_path, "library", split_of(), 17),
        ScoreStore(tmp_path, "library", split_of()),
    ):
        assert store.get(FIRST) is None


def test_a_file_under_a_wrong_name_is_not_believed(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path, "library", split_of())
    store.put(FIRST, WindowScores(figures()))
    store.path(SECOND).write_bytes(store.path(FIRST).read_bytes())
    assert store.get(SECOND) is None


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "text"])
def test_a_damaged_file_is_ignored_and_rewritten(tmp_path: Path, damage: str) -> None:
    store = ScoreStore(tmp_path, "library", split_of())
    scorer = StoredScorer(Counting(), store)
    expected = scorer.score(FIRST)
    whole = store.path(FIRST).read_bytes()
    damaged = {"empty": b"", "cut": whole[:-9], "flipped": whole[:-1] + bytes([whole[-1] ^ 1]), "text": b"not tensors"}
    store.path(FIRST).write_bytes(damaged[damage])
    assert store.get(FIRST) is None
    assert same(scorer.score(FIRST), expected) and scorer.scored_windows == 2 * 9
    assert same(store.get(FIRST), expected)


def test_what_cannot_be_read_is_an_error_that_names_it(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path, "library", split_of())
    store.path(FIRST).mkdir(parents=True)
    with pytest.raises(RunDirectoryError, match=FIRST.hash):
        store.get(FIRST)


def test_scores_that_do_not_fit_are_not_stored(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path, "library", split_of())
    for scores in (
        WindowScores({"news": torch.zeros(6, dtype=torch.float64)}),
        WindowScores({name: torch.zeros(n) for name, n in ALL.items()}),
        WindowScores({name: torch.zeros(n + 1, dtype=torch.float64) for name, n in ALL.items()}),
        WindowScores(figures(), figures()),
    ):
        with pytest.raises(AssertionError, match="do not fit"):
            store.put(FIRST, scores)


@pytest.mark.parametrize("kl", [False, True])
def test_no_window_is_scored_twice(tmp_path: Path, kl: bool) -> None:
    def fresh() -> tuple[Counting, StoredScorer]:
        counting = Counting(kl=kl)
        return counting, StoredScorer(counting, ScoreStore(tmp_path, "library", split_of(), 16 if kl else None))

    counting, scorer = fresh()
    part = {"news": 2, ODD: 1}
    assert same(scorer.score_range(FIRST, NONE, part), counting.whole.head(part))
    assert counting.windows == 3
    more = {"news": 4, ODD: 1}
    assert same(scorer.score_range(FIRST, part, more), counting.whole.between(part, more))
    assert counting.windows == 5
    counting, scorer = fresh()
    assert same(scorer.score_range(FIRST, NONE, part), counting.whole.head(part)) and counting.windows == 0
    assert same(scorer.score(FIRST), counting.whole) and counting.windows == 4
    assert same(scorer.score(FIRST), counting.whole) and counting.windows == 4
    assert (scorer.found_windows, scorer.scored_windows) == (3 + 5 + 9, 4)


def test_a_range_beyond_what_is_known_is_filled_from_there(tmp_path: Path) -> None:
    counting = Counting()
    scorer = StoredScorer(counting, ScoreStore(tmp_path, "library", split_of()))
    start = {"news": 3, ODD: 1}
    assert same(scorer.score_range(FIRST, start, ALL), counting.whole.between(start, ALL))
    assert same(scorer.score(FIRST), counting.whole) and counting.windows == 9


def test_workers_that_write_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    def work(seed: int) -> int:
        store, wrong = ScoreStore(tmp_path, "library", split_of()), 0
        for _ in range(20):
            store.put(FIRST, WindowScores(figures(seed)))
            found = store.get(FIRST)
            # A file that is replaced while it is read counts as damaged, and its architecture as not scored yet.
            wrong += found is not None and not any(same(found, WindowScores(figures(s))) for s in range(3))
        return wrong

    with ThreadPoolExecutor(3) as workers:
        assert list(workers.map(work, range(3))) == [0, 0, 0]
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1


def test_the_store_tells_how_many_windows_it_holds(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path, "library", split_of())
    assert store.windows() == {}
    whole = WindowScores(figures())
    store.put(FIRST, whole)
    store.put(SECOND, whole.head({"news": 2, ODD: 1}))
    assert store.windows() == {FIRST.hash: 9, SECOND.hash: 3}
    store.path(SECOND).write_bytes(b"torn")
    assert store.windows() == {FIRST.hash: 9}, "a corrupt file holds nothing"
