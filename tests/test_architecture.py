"""Architectures, spaces and shapes: what JSON they are, and what they refuse."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmprune.architecture import BLOCK_KINDS, Architecture, ParentShape, Space
from llmprune.errors import ArchitectureError

SHAPE = ParentShape(layers=3, hidden_size=24, kv_groups=4, queries_per_group=2, head_dim=3, ffn_width=40)
UNITS = st.integers(0, 10_000)
architectures = st.lists(st.tuples(UNITS, UNITS), min_size=1, max_size=6).map(Architecture.of)


def layer(index: Any = 0, kv_groups: Any = 1, ffn_width: Any = 2) -> dict[str, Any]:
    return {"layer": index, "attention": {"kv_groups": kv_groups}, "ffn": {"ffn_width": ffn_width}}


@given(architectures)
def test_the_hash_is_of_the_canonical_json(architecture: Architecture) -> None:
    text = json.dumps(architecture.to_json(), sort_keys=True, separators=(",", ":"))
    assert architecture.canonical_json == text
    assert architecture.hash == hashlib.sha256(text.encode()).hexdigest()[:16]


def test_the_hash_of_a_known_architecture_never_changes() -> None:
    architecture = Architecture.of([(3, 1536), (0, 0)])
    assert architecture.canonical_json == (
        '{"layers":[{"attention":{"kv_groups":3},"ffn":{"ffn_width":1536},"layer":0},'
        '{"attention":{"kv_groups":0},"ffn":{"ffn_width":0},"layer":1}]}'
    )
    assert architecture.hash == "c2bb135d7e44d07f"


@given(architectures, st.randoms())
def test_json_round_trip_in_any_order_of_layers(architecture: Architecture, random: Any) -> None:
    data = json.loads(json.dumps(architecture.to_json()))
    random.shuffle(data["layers"])
    again = Architecture.from_json(data)
    assert again == architecture and hash(again) == hash(architecture)


@given(architectures, st.data())
def test_changing_a_block_changes_nothing_else(architecture: Architecture, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(architecture.layers) - 1))
    kind = data.draw(st.sampled_from(BLOCK_KINDS))
    before = {(i, k): choice.units for i, k, choice in architecture.blocks()}
    changed = architecture.with_units(index, kind, 77)
    assert {(i, k): choice.units for i, k, choice in changed.blocks()} == {**before, (index, kind): 77}


def test_a_layer_without_blocks_is_gone() -> None:
    assert Architecture.of([(1, 0), (0, 0), (0, 5)]).kept_layers == (0, 2)


@pytest.mark.parametrize(
    "data",
    [
        None,
        7,
        "layers",
        [],
        {},
        {"layers": None},
        {"layers": 3},
        {"layers": "ab"},
        {"layers": [3]},
        {"layers": [{}]},
        {"layers": [{"layer": 0, "attention": {"kv_groups": 1}}]},
        {"layers": [{"layer": 0, "attention": 1, "ffn": 2}]},
        {"layers": [layer(1)]},
        {"layers": [layer(0), layer(0)]},
        {"layers": [layer(0), layer(2)]},
        {"layers": [layer("0")]},
        {"layers": [layer(0.0)]},
        {"layers": [layer(False)]},
        {"layers": [layer(0), layer("1")]},
        {"layers": [layer(kv_groups=-1)]},
        {"layers": [layer(kv_groups=True)]},
        {"layers": [layer(ffn_width=2.0)]},
        {"layers": [layer(ffn_width="2")]},
        {"layers": [layer(ffn_width=None)]},
        # A dimension that this version does not know must not be dropped in silence.
        {"layers": [{**layer(), "attention": {"kv_groups": 1, "window": 64}}]},
        {"layers": [{**layer(), "window": 64}]},
        {"layers": [layer()], "embedding": 8},
    ],
    ids=lambda data: json.dumps(data)[:90],
)
def test_anything_else_is_refused(data: Any) -> None:
    with pytest.raises(ArchitectureError, match="layer"):
        Architecture.from_json(data)


@given(full=st.integers(1, 200), step=st.integers(1, 200), drop=st.booleans())
def test_ladders_climb_by_the_step_to_the_parent(full: int, step: int, drop: bool) -> None:
    shape = ParentShape(layers=2, hidden_size=8, kv_groups=full, queries_per_group=1, head_dim=4, ffn_width=200)
    if step > full:
        with pytest.raises(
            ArchitectureError, match=rf"space.kv_groups_step must be from 1 to the parent's {full}; got"
        ):
            Space.of(shape, step, 8, drop=drop)
        return
    ladder = Space.of(shape, step, 8, drop=drop).ladder("attention")
    assert list(ladder) == sorted(set(ladder)) and ladder[-1] == full
    assert set(ladder[:-1]) == {units for units in range(full) if units % step == 0 and (units or drop)}


@pytest.mark.parametrize(("kv_groups_step", "ffn_step"), [(0, 8), (-1, 8), (5, 8), (1, 0), (1, 41)])
def test_a_step_outside_the_parent_is_refused(kv_groups_step: int, ffn_step: int) -> None:
    with pytest.raises(ArchitectureError, match=r"space\.(kv_groups|ffn)_step must be from 1 to the parent's (4|40)"):
        Space.of(SHAPE, kv_groups_step, ffn_step)


def test_a_space_of_the_parent_alone_is_refused() -> None:
    with pytest.raises(ArchitectureError, match=r"the space holds the parent alone; allow space\.drop, or lower"):
        Space.of(SHAPE, 4, 40, drop=False)
    assert Space.of(SHAPE, 4, 40).ffn_width == (0, 40)


def test_a_space_holds_what_its_ladders_hold() -> None:
    space = Space.of(SHAPE, 2, 16)
    assert (space.kv_groups, space.ffn_width) == ((0, 2, 4), (0, 16, 32, 40))
    assert SHAPE.architecture in space
    assert Architecture.of([(2, 16), (0, 0), (4, 32)]) in space
    assert Architecture.of([(1, 16), (0, 0), (4, 32)]) not in space
    assert Architecture.of([(2, 16)]) not in space


def test_a_shape_admits_its_own_sub_networks() -> None:
    SHAPE.check(SHAPE.architecture)
    SHAPE.check(Architecture.of([(0, 0), (1, 0), (0, 40)]))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([(4, 40)] * 2, "the parent has 3, the architecture 2"),
        ([(4, 40), (5, 40), (4, 40)], r"layer 1 keeps AttentionChoice\(kv_groups=5\) of a parent with 4 units"),
        ([(4, 40), (4, 40), (4, 41)], r"layer 2 keeps FfnChoice\(ffn_width=41\) of a parent with 40 units"),
        ([(-1, 40), (4, 40), (4, 40)], "layer 0 keeps"),
        ([(0, 40)] * 3, "keeps attention in at least one layer"),
    ],
)
def test_a_shape_refuses_what_cannot_run(layers: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(ArchitectureError, match=message):
        SHAPE.check(Architecture.of(layers))
