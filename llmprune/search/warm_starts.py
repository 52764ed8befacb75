"""Architectures to start from: a cold sampler in some sixty dimensions finds nothing in a hundred trials."""

from __future__ import annotations

from collections.abc import Sequence

from llmprune.choices.architecture import DROPPED, Architecture, LayerChoice
from llmprune.choices.dimensions import BLOCK_KINDS, WHOLE_MODEL
from llmprune.choices.space import Space
from llmprune.choices.vocabulary import PARENTS_VOCABULARY, VocabularyChoice
from llmprune.numerics.ggml import TYPES
from llmprune.tables.allocate import Allocator, Scores
from llmprune.tables.costs import CostTable

# A solution right at the target measures below it half of the time.
MARGIN = 1.02
WITHIN = 0.02
"""Share of a speed-up within which uniform widths count as equally fast."""


def warm_starts(
    delta_nats: Scores,
    influence: Sequence[float],
    costs: CostTable,
    phase: str,
    speedups: Sequence[float],
    path: Sequence[tuple[str, Architecture]] = (),
) -> list[tuple[str, Architecture]]:
    """Labelled starting points of the space, best guesses first, without repeats: the parent, then for each speed-up
    what the `path` holds, the allocation of least estimated loss (or, where nothing is as fast, the nearest), the
    uniform width, and the depth cut by block influence."""
    allocator = Allocator(delta_nats, costs)
    starts: list[tuple[str, Architecture | None]] = [("parent", costs.space.shape.architecture), *path]
    for s in speedups:
        wanted = {phase: s * MARGIN}
        found = allocator.best(wanted)
        starts.append((f"allocated-{s:g}x", found) if found else (f"nearest-{s:g}x", allocator.nearest(wanted)))
    starts += [
        (f"uniform-{s:g}x", _least_lost(uniform_width(costs, phase, s), costs, phase, s, delta_nats)) for s in speedups
    ]
    starts += [(f"depth-{s:g}x", depth_by_influence(influence, costs, phase, s)) for s in speedups]
    unique: dict[Architecture, str] = {}
    for label, architecture in starts:
        # A space whose layers are all alike holds no depth cut.
        if architecture is not None and architecture in costs.space:
            unique.setdefault(architecture, label)
    return [(label, architecture) for architecture, label in unique.items()]


def uniform_width(costs: CostTable, phase: str, speedup: float) -> list[Architecture]:
    """Architectures with one number of KV groups and one FFN width for all layers, with any vocabulary; nearest to
    `speedup` first."""
    space = costs.space
    uniform = [
        Architecture((LayerChoice(attention, ffn),) * space.shape.layers, vocabulary)
        for attention in space.attention
        for ffn in space.ffn
        for vocabulary in space.vocabulary or (PARENTS_VOCABULARY,)
        if attention.units and ffn.units
    ]
    return sorted(uniform, key=lambda architecture: abs(costs.speedup(architecture, phase) - speedup))


def _least_lost(
    nearest_first: Sequence[Architecture], costs: CostTable, phase: str, speedup: float, delta_nats: Scores
) -> Architecture:
    """Of the architectures at least about as fast as the nearest to a speed-up, the one of least summed nats: one KV
    group and a wide FFN may be as fast as all KV groups and a narrow one, and a faster one may lose less."""
    miss = abs(costs.speedup(nearest_first[0], phase) - speedup) + WITHIN * speedup
    fast = [a for a in nearest_first if costs.speedup(a, phase) >= speedup - miss]
    return min(fast, key=lambda architecture: sum(delta_nats[key] for key in architecture.assignments()))


def depth_by_influence(influence: Sequence[float], costs: CostTable, phase: str, speedup: float) -> Architecture | None:
    """Drop whole layers, least block influence first (ShortGPT, arXiv 2403.03853), until the speed-up is reached.

    None if the space has no drops, or all layers but one do not suffice.
    """
    space = costs.space
    if not all(DROPPED[kind] in space.ladder(kind) for kind in BLOCK_KINDS):
        return None
    architecture = space.shape.architecture
    for layer in sorted(range(space.shape.layers), key=lambda layer: influence[layer])[:-1]:
        architecture = architecture.without_layers([layer])
        if costs.speedup(architecture, phase) >= speedup:
            return architecture
    return None


def parents_in_types(space: Space) -> list[tuple[str, Architecture]]:
    """The parent in each of the types that the space offers, as it would be quantised without being pruned, widest
    first: all of it, and its blocks alone, as llama-quantize keeps embedding and output head wider where it can."""
    shape, found = space.shape, []
    every = [choice for kind in BLOCK_KINDS for choice in space.ladder(kind)]
    for name in TYPES:
        whole = [choice for choice in every if choice.stored == name and choice == choice.entered_as(shape)]
        if len(whole) == len(BLOCK_KINDS):
            changes = ((layer, choice) for layer in range(shape.layers) for choice in whole)
            blocks = shape.architecture.with_choices(changes)
            found.append((f"parent, blocks in {name}", blocks))
            if (vocabulary := VocabularyChoice(name)) in space.vocabulary:
                found.append((f"parent in {name}", blocks.with_choice(WHOLE_MODEL, vocabulary)))
    return found
