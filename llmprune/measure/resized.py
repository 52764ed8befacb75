"""What a smaller vocabulary or residual stream costs and saves, measured on the same text: nats a byte, and bytes of
text a second."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from llmprune.core.recipe import Phase
from llmprune.core.recipe_inputs import SplitName
from llmprune.measure.quality.text_nats import OfText
from llmprune.measure.speed.throughput import Spread
from llmprune.measure.value import Value


class Rung(Value):
    """The parent with other sizes of the whole model."""

    rows: int
    """Of embedding and output head."""
    hidden_size: int
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

    @property
    def size(self) -> tuple[int, int]:
        """What tells it from the others."""
        return self.rows, self.hidden_size


class Resized(Value):
    """What was measured of every size, the whole parent first, and which of them a run stands on."""

    whole: Rung
    rungs: tuple[Rung, ...]
    taken: tuple[int, int]
    """Rows and hidden size of the parent that blocks are cut from."""
    shares: dict[str, float]
    """Of each source in the mixture."""
    workload: dict[str, Any]

    @property
    def chosen(self) -> Rung:
        """The one that was taken."""
        return next(rung for rung in self.every if rung.size == self.taken)

    @property
    def is_whole(self) -> bool:
        return self.taken == self.whole.size

    def nats_per_byte(self, rung: Rung, split: SplitName = "validation") -> float:
        """Of the mixture; of the unseen sources, alike."""
        return self._mixed({name: text.nats_per_byte for name, text in rung.texts[split].items()})

    def tokens_per_byte(self, rung: Rung, split: SplitName = "validation") -> float:
        """Of the mixture; of the unseen sources, alike."""
        return self._mixed({name: text.tokens_per_byte for name, text in rung.texts[split].items()})

    def loss(self, rung: Rung, split: SplitName = "validation") -> float:
        """Share by which nats a byte are more than the whole parent's."""
        return self.nats_per_byte(rung, split) / self.nats_per_byte(self.whole, split) - 1

    def text_speedup(self, rung: Rung, phase: Phase, split: SplitName = "validation") -> float:
        """Bytes of text a second over the whole parent's: fewer tokens a second where a text is more tokens."""
        tokens: Spread = getattr(rung, f"{phase}_speedup")
        return tokens.median * self.tokens_per_byte(self.whole, split) / self.tokens_per_byte(rung, split)

    def loss_with(self, lost_nats_per_byte: float, split: SplitName) -> float:
        """Share by which nats a byte are more than the whole parent's, of a child that lost so many to the parent it
        was cut from, on its own windows of the split: two differences, each of the same text."""
        before = self.nats_per_byte(self.whole, split)
        return (self.nats_per_byte(self.chosen, split) + lost_nats_per_byte) / before - 1

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


def fastest(resized: Resized, phase: Phase, most_loss: float) -> Rung:
    """Of the sizes that lose at most so much, the one with most bytes of text a second; the whole parent is one."""
    allowed = [rung for rung in resized.rungs if resized.loss(rung) <= most_loss]
    return max((resized.whole, *allowed), key=lambda rung: resized.text_speedup(rung, phase))


def described(resized: Resized, phase: Phase) -> str:
    """What was chosen, in a line."""
    whole, chosen = resized.whole, resized.chosen
    if resized.is_whole:
        tried = ", ".join(size_text(rung, whole) for rung in resized.rungs)
        return f"vocabulary and hidden size stay: none of {tried} is faster within vocabulary.most_loss"
    more = resized.tokens_per_byte(chosen) / resized.tokens_per_byte(whole) - 1
    return (
        f"{size_text(chosen, whole)} of {size_text(whole)} taken: {resized.text_speedup(chosen, phase):.2f}x bytes of "
        f"text a second in {phase}, {resized.loss(chosen):+.1%} nats a byte, {more:+.1%} tokens (validation text)"
    )


def size_text(rung: Rung, whole: Rung | None = None) -> str:
    """A size in words: what differs from the whole parent's, or all of it."""
    parts = []
    if whole is None or rung.rows != whole.rows:
        parts.append(f"{rung.rows:,} rows")
    if whole is None or rung.hidden_size != whole.hidden_size:
        parts.append(f"hidden size {rung.hidden_size}")
    return " x ".join(parts)
