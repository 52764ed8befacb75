"""The documents of a recipe's text, by what they are for, as text: for what is decided before there is a tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from transformers import PreTrainedTokenizerBase

from llmprune.core.recipe_inputs import DataRecipe, SourceRecipe, SplitName
from llmprune.data.chat import chat_renderer
from llmprune.data.sources import read_documents
from llmprune.data.tokens import SPLITS_BY_PRIORITY, TokenSplits, without_copies

COUNTED_BYTES = 16_000_000
"""Of each source at the most: a vocabulary's tail is known by then, and a Hub data set may have no end."""


@dataclass(frozen=True, eq=False)
class Documents:
    """Texts by split and source, and those that may be looked at before anything is judged."""

    splits: Mapping[SplitName, Mapping[str, list[str]]]
    free: Mapping[str, list[str]]
    """Of each of `data.sources`, up to COUNTED_BYTES of what no figure is of: no document of the search, validation,
    test or estimate split."""


def read_texts(recipe: DataRecipe, tokenizer: PreTrainedTokenizerBase, splits: TokenSplits) -> Documents:
    """The documents that token splits were cut from, in their order, and what was left over. Raises DataError."""
    counts: Mapping[SplitName, Mapping[str, int]] = splits.provenance["documents"]
    found: dict[SplitName, dict[str, list[str]]] = {name: {} for name in counts}
    free: dict[str, list[str]] = {}
    seen: set[bytes] = set()
    for source in (*recipe.sources, *recipe.unseen):
        text = read_documents(source, seed=recipe.seed, render=lambda: chat_renderer(tokenizer))
        documents = without_copies(text.documents, seen)
        for name in SPLITS_BY_PRIORITY:
            if source.name in counts.get(name, {}):
                found[name][source.name] = list(islice(documents, counts[name][source.name]))
        if source in recipe.sources:
            judged_by_none = (found[name][source.name] for name in ("calibration", "recovery") if name in found)
            free[source.name] = [*(text for texts in judged_by_none for text in texts), *_first_bytes(documents)]
    return Documents(found, free)


def read_source(source: SourceRecipe, seed: int, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Up to COUNTED_BYTES of one source. Raises DataError."""
    return list(_first_bytes(read_documents(source, seed=seed, render=lambda: chat_renderer(tokenizer)).documents))


def _first_bytes(documents: Iterator[str]) -> Iterator[str]:
    taken = 0
    for text in documents:
        if taken >= COUNTED_BYTES:
            return
        yield text
        taken += len(text.encode())
