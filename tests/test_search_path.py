"""Seeds along a path: how far steps go, what is asked, and that it pays where blocks lean on each other."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from landscape import SPACES, Landscape, space_of

from llmprune.choices.architecture import Architecture
from llmprune.choices.space import Space
from llmprune.tables.allocate import TOLERANCE, Allocator, Near
from llmprune.tables.walk import radius_of, walk

STEP = 1.06
# The estimate at any place is what a change truly costs there.
EXACT = Landscape(space_of(6), table_noise=0.0)


def walked(
    landscape: Landscape, speedups: list[float], *, step: float = STEP, asked: list[Architecture] | None = None
) -> list[tuple[float, Architecture]]:
    def estimate(at: Architecture) -> Any:
        if asked is not None:
            asked.append(at)
        return landscape.estimate(at)

    costs = landscape.allocator.costs
    return list(walk(estimate, costs, "decode", speedups, step=step, progress=lambda done, total: None))


def changed(space: Space, one: Architecture, other: Architecture) -> int:
    return sum(a != b for a, b in zip(space.indices(one), space.indices(other), strict=True))


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_every_child_holds_its_speedup_and_can_run(space: Space) -> None:
    landscape = Landscape(space)
    found = walked(landscape, [1.5, 1.15, 1.3])
    assert [speedup for speedup, _ in found] == [1.15, 1.3, 1.5]
    for speedup, architecture in found:
        assert landscape.allocator.costs.speedup(architecture, "decode") >= speedup * (1 - TOLERANCE)
        assert architecture in space
        space.shape.check(architecture)


def test_a_step_changes_no_more_than_the_trust_region_where_that_suffices() -> None:
    space, costs = EXACT.space, EXACT.allocator.costs
    radius = radius_of(1.05, len(space.decisions))
    # Each stop is wanted, so each is seen.
    speedups = [1.05**power for power in range(1, 15)]
    found = walked(EXACT, speedups)
    assert len(found) == len(speedups)
    at = [space.shape.architecture, *(architecture for _, architecture in found)]
    for (before, after), speedup in zip(pairwise(at), speedups, strict=True):
        assert changed(space, before, after) <= radius
        near = Allocator(EXACT.estimate(before), costs).best({"decode": speedup}, near=Near(before, radius))
        assert near == after


def test_a_longer_step_may_change_more() -> None:
    assert [radius_of(step, 60) for step in (1.001, 1.06, 1.06**2, 1.06**4, 2.0)] == [2, 15, 30, 60, 60]


def test_a_step_too_far_for_the_trust_region_is_taken_all_the_same() -> None:
    ((_, architecture),) = walked(EXACT, [2.5], step=9.0)
    assert changed(EXACT.space, EXACT.space.shape.architecture, architecture) > 3
    assert EXACT.allocator.costs.speedup(architecture, "decode") >= 2.5 * (1 - TOLERANCE)


def test_the_estimate_is_asked_once_a_stop_and_where_the_path_stands() -> None:
    asked: list[Architecture] = []
    wanted = [1.15, 1.3, 1.5, 2.0]
    found = dict(walked(EXACT, wanted, asked=asked))
    assert asked[0] == EXACT.space.shape.architecture
    assert len(set(asked)) == len(asked)
    assert set(list(found.values())[:-1]) <= set(asked)
    reached = [EXACT.allocator.costs.speedup(architecture, "decode") for architecture in [*asked, found[2.0]]]
    # A solution is a little faster than its stop, never slower.
    assert all(later / earlier < STEP * 1.02 for earlier, later in pairwise(reached))
    # 1.15 and 1.3 in three steps of at most 1.06 each, 1.5 in three, 2.0 in five.
    assert len(asked) == 3 + 3 + 3 + 5


def test_a_path_ends_where_nothing_is_as_fast() -> None:
    landscape, asked = Landscape(space_of(3, drop=False)), list[Architecture]()
    assert [speedup for speedup, _ in walked(landscape, [1.2, 90.0], asked=asked)] == [1.2]
    assert landscape.allocator.costs.speedup(asked[-1], "decode") < 90
    assert walked(landscape, [90.0], step=100.0) == []


def test_two_paths_are_one() -> None:
    assert walked(EXACT, [1.3, 1.6]) == walked(EXACT, [1.6, 1.3, 1.3])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_where_blocks_lean_on_each_other_a_path_beats_one_allocation(seed: int) -> None:
    landscape = Landscape(space_of(12), seed=seed, table_noise=0.0)
    parent = landscape.nats(landscape.space.shape.architecture)
    lost: Callable[[Architecture], float] = lambda architecture: landscape.nats(architecture) - parent  # noqa: E731
    for speedup, architecture in walked(landscape, [1.6, 2.0]):
        at_once = landscape.allocator.best({"decode": speedup})
        assert at_once is not None
        assert lost(architecture) < lost(at_once)
