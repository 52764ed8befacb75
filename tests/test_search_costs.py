"""The cost table: from measured probes to what each choice saves."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import linear_costs, tiny_space

from llmprune.choices.architecture import DROPPED, Architecture
from llmprune.choices.choice import Choice
from llmprune.choices.dimensions import BLOCK_KINDS, BlockKind
from llmprune.choices.ffn import FfnChoice
from llmprune.choices.kv_groups import AttentionChoice
from llmprune.choices.merged import MergedChoice
from llmprune.choices.space import Space
from llmprune.tables.costs import PROBES_PER_KIND, CostTable, cost_table, probe_architectures, shrunk_to_line

SPACE = tiny_space(layers=3, kv_groups=2, ffn_width=96, ffn_step=8)


def test_probes_span_each_ladder_and_can_run() -> None:
    probes = probe_architectures(SPACE)
    for kind in BLOCK_KINDS:
        probed = [choice for choice in probes if choice.kind == kind]
        assert len(probed) == min(PROBES_PER_KIND, len(SPACE.ladder(kind)) - 1)
        assert probed[:2] == list(SPACE.ladder(kind)[:2]) and probed[0] == DROPPED[kind], "the drop, the smallest"
        assert probed[-1] == SPACE.ladder(kind)[-2], "and the largest"
    for choice, architecture in probes.items():
        SPACE.shape.check(architecture)
        assert architecture in SPACE
        changed = {own for _, own in architecture.blocks()} - {SPACE.shape.full(kind) for kind in BLOCK_KINDS}
        assert changed == {choice}, "one kind of block, one choice"


def test_a_probe_without_attention_keeps_it_in_the_first_layer() -> None:
    without = probe_architectures(SPACE)[AttentionChoice(0)]
    assert [layer.attention.kv_groups for layer in without.layers] == [2, 0, 0]


def test_where_no_lone_block_can_leave_layers_are_timed_whole() -> None:
    space = tiny_space(layers=4, size="layer")
    probes = probe_architectures(space, whole_layers=True)
    assert probes.keys() == {AttentionChoice(0), FfnChoice(0)}
    assert {architecture.kept_layers for architecture in probes.values()} == {(0,)}
    costs = cost_table(space, {probe: {"decode": 2.5} for probe in probes}, whole_layers=True)
    assert costs.speedup(space.shape.architecture.without_layers([1, 2, 3]), "decode") == pytest.approx(2.5)
    assert costs.relative_time(space.shape.architecture.without_layers([2]), "decode") == pytest.approx(0.8)


def test_a_parent_of_one_layer_can_be_probed() -> None:
    space = tiny_space(layers=1)
    probes = probe_architectures(space)
    assert space.shape.architecture not in probes.values() and AttentionChoice(0) not in probes
    costs = cost_table(space, {probe: {"decode": 1.25} for probe in probes})
    assert costs.saving["decode"][FfnChoice(0)] == pytest.approx(0.2)


def test_a_space_without_drops_is_probed_at_its_lowest_rung() -> None:
    space = tiny_space(layers=2, kv_groups=4, ffn_width=96, ffn_step=8)
    space = type(space).of(space.shape, 1, 8, drop=False)
    assert {AttentionChoice(1), FfnChoice(8)} <= probe_architectures(space).keys()


@given(st.data())
def test_exact_probes_of_an_additive_machine_give_its_savings_back(data: st.DataObject) -> None:
    truth = linear_costs(SPACE, *data.draw(st.tuples(st.floats(0, 0.12), st.floats(0, 0.2))))
    speedups = {
        probe: {phase: truth.speedup(architecture, phase) for phase in ("decode", "prefill")}
        for probe, architecture in probe_architectures(SPACE).items()
    }
    found = cost_table(SPACE, speedups)
    for phase in ("decode", "prefill"):
        assert found.saving[phase] == pytest.approx(truth.saving[phase], abs=1e-9)


@given(st.lists(st.floats(0.3, 4), min_size=8, max_size=8))
def test_whatever_was_measured_the_table_is_monotone_and_the_parent_is_itself(measured: list[float]) -> None:
    probes = probe_architectures(SPACE)
    assert len(probes) == len(measured)
    costs = cost_table(
        SPACE, {probe: {"decode": value, "prefill": 1.0} for probe, value in zip(probes, measured, strict=True)}
    )
    for phase, kind in itertools.product(("decode", "prefill"), BLOCK_KINDS):
        savings = [costs.saving[phase][choice] for choice in SPACE.ladder(kind)]
        assert savings[-1] == 0
        assert all(smaller >= larger >= 0 for smaller, larger in itertools.pairwise(savings))
        assert costs.speedup(SPACE.shape.architecture, phase) == 1


def test_merged_kv_heads_are_probed_and_interpolated_apart() -> None:
    shape = replace(SPACE.shape, kv_groups=8)
    space = Space.of(shape, 1, 8, merge_kv=True)
    plain = Space.of(shape, 1, 8)
    probes = probe_architectures(space)
    merged = [choice for choice in probes if isinstance(choice, MergedChoice)]
    assert merged == list(MergedChoice.of(shape)) and len(merged) == 3
    assert probes.keys() - set(merged) == probe_architectures(plain).keys()
    for choice in merged:
        assert {own for _, own in probes[choice].blocks()} == {choice, shape.full("ffn")}
    # A machine on which merged heads save nothing: what else is on the ladder does not hear of it.
    speedups = {choice: {"decode": 1.0 if choice in merged else 1.5} for choice in probes}
    savings, of_plain = (cost_table(some, speedups).saving["decode"] for some in (space, plain))
    assert {savings[choice] for choice in merged} == {0.0}
    assert of_plain == {choice: savings[choice] for choice in savings if choice not in merged}
    fewest, fewer, more = merged
    slip = {**speedups, fewest: {"decode": 1.2}, fewer: {"decode": 1.1}, more: {"decode": 1.3}}
    costs = cost_table(space, slip)
    assert [costs.saving["decode"][choice] for choice in merged] == pytest.approx([(1 - 1 / 1.3) / shape.layers] * 3)
    assert CostTable.from_json(space, json.loads(json.dumps(costs.to_json()))) == costs


def test_sizes_between_two_probes_are_interpolated() -> None:
    probes = probe_architectures(SPACE)
    widths = [choice.units for choice in probes if choice.kind == "ffn"]
    assert widths == [0, 8, 24, 48, 72, 88], "six of the twelve rungs below the parent's"
    speedups = {choice: {"decode": 1 / (1 - 3 * (0.2 if choice.units <= 8 else 0.1))} for choice in probes}
    savings = cost_table(SPACE, speedups).saving["decode"]
    assert savings[FfnChoice(0)] == savings[FfnChoice(8)] == pytest.approx(0.2)
    assert savings[FfnChoice(16)] == pytest.approx(0.15), "halfway between 8 and 24"
    assert savings[FfnChoice(32)] == savings[FfnChoice(40)] == pytest.approx(0.1)


A_LAUNCH = 0.03
"""Share of the parent's time that is saved by dropping a block, beside that of its rows."""


def with_launches(space: Space) -> CostTable:
    """A machine on which a block costs something that no width of it saves."""
    plain = linear_costs(space, attention=0.05, ffn=0.12)
    return CostTable(
        space,
        {
            phase: {choice: value + A_LAUNCH * (choice in DROPPED.values()) for choice, value in row.items()}
            for phase, row in plain.saving.items()
        },
    )


@pytest.mark.parametrize("unsure", [0.0, 0.01, 0.1])
def test_what_a_drop_saves_besides_its_rows_is_not_put_on_its_sizes(unsure: float) -> None:
    """Timed without error, whatever the error is taken for: only what is drawn together can be wrong."""
    truth = with_launches(SPACE)
    probes = probe_architectures(SPACE)
    speedups = {probe: {"decode": truth.speedup(child, "decode")} for probe, child in probes.items()}
    found = cost_table(SPACE, speedups, {probe: {"decode": unsure} for probe in probes}).saving["decode"]
    assert found == pytest.approx(truth.saving["decode"], rel=0.02, abs=1e-9)


def test_one_line_through_drop_and_sizes_was_off_on_such_a_machine() -> None:
    """How tables were made before (docs/decisions/0044): the drop, whose timing is the surest, bends the line."""
    truth = with_launches(SPACE).saving["decode"]
    probed = [choice for choice in probe_architectures(SPACE) if choice.kind == "ffn"]
    removed = [96 - choice.units for choice in probed]
    line = shrunk_to_line(removed, [truth[choice] for choice in probed], [0.02] * len(probed))
    off = {choice: value / truth[choice] - 1 for choice, value in zip(probed, line, strict=True)}
    assert off[FfnChoice(0)] < -0.1 and min(off[choice] for choice in probed[1:]) > 0.08


@pytest.mark.parametrize("kind", BLOCK_KINDS)
def test_what_a_drop_was_timed_at_moves_no_size_and_no_size_moves_it(kind: BlockKind) -> None:
    probes = probe_architectures(SPACE)
    truth, unsure = linear_costs(SPACE), {probe: {"decode": 0.02} for probe in probes}
    speedups = {probe: {"decode": truth.speedup(child, "decode")} for probe, child in probes.items()}
    drop = DROPPED[kind]

    def savings(changed: Choice, factor: float) -> dict[Any, float]:
        slipped = {**speedups, changed: {"decode": factor * speedups[changed]["decode"]}}
        return dict(cost_table(SPACE, slipped, unsure).saving["decode"])

    as_timed = savings(drop, 1.0)
    of_drop = savings(drop, 1.3)
    assert of_drop.pop(drop) > as_timed[drop] and of_drop == {c: v for c, v in as_timed.items() if c != drop}
    largest = SPACE.ladder(kind)[-2]
    assert savings(largest, 0.9)[drop] == as_timed[drop]


def test_a_drop_saves_no_less_than_the_smallest_size() -> None:
    probes = probe_architectures(SPACE)
    speedups = {choice: {"decode": 1.0 if choice == FfnChoice(0) else 1.3} for choice in probes}
    savings = cost_table(SPACE, speedups).saving["decode"]
    assert savings[FfnChoice(0)] == savings[FfnChoice(8)] == pytest.approx((1 - 1 / 1.3) / 3)


def test_of_two_probes_with_as_many_rows_the_later_on_the_ladder_counts() -> None:
    """Once the order of a set decided, which is another in every process."""
    space = tiny_space(kv_groups=3, size="large")
    shape = replace(space.shape, queries_per_group=2)
    wide, narrow = AttentionChoice(3, 1), AttentionChoice(2)
    assert shape.rows(wide) == shape.rows(narrow) and space.attention.index(wide) > space.attention.index(narrow)
    probes = probe_architectures(space)
    assert {wide, narrow} <= probes.keys()
    for order in (list(probes), list(probes)[::-1]):
        speedups = {choice: {"decode": 1.3 if choice == wide else 1.4} for choice in order}
        assert cost_table(space, speedups).saving["decode"][wide] == pytest.approx((1 - 1 / 1.3) / 3)


def test_savings_add_up() -> None:
    saving: dict[Choice, float] = {
        **dict(zip(tiny_space().attention, (0.2, 0.1, 0.0), strict=True)),
        **dict(zip(tiny_space().ffn, (0.3, 0.1, 0.0), strict=True)),
    }
    costs = CostTable(tiny_space(), {"decode": saving})
    assert costs.option_saving("decode", [(0, AttentionChoice(1)), (0, FfnChoice(0))]) == pytest.approx(0.4)
    assert costs.relative_time(Architecture.of([(2, 32), (1, 16), (2, 0)]), "decode") == pytest.approx(0.5)
    assert costs.speedup(Architecture.of([(2, 32), (1, 16), (2, 0)]), "decode") == pytest.approx(2)


def test_an_estimate_never_reaches_no_time_at_all() -> None:
    costs = linear_costs(tiny_space(), attention=0.5, ffn=0.5)
    assert costs.speedup(Architecture.of([(0, 0), (0, 0), (1, 0)]), "decode") == pytest.approx(100)


def test_json_round_trip() -> None:
    for space in (SPACE, tiny_space(size="large")):
        costs = linear_costs(space)
        assert CostTable.from_json(space, json.loads(json.dumps(costs.to_json()))) == costs


def test_a_scaled_table_scales_the_savings_of_each_phase() -> None:
    costs = linear_costs(SPACE)
    scaled = costs.scaled({"decode": 0.5, "prefill": 1.0})
    architecture = SPACE.shape.architecture.with_choices([(0, FfnChoice(0)), (1, AttentionChoice(1))])
    assert 1 - scaled.relative_time(architecture, "decode") == pytest.approx(
        0.5 * (1 - costs.relative_time(architecture, "decode"))
    )
    assert scaled.relative_time(architecture, "prefill") == costs.relative_time(architecture, "prefill")


def test_points_on_a_line_and_points_that_are_sure_stay() -> None:
    assert shrunk_to_line([1, 2, 4], [3, 6, 12], [1, 1, 1]) == pytest.approx([3, 6, 12])
    assert shrunk_to_line([1, 2, 4], [1, 6, 12], [1e-9, 1e-9, 1e-9]) == pytest.approx([1, 6, 12], rel=1e-5)
    assert shrunk_to_line([2], [3], [1]) == pytest.approx([3])
    assert shrunk_to_line([1, 2], [0, 0], [0, 0]) == [0, 0]


def test_what_a_disturbed_timing_says_of_a_mild_choice_is_not_believed() -> None:
    """Timed on a busy machine: the mildest choice seemed to save a third of what it does."""
    removed = [128, 384, 640, 1024, 1280, 1536]
    truth = [2.65e-4 * x for x in removed]
    timed = [truth[0] / 3, 0.82 * truth[1], *truth[2:]]
    shrunk = shrunk_to_line(removed, timed, [0.01] * 6)
    assert shrunk[0] == pytest.approx(truth[0], rel=0.1) and shrunk[1] == pytest.approx(truth[1], rel=0.1)
    assert shrunk[2:] == pytest.approx(truth[2:], rel=0.03)


@given(st.lists(st.tuples(st.floats(1, 9), st.floats(1e-3, 9), st.floats(0, 1)), min_size=1, max_size=6))
def test_a_point_is_drawn_between_itself_and_the_line(points: list[tuple[float, float, float]]) -> None:
    x, y, errors = zip(*points, strict=True)
    slopes = [b / a for a, b in zip(x, y, strict=True)]
    for a, found in zip(x, shrunk_to_line(x, y, errors), strict=True):
        assert min(slopes) - 1e-6 <= found / a <= max(slopes) + 1e-6


def test_probes_without_errors_are_taken_as_they_are() -> None:
    probes = probe_architectures(SPACE)
    speedups = {choice: {"decode": 1.1 + 0.3 * (i % 2)} for i, choice in enumerate(probes)}
    exact = {choice: {"decode": 0.0} for choice in probes}
    found, same = cost_table(SPACE, speedups).saving["decode"], cost_table(SPACE, speedups, exact).saving["decode"]
    assert found == pytest.approx(same, rel=1e-6)
