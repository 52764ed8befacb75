"""Which choices a search may make: ladders of sizes for each kind of block, and the decisions that pick from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from llmprune.choices.architecture import DROPPED, Architecture, ParentShape
from llmprune.choices.choice import AnyChoice, Assignment, Choice
from llmprune.choices.dimensions import BLOCK_KINDS, WHOLE_MODEL, BlockKind
from llmprune.choices.kinds import ladder_of, parse_choice
from llmprune.choices.vocabulary import PARENTS_VOCABULARY, VocabularyChoice
from llmprune.core.errors import ArchitectureError
from llmprune.core.recipe import SpaceRecipe, SpaceSize


@dataclass(frozen=True)
class Decision:
    """One thing to decide: each option, in order of size, assigns some choices; the last is the parent's."""

    name: str
    options: tuple[tuple[Assignment, ...], ...]


@dataclass(frozen=True)
class Space:
    """The architectures that a search may propose.

    `size` is how free it is: small, one choice a kind for all layers; layer, each layer whole or gone; medium, KV
    groups and FFN width block by block; large, query heads a group besides.
    `attention`, `ffn` and `vocabulary` are the ladders of choices, ascending in size; the last of each is the parent's.
    """

    shape: ParentShape
    size: SpaceSize
    attention: tuple[Choice, ...]
    ffn: tuple[Choice, ...]
    vocabulary: tuple[VocabularyChoice, ...] = ()
    """Empty where there is nothing to choose."""

    @classmethod
    def of(cls, shape: ParentShape, kv_groups_step: int | float, ffn_step: int | float, **rules: Any) -> Space:
        """The space `under` rules with these steps, which are checked against the parent alone."""
        return cls.under(shape, SpaceRecipe.model_construct(kv_groups_step=kv_groups_step, ffn_step=ffn_step, **rules))

    @classmethod
    def under(cls, shape: ParentShape, rules: SpaceRecipe) -> Space:
        """The ladders of all kinds of choice, under a recipe's rules.

        Raises ArchitectureError on a step that is not between 1 and the parent's size, on a rule that can change
        nothing, or if nothing can be pruned.
        """
        attention, ffn = (ladder_of(kind, shape, rules) for kind in BLOCK_KINDS)
        if rules.size == "layer":
            if not rules.drop:
                raise ArchitectureError("space.size=layer leaves whole layers out; set space.drop=true")
            attention, ffn = ((DROPPED[kind], shape.full(kind)) for kind in BLOCK_KINDS)
        space = cls(shape, rules.size, attention, ffn, VocabularyChoice.ladder(shape, rules))
        if all(len(decision.options) == 1 for decision in space.decisions):
            raise ArchitectureError(
                "the space holds the parent alone; allow space.drop, or lower space.kv_groups_step from "
                f"{rules.kv_groups_step} or space.ffn_step from {rules.ffn_step}"
            )
        return space

    def to_json(self) -> dict[str, Any]:
        attention, ffn = ([choice.to_json() for choice in ladder] for ladder in (self.attention, self.ffn))
        found = {"shape": asdict(self.shape), "size": self.size, "attention": attention, "ffn": ffn}
        return found | ({"vocabulary": [choice.to_json() for choice in self.vocabulary]} if self.vocabulary else {})

    @classmethod
    def from_json(cls, data: Any) -> Space:
        """Inverse of `to_json`. Raises KeyError, TypeError or ArchitectureError on anything else."""
        attention, ffn = (tuple(parse_choice(choice, kind) for choice in data[kind]) for kind in BLOCK_KINDS)
        vocabulary = tuple(VocabularyChoice.from_json(choice) for choice in data.get("vocabulary", []))
        return cls(ParentShape(**data["shape"]), data["size"], attention, ffn, vocabulary)

    def ladder(self, kind: BlockKind) -> tuple[Choice, ...]:
        return self.attention if kind == "attention" else self.ffn

    @property
    def ladders(self) -> dict[str, tuple[AnyChoice, ...]]:
        """All of them, by what they are choices for."""
        found: dict[str, tuple[AnyChoice, ...]] = {kind: self.ladder(kind) for kind in BLOCK_KINDS}
        return found | ({"vocabulary": self.vocabulary} if self.vocabulary else {})

    def assignments(self) -> Iterable[Assignment]:
        """All that may be chosen."""
        for layer, kind in self.blocks():
            yield from ((layer, choice) for choice in self.ladder(kind))
        yield from ((WHOLE_MODEL, choice) for choice in self.vocabulary)

    def blocks(self) -> Iterable[tuple[int, BlockKind]]:
        """Every block of the parent."""
        return ((layer, kind) for layer in range(self.shape.layers) for kind in BLOCK_KINDS)

    @cached_property
    def decisions(self) -> tuple[Decision, ...]:
        """What Optuna's parameters stand for: an index into each decision's options."""
        of_vocabulary = Decision("vocabulary", tuple(((WHOLE_MODEL, choice),) for choice in self.vocabulary))
        return (*self._of_blocks(), *([of_vocabulary] if self.vocabulary else []))

    def _of_blocks(self) -> tuple[Decision, ...]:
        layers = range(self.shape.layers)
        if self.size == "small":
            return tuple(
                Decision(
                    f"all.{kind}",
                    # Nothing is left of a model whose blocks of a kind are all gone.
                    tuple(tuple((i, c) for i in layers) for c in self.ladder(kind) if c.units),
                )
                for kind in BLOCK_KINDS
            )
        if self.size == "layer":
            full = tuple(self.shape.full(kind) for kind in BLOCK_KINDS)
            pairs = (tuple(DROPPED.values()), full)
            options = [tuple(tuple((i, choice) for choice in pair) for pair in pairs) for i in layers]
            return tuple(Decision(f"layer_{i:03d}", option) for i, option in zip(layers, options, strict=True))
        return tuple(
            Decision(f"layer_{i:03d}.{kind}", tuple(((i, choice),) for choice in self.ladder(kind)))
            for i, kind in self.blocks()
        )

    def architecture(self, indices: Sequence[int]) -> Architecture:
        """The architecture of one option a decision."""
        options = (d.options[index] for d, index in zip(self.decisions, indices, strict=True))
        return self.shape.architecture.with_choices(assignment for option in options for assignment in option)

    def indices(self, architecture: Architecture) -> tuple[int, ...]:
        """Inverse of `architecture`. Raises ArchitectureError if the space does not hold it."""
        if len(architecture.layers) != self.shape.layers:
            raise ArchitectureError(
                f"an architecture has one entry per parent layer: the parent has {self.shape.layers} layers, "
                f"the architecture {len(architecture.layers)}"
            )
        chosen: dict[tuple[int, str], AnyChoice] = {(layer, own.kind): own for layer, own in architecture.blocks()}
        chosen[WHOLE_MODEL, "vocabulary"] = architecture.vocabulary
        found = []
        for decision in self.decisions:
            wanted = tuple((layer, chosen[layer, choice.kind]) for layer, choice in decision.options[-1])
            if wanted not in decision.options:
                raise ArchitectureError(
                    f"{decision.name} has no option {[choice.to_json() for _, choice in wanted]} in this "
                    f"{self.size} space; use another space.size or finer steps"
                )
            found.append(decision.options.index(wanted))
        if architecture.vocabulary not in (self.vocabulary or (PARENTS_VOCABULARY,)):
            raise ArchitectureError(f"the space has no {architecture.vocabulary}; name its type in space.precision")
        return tuple(found)

    def __contains__(self, architecture: Architecture) -> bool:
        try:
            self.indices(architecture)
        except ArchitectureError:
            return False
        return True
