"""The multiple-choice knapsack against brute force, and the architectures that a search starts from."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import linear_costs, tiny_space

from llmprune.architecture import BLOCK_KINDS, Architecture, BlockKind, Space
from llmprune.search.allocate import allocate
from llmprune.search.costs import CostTable
from llmprune.search.warm_starts import MARGIN, depth_by_influence, uniform_width, warm_starts

DeltaNats = dict[tuple[int, BlockKind, int], float]
SOLVER_GAP = 1e-4


def architectures(space: Space) -> Iterator[Architecture]:
    """All architectures of a space that can run."""
    layers = list(itertools.product(space.kv_groups, space.ffn_width))
    for chosen in itertools.product(layers, repeat=space.shape.layers):
        if any(kv_groups for kv_groups, _ in chosen):
            yield Architecture.of(chosen)


def loss(architecture: Architecture, delta_nats: DeltaNats) -> float:
    return sum(delta_nats[layer, kind, choice.units] for layer, kind, choice in architecture.blocks())


def quadratic_loss(space: Space) -> DeltaNats:
    """Losing more costs more than in proportion, and the more the earlier the layer."""
    return {
        (layer, kind, units): (1 - units / space.shape.units(kind)) ** 2 / (1 + layer)
        for layer in range(space.shape.layers)
        for kind in BLOCK_KINDS
        for units in space.ladder(kind)
    }


@st.composite
def problems(draw: st.DrawFn) -> tuple[DeltaNats, CostTable, float]:
    space = tiny_space(
        draw(st.integers(2, 3)), kv_groups=draw(st.integers(1, 2)), ffn_step=draw(st.sampled_from([16, 32]))
    )
    deltas = st.floats(-1, 2).map(lambda value: round(value, 3))
    # Multiples of a step, so that no sum lies within the solver's tolerance of the budget.
    steps = st.integers(0, 16)

    def savings(kind: BlockKind) -> tuple[float, ...]:
        rungs = len(space.ladder(kind)) - 1
        drawn = draw(st.lists(steps, min_size=rungs, max_size=rungs))
        return (*sorted((value / 128 for value in drawn), reverse=True), 0.0)

    costs = CostTable(space, {"decode": {kind: savings(kind) for kind in BLOCK_KINDS}})
    delta_nats = {
        (layer, kind, units): draw(deltas)
        for layer in range(space.shape.layers)
        for kind in BLOCK_KINDS
        for units in space.ladder(kind)
    }
    return delta_nats, costs, draw(st.floats(1.01, 3.5).map(lambda value: round(value, 2)))


@settings(max_examples=60, deadline=None)
@given(problems())
def test_no_architecture_that_is_as_fast_loses_less(problem: tuple[DeltaNats, CostTable, float]) -> None:
    delta_nats, costs, speedup = problem
    fast = [
        architecture for architecture in architectures(costs.space) if costs.speedup(architecture, "decode") >= speedup
    ]
    found = allocate(delta_nats, costs, "decode", speedup)
    if not fast:
        assert found is None
        return
    assert found is not None and found in fast
    best = min(loss(architecture, delta_nats) for architecture in fast)
    assert loss(found, delta_nats) <= best + SOLVER_GAP * abs(best) + 1e-6


def test_each_phase_has_its_own_optimum() -> None:
    space = tiny_space()
    costs, delta_nats = linear_costs(space, attention=0.05, ffn=0.25), quadratic_loss(space)
    decode, prefill = (allocate(delta_nats, costs, phase, 1.3) for phase in ("decode", "prefill"))
    assert decode is not None and prefill is not None and decode != prefill
    assert costs.speedup(decode, "decode") >= 1.3 and costs.speedup(prefill, "prefill") >= 1.3


@pytest.mark.parametrize("share", [0.1, 0.2])
def test_a_speed_out_of_reach_has_no_architecture(share: float) -> None:
    # With blocks that take a fifth each, the six add up to more than all of the time: estimates end at 100.
    space = tiny_space()
    assert allocate(quadratic_loss(space), linear_costs(space, share, share), "decode", 101) is None


def test_warm_starts_are_unique_and_open_with_the_parent() -> None:
    space = tiny_space(layers=4, ffn_step=8)
    costs, targets = linear_costs(space, attention=0.08, ffn=0.14), (1.15, 1.3, 1.300001, 2.0, 90.0)
    starts = warm_starts(quadratic_loss(space), [0.5, 0.1, 0.2, 0.3], costs, "decode", targets)
    labels, found = zip(*starts, strict=True)
    assert starts[0] == ("parent", space.shape.architecture)
    assert len(set(found)) == len(found) and len(set(labels)) == len(labels)
    assert all(architecture in space for architecture in found)
    assert {"allocated-1.3x", "uniform-1.3x", "depth-1.3x"} <= set(labels)
    assert not any(label in labels for label in ("allocated-90x", "depth-90x")), "out of reach"
    for architecture in found:
        space.shape.check(architecture)
    for speedup in (1.15, 1.3, 2.0):
        assert costs.speedup(found[labels.index(f"allocated-{speedup:g}x")], "decode") >= speedup * MARGIN * (1 - 1e-6)


def test_uniform_widths_are_sorted_by_their_distance_to_the_speed() -> None:
    space = tiny_space(ffn_step=8)
    costs = linear_costs(space)
    found = uniform_width(costs, "decode", 1.4)
    assert len(found) == 2 * 4, "blocks are narrowed, none is dropped"
    assert all(len(set(architecture.layers)) == 1 for architecture in found)
    distances = [abs(costs.speedup(architecture, "decode") - 1.4) for architecture in found]
    assert distances == sorted(distances)


def test_depth_drops_the_layers_of_least_influence() -> None:
    space = tiny_space(layers=4)
    costs = linear_costs(space, attention=0.1, ffn=0.1)
    influence = [0.9, 0.1, 0.5, 0.2]
    for speedup, kept in ((1.1, (0, 2, 3)), (1.25, (0, 2, 3)), (1.3, (0, 2)), (2.5, (0,))):
        found = depth_by_influence(influence, costs, "decode", speedup)
        assert found is not None and found.kept_layers == kept
        assert all(found.layers[i] == space.shape.architecture.layers[i] for i in kept)
    assert depth_by_influence(influence, costs, "decode", 2.6) is None
    without_drops = Space.of(space.shape, 1, 16, drop=False)
    assert depth_by_influence(influence, linear_costs(without_drops), "decode", 1.1) is None
