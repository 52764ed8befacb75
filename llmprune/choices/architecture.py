"""What a child keeps of its parent: one choice per block, hashable, JSON in and out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from llmprune.core.errors import ArchitectureError, quoted

BlockKind = Literal["attention", "ffn"]
BLOCK_KINDS: tuple[BlockKind, BlockKind] = ("attention", "ffn")


@dataclass(frozen=True, slots=True)
class AttentionChoice:
    """What an attention block keeps: KV groups (a KV head with the query heads that read it; 0 drops the block).

    `queries_per_group`: how many query heads stay of each kept group, the same number in all, so that the kernel stays
    legal; None keeps the parent's. More than the parent's means merged groups: neighbours share one KV head, the mean
    of theirs, and all query heads stay (GQA, arXiv 2305.13245).
    """

    kv_groups: int
    queries_per_group: int | None = None

    @property
    def kind(self) -> BlockKind:
        return "attention"

    @property
    def units(self) -> int:
        return self.kv_groups

    def to_json(self) -> dict[str, int]:
        queries = {} if self.queries_per_group is None else {"queries_per_group": self.queries_per_group}
        return {"kv_groups": self.kv_groups, **queries}


@dataclass(frozen=True, slots=True)
class FfnChoice:
    """What an FFN block keeps, in channels; 0 drops it."""

    ffn_width: int

    @property
    def kind(self) -> BlockKind:
        return "ffn"

    @property
    def units(self) -> int:
        return self.ffn_width

    def to_json(self) -> dict[str, int]:
        return {"ffn_width": self.ffn_width}


BlockChoice = AttentionChoice | FfnChoice
DROPPED: dict[BlockKind, BlockChoice] = {"attention": AttentionChoice(0), "ffn": FfnChoice(0)}


@dataclass(frozen=True, slots=True)
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

    def with_choice(self, choice: BlockChoice) -> LayerChoice:
        if isinstance(choice, AttentionChoice):
            return replace(self, attention=choice)
        return replace(self, ffn=choice)


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

    def blocks(self) -> Iterator[tuple[int, BlockChoice]]:
        """Every block as `(parent layer, choice)`, attention before FFN."""
        for i, layer in enumerate(self.layers):
            yield i, layer.attention
            yield i, layer.ffn

    def with_choices(self, changes: Iterable[tuple[int, BlockChoice]]) -> Architecture:
        """This architecture with some blocks changed, named by their layer."""
        layers = list(self.layers)
        for layer, choice in changes:
            layers[layer] = layers[layer].with_choice(choice)
        return Architecture(tuple(layers))

    def with_choice(self, layer: int, choice: BlockChoice) -> Architecture:
        """This architecture with one block changed."""
        return self.with_choices([(layer, choice)])

    def without_layers(self, layers: Iterable[int]) -> Architecture:
        """This architecture with both blocks of some layers dropped."""
        return self.with_choices((layer, choice) for layer in layers for choice in DROPPED.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "layers": [
                {"layer": i, "attention": layer.attention.to_json(), "ffn": layer.ffn.to_json()}
                for i, layer in enumerate(self.layers)
            ]
        }

    @classmethod
    def from_json(cls, data: Any) -> Architecture:
        """Inverse of `to_json`. Raises ArchitectureError on anything else."""
        try:
            entries = sorted(data["layers"], key=lambda entry: entry["layer"])
            indices = [entry["layer"] for entry in entries]
            architecture = cls(
                tuple(
                    LayerChoice(
                        AttentionChoice(entry["attention"]["kv_groups"], entry["attention"].get("queries_per_group")),
                        FfnChoice(entry["ffn"]["ffn_width"]),
                    )
                    for entry in entries
                )
            )
        except (TypeError, KeyError, AttributeError) as error:
            raise ArchitectureError(
                'an architecture is {"layers": [{"layer": 0, "attention": {"kv_groups": n}, '
                f'"ffn": {{"ffn_width": n}}}}, ...]}}; got {quoted(data)} ({type(error).__name__}: {error})'
            ) from None
        if indices != list(range(len(indices))) or not all(type(index) is int for index in indices):
            raise ArchitectureError(
                f"an architecture names every parent layer 0..n-1 once; got layers {quoted(indices)}"
            )
        for i, choice in architecture.blocks():
            for name, number in choice.to_json().items():
                if type(number) is not int or number < 0:
                    raise ArchitectureError(f"{name} is an integer >= 0; layer {i} has {quoted(number)}")
        if architecture.to_json() != {**data, "layers": entries}:
            raise ArchitectureError(
                "the layers of an architecture say kv_groups, queries_per_group and ffn_width, and nothing else; "
                f"this one has more, perhaps from a newer llmprune: {quoted(data)}"
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

    def full(self, kind: BlockKind) -> BlockChoice:
        """The choice that keeps a whole block."""
        return AttentionChoice(self.kv_groups) if kind == "attention" else FfnChoice(self.ffn_width)

    def queries(self, choice: AttentionChoice) -> int:
        """Query heads that each kept KV group has."""
        return self.queries_per_group if choice.queries_per_group is None else choice.queries_per_group

    def merges(self, choice: BlockChoice) -> int:
        """How many of the parent's KV groups share each KV head: 1 where none do."""
        if isinstance(choice, AttentionChoice) and choice in self.merged:
            return self.kv_groups // choice.kv_groups
        return 1

    @property
    def merged(self) -> tuple[AttentionChoice, ...]:
        """The choices that keep all query heads on fewer KV heads, ascending: consecutive KV groups merge, as many in
        each head."""
        fewer = (k for k in range(1, self.kv_groups) if self.kv_groups % k == 0)
        return tuple(AttentionChoice(k, self.kv_groups // k * self.queries_per_group) for k in fewer)

    def inputs(self, choice: BlockChoice) -> int:
        """Inputs of the output projection that a choice keeps."""
        if isinstance(choice, AttentionChoice):
            return choice.kv_groups * self.queries(choice) * self.head_dim
        return choice.ffn_width

    def rows(self, choice: BlockChoice) -> int:
        """Rows and columns of the projections that a choice keeps: what its size goes by."""
        if isinstance(choice, AttentionChoice):
            return 2 * self.inputs(choice) + 2 * choice.kv_groups * self.head_dim
        return choice.ffn_width

    def check(self, architecture: Architecture) -> None:
        """Raises ArchitectureError unless `architecture` is a sub-network of this parent that can run."""
        if len(architecture.layers) != self.layers:
            raise ArchitectureError(
                f"an architecture has one entry per parent layer: the parent has {self.layers}, "
                f"the architecture {len(architecture.layers)}"
            )
        for i, choice in architecture.blocks():
            if not 0 <= choice.units <= self.units(choice.kind):
                raise ArchitectureError(
                    f"layer {i} keeps {choice} of a parent with {self.units(choice.kind)} units in its "
                    f"{choice.kind} block"
                )
            if isinstance(choice, AttentionChoice) and choice.queries_per_group is not None:
                self._check_queries(i, choice, choice.queries_per_group)
        if all(layer.attention.kv_groups == 0 for layer in architecture.layers):
            raise ArchitectureError(
                "a child keeps attention in at least one layer (without it no token sees another); all kv_groups are 0"
            )

    def _check_queries(self, layer: int, choice: AttentionChoice, queries: int) -> None:
        most = self.queries_per_group - 1 if choice.kv_groups else 0
        if 1 <= queries <= most or choice in self.merged:
            return
        rule = f"queries_per_group is from 1 to {most}, and left out where all stay or the block is dropped"
        if choice.kv_groups and queries > self.queries_per_group:
            legal = " or ".join(f"{c.kv_groups} x {c.queries_per_group}" for c in self.merged)
            rule += (
                f"; more of them are merged KV groups, which keep all {self.kv_groups * self.queries_per_group} query "
                f"heads: kv_groups x queries_per_group is {legal or 'never so with one KV group'}"
            )
        raise ArchitectureError(
            f"layer {layer} keeps {choice} of a parent with {self.queries_per_group} query heads a KV group: {rule}"
        )
