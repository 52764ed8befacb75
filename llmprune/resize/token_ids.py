"""Ids of tokens as configs name them - the ends of text, padding, words to hold back - before and after a cut."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from llmprune.core.errors import VocabularyError

_HELD_BACK = ("suppress_tokens", "begin_suppress_tokens")
_HELD_BACK_WORDS = ("bad_words_ids",)
_FORCED_WORDS = ("force_words_ids",)


def named_ids(model: PreTrainedModel) -> frozenset[int]:
    """Ids that a model's config and generation config give a part (eos, pad, ...), as far as it has rows for them.

    Give these to `kept_tokens` as `also`: a model without its end of text never ends.
    """
    found: set[int] = set()
    for config in (model.config, getattr(model, "generation_config", None)):
        found.update(_named(vars(config) if config is not None else {}))
    embedding: Any = model.get_input_embeddings()
    return frozenset(token for token in found if 0 <= token < embedding.num_embeddings)


@dataclass(frozen=True)
class NewIds:
    """What becomes of a parent's ids."""

    new: Mapping[int, int]
    """The new id of each token that is kept."""
    tokens: frozenset[int]
    """The ids that were tokens of the tokenizer; others are rows that no text could reach."""

    def config(self, config: PreTrainedConfig, rows: int) -> PreTrainedConfig:
        """A copy of a model's config with new ids and `rows` of a vocabulary. Raises VocabularyError as `of` does."""
        changed = copy.deepcopy(config)
        self._write(config, changed)
        changed.vocab_size = changed.get_text_config().vocab_size = rows
        return changed

    def generation_config(self, config: GenerationConfig | None) -> GenerationConfig | None:
        """A copy with new ids. Raises VocabularyError as `of` does."""
        changed = copy.deepcopy(config)
        if config is not None:
            self._write(config, changed)
        return changed

    def of(self, name: str, token: Any) -> Any:
        """The new id of a token that `name` gives a part; None if it was no token's, as ids below 0 stay what they are.

        Raises VocabularyError if the token is not kept.
        """
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            return token
        if token in self.tokens and token not in self.new:
            raise VocabularyError(
                f"the model's {name} is token {token}, which is not kept; give it to kept_tokens in `also`"
            )
        return self.new.get(token)

    def _write(self, old: Any, changed: Any) -> None:
        for name, value in self._mapped(vars(old)).items():
            setattr(changed, name, value)

    def _mapped(self, values: Mapping[Any, Any]) -> dict[str, Any]:
        """The entries that name ids, with new ones."""
        mapped: dict[str, Any] = {}
        for name, value in values.items():
            if value is None or not isinstance(name, str) or name.startswith("_"):
                continue
            if isinstance(value, PreTrainedConfig):
                changed = copy.deepcopy(value)
                self._write(value, changed)
                mapped[name] = changed
            elif name == "sequence_bias":
                mapped[name] = self._biases(value)
            elif isinstance(value, Mapping):
                if inner := self._mapped(value):
                    mapped[name] = {**value, **inner}
            elif _names_ids(name):
                mapped[name] = self._ids(name, value)
            elif name in _HELD_BACK:
                mapped[name] = [self.new[token] for token in value if token in self.new]
            elif name in _HELD_BACK_WORDS:
                mapped[name] = [new for word in value if (new := self._word(word)) is not None] or None
            elif name in _FORCED_WORDS:
                mapped[name] = self._forced(name, value)
            elif name == "forced_decoder_ids":
                mapped[name] = [[at, self.of(name, token)] for at, token in value]
        return mapped

    def _ids(self, name: str, value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            return self.of(name, value)
        # Rows without a token came out of no text, so to stop at them is nothing to keep.
        return [new for token in value if (new := self.of(name, token)) is not None] or None

    def _word(self, word: Any) -> list[int] | None:
        return [self.new[token] for token in word] if all(token in self.new for token in word) else None

    def _forced(self, name: str, value: Any) -> Any:
        return (
            [self._forced(name, part) for part in value] if isinstance(value, (list, tuple)) else self.of(name, value)
        )

    def _biases(self, value: Any) -> Any:
        pairs = value.items() if isinstance(value, Mapping) else value
        changed = [(new, bias) for word, bias in pairs if (new := self._word(word)) is not None]
        if not changed:
            return None
        return (
            {tuple(word): bias for word, bias in changed} if isinstance(value, Mapping) else [list(p) for p in changed]
        )


def _names_ids(name: str) -> bool:
    return name.endswith(("_token_id", "_token_ids"))


def _named(values: Mapping[str, Any]) -> Iterator[int]:
    for name, value in values.items():
        if name.startswith("_"):
            continue
        if isinstance(value, PreTrainedConfig):
            yield from _named(vars(value))
        elif isinstance(value, Mapping):
            yield from _named({str(key): part for key, part in value.items()})
        elif _names_ids(name):
            several = value if isinstance(value, (list, tuple)) else [value]
            yield from (token for token in several if isinstance(token, int) and not isinstance(token, bool))
