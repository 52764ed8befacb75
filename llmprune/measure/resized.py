"""What a smaller vocabulary costs and saves, measured on the same text: nats a byte, and bytes of text a second."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from llmprune.core.recipe import Objective
from llmprune.core.recipe_inputs import SplitName
from llmprune.measure.quality.perplexity import Figure
from llmprune.measure.speed.throughput import Spread
from llmprune.measure.value import Value


class OfText(Value):
    """A vocabulary's figures on one source of a split."""

    bytes: int
    tokens: int
    nats_per_byte: Figure

    @property
    def tokens_per_byte(self) -> float:
        return self.tokens / self.bytes


class Rung(Value):
    """The parent with so many rows of embedding and output head."""

    rows: int
    params: int
    bytes: int
    """As served; `stored_as` of the run's records says how."""
    texts: dict[SplitName, dict[str, OfText]]
    """By split and source."""
    decode_speedup: Spread
    """Tokens a second over the whole parent's; of the whole parent, 1."""
    prefill_speedup: Spread
    kept_text: dict[str, float] = Field(default_factory=dict)
    """Tokens a byte of each source of `vocabulary.keep_text`."""


class Resized(Value):
    """What was measured of every size, the whole parent first, and which of them a run stands on."""

    whole: Rung
    rungs: tuple[Rung, ...]
    rows: int
    """Of the parent that blocks are cut from."""
    shares: dict[str, float]
    """Of each source in the mixture."""
    workload: dict[str, Any]

    @property
    def chosen(self) -> Rung:
        """The one that was taken."""
        return next(rung for rung in (*self.rungs, self.whole) if rung.rows == self.rows)

    @property
    def is_whole(self) -> bool:
        return self.rows == self.whole.rows

    def nats_per_byte(self, rung: Rung, split: SplitName = "validation") -> float:
        """Of the mixture; of the unseen sources, alike."""
        return self._mixed({name: text.nats_per_byte for name, text in rung.texts[split].items()})

    def tokens_per_byte(self, rung: Rung, split: SplitName = "validation") -> float:
        """Of the mixture; of the unseen sources, alike."""
        return self._mixed({name: text.tokens_per_byte for name, text in rung.texts[split].items()})

    def loss(self, rung: Rung, split: SplitName = "validation") -> float:
        """Share by which nats a byte are more than the whole parent's."""
        return self.nats_per_byte(rung, split) / self.nats_per_byte(self.whole, split) - 1

    def text_speedup(self, rung: Rung, phase: Objective, split: SplitName = "validation") -> float:
        """Bytes of text a second over the whole parent's: fewer tokens a second where a text is more tokens."""
        tokens: Spread = getattr(rung, f"{phase}_speedup")
        return tokens.median * self.tokens_per_byte(self.whole, split) / self.tokens_per_byte(rung, split)

    @property
    def every(self) -> tuple[Rung, ...]:
        """All sizes, the whole parent first."""
        return (self.whole, *self.rungs)

    def more_tokens(self, rung: Rung) -> dict[str, float]:
        """By source, share by which its text is more tokens than the whole parent's: of validation text, of the text
        that is to be kept, and of unseen text where it was measured."""
        found = {name: rung.kept_text[name] / self.whole.kept_text[name] - 1 for name in rung.kept_text}
        for split in ("validation", "unseen"):
            for name, text in rung.texts.get(split, {}).items():
                found[name] = text.tokens_per_byte / self.whole.texts[split][name].tokens_per_byte - 1
        return found

    def _mixed(self, figures: Mapping[str, float]) -> float:
        weights = self.shares if self.shares.keys() >= figures.keys() else dict.fromkeys(figures, 1 / len(figures))
        return sum(weights[name] * figure for name, figure in figures.items())


def fastest(resized: Resized, phase: Objective, most_loss: float) -> Rung:
    """Of the sizes that lose at most so much, the one with most bytes of text a second; the whole parent is one."""
    allowed = [rung for rung in resized.rungs if resized.loss(rung) <= most_loss]
    return max((resized.whole, *allowed), key=lambda rung: resized.text_speedup(rung, phase))


def described(resized: Resized, phase: Objective) -> str:
    """What was chosen, in a line."""
    whole, chosen = resized.whole, resized.chosen
    if resized.is_whole:
        tried = ", ".join(f"{rung.rows:,}" for rung in resized.rungs)
        return f"vocabulary: all {whole.rows:,} rows stay; none of {tried} is faster within vocabulary.most_loss"
    more = resized.tokens_per_byte(chosen) / resized.tokens_per_byte(whole) - 1
    return (
        f"vocabulary: {chosen.rows:,} of {whole.rows:,} rows stay: {resized.text_speedup(chosen, phase):.2f}x bytes of "
        f"text a second in {phase}, {resized.loss(chosen):+.1%} nats a byte, {more:+.1%} tokens (validation text)"
    )
