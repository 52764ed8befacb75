"""How byte-pair encoding builds each of its tokens: which two tokens the last merge joins.

Merges inside a token's text are the same wherever the token comes out, since none of them ever crossed its ends. So a
token has one derivation, that of its own text on its own, however many merges name it as their result; and if its text
alone becomes something else, no text ever becomes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

Parts = Mapping[int, tuple[int, int]]
"""The two ids that a token's last merge joins, for every token that merges build."""

Merge = tuple[str, str]


def merge_list(model: Mapping[str, Any]) -> list[Merge]:
    """The merges of a tokenizer.json's model, lowest rank first, in whichever of its two spellings."""
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in pairs]


def derivations(model: Mapping[str, Any]) -> tuple[Parts, dict[int, int]]:
    """The parts of each token that merges build, and its rank: the first merge that makes it, counted from 0.

    `model` is the "model" of a tokenizer.json of type BPE. Both leave out single characters, and tokens that no text
    becomes by merging.
    """
    vocab: Mapping[str, int] = model["vocab"]
    table: dict[tuple[int, int], tuple[int, int]] = {}
    ranks: dict[int, int] = {}
    for rank, (left, right) in enumerate(merge_list(model)):
        result = vocab[left + right]
        # Of a pair that is named twice, the tokenizer heeds the last.
        table[vocab[left], vocab[right]] = (rank, result)
        ranks.setdefault(result, rank)
    fallback = bool(model.get("byte_fallback"))
    parts = {}
    for text, token in vocab.items():
        if token in ranks and (last := _last_merge(_characters(text, vocab, fallback), table, token)):
            parts[token] = last
    return parts, {token: ranks[token] for token in parts}


def with_parts(tokens: Iterable[int], parts: Parts) -> set[int]:
    """The tokens, and all that they are built from."""
    found: set[int] = set()
    left = list(tokens)
    while left:
        token = left.pop()
        if token not in found:
            found.add(token)
            left.extend(parts.get(token, ()))
    return found


def _characters(text: str, vocab: Mapping[str, int], fallback: bool) -> list[int]:
    """What merging starts from. Characters that are neither tokens nor bytes are no part of a token."""
    ids = []
    for character in text:
        if character in vocab:
            ids.append(vocab[character])
        elif fallback:
            ids.extend(vocab[name] for byte in character.encode() if (name := f"<0x{byte:02X}>") in vocab)
    return ids


def _last_merge(ids: list[int], table: Mapping[tuple[int, int], tuple[int, int]], token: int) -> tuple[int, int] | None:
    """The pair that the last merge joins if merging ends in `token` alone. Changes `ids`."""
    last = None
    pairs = [table.get(pair) for pair in pairwise(ids)]
    while len(ids) > 1:
        # The lowest rank; of equal ones the leftmost.
        found = min(((merge[0], at, merge[1]) for at, merge in enumerate(pairs) if merge), default=None)
        if found is None:
            return None
        _, at, result = found
        last = ids[at], ids[at + 1]
        ids[at : at + 2] = [result]
        pairs[at : at + 1] = []
        if at > 0:
            pairs[at - 1] = table.get((ids[at - 1], result))
        if at < len(pairs):
            pairs[at] = table.get((result, ids[at + 1]))
    return last if ids == [token] else None
