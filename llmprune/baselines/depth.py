"""Depth: whole layers or half layers leave, by a score of the parent or by what each step really loses."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from llmprune.baselines.given import Given, Path, along
from llmprune.baselines.match import AT
from llmprune.choices.architecture import DROPPED, Architecture
from llmprune.choices.dimensions import BLOCK_KINDS
from llmprune.choices.space import Space
from llmprune.search.warm_starts import parents_in_types


def shortgpt(given: Given) -> Path:
    """Drop whole layers, least block influence first (ShortGPT, arXiv 2403.03853); the last attention stays."""
    architecture = given.space.shape.architecture
    yield architecture
    influence = given.tables.influence
    for layer in sorted(range(len(influence)), key=lambda layer: influence[layer]):
        shorter = architecture.without_layers([layer])
        if may_drop(given.space) and shorter.attends:
            architecture = shorter
            yield architecture


def uniform_depth(given: Given, speedup: float) -> Architecture | None:
    """Keep every n-th layer, the first and the last among them: what is taken for a draft where nothing is searched.
    Where a space offers types of weights, what stays has one of them: the best on the search tokens of all that are
    as fast."""
    wholes = [given.space.shape.architecture, *(whole for _, whole in parents_in_types(given.space))]
    nearest = [along(_every_nth(given.space, whole), given.speedup)(speedup) for whole in wholes]
    found = [architecture for architecture in nearest if architecture is not None]
    fast = [a for a in found if given.speedup(a) >= speedup * (1 - AT)] or [max(found, key=given.speedup)]
    return fast[0] if len(fast) == 1 else given.best(fast)


def _every_nth(space: Space, whole: Architecture) -> Path:
    """All of `whole`, and ever fewer layers of it."""
    yield whole
    last = space.shape.layers - 1
    for kept in range(last, 0, -1):
        stays = {round(i * last / max(1, kept - 1)) for i in range(kept)}
        shorter = whole.without_layers([layer for layer in range(last + 1) if layer not in stays])
        if may_drop(space) and shorter.attends:
            yield shorter


def sleb(given: Given) -> Path:
    """Again and again drop the layer whose removal loses the least nats, all removals being measured on the current
    child (SLEB, arXiv 2402.09025)."""

    def shorter(architecture: Architecture) -> Iterable[Architecture]:
        return (architecture.without_layers([layer]) for layer in architecture.kept_layers)

    return _greedy(given, shorter)


def blockpruner(given: Given) -> Path:
    """As `sleb`, with attention and FFN blocks apart (BlockPruner, arXiv 2406.10594)."""

    def smaller(architecture: Architecture) -> Iterable[Architecture]:
        blocks = architecture.blocks()
        return (architecture.with_choice(layer, DROPPED[own.kind]) for layer, own in blocks if own.units)

    return _greedy(given, smaller)


def _greedy(given: Given, removals: Callable[[Architecture], Iterable[Architecture]]) -> Path:
    architecture: Architecture | None = given.space.shape.architecture
    while architecture is not None:
        yield architecture
        given.remember(architecture)
        legal = [child for child in removals(architecture) if child.attends] if may_drop(given.space) else []
        architecture = given.best(legal)


def may_drop(space: Space) -> bool:
    return all(DROPPED[kind] in space.ladder(kind) for kind in BLOCK_KINDS)
