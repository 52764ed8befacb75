"""Each method against what its paper says, computed the long way round."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast, get_args

import pytest
from baselines_tiny import given_of, library_of, nats_of, random_parent, space_of, tables_of

from llmprune.baselines.chance import best_of_random
from llmprune.baselines.depth import blockpruner, shortgpt, sleb, uniform_depth
from llmprune.baselines.given import Given, along
from llmprune.baselines.methods import METHODS, choose
from llmprune.baselines.uniform import uniform
from llmprune.blocks.library import BlockLibrary
from llmprune.choices.architecture import DROPPED, Architecture
from llmprune.choices.space import Space
from llmprune.core.recipe import BASELINE_NAMES, BaselineName, SpaceSize
from llmprune.models.parent import Parent
from llmprune.models.surgery import prune
from llmprune.tables.allocate import Allocator


@pytest.fixture(scope="module")
def parent() -> Parent:
    return random_parent()


@pytest.fixture(scope="module")
def library(parent: Parent) -> BlockLibrary:
    return library_of(parent, space_of(parent))


@pytest.fixture(scope="module")
def given(parent: Parent, library: BlockLibrary) -> Given:
    return given_of(parent, library)


def attends(architecture: Architecture) -> bool:
    return any(layer.attention.kv_groups for layer in architecture.layers)


def by_layer(architecture: Architecture) -> Iterator[Architecture]:
    for layer in architecture.kept_layers:
        yield architecture.without_layers([layer])


def by_block(architecture: Architecture) -> Iterator[Architecture]:
    for layer, choice in architecture.blocks():
        if choice.units:
            yield architecture.with_choice(layer, DROPPED[choice.kind])


@pytest.mark.parametrize(("method", "removals", "steps"), [(sleb, by_layer, 2), (blockpruner, by_block, 5)])
def test_greedy_drops_what_measures_best_on_the_current_child(
    parent: Parent,
    library: BlockLibrary,
    given: Given,
    method: Callable[[Given], Iterable[Architecture]],
    removals: Callable[[Architecture], Iterable[Architecture]],
    steps: int,
) -> None:
    path = list(method(given))
    assert path[0] == parent.shape.architecture and len(path) == 1 + steps
    for before, after in pairwise(path):
        losses = {child: nats_of(parent, library, child) for child in removals(before) if attends(child)}
        assert after == min(losses, key=losses.__getitem__)


def test_every_nth_layer_stays_in_the_type_of_weights_that_loses_least(given: Given) -> None:
    # Types of weights round 32 weights at a time.
    shape = replace(given.space.shape, hidden_size=64, head_dim=32, ffn_width=32)
    typed = Space.of(shape, 1, 8, precision=("q8_0", "q4_0"))
    offered: list[Sequence[Architecture]] = []

    def nats(architectures: Sequence[Architecture]) -> list[float]:
        offered.append(architectures)
        return [float("q8_0" not in stored(architecture)) for architecture in architectures]

    def stored(architecture: Architecture) -> set[str | None]:
        return {choice.stored for _, choice in architecture.blocks() if choice.units}

    plain, wanted = uniform_depth(given, 1.2), 1.2
    assert plain is not None and plain.kept_layers == (0, 2), "the first and the last stay"
    library = cast(Any, SimpleNamespace(space=typed))
    found = uniform_depth(given_of(given.parent, library, nats), wanted)
    assert found in offered[0] and found is not None and stored(found) == {"q8_0"}
    assert [stored(one) for one in offered[0][:1]] == [{None}] and {"q4_0"} in map(stored, offered[0])
    assert all(len(stored(one)) == 1 and one.kept_layers[0] == 0 and one.kept_layers[-1] == 2 for one in offered[0])
    # Fewer bits reach the speed with more layers.
    assert offered[0][0].kept_layers == plain.kept_layers and len(found.kept_layers) == 3


def test_a_step_scores_every_removal_once_and_a_path_only_as_far_as_asked(given: Given) -> None:
    scored: list[int] = []

    def nats(architectures: object) -> list[float]:
        assert isinstance(architectures, list)
        scored.append(len(architectures))
        return [float(i) for i in range(len(architectures))]

    counting = given_of(given.parent, given.library, nats)
    aim = along(blockpruner(counting), counting.speedup)
    assert aim(1.0) == given.space.shape.architecture and scored == []
    assert aim(1.17) is not None and scored == [6]
    assert aim(1.1) is not None and scored == [6]
    last = aim(1000.0)
    # The last attention stays.
    assert scored == [6, 5, 4, 2, 1] and last is not None and counting.speedup(last) < 1000


def test_shortgpt_drops_the_least_influential_layers_first(given: Given) -> None:
    influence, path = given.tables.influence, list(shortgpt(given))
    order = sorted(range(3), key=lambda layer: influence[layer])
    assert [set(range(3)) - set(a.kept_layers) for a in path] == [set(order[:n]) for n in range(3)]


def test_a_child_that_computes_no_numbers_is_never_the_best(given: Given) -> None:
    broken = given_of(given.parent, given.library, lambda architectures: [float("inf")] * len(architectures))
    assert list(sleb(broken)) == [given.space.shape.architecture]
    assert best_of_random(broken, 1.3) is None


UNIFORM = [Architecture.of([(groups, width)] * 3) for groups in (1, 2) for width in range(4, 25, 4)]


def test_uniform_takes_the_best_of_those_at_the_speed(parent: Parent, library: BlockLibrary, given: Given) -> None:
    for speedup in (1.1, 1.3, 1.6):
        found = uniform(given, speedup)
        assert found is not None and len(set(found.layers)) == 1
        near = [one for one in UNIFORM if abs(given.speedup(one) / speedup - 1) <= 0.02]
        if near:
            least = min(nats_of(parent, library, architecture) for architecture in near)
            assert nats_of(parent, library, found) <= least
        else:
            assert given.speedup(found) > speedup
    assert uniform(given, 100.0) == Architecture.of([(1, 4)] * 3)


def test_uniform_may_be_faster_where_that_is_better(given: Given) -> None:
    by_speed = sorted(UNIFORM, key=given.speedup)
    near, better = (next(one for one in by_speed if given.speedup(one) >= s) for s in (1.1, 1.3))
    scores = dict.fromkeys(given.tables.delta_nats, 1.0) | dict.fromkeys(better.blocks(), 0.0)
    told = given_of(given.parent, given.library, lambda many: [float(one != better) for one in many])
    told = replace(told, tables=replace(told.tables, delta_nats=scores))
    assert given.speedup(better) > 1.05 * given.speedup(near)
    assert uniform(told, given.speedup(near)) == better
    # What the tables think better is scored, and not believed.
    doubted = replace(told, nats=lambda many: [float(one == better) for one in many])
    assert uniform(doubted, given.speedup(near)) != better


def test_random_is_the_best_of_its_draws_and_none_where_nothing_is_as_fast(given: Given) -> None:
    found = best_of_random(given, 1.4)
    assert found is not None and found in given.space and abs(given.speedup(found) / 1.4 - 1) <= 0.02
    seen: list[Architecture] = []

    def nats(architectures: object) -> list[float]:
        assert isinstance(architectures, list)
        seen.extend(architectures)
        return given.nats(architectures)

    assert best_of_random(given_of(given.parent, given.library, nats), 1.4) == found
    assert len(seen) <= 4 and found == min(seen, key=lambda a: given.nats([a])[0])
    assert best_of_random(given, 50.0) is None
    assert best_of_random(given_of(given.parent, given.library, draws=0), 1.4) is None


def test_milp_is_the_allocator_s(given: Given) -> None:
    tables = tables_of(given.space)
    expected = Allocator(tables.delta_nats, tables.costs).best({"decode": 1.5})
    assert choose(METHODS["milp"], given, 1.5) == expected is not None


def test_every_name_has_a_method() -> None:
    assert tuple(METHODS) == BASELINE_NAMES == get_args(BaselineName)
    assert all((method.path is None) != (method.aimed is None) for method in METHODS.values())


@pytest.mark.parametrize("size", ["medium", "large"])
@pytest.mark.parametrize("name", BASELINE_NAMES)
def test_children_are_legal_and_run(parent: Parent, library: BlockLibrary, name: BaselineName, size: SpaceSize) -> None:
    method, space = METHODS[name], space_of(parent, size=size)
    own = library_of(parent, space, method.importance) if method.importance or size != "medium" else library
    given = given_of(parent, own, lambda architectures: [1.0] * len(architectures))
    aim = method.aim(given)
    for speedup in (1.1, 1.3, 1.7, 3.0):
        architecture = aim(speedup)
        if architecture is not None:
            parent.shape.check(architecture)
            assert all(choice in space.ladder(choice.kind) for _, choice in architecture.blocks())
            prune(parent, architecture, own)
    assert choose(method, given, 60.0) is None


@pytest.mark.parametrize("name", ["shortgpt", "sleb", "blockpruner"])
def test_depth_needs_drops(parent: Parent, name: BaselineName) -> None:
    space = space_of(parent, drop=False)
    given = given_of(parent, library_of(parent, space))
    assert METHODS[name].aim(given)(1.5) == parent.shape.architecture
    assert choose(METHODS[name], given, 1.5) is None
