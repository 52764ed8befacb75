"""Which tokens a smaller vocabulary keeps: what text needs most, what must stay, and what those are built from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from llmprune.core.errors import VocabularyError
from llmprune.data.tokens import IntArray
from llmprune.resize.derivations import Parts, derivations, with_parts
from llmprune.resize.tokenizers import BYTE_TOKENS, required_tokens, texts_by_id, tokenizer_data

FloatArray = npt.NDArray[np.float64]

PARENTS_SHARE = 0.2
"""The weight of the parent's own training text, as its merges or scores tell of it, beside 1 for the text counted.

A few megabytes of text use half of the tokens and are silent on the others. SmolLM2's tokenizer (49,152 rows), 1.5 MB
of Wikipedia and web text counted, tokens a byte of text that was not counted, of

| rows   | ranked by                        | Wikipedia | web    | stories | speeches | code   | Python |
|--------|----------------------------------|-----------|--------|---------|----------|--------|--------|
| 49,152 | (the parent)                     | 0.2419    | 0.2258 | 0.2384  | 0.2158   | 0.3311 | 0.2732 |
| 24,576 | own counts, parts as needed      | 0.2529    | 0.2381 | 0.2496  | 0.2231   | 0.4955 | 0.4678 |
|        | counts with what is built from it | 0.2532   | 0.2389 | 0.2495  | 0.2248   | 0.4937 | 0.4691 |
|        | the same, the parent's text at 0.2 | 0.2534  | 0.2376 | 0.2486  | 0.2227   | 0.3683 | 0.2888 |
| 16,384 | own counts, parts as needed      | 0.2637    | 0.2492 | 0.2607  | 0.2319   | 0.5221 | 0.4841 |
|        | counts with what is built from it | 0.2634   | 0.2494 | 0.2610  | 0.2323   | 0.5273 | 0.4904 |
|        | the same, the parent's text at 0.2 | 0.2639  | 0.2474 | 0.2574  | 0.2298   | 0.3934 | 0.3038 |

To cut in six steps, with the text counted anew after each, moved no figure of counts alone by more than 0.0002.
"""

_FIRST_RANKS = 100
"""The n-th merge was made about 1 / (n + this) as often as the first: Zipf's law with Mandelbrot's offset."""

_BATCH = 256
"""Texts that are tokenised at once."""


def token_counts(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> IntArray:
    """How often each id stands in the texts, no special tokens added: (V,), up to the tokenizer's highest id.

    Texts are read as a stream, a few hundred at a time.
    """
    counts = np.zeros(1 + max(tokenizer.get_vocab().values()), dtype=np.int64)
    stream = iter(texts)
    while batch := list(islice(stream, _BATCH)):
        encoded: list[list[int]] = tokenizer(
            batch, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        for ids in encoded:
            counts += np.bincount(np.array(ids, dtype=np.int64), minlength=len(counts))
    return counts


def kept_tokens(
    tokenizer: PreTrainedTokenizerBase, counts: IntArray, size: int, *, also: Iterable[int] = ()
) -> IntArray:
    """The ids of the tokens that a vocabulary of at most `size` keeps, ascending: (n,), n <= size.

    `counts` (V,) are `token_counts` of text like that which the model is for. Kept in any case are added tokens, those
    of settings and of `also` (an id there that no token has counts for nothing), and the alphabet. The others are
    ranked by how often merges built them, whether or not they were built into longer ones after: that is by how many
    tokens the text is longer without, and no token ranks before what it is built from. Raises VocabularyError if the
    vocabulary cannot be cut, or not so far.
    """
    data = tokenizer_data(tokenizer)
    texts = texts_by_id(data)
    assert counts.shape == (max(texts) + 1,), f"counts must be of all {max(texts) + 1} ids, got {counts.shape}"
    merged = data["model"]["type"] == "BPE"
    parts, ranks = derivations(data["model"]) if merged else ({}, {})
    required = _required(tokenizer, data, texts, parts, also)
    if size < len(required):
        raise VocabularyError(
            f"a vocabulary must have at least {len(required):,} rows to keep this tokenizer's "
            f"{len(data['added_tokens']):,} added tokens and its alphabet, got {size:,}; ask for {len(required):,} or "
            "more"
        )
    needs = _bpe_needs(data, texts, counts, parts, ranks) if merged else _unigram_needs(data, texts, counts)
    others = sorted(texts.keys() - required, key=lambda token: (-needs[token], len(texts[token]), token))
    return np.array(sorted(required.union(others[: size - len(required)])), dtype=np.int64)


def least_size(tokenizer: PreTrainedTokenizerBase, *, also: Iterable[int] = ()) -> int:
    """The least size that `kept_tokens` takes. Raises VocabularyError if the vocabulary cannot be cut."""
    data = tokenizer_data(tokenizer)
    parts, _ = derivations(data["model"]) if data["model"]["type"] == "BPE" else ({}, {})
    return len(_required(tokenizer, data, texts_by_id(data), parts, also))


def _required(
    tokenizer: PreTrainedTokenizerBase,
    data: Mapping[str, Any],
    texts: Mapping[int, str],
    parts: Parts,
    also: Iterable[int],
) -> set[int]:
    """Ids that stay whatever the text needs, and what they are built from."""
    added = {entry["id"] for entry in data["added_tokens"]}
    required = required_tokens(tokenizer, data) | (texts.keys() & set(also))
    # An added token is cut out of text before anything merges.
    return required | with_parts(required - added, parts)


def _bpe_needs(
    data: Mapping[str, Any], texts: Mapping[int, str], counts: IntArray, parts: Parts, ranks: Mapping[int, int]
) -> FloatArray:
    """How many tokens longer the text is without each token (V,); no less for a part than for what it builds."""
    longest_first = sorted(parts, key=lambda token: -len(texts[token]))
    needs = counts.astype(np.float64)
    for token in longest_first:
        for part in parts[token]:
            needs[part] += needs[token]
    _count_bytes(needs, data, texts)
    ranked = np.array(list(ranks), dtype=np.int64)
    prior = 1 / (_FIRST_RANKS + np.array(list(ranks.values())))
    needs[ranked] += PARENTS_SHARE * max(1.0, needs.sum()) * prior / max(1e-300, prior.sum())
    for token in longest_first:
        for part in parts[token]:
            needs[part] = max(needs[part], needs[token])
    return needs


def _unigram_needs(data: Mapping[str, Any], texts: Mapping[int, str], counts: IntArray) -> FloatArray:
    """How often the text needs each piece (V,).

    Weighed by how many pieces would stand in its place, text came out up to 4% longer, seldom shorter. To count those
    anew in steps left it as long at half of 24,000 rows, and 1 to 3% shorter (code 7%) at a quarter: not done, for
    what it costs.
    """
    needs = counts.astype(np.float64)
    _count_bytes(needs, data, texts)
    scores = np.array([score for _, score in data["model"]["vocab"]], dtype=np.float64)
    # Scores are logarithms of shares; those of tokens that no text is cut into are none.
    unscored = {entry["id"] for entry in data["added_tokens"]} | {t for t, text in texts.items() if text in BYTE_TOKENS}
    scores[[token for token in unscored if token < len(scores)]] = -np.inf
    shares = np.exp(scores)
    needs[: len(scores)] += PARENTS_SHARE * max(1.0, needs.sum()) * shares / max(shares.sum(), np.finfo(float).tiny)
    return needs


def _count_bytes(needs: FloatArray, data: Mapping[str, Any], texts: Mapping[int, str]) -> None:
    """Where characters fall back to bytes, one that goes leaves as many tokens as it has bytes. Changes `needs`."""
    if data["model"]["byte_fallback"]:
        for token, text in texts.items():
            if len(text) == 1:
                needs[token] *= max(1, len(text.encode()) - 1)
