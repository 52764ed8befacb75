"""The multiple-choice knapsack against brute force, and the architectures that a search starts from."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from functools import cached_property
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import linear_costs, tiny_space

from llmprune.choices.architecture import Architecture
from llmprune.choices.choice import Choice
from llmprune.choices.dimensions import BLOCK_KINDS
from llmprune.choices.kv_groups import AttentionChoice
from llmprune.choices.space import Space
from llmprune.core.errors import ArchitectureError
from llmprune.core.recipe import SpaceSize
from llmprune.search.warm_starts import MARGIN, depth_by_influence, uniform_width, warm_starts
from llmprune.tables.allocate import Allocator, Near
from llmprune.tables.costs import CostTable

DeltaNats = dict[tuple[int, Choice], float]
SIZES: tuple[SpaceSize, ...] = get_args(SpaceSize)
COLUMNS = ("decode", "params")
SOLVER_GAP = 1e-4
# Wanted ratios and savings meet exactly now and then: rounding is then no difference.
ROUNDING = 1e-9


def architectures(space: Space) -> list[Architecture]:
    """All architectures of a space that can run."""
    options = (range(len(decision.options)) for decision in space.decisions)
    every = (space.architecture(indices) for indices in itertools.product(*options))
    return [found for found in every if any(layer.attention.kv_groups for layer in found.layers)]


def loss(architecture: Architecture, delta_nats: DeltaNats) -> float:
    return sum(delta_nats[key] for key in architecture.blocks())


def quadratic_loss(space: Space) -> DeltaNats:
    """Losing more costs more than in proportion, and the more the earlier the layer."""
    rows = space.shape.rows
    return {
        (layer, choice): (1 - rows(choice) / rows(space.shape.full(kind))) ** 2 / (1 + layer)
        for layer, kind in space.blocks()
        for choice in space.ladder(kind)
    }


@dataclass(frozen=True)
class Problem:
    """Tables, what is wanted of each column, and all that there is to choose from."""

    delta_nats: DeltaNats
    costs: CostTable
    wanted: dict[str, float]

    @property
    def space(self) -> Space:
        return self.costs.space

    @property
    def allocator(self) -> Allocator:
        return Allocator(self.delta_nats, self.costs)

    @cached_property
    def all(self) -> list[Architecture]:
        return architectures(self.space)

    @cached_property
    def feasible(self) -> list[Architecture]:
        return [one for one in self.all if self.holds(one)]

    def holds(self, architecture: Architecture) -> bool:
        return all(self.costs.speedup(architecture, c) >= r * (1 - ROUNDING) for c, r in self.wanted.items())

    def distance(self, one: Architecture, other: Architecture) -> int:
        """How many decisions differ."""
        return sum(a != b for a, b in zip(self.space.indices(one), self.space.indices(other), strict=True))

    def check(self, found: Architecture | None, among: list[Architecture]) -> None:
        """`found` is the least loss of `among`, and None if that is empty."""
        if not among:
            assert found is None
            return
        assert found is not None and found in among
        best = min(loss(one, self.delta_nats) for one in among)
        assert loss(found, self.delta_nats) <= best + SOLVER_GAP * abs(best) + 1e-6


@st.composite
def problems(draw: st.DrawFn, columns: int = 1) -> Problem:
    size = draw(st.sampled_from(SIZES))
    space = tiny_space(
        2 if size == "large" else draw(st.integers(2, 3)),
        kv_groups=draw(st.integers(1, 2)),
        ffn_step=draw(st.sampled_from([8, 16] if size == "small" else [16, 32])),
        size=size,
    )
    deltas = st.floats(-1, 2).map(lambda value: round(value, 3))
    # Multiples of a step, so that no sum lies within the solver's tolerance of the budget.
    steps = st.integers(0, 16)

    def savings() -> dict[Choice, float]:
        saving: dict[Choice, float] = {}
        for kind in BLOCK_KINDS:
            ladder = space.ladder(kind)
            drawn = draw(st.lists(steps, min_size=len(ladder) - 1, max_size=len(ladder) - 1))
            saving |= zip(ladder, (*sorted((value / 128 for value in drawn), reverse=True), 0.0), strict=True)
        return saving

    costs = CostTable(space, {column: savings() for column in COLUMNS[:columns]})
    delta_nats = {(i, choice): draw(deltas) for i, kind in space.blocks() for choice in space.ladder(kind)}
    ratios = st.floats(1.01, 3.5 if columns == 1 else 1.3).map(lambda value: round(value, 2))
    return Problem(delta_nats, costs, {column: draw(ratios) for column in COLUMNS[:columns]})


@settings(max_examples=60, deadline=None)
@given(problems())
def test_no_architecture_that_is_as_fast_loses_less(problem: Problem) -> None:
    problem.check(problem.allocator.best(problem.wanted), problem.feasible)


@settings(max_examples=60, deadline=None)
@given(problems(columns=2))
def test_no_architecture_that_is_as_fast_and_as_small_loses_less(problem: Problem) -> None:
    problem.check(problem.allocator.best(problem.wanted), problem.feasible)


@settings(max_examples=60, deadline=None)
@given(problems(columns=2), st.data())
def test_the_trust_region_and_the_cuts_are_what_they_say(problem: Problem, data: st.DataObject) -> None:
    decisions = len(problem.space.decisions)
    some = st.sampled_from(problem.all)
    near = data.draw(st.none() | st.builds(Near, some, st.integers(0, decisions)))
    apart, distance = data.draw(st.lists(some, max_size=3)), data.draw(st.integers(1, decisions))
    among = [
        one
        for one in problem.feasible
        if (near is None or problem.distance(one, near.architecture) <= near.radius)
        and all(problem.distance(one, other) >= distance for other in apart)
    ]
    problem.check(problem.allocator.best(problem.wanted, near=near, apart=apart, distance=distance), among)


@settings(max_examples=60, deadline=None)
@given(problems(columns=2), st.data())
def test_a_pool_is_the_best_then_the_best_that_differs(problem: Problem, data: st.DataObject) -> None:
    decisions = len(problem.space.decisions)
    distance, count = data.draw(st.integers(1, decisions)), data.draw(st.integers(1, 4))
    near = data.draw(
        st.none() | st.builds(Near, st.sampled_from(problem.all), st.integers(min(distance, decisions), decisions))
    )
    pool = problem.allocator.pool(problem.wanted, count=count, distance=distance, near=near)
    left = [one for one in problem.feasible if near is None or problem.distance(one, near.architecture) <= near.radius]
    for member in pool:
        problem.check(member, left)
        left = [one for one in left if problem.distance(one, member) >= distance]
    assert len(pool) == count or not left, "the pool ends before the space does"
    assert len(pool) <= count
    for one, other in itertools.combinations(pool, 2):
        assert problem.distance(one, other) >= distance
    losses = [loss(member, problem.delta_nats) for member in pool]
    assert all(after >= before - SOLVER_GAP * abs(before) - 1e-6 for before, after in itertools.pairwise(losses))


@settings(max_examples=60, deadline=None)
@given(problems(columns=2), st.floats(1, 4))
def test_the_nearest_has_the_smallest_worst_gap(problem: Problem, harder: float) -> None:
    wanted = {column: harder * ratio for column, ratio in problem.wanted.items()}

    def worst_gap(architecture: Architecture) -> float:
        gaps = (
            (1 - 1 / ratio) - problem.costs.option_saving(column, architecture.blocks())
            for column, ratio in wanted.items()
        )
        return max(0.0, *gaps)

    found = problem.allocator.nearest(wanted)
    assert found in problem.all
    assert worst_gap(found) == pytest.approx(min(map(worst_gap, problem.all)), rel=SOLVER_GAP, abs=1e-5)


def test_an_architecture_of_another_space_is_no_anchor() -> None:
    space = tiny_space()
    allocator = Allocator(quadratic_loss(space), linear_costs(space))
    with pytest.raises(ArchitectureError, match=r"layer_000\.attention has no option"):
        allocator.best({}, near=Near(space.shape.architecture.with_choice(0, AttentionChoice(2, 1)), 1))


def test_what_is_wanted_of_no_column_is_the_least_loss() -> None:
    space = tiny_space(size="large")
    assert Allocator(quadratic_loss(space), linear_costs(space)).best({}) == space.shape.architecture


def test_each_phase_has_its_own_optimum() -> None:
    space = tiny_space()
    costs = linear_costs(space, attention=0.05, ffn=0.25)
    allocator = Allocator(quadratic_loss(space), costs)
    decode, prefill = (allocator.best({phase: 1.3}) for phase in ("decode", "prefill"))
    assert decode is not None and prefill is not None and decode != prefill
    assert costs.speedup(decode, "decode") >= 1.3 and costs.speedup(prefill, "prefill") >= 1.3
    both = allocator.best({"decode": 1.3, "prefill": 1.3})
    assert both is not None and min(costs.speedup(both, phase) for phase in ("decode", "prefill")) >= 1.3 - 1e-4


@pytest.mark.parametrize("share", [0.1, 0.2])
def test_a_speed_out_of_reach_has_no_architecture(share: float) -> None:
    # With blocks that take a fifth each, the six add up to more than all of the time: estimates end at 100.
    space = tiny_space()
    allocator = Allocator(quadratic_loss(space), linear_costs(space, share, share))
    assert allocator.best({"decode": 101}) is None
    assert allocator.pool({"decode": 101}, count=3, distance=1) == []


@pytest.mark.parametrize("size", SIZES)
def test_warm_starts_are_of_the_space(size: SpaceSize) -> None:
    space = tiny_space(layers=4, ffn_step=8, size=size)
    costs = linear_costs(space, attention=0.08, ffn=0.14)
    starts = warm_starts(quadratic_loss(space), [0.5, 0.1, 0.2, 0.3], costs, "decode", (1.15, 1.3, 2.0))
    assert all(architecture in space for _, architecture in starts)
    labels = {label.partition("-")[0] for label, _ in starts}
    # Layers that are all alike are none that leave, and layers that are whole have no width.
    assert labels == {"parent", "allocated", "uniform", "depth"} - {"small": {"depth"}, "layer": {"uniform"}}.get(
        size, set()
    )


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


def test_warm_starts_take_the_path_first_and_the_nearest_where_nothing_is_as_fast() -> None:
    space = tiny_space(layers=4, ffn_step=8)
    costs, scores, influence = linear_costs(space, attention=0.08, ffn=0.14), quadratic_loss(space), [0.5] * 4
    plain = warm_starts(scores, influence, costs, "decode", (1.3, 90.0))
    labels = [label for label, _ in plain]
    assert labels[:3] == ["parent", "allocated-1.3x", "nearest-90x"]
    assert plain[2][1] == Allocator(scores, costs).nearest({"decode": 90.0 * MARGIN})
    # What the path and the allocation agree on is a seed of the path; what is not of the space is none.
    path = [("path-1.3x", plain[1][1]), ("path-2x", space.shape.architecture.with_choice(0, AttentionChoice(1, 1)))]
    along = warm_starts(scores, influence, costs, "decode", (1.3, 90.0), path)
    assert [label for label, _ in along] == ["parent", "path-1.3x", *labels[2:]]


def test_uniform_widths_are_sorted_by_their_distance_to_the_speed() -> None:
    space = tiny_space(ffn_step=8)
    costs = linear_costs(space)
    found = uniform_width(costs, "decode", 1.4)
    assert len(found) == 2 * 4, "blocks are narrowed, none is dropped"
    assert all(len(set(architecture.layers)) == 1 for architecture in found)
    distances = [abs(costs.speedup(architecture, "decode") - 1.4) for architecture in found]
    assert distances == sorted(distances)


def test_of_uniform_widths_that_are_as_fast_the_least_lossy_is_the_seed() -> None:
    space = tiny_space(layers=4, ffn_step=8)
    costs = linear_costs(space, attention=0.004, ffn=0.14)
    first, second = uniform_width(costs, "decode", 1.3)[:2]
    miss = abs(costs.speedup(second, "decode") - costs.speedup(first, "decode"))
    assert miss <= 0.02 * 1.3, "they are as fast as each other"
    for better in (first, second):
        free = set(better.blocks())
        scores = {key: 0.0 if key in free else 1.0 for key in quadratic_loss(space)}
        starts = dict(warm_starts(scores, [0.5] * 4, costs, "decode", (1.3,)))
        assert better in starts.values() and starts.get("uniform-1.3x", better) == better


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


def test_the_solver_leaves_stdout_to_results(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmprune.tables import allocate as module

    solve = module.milp

    def chatty(*args: object, **options: object) -> object:
        os.write(1, b"HighsMipSolverData")
        return solve(*args, **options)

    monkeypatch.setattr(module, "milp", chatty)
    space = tiny_space()
    assert Allocator(quadratic_loss(space), linear_costs(space)).best({"decode": 1.2}) is not None
    print("result")
    assert capfd.readouterr().out == "result\n"
