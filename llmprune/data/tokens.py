"""Token splits: what statistics, trials, the choice on the front and the final figures each see, and nothing else does.

Splits are disjoint by document, not only by window: half an article in `search` makes the other half easier in `test`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from llmprune.core.errors import DataError, quoted
from llmprune.core.recipe_inputs import DataRecipe, SplitName
from llmprune.data.bos import resolved_bos
from llmprune.data.chat import chat_renderer
from llmprune.data.sources import read_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IntArray = npt.NDArray[np.int64]

SPLITS_BY_PRIORITY: tuple[SplitName, ...] = (
    *("search", "validation", "test", "estimate", "calibration", "recovery", "unseen"),
)
"""Which split takes its documents first: raising `calibration_tokens` or `recovery_tokens` leaves the scored text as it
was."""

LARGEST_DOCUMENT_SHARE = 1 / 16
"""How much of a source's share of a split one document may fill: three long articles are no sample of Wikipedia."""

_DECODE_CONTEXT = 8
"""Tokens of left context when a token's text is found by decoding; the longest UTF-8 character has four bytes."""


@dataclass(frozen=True, eq=False)
class SourceTokens:
    """The windows of one source in one split, of `seq_len` tokens each."""

    windows: torch.Tensor
    """(n, seq_len) int64 token ids."""
    bytes: torch.Tensor
    """(n,) int64: UTF-8 bytes of the text that a window's scored tokens (all but its first) stand for."""
    own: torch.Tensor | None = None
    """(n,) int64: tokens that the parent wrote, up to its first end of text; None in text that it did not write."""

    def of(self, rows: slice | torch.Tensor) -> SourceTokens:
        """Some of the windows."""
        return SourceTokens(self.windows[rows], self.bytes[rows], None if self.own is None else self.own[rows])


@dataclass(frozen=True, eq=False)
class Split:
    """The windows of one split, source by source."""

    name: SplitName
    sources: Mapping[str, SourceTokens]
    weights: Mapping[str, float]
    """Share of each source in the mixture; they sum to 1."""
    seq_len: int
    bos: bool
    vocabulary: int | None = None
    """Tokens of the tokenizer that cut it, where that is known: to models of another it says something else."""
    own_after: int | None = None
    """Tokens of each window behind which the text is the parent's own; None for text that it did not write."""

    @property
    def tokens(self) -> int:
        """All tokens of the split, BOS and EOS included."""
        return sum(source.windows.numel() for source in self.sources.values())

    def first_windows(self, share: float, multiple: int = 1) -> dict[str, int]:
        """How many windows of each source make up `share` (over 0, up to 1) of the split, mixed by weight.

        Each count is at least one and rounded up to a `multiple`, but never more than the source has; with a share of
        1 it is all of them. Counts never fall as the share grows.
        """
        assert 0 < share <= 1 and multiple >= 1, f"share {share} must be over 0 and up to 1, multiple {multiple} >= 1"
        counts = {name: len(source.windows) for name, source in self.sources.items()}
        return first_windows(counts, self.weights, share, multiple)

    def head(self, counts: Mapping[str, int]) -> Split:
        """The split of the first `counts[name]` windows of each source, the weights as they are."""
        sources = {name: source.of(slice(counts[name])) for name, source in self.sources.items()}
        return replace(self, sources=sources)

    @property
    def dataset(self) -> str:
        """A label for people, such as "wikipedia+web"."""
        return "+".join(self.sources)

    @cached_property
    def hash(self) -> str:
        """SHA-256, as hex, over everything that a figure of this split depends on."""
        header = [self.name, self.seq_len, self.bos, *([] if self.own_after is None else [self.own_after])]
        digest = hashlib.sha256(json.dumps(header).encode())
        for name, source in self.sources.items():
            digest.update(json.dumps([name, self.weights[name], len(source.windows)]).encode())
            for tensor in (source.windows, source.bytes, *([] if source.own is None else [source.own])):
                digest.update(tensor.numpy().astype("<i8").tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class TokenSplits:
    """All splits of a run, and where their text came from."""

    splits: Mapping[SplitName, Split]
    """Each with its own length of windows; "unseen" is there only if the recipe names such text."""
    provenance: Mapping[str, Any]
    """JSON: seed, tokenizer, identity of every source, and its documents in each split."""

    def __getitem__(self, name: SplitName) -> Split:
        """Raises DataError if there is no such split."""
        if name not in self.splits:
            raise DataError(
                f"there is no {name} text here, only {', '.join(self.splits)}; name its sources in data.{name}"
            )
        return self.splits[name]


def build_token_splits(recipe: DataRecipe, tokenizer: PreTrainedTokenizerBase) -> TokenSplits:
    """Shuffle, tokenise and cut the recipe's text into windows of each split's `seq_len` tokens.

    Documents are joined by EOS, no document (nor an exact copy of it) is in two splits, and no more are tokenised than
    are needed. A document that is longer than `LARGEST_DOCUMENT_SHARE` allows is cut at the end of a window. Each split
    gets at least the tokens asked for, in whole windows, divided over its sources by weight. Raises DataError on text
    that cannot be read or is too short, and on a tokenizer without EOS (or BOS, if asked for).
    """
    if tokenizer.eos_token_id is None:
        raise DataError("documents are joined by EOS, and this tokenizer has none; set its eos_token")
    bos = resolved_bos(recipe.bos, tokenizer)
    weights = {name: recipe.weights_of(name) for name in SPLITS_BY_PRIORITY if name in recipe.splits}
    cuts = {name: divide_windows(recipe, name, shares) for name, shares in weights.items()}
    seen: set[bytes] = set()
    filled: dict[str, dict[SplitName, _Filling]] = {}
    identities: dict[str, Mapping[str, str | None]] = {}
    for source in (*recipe.sources, *recipe.unseen):
        text = read_documents(source, seed=recipe.seed, render=lambda: chat_renderer(tokenizer))
        identities[source.name] = text.identity
        documents = _encoded(without_copies(text.documents, seen), tokenizer)
        fillings = {
            name: _Filling(windows[source.name], recipe.seq_len_of(name) - bos)
            for name, windows in cuts.items()
            if source.name in windows
        }
        _fill(documents, fillings, source.name)
        filled[source.name] = fillings
    splits = {
        name: Split(
            name,
            {source: _cut(filled[source][name], tokenizer.bos_token_id if bos else None) for source in shares},
            shares,
            recipe.seq_len_of(name),
            bos,
            len(tokenizer),
        )
        for name, shares in weights.items()
    }
    provenance = {
        "seed": recipe.seed,
        "tokenizer": {"class": type(tokenizer).__name__, "vocabulary": len(tokenizer)},
        "sources": identities,
        "documents": {
            name: {source: filled[source][name].documents for source in shares} for name, shares in weights.items()
        },
    }
    return TokenSplits(splits, provenance)


def first_windows(
    counts: Mapping[str, int], weights: Mapping[str, float], share: float, multiple: int = 1
) -> dict[str, int]:
    """`Split.first_windows`, from the windows and the weight of each source alone."""
    if share == 1:
        return dict(counts)
    total = sum(counts.values())
    return {
        name: min(count, math.ceil(share * total * weights[name] / multiple) * multiple)
        for name, count in counts.items()
    }


def divide_windows(recipe: DataRecipe, split: SplitName, weights: Mapping[str, float]) -> dict[str, int]:
    """Windows of each source: together enough for the split's tokens, in proportion to `weights`, one at the least."""
    total = max(len(weights), math.ceil(recipe.tokens_of(split) / recipe.seq_len_of(split)))
    windows = {name: max(1, math.floor(total * weight)) for name, weight in weights.items()}
    by_shortfall = sorted(weights, key=lambda name: windows[name] - total * weights[name])
    for name in by_shortfall[: max(0, total - sum(windows.values()))]:
        windows[name] += 1
    return windows


@dataclass
class _Filling:
    """Tokens of one source on their way into one split, without BOS."""

    windows: int
    window_tokens: int
    ids: list[IntArray] = field(default_factory=list)
    bytes: list[IntArray] = field(default_factory=list)
    tokens: int = 0
    documents: int = 0

    @property
    def needed_tokens(self) -> int:
        return self.windows * self.window_tokens

    def add(self, ids: IntArray, token_bytes: IntArray) -> None:
        """Add a document; if it is too long, up to the last end of a window that it may reach.

        There a cut leaves no trace: the next document opens a window, and no EOS stands where the text goes on.
        """
        limit = max(self.window_tokens, int(self.needed_tokens * LARGEST_DOCUMENT_SHARE))
        end = len(ids)
        if end > limit:
            end = limit - (self.tokens + limit) % self.window_tokens
        self.ids.append(ids[:end])
        self.bytes.append(token_bytes[:end])
        self.tokens += end
        self.documents += 1


def _fill(documents: Iterator[tuple[IntArray, IntArray]], fillings: Mapping[SplitName, _Filling], source: str) -> None:
    """Give every split whole documents until its windows are full; what is left of its last document is dropped."""
    for filling in fillings.values():
        while filling.tokens < filling.needed_tokens:
            document = next(documents, None)
            if document is None:
                raise _too_short(fillings, source)
            filling.add(*document)


def _too_short(fillings: Mapping[SplitName, _Filling], source: str) -> DataError:
    tokens = sum(filling.tokens for filling in fillings.values())
    documents = sum(filling.documents for filling in fillings.values())
    needed = {name: filling.needed_tokens for name, filling in fillings.items()}
    largest = max(needed, key=lambda name: needed[name])
    listed = ", ".join(f"{name} {count:,}" for name, count in needed.items())
    return DataError(
        f"source {quoted(source)} is too short: it has {tokens:,} tokens in {documents:,} different documents, its "
        f"share of the splits is {sum(needed.values()):,} ({listed}), and no document may be in two splits or be "
        f"more than {LARGEST_DOCUMENT_SHARE:.2%} of one (longer ones are cut); "
        f"lower data.{largest}_tokens or this source's weight, or give more or shorter documents"
    )


def _cut(filling: _Filling, bos_token_id: int | None) -> SourceTokens:
    shape = (filling.windows, filling.window_tokens)
    windows = np.concatenate(filling.ids)[: filling.needed_tokens].reshape(shape)
    token_bytes = np.concatenate(filling.bytes)[: filling.needed_tokens].reshape(shape)
    if bos_token_id is not None:
        windows = np.insert(windows, 0, bos_token_id, axis=1)
        scored_bytes = token_bytes
    else:
        scored_bytes = token_bytes[:, 1:]
    return SourceTokens(torch.from_numpy(windows), torch.from_numpy(scored_bytes.sum(axis=1)))


def without_copies(documents: Iterator[str], seen: set[bytes]) -> Iterator[str]:
    """Documents not met before, in this source or an earlier one: web text is full of copies, and a copy leaks."""
    for text in documents:
        digest = hashlib.sha256(text.encode()).digest()
        if digest not in seen:
            seen.add(digest)
            yield text


def _encoded(documents: Iterator[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[IntArray, IntArray]]:
    """Each document's token ids, closed by EOS, and the UTF-8 bytes that each stands for (none for an added EOS)."""
    for text in documents:
        ids, token_bytes = encode_with_bytes(text, tokenizer)
        if len(ids) and ids[-1] == tokenizer.eos_token_id:
            # The last turn of a chat is closed by its template.
            yield ids, token_bytes
        elif len(ids):
            yield np.append(ids, tokenizer.eos_token_id), np.append(token_bytes, 0)


def encode_with_bytes(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[IntArray, IntArray]:
    """Token ids of `text`, no special tokens added, and how many UTF-8 bytes of it each stands for: two (tokens,).

    A token's bytes run from the end of the one before it to its own end, so no byte is lost or counted twice. A
    character that is spread over several tokens is counted with the first. Exact for fast tokenizers; for the others,
    the bytes by which a token lengthens the decoded text.
    """
    if not tokenizer.is_fast:
        slow_ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return np.array(slow_ids, dtype=np.int64), _bytes_by_decoding(slow_ids, tokenizer)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = np.array(encoding["input_ids"], dtype=np.int64)
    offsets = np.array(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    ends = np.maximum.accumulate(offsets[:, 1])
    return ids, np.diff(_byte_positions(text)[ends], prepend=0)


def _byte_positions(text: str) -> IntArray:
    """At which UTF-8 byte each character starts, and the end: (characters + 1,)."""
    code_points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    widths = 1 + (code_points >= 0x80) + (code_points >= 0x800) + (code_points >= 0x10000)
    return np.concatenate(([0], np.cumsum(widths, dtype=np.int64)))


def _bytes_by_decoding(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> IntArray:
    def length(part: Sequence[int]) -> int:
        text = tokenizer.decode(list(part), clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return len(text.encode())

    starts = (max(0, end - _DECODE_CONTEXT) for end in range(len(ids)))
    lengths = [length(ids[start : end + 1]) - length(ids[start:end]) for end, start in enumerate(starts)]
    return np.array(lengths, dtype=np.int64)
