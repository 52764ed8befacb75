"""Rounds of speculative decoding, counted on text: held to rounds that are walked one by one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from llmprune.measure.quality.accepted import (
    PromptLookup,
    catch_ups_of,
    draft_speedup,
    leading_matches,
    lookup_passes,
    rounds_of,
)

MOST = 5
hits_of_a_text = st.lists(st.booleans(), min_size=1, max_size=40)
few_words = st.lists(st.integers(0, 3), min_size=2, max_size=40)


def walked(tokens: int, accepted_at: Callable[[int], int]) -> int:
    """Rounds in which a text is written, if a round that starts at a position accepts so many."""
    position = rounds = 0
    while position < tokens:
        position, rounds = position + accepted_at(position) + 1, rounds + 1
    return rounds


def leading(hits: Sequence[bool]) -> int:
    return len(list(itertools.takewhile(bool, hits)))


@given(hits_of_a_text)
def test_rounds_are_those_that_are_walked(hits: list[bool]) -> None:
    (found_K,) = rounds_of(np.array([hits]), MOST)
    expected = [walked(len(hits), lambda t, k=k: leading(hits[t : t + k])) for k in range(MOST + 1)]  # type: ignore[misc]
    assert found_K.tolist() == expected
    assert found_K[0] == len(hits) and (np.diff(found_K) <= 0).all(), "a longer draft never takes more rounds"


@given(st.lists(hits_of_a_text, min_size=1, max_size=4))
def test_texts_of_a_batch_are_counted_each_for_itself(texts: list[list[bool]]) -> None:
    lengths_N = np.array([len(hits) for hits in texts])
    # What is behind a text's end must not count, whatever it is.
    for behind in (False, True):
        hits_NT = np.full((len(texts), lengths_N.max() + 3), behind)
        for row, hits in zip(hits_NT, texts, strict=True):
            row[: len(hits)] = hits
        found_NK = rounds_of(hits_NT, MOST, lengths_N)
        for found_K, hits in zip(found_NK, texts, strict=True):
            assert found_K.tolist() == rounds_of(np.array([hits]), MOST)[0].tolist()


@given(st.integers(1, 40))
def test_a_perfect_draft_and_one_that_is_always_wrong(tokens: int) -> None:
    perfect, wrong = np.ones((1, tokens), bool), np.zeros((1, tokens), bool)
    assert rounds_of(perfect, MOST)[0].tolist() == [-(-tokens // (k + 1)) for k in range(MOST + 1)]
    assert rounds_of(wrong, MOST)[0].tolist() == [tokens] * (MOST + 1)


@given(hits_of_a_text)
def test_catch_ups_are_rounds_behind_one_that_accepted_all(hits: list[bool]) -> None:
    (found_K,) = catch_ups_of(np.array([hits]), MOST)
    for k in range(MOST + 1):
        position, expected = 0, 0
        while position < len(hits):
            accepted = leading(hits[position : position + k])
            position += accepted + 1
            expected += 0 < k == accepted and position < len(hits)
        assert found_K[k] == expected


def test_a_pass_over_two_tokens_counts_as_what_it_takes() -> None:
    hits_NT = np.ones((1, 8), bool)
    (rounds_K,), (catch_ups_K,) = rounds_of(hits_NT, 1), catch_ups_of(hits_NT, 1)
    assert (rounds_K.tolist(), catch_ups_K.tolist()) == ([8, 4], [0, 3])
    found = draft_speedup(rounds_K, 8, 0.5, [1, 1.6], catch_ups_K)
    assert found.speedups_K[1] == pytest.approx(8 / (0.5 * (1 + 3 * 1.6) + 4 * 1.6))


def test_no_text_takes_no_rounds() -> None:
    assert rounds_of(np.ones((2, 3), bool), 2, np.array([0, 3])).tolist() == [[0, 0, 0], [3, 2, 1]]
    assert rounds_of(np.ones((0, 3), bool), 2).shape == (0, 3)


@given(few_words, st.integers(1, MOST), st.integers(1, 3))
def test_look_ups_are_those_of_transformers(ids: list[int], most: int, ngram: int) -> None:
    stock = PromptLookupCandidateGenerator(
        num_output_tokens=most, max_matching_ngram_size=ngram, max_length=len(ids) + 2 * MOST
    )
    candidates, _ = stock.get_candidates(torch.tensor([ids]))
    assert PromptLookup(ids, ngram).draft(most) == candidates[0, len(ids) :].tolist()


@given(few_words, st.integers(1, 3), st.data())
def test_rounds_of_look_ups_are_those_that_are_walked(ids: list[int], ngram: int, data: st.DataObject) -> None:
    prompt_length = data.draw(st.integers(1, len(ids) - 1))

    def accepted_at(position: int, most: int) -> int:
        known = prompt_length + position
        return leading_matches(PromptLookup(ids[:known], ngram).draft(most), ids[known:])

    expected = [walked(len(ids) - prompt_length, lambda t, k=k: accepted_at(t, k)) for k in range(MOST + 1)]  # type: ignore[misc]
    passes_KK = lookup_passes(ids, prompt_length, MOST, ngram)
    assert passes_KK.sum(1).tolist() == expected
    # How much each of them drafted, walked one by one.
    for k in range(MOST + 1):
        drafted, position = [0] * (MOST + 1), 0
        while position < len(ids) - prompt_length:
            drafted[len(PromptLookup(ids[: prompt_length + position], ngram).draft(k))] += 1
            position += accepted_at(position, k) + 1
        assert passes_KK[k].tolist() == drafted


def test_a_text_that_repeats_its_prompt_is_looked_up() -> None:
    ids = [*range(12), *range(12)]
    # The first token of the repetition is new to its place; then a single 0 is enough to find what follows.
    passes_KK = lookup_passes(ids, 12, 4, 2)
    assert passes_KK.sum(1).tolist() == [12, 7, 5, 4, 4]
    assert passes_KK[4].tolist() == [1, 0, 0, 0, 3], "where nothing was found nothing was drafted"


@given(hits_of_a_text, st.floats(0.05, 1.5), st.lists(st.floats(1, 3), min_size=MOST, max_size=MOST))
def test_a_speedup_is_time_alone_by_time_in_rounds(hits: list[bool], draft: float, passes: list[float]) -> None:
    rounds_K, verify = rounds_of(np.array([hits]), MOST)[0], [1.0, *passes]
    found = draft_speedup(rounds_K, len(hits), draft, verify)
    assert found.speedups_K[0] == 1 and found.speedups_K[found.drafted] == found.speedups_K.max()
    for k in range(MOST + 1):
        spent = sum(k * draft + verify[k] for _ in range(rounds_K[k]))
        assert found.speedups_K[k] == pytest.approx(len(hits) / spent)


def test_a_draft_that_does_not_pay_is_not_used() -> None:
    found = draft_speedup(np.array([8, 8, 8]), 8, 0.5, [1, 1, 1])
    assert found.drafted == 0 and found.speedups_K.tolist() == [1, 1 / 1.5, 1 / 2]


def test_what_does_not_fit_together_is_refused() -> None:
    with pytest.raises(AssertionError, match="2 draft lengths, 3 passes"):
        draft_speedup(np.array([4, 2]), 4, 0.5, [1, 1, 1])
    with pytest.raises(AssertionError, match="4 rounds of one token each write 5 tokens"):
        draft_speedup(np.array([4, 2]), 5, 0.5, [1, 1])
    with pytest.raises(AssertionError, match="n-gram has tokens"):
        PromptLookup([1, 2], 0)


@given(hits_of_a_text, st.integers(1, MOST))
def test_a_round_behind_a_full_one_begins_with_two_tokens(hits: list[bool], most: int) -> None:
    position, behind_full, catch_ups = 0, False, 0
    while position < len(hits):
        catch_ups += behind_full
        right = leading_matches([True] * most, hits[position:])
        behind_full, position = right == most, position + right + 1
    assert catch_ups_of(np.array([hits]), most)[0, most] == catch_ups
    rounds_K, catch_ups_K = (count(np.array([hits]), most)[0] for count in (rounds_of, catch_ups_of))
    dear = [1.0, *(1.5 for _ in range(most))]
    found = draft_speedup(rounds_K, len(hits), 0.5, dear, catch_ups_K)
    spent = rounds_K[most] * (most * 0.5 + 1.5) + catch_ups * 0.5 * 0.5
    assert found.speedups_K[most] == pytest.approx(len(hits) / spent)
