"""Spaces: which choices their ladders and decisions hold, in every size."""

from __future__ import annotations

import itertools
import json
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmprune.choices.architecture import DROPPED, Architecture, LayerChoice, ParentShape
from llmprune.choices.choice import Choice
from llmprune.choices.dimensions import BLOCK_KINDS, BlockKind
from llmprune.choices.ffn import FfnChoice
from llmprune.choices.kv_groups import AttentionChoice
from llmprune.choices.merged import MergedChoice
from llmprune.choices.space import Space
from llmprune.core.errors import ArchitectureError
from llmprune.core.recipe import SpaceSize

SHAPE = ParentShape(layers=3, hidden_size=24, kv_groups=4, queries_per_group=3, head_dim=3, ffn_width=40)
SIZES: tuple[SpaceSize, ...] = get_args(SpaceSize)


def space_of(size: SpaceSize) -> Space:
    return Space.of(SHAPE, 2, 16, size=size)


def units(space: Space, kind: BlockKind) -> list[int]:
    return [choice.units for choice in space.ladder(kind)]


@given(full=st.integers(1, 200), step=st.integers(1, 200), drop=st.booleans())
def test_ladders_climb_by_the_step_to_the_parent(full: int, step: int, drop: bool) -> None:
    shape = ParentShape(layers=2, hidden_size=8, kv_groups=full, queries_per_group=1, head_dim=4, ffn_width=200)
    if step > full:
        with pytest.raises(
            ArchitectureError, match=rf"space.kv_groups_step must be from 1 to the parent's {full}; got"
        ):
            Space.of(shape, step, 8, drop=drop)
        return
    ladder = units(Space.of(shape, step, 8, drop=drop), "attention")
    assert ladder == sorted(set(ladder)) and ladder[-1] == full
    assert set(ladder[:-1]) == {count for count in range(full) if count % step == 0 and (count or drop)}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("kv_groups_step", "ffn_step"), [(0, 8), (-1, 8), (5, 8), (1, 0), (1, 41)])
def test_a_step_outside_the_parent_is_refused(kv_groups_step: int, ffn_step: int, size: SpaceSize) -> None:
    with pytest.raises(
        ArchitectureError, match=r"space\.(kv_groups|ffn)_step must be from 1 to the parent's (4|40); got (-1|0|5|41)"
    ):
        Space.of(SHAPE, kv_groups_step, ffn_step, size=size)


@pytest.mark.parametrize(("size", "drop"), [("medium", False), ("small", False), ("small", True)])
def test_a_space_of_the_parent_alone_is_refused(size: SpaceSize, drop: bool) -> None:
    with pytest.raises(
        ArchitectureError, match=r"the space holds the parent alone; .*lower space\.kv_groups_step from 4 or .* from 40"
    ):
        Space.of(SHAPE, 4, 40, drop=drop, size=size)


def test_a_step_as_large_as_the_parent_leaves_drops_or_query_heads() -> None:
    assert Space.of(SHAPE, 4, 40).ffn == (FfnChoice(0), FfnChoice(40))
    without_drops = Space.of(SHAPE, 4, 40, drop=False, size="large")
    assert without_drops.attention == (AttentionChoice(4, 1), AttentionChoice(4, 2), AttentionChoice(4))
    assert without_drops.ffn == (FfnChoice(40),)


def test_a_space_holds_what_its_ladders_hold() -> None:
    space = Space.of(SHAPE, 2, 16)
    assert (units(space, "attention"), units(space, "ffn")) == ([0, 2, 4], [0, 16, 32, 40])
    assert SHAPE.architecture in space
    assert Architecture.of([(2, 16), (0, 0), (4, 32)]) in space
    assert Architecture.of([(1, 16), (0, 0), (4, 32)]) not in space
    assert SHAPE.architecture.with_choice(0, AttentionChoice(2, 1)) not in space


@pytest.mark.parametrize("size", ["small", "medium", "large"])
def test_merging_adds_every_number_of_kv_heads_that_divides_the_parents(size: SpaceSize) -> None:
    plain, merging = (Space.of(SHAPE, 2, 16, size=size, merge_kv=merge) for merge in (False, True))
    merged = {MergedChoice(1), MergedChoice(2)}
    assert set(merging.attention) == set(plain.attention) | merged and len(set(merging.attention)) == len(
        merging.attention
    )
    assert merging.ffn == plain.ffn
    rows = [SHAPE.rows(choice) for choice in merging.attention]
    assert rows == sorted(rows) and merging.attention[-1] == SHAPE.full("attention")
    for choice in merged:
        assert SHAPE.inputs(choice) == SHAPE.inputs(SHAPE.full("attention"))
        architecture = SHAPE.architecture.with_choices((i, choice) for i in range(SHAPE.layers))
        SHAPE.check(architecture)
        assert architecture in merging and architecture not in plain


@pytest.mark.parametrize("size", get_args(SpaceSize))
def test_a_space_comes_back_from_its_json(size: SpaceSize) -> None:
    space = Space.of(SHAPE, 2, 16, size=size, merge_kv=size in ("medium", "large"))
    assert Space.from_json(json.loads(json.dumps(space.to_json()))) == space


def test_merging_that_can_change_nothing_is_refused() -> None:
    with pytest.raises(ArchitectureError, match=r"space\.merge_kv changes attention, and space\.size=layer"):
        Space.of(SHAPE, 1, 16, size="layer", merge_kv=True)
    one = ParentShape(layers=2, hidden_size=8, kv_groups=1, queries_per_group=4, head_dim=4, ffn_width=40)
    with pytest.raises(ArchitectureError, match=r"needs several KV groups, the parent has 1; set space\."):
        Space.of(one, 1, 16, merge_kv=True)


@given(groups=st.integers(1, 12), queries=st.integers(1, 4), data=st.data())
def test_every_choice_of_a_merging_space_is_legal_and_has_one_meaning(
    groups: int, queries: int, data: st.DataObject
) -> None:
    shape = ParentShape(1, 8, groups, queries, 4, 16)
    space = Space.of(shape, 1, 16, size="large", merge_kv=groups > 1)
    choice = data.draw(st.sampled_from(space.attention[1:]))
    architecture = shape.architecture.with_choice(0, choice)
    shape.check(architecture)
    assert Architecture.from_json(json.loads(architecture.canonical_json)) == architecture
    heads, kv_heads = (choice.sizes(shape)[word] for word in ("heads", "kv_heads"))
    if isinstance(choice, MergedChoice):
        assert groups % kv_heads == 0 and kv_heads < groups and heads == groups * queries
    else:
        assert kv_heads <= groups and heads <= kv_heads * queries


@given(
    choice=st.builds(AttentionChoice, st.integers(0, 9), st.none() | st.integers(-1, 40))
    | st.builds(MergedChoice, st.integers(-1, 9))
)
def test_a_shape_admits_just_the_choices_of_its_largest_space(choice: Choice) -> None:
    shape = ParentShape(2, 8, 8, 3, 4, 16)
    inside = choice in Space.of(shape, 1, 16, size="large", merge_kv=True).attention
    try:
        shape.check(shape.architecture.with_choice(1, choice))
    except ArchitectureError:
        assert not inside
    else:
        assert inside


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_an_architecture_of_another_depth_is_in_no_space(layers: int, size: SpaceSize) -> None:
    other, space = Architecture.of([(4, 40)] * layers), space_of(size)
    assert other not in space
    with pytest.raises(ArchitectureError, match=f"the parent has 3 layers, the architecture {layers}"):
        space.indices(other)


@pytest.mark.parametrize(
    ("size", "names", "options"),
    [
        ("small", ["all.attention", "all.ffn"], [2, 3]),
        ("layer", ["layer_000", "layer_001", "layer_002"], [2] * 3),
        ("medium", [f"layer_00{i}.{kind}" for i in range(3) for kind in BLOCK_KINDS], [3, 4] * 3),
        ("large", [f"layer_00{i}.{kind}" for i in range(3) for kind in BLOCK_KINDS], [7, 4] * 3),
    ],
)
def test_the_decisions_of_each_size(size: SpaceSize, names: list[str], options: list[int]) -> None:
    decisions = space_of(size).decisions
    assert [decision.name for decision in decisions] == names == sorted(names), "dashboards sort parameters by name"
    assert [len(decision.options) for decision in decisions] == options
    blocks = [{(layer, choice.kind) for layer, choice in decision.options[-1]} for decision in decisions]
    assert len(set().union(*blocks)) == sum(map(len, blocks)) == 2 * SHAPE.layers, "each block is decided once"
    for decision, own in zip(decisions, blocks, strict=True):
        assert all({(layer, choice.kind) for layer, choice in option} == own for option in decision.options)
        assert all(choice == SHAPE.full(choice.kind) for _, choice in decision.options[-1])
        rows = [sum(SHAPE.rows(choice) for _, choice in option) for option in decision.options]
        assert rows == sorted(rows), "the options climb"


@pytest.mark.parametrize("size", SIZES)
@given(data=st.data())
def test_indices_and_architectures_are_each_others_inverse(size: SpaceSize, data: st.DataObject) -> None:
    space = space_of(size)
    indices = tuple(data.draw(st.integers(0, len(decision.options) - 1)) for decision in space.decisions)
    architecture = space.architecture(indices)
    assert space.indices(architecture) == indices
    assert architecture in space
    assert {choice for _, choice in architecture.blocks()} <= {*space.attention, *space.ffn}


@pytest.mark.parametrize("size", SIZES)
def test_the_last_option_of_every_decision_makes_the_parent(size: SpaceSize) -> None:
    space = space_of(size)
    assert space.architecture([-1] * len(space.decisions)) == SHAPE.architecture


def test_a_small_space_never_drops_everything() -> None:
    space = space_of("small")
    found = {
        space.architecture(indices) for indices in itertools.product(*(range(len(d.options)) for d in space.decisions))
    }
    assert found == {Architecture.of([(groups, width)] * 3) for groups in (2, 4) for width in (16, 32, 40)}
    for architecture in found:
        SHAPE.check(architecture)
    assert SHAPE.architecture.with_choice(1, FfnChoice(16)) not in space, "all layers are alike"


def test_a_layer_space_keeps_layers_whole_or_not_at_all() -> None:
    space = space_of("layer")
    assert space.attention == (AttentionChoice(0), AttentionChoice(4)) and space.ffn == (FfnChoice(0), FfnChoice(40))
    assert SHAPE.architecture.without_layers([1]) in space
    for choice in (*DROPPED.values(), AttentionChoice(2), FfnChoice(16)):
        assert SHAPE.architecture.with_choice(1, choice) not in space
    with pytest.raises(ArchitectureError, match=r"space\.size=layer leaves whole layers out; set space\.drop=true"):
        Space.of(SHAPE, 2, 16, drop=False, size="layer")


@given(
    groups=st.integers(1, 6),
    queries=st.integers(1, 5),
    step=st.integers(1, 6),
    drop=st.booleans(),
)
def test_the_ladder_of_a_large_space_climbs_in_rows_to_the_parents_choice(
    groups: int, queries: int, step: int, drop: bool
) -> None:
    shape = ParentShape(layers=2, hidden_size=8, kv_groups=groups, queries_per_group=queries, head_dim=4, ffn_width=40)
    step = min(step, groups)
    ladder = Space.of(shape, step, 8, drop=drop, size="large").attention
    assert ladder[-1] == shape.full("attention")
    rows = [shape.rows(choice) for choice in ladder]
    assert rows == sorted(rows) and rows[-1] > max(rows[:-1], default=0)
    medium = Space.of(shape, step, 8, drop=drop).attention
    fewer = {AttentionChoice(c.units, q) for c in medium if c.units for q in range(1, queries)}
    assert set(ladder) == {*medium, *fewer} and len(ladder) == len(medium) + len(fewer)
    for choice in ladder:
        # Every rung is legal: alone, beside a layer that keeps everything.
        shape.check(shape.architecture.with_choice(0, choice))


def test_a_large_space_holds_query_heads_block_by_block() -> None:
    mixed = Architecture(
        (
            LayerChoice(AttentionChoice(2, 1), FfnChoice(16)),
            LayerChoice(AttentionChoice(4), FfnChoice(0)),
            LayerChoice(AttentionChoice(0), FfnChoice(40)),
        )
    )
    assert mixed in space_of("large") and mixed not in space_of("medium")


@pytest.mark.parametrize(
    ("size", "architecture", "option"),
    [
        ("small", Architecture.of([(4, 40), (4, 16), (4, 40)]), r"all\.ffn has no option .*'ffn_width': 16.* small"),
        ("small", Architecture.of([(0, 40)] * 3), r"all\.attention has no option .*'kv_groups': 0.* small"),
        ("layer", Architecture.of([(4, 40), (4, 0), (4, 40)]), r"layer_001 has no option .*'ffn_width': 0.* layer"),
        ("medium", Architecture.of([(4, 40), (4, 40), (3, 40)]), r"layer_002\.attention .*'kv_groups': 3.* medium"),
        (
            "medium",
            SHAPE.architecture.with_choice(0, AttentionChoice(4, 1)),
            r"layer_000\.attention .*'queries_per_group': 1.* medium",
        ),
        ("large", Architecture.of([(4, 40), (4, 17), (4, 40)]), r"layer_001\.ffn .*'ffn_width': 17.* large"),
    ],
)
def test_what_a_space_does_not_hold_is_named_with_the_fix(
    size: SpaceSize, architecture: Architecture, option: str
) -> None:
    space = space_of(size)
    assert architecture not in space
    with pytest.raises(ArchitectureError, match=f"{option} space; use another space.size or finer steps"):
        space.indices(architecture)
