"""What a draft saves its parent, counted on the parent's own text.

Greedy speculative decoding (Stern et al., arXiv 1811.03115; Leviathan et al., arXiv 2211.17192) goes in rounds. In each
the draft writes k tokens; the parent reads them in one pass behind the last token it has not read, keeps those that it
would have written itself, up to the first that it would not, and adds its own next token. A round so advances by one
token more than it accepts, and the text is the parent's own, whoever drafts.

So rounds can be counted without any generation: until its first miss a draft has written what the parent would have,
and reads the parent's own text. Where it would be right behind that text ("hits", one pass of the draft over the text
that the parent wrote) is all there is to know, for every k at once, and the count is exact.

A text here is the tokens that rounds produce, all that the parent wrote behind the prompt: the first round starts with
the prompt's last token unread. The last round may draft beyond the text's end, as it does when a text ends by itself.

Legend: N texts, T tokens of a text, K+1 draft lengths k = 0..K (`most` is K); k = 0 is the parent alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class DraftSpeedup(NamedTuple):
    """How much faster the parent writes with a draft, estimated from counted rounds and measured passes."""

    drafted: int
    """The best k; 0 where drafting does not pay."""
    speedups_K: npt.NDArray[np.float64]
    """Of k = 0..K; the first is 1."""


def rounds_of(hits_NT: npt.NDArray[np.bool_], most: int, lengths_N: Counts | None = None) -> Counts:
    """(N, K+1) rounds in which each text is written, for each draft length.

    `hits_NT` says where the draft's likeliest token behind the text so far is the text's next one. `lengths_N` are
    the tokens of each text where some end before T; what stands behind them is not looked at.
    """
    return _walked(*_runs(hits_NT, lengths_N), most)[0]


def catch_ups_of(hits_NT: npt.NDArray[np.bool_], most: int, lengths_N: Counts | None = None) -> Counts:
    """(N, K+1) rounds in which the draft's first pass is over two tokens: the round before accepted all that it wrote,
    and it has not read the last of that yet. Of the same hits as `rounds_of`."""
    return _walked(*_runs(hits_NT, lengths_N), most)[1]


def _runs(hits_NT: npt.NDArray[np.bool_], lengths_N: Counts | None) -> tuple[Counts, Counts]:
    """(N, T) hits in a row from each position on, and the lengths (N,)."""
    texts, tokens = hits_NT.shape
    lengths_N = np.full(texts, tokens) if lengths_N is None else lengths_N
    # A run reaches to the next miss: the smallest index from here on at which there is one.
    misses_NT = np.where(hits_NT, tokens, np.arange(tokens))
    next_miss_NT: Counts = np.minimum.accumulate(misses_NT[:, ::-1], axis=1)[:, ::-1]
    return next_miss_NT - np.arange(tokens), lengths_N


def lookup_passes(ids: Sequence[int], prompt_length: int, most: int, ngram: int) -> Counts:
    """(K+1, K+1) rounds in which the tokens of `ids` behind the prompt are written if `PromptLookup` drafts them: for
    each draft length, those that really drafted 0, 1, ... K tokens. A round that finds nothing drafts nothing, and is a
    decode step.
    """
    lookup, drafted_T, right_T = PromptLookup(ids[:prompt_length], ngram), list[int](), list[int]()
    for position in range(prompt_length, len(ids)):
        drafted = lookup.draft(most)
        drafted_T.append(len(drafted))
        right_T.append(leading_matches(drafted, ids[position:]))
        lookup.read(ids[position : position + 1])
    passes_KK = np.zeros((most + 1, most + 1), dtype=np.int64)
    for k in range(most + 1):
        position = 0
        while position < len(drafted_T):
            passes_KK[k, min(k, drafted_T[position])] += 1
            position += min(k, right_T[position]) + 1
    return passes_KK


def draft_speedup(
    rounds_K: Counts | Floats,
    tokens: int,
    draft_s_over_parent_s: float,
    verify_ratios: Sequence[float],
    catch_ups_K: Counts | Floats | None = None,
) -> DraftSpeedup:
    """How much faster `tokens` tokens are written in so many rounds (K+1,) than by the parent alone.

    The unit of time is the parent's decode step. A round of k takes k of the draft's, each `draft_s_over_parent_s`,
    and one pass of the parent over k + 1 tokens, `verify_ratios[k]`, whose first is 1. In `catch_ups_K` of the rounds
    the draft's first pass is over two tokens, and is taken to cost as many of its decode steps as the parent's does of
    the parent's: on a CPU that is much more than one.
    """
    assert len(rounds_K) == len(verify_ratios), f"{len(rounds_K)} draft lengths, {len(verify_ratios)} passes"
    assert rounds_K[0] == tokens > 0, f"{rounds_K[0]} rounds of one token each write {tokens} tokens"
    assert verify_ratios[0] == 1, "the parent's decode step is the unit"
    catch_ups_K = np.zeros(len(rounds_K)) if catch_ups_K is None else catch_ups_K
    counted = zip(rounds_K.tolist(), catch_ups_K.tolist(), strict=True)
    spent_K = [time_in_rounds(k, *of_k, draft_s_over_parent_s, verify_ratios) for k, of_k in enumerate(counted)]
    speedups_K = tokens / np.array(spent_K)
    return DraftSpeedup(int(speedups_K.argmax()), speedups_K)


def time_in_rounds(
    drafted: int, rounds: float, catch_ups: float, draft_s_over_parent_s: float, verify_ratios: Sequence[float]
) -> float:
    """What rounds of so many drafted tokens take, in decode steps of the parent (see `draft_speedup`)."""
    longer = verify_ratios[1] - 1 if drafted else 0.0
    return (drafted * rounds + catch_ups * longer) * draft_s_over_parent_s + rounds * verify_ratios[drafted]


class PromptLookup:
    """A draft without a model: what followed when the last few tokens stood in the text for the first time.

    Saxena's prompt lookup decoding (github.com/apoorvumang/prompt-lookup-decoding), token for token as transformers
    has it (`prompt_lookup_num_tokens`): the longest n-gram that is found counts, its first occurrence, and what
    follows as far as the text goes.
    """

    def __init__(self, ids: Iterable[int], ngram: int) -> None:
        assert ngram >= 1, f"an n-gram has tokens, got {ngram}"
        self._ngram, self._ids = ngram, list[int]()
        self._followed_at: dict[tuple[int, ...], int] = {}
        """Where what follows an n-gram begins."""
        self.read(ids)

    def read(self, ids: Iterable[int]) -> None:
        """Take the text's next tokens."""
        for token in ids:
            for last in self._last_tokens():
                self._followed_at.setdefault(last, len(self._ids))
            self._ids.append(token)

    def draft(self, most: int) -> list[int]:
        """Up to `most` tokens that may come next; none if the text's end stands nowhere else in it."""
        for last in self._last_tokens():
            if (start := self._followed_at.get(last)) is not None:
                return self._ids[start : start + most]
        return []

    def _last_tokens(self) -> list[tuple[int, ...]]:
        """The n-grams at the end of the text, the longest first."""
        return [tuple(self._ids[-size:]) for size in range(min(self._ngram, len(self._ids)), 0, -1)]


def leading_matches(drafted: Sequence[int], text: Sequence[int]) -> int:
    """How many of the drafted tokens are the text's, up to the first that is not."""
    for i, (token, expected) in enumerate(zip(drafted, text, strict=False)):
        if token != expected:
            return i
    return min(len(drafted), len(text))


def _walked(runs_NT: Counts, lengths_N: Counts, most: int) -> tuple[Counts, Counts]:
    """(N, K+1) rounds, and those behind one that accepted all, where a draft at position t has `runs_NT[:, t]` leading
    tokens right if it writes that many."""
    assert most >= 0 and (lengths_N <= runs_NT.shape[1]).all(), f"texts of {lengths_N} tokens in {runs_NT.shape}"
    positions_NK = np.zeros((len(runs_NT), most + 1), dtype=np.int64)
    rounds_NK, catch_ups_NK = np.zeros_like(positions_NK), np.zeros_like(positions_NK)
    drafted_K = np.arange(most + 1)
    while (live_NK := positions_NK < lengths_N[:, None]).any():
        rounds_NK += live_NK
        runs_NK = np.take_along_axis(runs_NT, np.where(live_NK, positions_NK, 0), axis=1)
        positions_NK += np.where(live_NK, np.minimum(runs_NK, drafted_K) + 1, 0)
        catch_ups_NK += live_NK & (runs_NK >= drafted_K) & (drafted_K > 0) & (positions_NK < lengths_N[:, None])
    return rounds_NK, catch_ups_NK
