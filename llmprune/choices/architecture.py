"""What a child keeps of its parent: one choice per block and one for the vocabulary, hashable, JSON in and out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from llmprune.choices.choice import AnyChoice, Assignment, Choice, attends
from llmprune.choices.dimensions import WHOLE_MODEL, BlockKind, Dimensions
from llmprune.choices.ffn import FfnChoice
from llmprune.choices.kinds import parse_choice
from llmprune.choices.kv_groups import AttentionChoice
from llmprune.choices.stored import whole
from llmprune.choices.vocabulary import PARENTS_VOCABULARY, VocabularyChoice
from llmprune.core.errors import ArchitectureError, quoted

DROPPED: dict[BlockKind, Choice] = {"attention": AttentionChoice(0), "ffn": FfnChoice(0)}


@dataclass(frozen=True, slots=True)
class LayerChoice:
    """The choices of a layer's two blocks; with both dropped, the layer is gone."""

    attention: Choice
    ffn: Choice

    @classmethod
    def of(cls, kv_groups: int, ffn_width: int) -> LayerChoice:
        return cls(AttentionChoice(kv_groups), FfnChoice(ffn_width))

    @property
    def blocks(self) -> tuple[Choice, Choice]:
        return self.attention, self.ffn

    @property
    def is_gone(self) -> bool:
        return not any(choice.units for choice in self.blocks)

    def block(self, kind: BlockKind) -> Choice:
        return self.attention if kind == "attention" else self.ffn

    def with_choice(self, choice: Choice) -> LayerChoice:
        return replace(self, attention=choice) if choice.kind == "attention" else replace(self, ffn=choice)


@dataclass(frozen=True, slots=True)
class Architecture:
    """One choice per block of the parent; `layers[i]` speaks of the parent's layer `i`, kept or not."""

    layers: tuple[LayerChoice, ...]
    vocabulary: VocabularyChoice = PARENTS_VOCABULARY

    @classmethod
    def of(cls, layers: Iterable[tuple[int, int]]) -> Architecture:
        """From `(kv_groups, ffn_width)` pairs, one per parent layer."""
        return cls(tuple(LayerChoice.of(kv_groups, ffn_width) for kv_groups, ffn_width in layers))

    @property
    def kept_layers(self) -> tuple[int, ...]:
        """Parent indices of the layers that keep at least one block: the child's layers, in order."""
        return tuple(i for i, layer in enumerate(self.layers) if not layer.is_gone)

    @property
    def attends(self) -> bool:
        """Whether some layer keeps attention: without it there is no child."""
        return attends(layer.attention for layer in self.layers)

    def blocks(self) -> Iterator[tuple[int, Choice]]:
        """Every block as `(parent layer, choice)`, attention before FFN."""
        return ((i, choice) for i, layer in enumerate(self.layers) for choice in layer.blocks)

    def assignments(self) -> Iterator[Assignment]:
        """All that is chosen: every block, and the vocabulary where it is not the parent's."""
        yield from self.blocks()
        if self.vocabulary != PARENTS_VOCABULARY:
            yield WHOLE_MODEL, self.vocabulary

    def with_choices(self, changes: Iterable[Assignment]) -> Architecture:
        """This architecture with some choices changed: of blocks, named by their layer, or of the vocabulary."""
        layers, vocabulary = list(self.layers), self.vocabulary
        for layer, choice in changes:
            if isinstance(choice, VocabularyChoice):
                vocabulary = choice
            else:
                layers[layer] = layers[layer].with_choice(choice)
        return Architecture(tuple(layers), vocabulary)

    def with_choice(self, layer: int, choice: AnyChoice) -> Architecture:
        """This architecture with one choice changed."""
        return self.with_choices([(layer, choice)])

    def without_layers(self, layers: Iterable[int]) -> Architecture:
        """This architecture with both blocks of some layers dropped."""
        return self.with_choices((layer, choice) for layer in layers for choice in DROPPED.values())

    def to_json(self) -> dict[str, Any]:
        layers = [
            {"layer": i, "attention": layer.attention.to_json(), "ffn": layer.ffn.to_json()}
            for i, layer in enumerate(self.layers)
        ]
        # Only where it is not the parent's: most architectures are of blocks alone.
        vocabulary = self.vocabulary.to_json()
        return {"layers": layers, **({"vocabulary": vocabulary} if vocabulary else {})}

    @classmethod
    def from_json(cls, data: Any) -> Architecture:
        """Inverse of `to_json`. Raises ArchitectureError on anything else."""
        try:
            entries = sorted(data["layers"], key=lambda entry: entry["layer"])
            indices = [entry["layer"] for entry in entries]
            layers = [
                LayerChoice(parse_choice(entry["attention"], "attention"), parse_choice(entry["ffn"], "ffn"))
                for entry in entries
            ]
            vocabulary = VocabularyChoice.from_json(data.get("vocabulary", {}))
        except (TypeError, KeyError, AttributeError) as error:
            raise ArchitectureError(
                'an architecture is {"layers": [{"layer": 0, "attention": {"kv_groups": n}, '
                f'"ffn": {{"ffn_width": n}}}}, ...]}}; got {quoted(data)} ({type(error).__name__}: {error})'
            ) from None
        if indices != list(range(len(indices))) or not all(type(index) is int for index in indices):
            raise ArchitectureError(
                f"an architecture names every parent layer 0..n-1 once; got layers {quoted(indices)}"
            )
        architecture = cls(tuple(layers), vocabulary)
        if architecture.to_json() != {**data, "layers": entries}:
            raise ArchitectureError(
                "the layers of an architecture say one choice for each block, and nothing else; this one has more, "
                f"perhaps from a newer llmprune: {quoted(data)}"
            )
        return architecture

    @property
    def canonical_json(self) -> str:
        """Sorted keys, no spaces: the text that `hash` is taken of."""
        return json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))

    @property
    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.canonical_json.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class ParentShape(Dimensions):
    """The dimensions of a parent that pruning speaks of; all layers of a parent are alike."""

    @property
    def architecture(self) -> Architecture:
        """The parent itself, as an architecture that keeps everything."""
        return Architecture.of([(self.kv_groups, self.ffn_width)] * self.layers)

    def full(self, kind: BlockKind) -> Choice:
        """The choice that keeps a whole block."""
        return whole(self, kind)

    def inputs(self, choice: Choice) -> int:
        """Inputs of the output projection that a choice keeps."""
        return choice.inputs(self)

    def rows(self, choice: Choice) -> int:
        """Rows and columns of the projections that a choice keeps: what its size goes by."""
        return choice.rows(self)

    def check(self, architecture: Architecture) -> None:
        """Raises ArchitectureError unless `architecture` is a sub-network of this parent that can run."""
        if len(architecture.layers) != self.layers:
            raise ArchitectureError(
                f"an architecture has one entry per parent layer: the parent has {self.layers}, "
                f"the architecture {len(architecture.layers)}"
            )
        for i, choice in architecture.blocks():
            if problem := choice.problem(self):
                raise ArchitectureError(f"layer {i} keeps {choice} of a parent with {problem}")
        if problem := architecture.vocabulary.problem(self):
            raise ArchitectureError(f"a child has {architecture.vocabulary} of a parent with {problem}")
        if not architecture.attends:
            raise ArchitectureError(
                "a child keeps attention in at least one layer (without it no token sees another); all kv_groups are 0"
            )
