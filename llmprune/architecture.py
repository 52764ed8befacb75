"""What a child keeps of its parent: one choice per block, hashable, JSON in and out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from llmprune.errors import ArchitectureError

BlockKind = Literal["attention", "ffn"]
BLOCK_KINDS: tuple[BlockKind, BlockKind] = ("attention", "ffn")


@dataclass(frozen=True, slots=True, order=True)
class AttentionChoice:
    """What an attention block keeps, in KV groups (a KV head with the query heads that read it); 0 drops it."""

    kv_groups: int

    @property
    def units(self) -> int:
        return self.kv_groups


@dataclass(frozen=True, slots=True, order=True)
class FfnChoice:
    """What an FFN block keeps, in channels; 0 drops it."""

    ffn_width: int

    @property
    def units(self) -> int:
        return self.ffn_width


BlockChoice = AttentionChoice | FfnChoice


@dataclass(frozen=True, slots=True, order=True)
class LayerChoice:
    """The choices of a layer's two blocks; with both dropped, the layer is gone."""

    attention: AttentionChoice
    ffn: FfnChoice

    @classmethod
    def of(cls, kv_groups: int, ffn_width: int) -> LayerChoice:
        return cls(AttentionChoice(kv_groups), FfnChoice(ffn_width))

    @property
    def is_gone(self) -> bool:
        return self.attention.kv_groups == 0 and self.ffn.ffn_width == 0

    def block(self, kind: BlockKind) -> BlockChoice:
        return self.attention if kind == "attention" else self.ffn

    def with_units(self, kind: BlockKind, units: int) -> LayerChoice:
        if kind == "attention":
            return replace(self, attention=AttentionChoice(units))
        return replace(self, ffn=FfnChoice(units))


@dataclass(frozen=True, slots=True)
class Architecture:
    """One choice per block of the parent; `layers[i]` speaks of the parent's layer `i`, kept or not."""

    layers: tuple[LayerChoice, ...]

    @classmethod
    def of(cls, layers: Iterable[tuple[int, int]]) -> Architecture:
        """From `(kv_groups, ffn_width)` pairs, one per parent layer."""
        return cls(tuple(LayerChoice.of(kv_groups, ffn_width) for kv_groups, ffn_width in layers))

    @property
    def kept_layers(self) -> tuple[int, ...]:
        """Parent indices of the layers that keep at least one block: the child's layers, in order."""
        return tuple(i for i, layer in enumerate(self.layers) if not layer.is_gone)

    def blocks(self) -> Iterator[tuple[int, BlockKind, BlockChoice]]:
        """Every block as `(parent layer, kind, choice)`, attention before FFN."""
        for i, layer in enumerate(self.layers):
            yield i, "attention", layer.attention
            yield i, "ffn", layer.ffn

    def with_units(self, layer: int, kind: BlockKind, units: int) -> Architecture:
        """This architecture with one block changed."""
        changed = self.layers[layer].with_units(kind, units)
        return Architecture((*self.layers[:layer], changed, *self.layers[layer + 1 :]))

    def to_json(self) -> dict[str, Any]:
        return {
            "layers": [
                {
                    "layer": i,
                    "attention": {"kv_groups": choice.attention.kv_groups},
                    "ffn": {"ffn_width": choice.ffn.ffn_width},
                }
                for i, choice in enumerate(self.layers)
            ]
        }

    @classmethod
    def from_json(cls, data: Any) -> Architecture:
        """Inverse of `to_json`. Raises ArchitectureError on anything else."""
        try:
            entries = sorted(data["layers"], key=lambda entry: entry["layer"])
            indices = [entry["layer"] for entry in entries]
            pairs = [(entry["attention"]["kv_groups"], entry["ffn"]["ffn_width"]) for entry in entries]
        except (TypeError, KeyError) as error:
            raise ArchitectureError(
                'an architecture is {"layers": [{"layer": 0, "attention": {"kv_groups": n}, '
                f'"ffn": {{"ffn_width": n}}}}, ...]}}; got {data!r:.200} ({type(error).__name__}: {error})'
            ) from None
        if indices != list(range(len(indices))) or not all(type(index) is int for index in indices):
            raise ArchitectureError(f"an architecture names every parent layer 0..n-1 once; got layers {indices}")
        for i, pair in enumerate(pairs):
            if not all(type(units) is int and units >= 0 for units in pair):
                raise ArchitectureError(f"kv_groups and ffn_width are integers >= 0; layer {i} has {pair}")
        architecture = cls.of(pairs)
        if architecture.to_json() != {**data, "layers": entries}:
            raise ArchitectureError(
                "the layers of an architecture say kv_groups and ffn_width, and nothing else; "
                f"this one has more, perhaps from a newer llmprune: {data!r:.200}"
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
class ParentShape:
    """The dimensions of a parent that pruning speaks of; all layers of a parent are alike."""

    layers: int
    hidden_size: int
    kv_groups: int
    queries_per_group: int
    head_dim: int
    ffn_width: int

    @property
    def architecture(self) -> Architecture:
        """The parent itself, as an architecture that keeps everything."""
        return Architecture.of([(self.kv_groups, self.ffn_width)] * self.layers)

    def units(self, kind: BlockKind) -> int:
        """How many units the parent's blocks of this kind have."""
        return self.kv_groups if kind == "attention" else self.ffn_width

    def check(self, architecture: Architecture) -> None:
        """Raises ArchitectureError unless `architecture` is a sub-network of this parent that can run."""
        if len(architecture.layers) != self.layers:
            raise ArchitectureError(
                f"an architecture has one entry per parent layer: the parent has {self.layers}, "
                f"the architecture {len(architecture.layers)}"
            )
        for i, kind, choice in architecture.blocks():
            if not 0 <= choice.units <= self.units(kind):
                raise ArchitectureError(
                    f"layer {i} keeps {choice} of a parent with {self.units(kind)} units in its {kind} block"
                )
        if all(layer.attention.kv_groups == 0 for layer in architecture.layers):
            raise ArchitectureError(
                "a child keeps attention in at least one layer (without it no token sees another); all kv_groups are 0"
            )


@dataclass(frozen=True, slots=True)
class Space:
    """Which choices a search may make: for each kind an ascending ladder of units that ends at the parent's."""

    shape: ParentShape
    kv_groups: tuple[int, ...]
    ffn_width: tuple[int, ...]

    @classmethod
    def of(cls, shape: ParentShape, kv_groups_step: int, ffn_step: int, *, drop: bool = True) -> Space:
        """Multiples of each step up to the parent's size, the parent's own size, and 0 if `drop`.

        Raises ArchitectureError on a step that is not between 1 and the parent's size, or if nothing can be pruned.
        """

        def ladder(kind: BlockKind, name: str, step: int) -> tuple[int, ...]:
            full = shape.units(kind)
            if not 1 <= step <= full:
                raise ArchitectureError(f"{name} must be from 1 to the parent's {full}; got {step}")
            return tuple(sorted({*range(0 if drop else step, full, step), full}))

        space = cls(
            shape,
            ladder("attention", "space.kv_groups_step", kv_groups_step),
            ladder("ffn", "space.ffn_step", ffn_step),
        )
        if len(space.kv_groups) == len(space.ffn_width) == 1:
            raise ArchitectureError(
                "the space holds the parent alone; allow space.drop, or lower space.kv_groups_step from "
                f"{kv_groups_step} or space.ffn_step from {ffn_step}"
            )
        return space

    def ladder(self, kind: BlockKind) -> tuple[int, ...]:
        return self.kv_groups if kind == "attention" else self.ffn_width

    def __contains__(self, architecture: Architecture) -> bool:
        return len(architecture.layers) == self.shape.layers and all(
            choice.units in self.ladder(kind) for _, kind, choice in architecture.blocks()
        )
