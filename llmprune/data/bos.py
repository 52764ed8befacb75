"""Whether a text is opened with the BOS token: one rule for windows, tasks and GGUF files.

Models differ: Gemma computes nonsense without it, and GPT-2 never saw it in front of a text.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Literal

from llmprune.core.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def puts_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself puts BOS in front of a text.

    By what it does, not by what its settings claim: post-processors overrule them, and slow tokenizers have others.
    """
    ids: list[int] = tokenizer("a", add_special_tokens=True)["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def resolved_bos(rule: Literal["auto"] | bool, tokenizer: PreTrainedTokenizerBase) -> bool:
    """What the recipe's `data.bos` comes to with this tokenizer. Raises DataError if it asks for a BOS that is not."""
    if rule == "auto":
        return puts_bos(tokenizer)
    if rule and tokenizer.bos_token_id is None:
        raise DataError("data.bos=true opens windows with BOS, and this tokenizer has none; set data.bos to auto")
    return rule


def opening_with_bos(tokenizer: PreTrainedTokenizerBase, bos: bool) -> PreTrainedTokenizerBase:
    """The tokenizer, or if it does otherwise a copy of it, that puts BOS in front of a text just if `bos` says so.

    Raises DataError if it cannot be made to.
    """
    if puts_bos(tokenizer) == bos:
        return tokenizer
    other: Any = copy.deepcopy(tokenizer)
    # Of fast tokenizers, this writes the post-processor anew.
    other.add_bos_token = bos
    if puts_bos(other) != bos:
        raise DataError(
            f"data.bos={str(bos).lower()} is not what this {type(tokenizer).__name__} does, and it cannot be told to; "
            "set data.bos to auto"
        )
    return other  # type: ignore[no-any-return]
