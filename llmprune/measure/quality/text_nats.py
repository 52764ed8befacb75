"""What models of different vocabularies lose on the same text: nats a byte, and tokens a byte.

A token of one vocabulary is several of another, so nats a token and perplexities of the two do not compare; every
byte of a piece is scored under both, behind the same end of text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmprune.measure.quality.perplexity import Figure, nats_of_logits
from llmprune.measure.value import Value

_CHARACTERS_A_TOKEN = 4
"""Pieces begin so long, and are halved until every vocabulary holds them in a window."""


class OfText(Value):
    """A model's figures on some text."""

    bytes: int
    tokens: int
    nats_per_byte: Figure

    @property
    def tokens_per_byte(self) -> float:
        return self.tokens / self.bytes


def encoded(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a text alone."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def pieces_of(
    texts: Sequence[str], tokenizers: Sequence[PreTrainedTokenizerBase], seq_len: int, most_bytes: int | None = None
) -> list[str]:
    """Texts cut into pieces that each of the tokenizers encodes in less than `seq_len` tokens, in order; no more of
    them than hold `most_bytes` UTF-8 bytes (the last one whole), and one at the least."""
    found: list[str] = []
    taken = 0
    for text in texts:
        for start in range(0, len(text), _CHARACTERS_A_TOKEN * seq_len):
            for piece in _fitting(text[start : start + _CHARACTERS_A_TOKEN * seq_len], tokenizers, seq_len):
                if most_bytes is not None and found and taken >= most_bytes:
                    return found
                found.append(piece)
                taken += len(piece.encode())
    return found


def _fitting(text: str, tokenizers: Sequence[PreTrainedTokenizerBase], seq_len: int) -> Iterator[str]:
    if len(text) <= 1 or all(len(encoded(text, tokenizer)) < seq_len for tokenizer in tokenizers):
        yield text
        return
    middle = len(text) // 2
    space = text.rfind(" ", 1, middle)
    cut = space if space > 0 else middle
    yield from _fitting(text[:cut], tokenizers, seq_len)
    yield from _fitting(text[cut:], tokenizers, seq_len)


def tokens_of(pieces: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens pieces of text are."""
    return sum(len(encoded(piece, tokenizer)) for piece in pieces)


@torch.inference_mode()
def text_nats(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pieces: Sequence[str]) -> OfText:
    """Nats of pieces of text, each behind EOS, so that its first token is scored as well. Raises ModelError if a logit
    is NaN."""
    assert pieces and tokenizer.eos_token_id is not None, "there is text, and documents are joined by EOS"
    device: Any = model.get_input_embeddings().weight.device
    nats, tokens, size = 0.0, 0, 0
    for index, piece in enumerate(pieces):
        ids_T = torch.tensor([tokenizer.eos_token_id, *encoded(piece, tokenizer)], device=device)
        logits_TV = model(input_ids=ids_T[None], use_cache=False).logits[0]
        nats += float(nats_of_logits(model, ids_T, logits_TV, window=index))
        tokens += len(ids_T) - 1
        size += len(piece.encode())
    return OfText(bytes=size, tokens=tokens, nats_per_byte=nats / size)
