"""Architectures and shapes: what JSON they are, and what they refuse."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmprune.choices.architecture import Architecture, LayerChoice, ParentShape
from llmprune.choices.choice import Choice
from llmprune.choices.ffn import FfnChoice
from llmprune.choices.kv_groups import AttentionChoice
from llmprune.core.errors import ArchitectureError

SHAPE = ParentShape(layers=3, hidden_size=24, kv_groups=4, queries_per_group=2, head_dim=3, ffn_width=40)
UNITS = st.integers(0, 10_000)
attention_choices = st.builds(AttentionChoice, UNITS, st.none() | UNITS)
ffn_choices = st.builds(FfnChoice, UNITS)
architectures = st.lists(st.builds(LayerChoice, attention_choices, ffn_choices), min_size=1, max_size=6).map(
    lambda layers: Architecture(tuple(layers))
)


def layer(index: Any = 0, kv_groups: Any = 1, ffn_width: Any = 2, **attention: Any) -> dict[str, Any]:
    return {"layer": index, "attention": {"kv_groups": kv_groups, **attention}, "ffn": {"ffn_width": ffn_width}}


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


def test_query_heads_are_said_only_where_some_leave() -> None:
    whole, fewer = (Architecture((LayerChoice(AttentionChoice(2, queries), FfnChoice(8)),)) for queries in (None, 1))
    assert whole == Architecture.of([(2, 8)])
    assert fewer.canonical_json == (
        '{"layers":[{"attention":{"kv_groups":2,"queries_per_group":1},"ffn":{"ffn_width":8},"layer":0}]}'
    )
    assert Architecture.from_json(json.loads(fewer.canonical_json)) == fewer != whole
    assert fewer.hash != whole.hash


@given(architectures, st.randoms())
def test_json_round_trip_in_any_order_of_layers(architecture: Architecture, random: Any) -> None:
    data = json.loads(json.dumps(architecture.to_json()))
    random.shuffle(data["layers"])
    again = Architecture.from_json(data)
    assert again == architecture and hash(again) == hash(architecture)


@given(architectures, attention_choices | ffn_choices, st.data())
def test_changing_a_block_changes_nothing_else(architecture: Architecture, choice: Choice, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(architecture.layers) - 1))
    before = {(i, own.kind): own for i, own in architecture.blocks()}
    changed = architecture.with_choice(index, choice)
    assert {(i, own.kind): own for i, own in changed.blocks()} == {**before, (index, choice.kind): choice}


@given(architectures, st.data())
def test_layers_that_are_left_out_are_gone(architecture: Architecture, data: st.DataObject) -> None:
    gone = data.draw(st.sets(st.integers(0, len(architecture.layers) - 1)))
    without = architecture.without_layers(gone)
    assert without.kept_layers == tuple(i for i in architecture.kept_layers if i not in gone)
    assert all(without.layers[i] == architecture.layers[i] for i in without.kept_layers)


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
        {"layers": [layer(queries_per_group=-1)]},
        {"layers": [layer(queries_per_group=True)]},
        {"layers": [layer(queries_per_group=1.0)]},
        # Two texts of one architecture would have two hashes.
        {"layers": [layer(queries_per_group=None)]},
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


def test_a_shape_admits_its_own_sub_networks() -> None:
    SHAPE.check(SHAPE.architecture)
    SHAPE.check(Architecture.of([(0, 0), (1, 0), (0, 40)]))
    SHAPE.check(SHAPE.architecture.with_choice(1, AttentionChoice(3, 1)))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([(4, 40)] * 2, "the parent has 3, the architecture 2"),
        ([(4, 40), (5, 40), (4, 40)], r"layer 1 keeps AttentionChoice\(kv_groups=5, .*\) of a parent with 4 units"),
        ([(4, 40), (4, 40), (4, 41)], r"layer 2 keeps FfnChoice\(ffn_width=41\) of a parent with 40 units"),
        ([(-1, 40), (4, 40), (4, 40)], "layer 0 keeps"),
        ([(0, 40)] * 3, "keeps attention in at least one layer"),
    ],
)
def test_a_shape_refuses_what_cannot_run(layers: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(ArchitectureError, match=message):
        SHAPE.check(Architecture.of(layers))


@pytest.mark.parametrize(
    ("choice", "range_text"),
    [
        (AttentionChoice(4, 0), "from 1 to 1"),
        (AttentionChoice(4, -1), "from 1 to 1"),
        # The parent's own number is said by saying nothing: one architecture has one text.
        (AttentionChoice(4, 2), "from 1 to 1"),
        (AttentionChoice(4, 3), "from 1 to 1"),
        (AttentionChoice(0, 1), "from 1 to 0"),
    ],
)
def test_a_shape_refuses_query_heads_that_it_cannot_keep(choice: AttentionChoice, range_text: str) -> None:
    with pytest.raises(ArchitectureError, match=f"layer 1 keeps .* 2 query heads a KV group: .* {range_text}, and"):
        SHAPE.check(SHAPE.architecture.with_choice(1, choice))


def test_with_one_query_head_a_group_none_can_leave() -> None:
    shape = replace(SHAPE, queries_per_group=1)
    with pytest.raises(ArchitectureError, match="1 query heads a KV group: queries_per_group is from 1 to 0"):
        shape.check(shape.architecture.with_choice(0, AttentionChoice(4, 1)))


def test_inputs_and_rows_of_a_choice() -> None:
    # Two KV heads of three dimensions, each with its one query head: rows of q, columns of o, rows of k and v.
    assert SHAPE.inputs(AttentionChoice(2, 1)) == 2 * 1 * 3
    assert SHAPE.rows(AttentionChoice(2, 1)) == 2 * 6 + 2 * 6
    assert SHAPE.inputs(AttentionChoice(2)) == 2 * 2 * 3
    assert SHAPE.rows(AttentionChoice(2)) == 2 * 12 + 2 * 6
    assert SHAPE.inputs(FfnChoice(7)) == SHAPE.rows(FfnChoice(7)) == 7
    assert SHAPE.rows(AttentionChoice(0)) == SHAPE.rows(FfnChoice(0)) == 0
