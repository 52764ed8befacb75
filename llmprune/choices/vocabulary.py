"""How the matrices with a row a token are stored: the input embedding, and the output head. A model has them once, and
a small one has a fifth of its numbers there, which no choice of a block makes smaller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from llmprune.choices.dimensions import Dimensions
from llmprune.core.errors import ArchitectureError, quoted
from llmprune.core.recipe import GgufType, SpaceRecipe
from llmprune.numerics.ggml import TYPES


@dataclass(frozen=True, slots=True)
class VocabularyChoice:
    """The type of weights of embedding and output head, tied or not; None: as the parent's are."""

    stored: GgufType | None = None

    kind: ClassVar[Literal["vocabulary"]] = "vocabulary"

    @classmethod
    def ladder(cls, shape: Dimensions, rules: SpaceRecipe) -> tuple[VocabularyChoice, ...]:
        """With `space.precision`, every type whose blocks rows are whole numbers of, narrowest first, and last the
        parent's; nothing if there is no such type."""
        types = [name for name in TYPES if name in rules.precision and shape.hidden_size % TYPES[name].block == 0]
        return (*(cls(name) for name in reversed(types)), cls()) if types else ()

    @classmethod
    def from_json(cls, data: Any) -> VocabularyChoice:
        """Inverse of `to_json`. Raises ArchitectureError on anything else."""
        known = isinstance(data, Mapping) and (not data or (data.keys() == {"stored"} and data["stored"] in TYPES))
        if not known:
            raise ArchitectureError(f'a vocabulary is {{"stored": TYPE}}, of {", ".join(TYPES)}; got {quoted(data)}')
        return cls(**data)

    def to_json(self) -> dict[str, Any]:
        """Nothing for the parent's."""
        return {"stored": self.stored} if self.stored else {}

    @property
    def label(self) -> str:
        return self.stored or "whole"

    def problem(self, shape: Dimensions) -> str | None:
        """Why no such parent can have this, continuing "keeps ... of a parent with"; None if it can."""
        if self.stored is None or shape.hidden_size % (block := TYPES[self.stored].block) == 0:
            return None
        return f"hidden_size {shape.hidden_size}: rows are stored in blocks of {block} in {self.stored}"


PARENTS_VOCABULARY = VocabularyChoice()
