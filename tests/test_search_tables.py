"""The tables of a real, tiny parent: sizes in them are exact, and times are scaled to what mixed children save."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from families import CASES, IDS, Slices, tiny_parent, tokens
from tiny import paired_by_bytes

from llmprune.blocks.library import build_library
from llmprune.choices.architecture import Architecture
from llmprune.choices.merged import MergedChoice
from llmprune.choices.space import Space
from llmprune.core.budgets import SIZE_METRICS
from llmprune.core.progress import silent
from llmprune.core.recipe import ImportanceRecipe, TablesRecipe, WorkloadRecipe
from llmprune.data.tokens import SourceTokens, Split
from llmprune.measure.speed.throughput import Workload
from llmprune.models.parent import Parent
from llmprune.models.sizes import size_of
from llmprune.models.surgery import prune
from llmprune.tables import block_tables
from llmprune.tables.block_tables import BlockTables, build_tables, count_savings
from llmprune.tables.costs import CostTable

SEQ_LEN = 16
# With and without biases, norms over the heads or over each, tied embeddings, projections in one.
FAMILIES = ("llama-gqa", "llama-biased", "qwen3-gqa", "gemma2-gqa", "olmo2-gqa", "phi3-gqa", "gpt2-mha", "opt-mha")


def mixed_architectures(space: Space, count: int = 6) -> list[Architecture]:
    """Drawn at random, with some attention each."""
    generator = random.Random(0)
    found: list[Architecture] = []
    while len(found) < count:
        drawn = space.architecture([generator.randrange(len(decision.options)) for decision in space.decisions])
        if any(layer.attention.kv_groups for layer in drawn.layers):
            found.append(drawn)
    return found


def assert_sizes_are_exact(costs: CostTable, parent: Parent) -> None:
    whole = asdict(size_of(parent.model, parent.shape, parent.shape.architecture))
    for architecture in (parent.shape.architecture, *mixed_architectures(costs.space)):
        child = prune(parent, architecture, Slices(parent))
        own = asdict(size_of(child, parent.shape, architecture))
        for metric in SIZE_METRICS:
            assert costs.relative_time(architecture, metric) == pytest.approx(own[metric] / whole[metric], rel=1e-9)


@pytest.mark.parametrize("case_id", FAMILIES)
def test_counted_sizes_add_up_to_those_of_any_child(case_id: str) -> None:
    parent = tiny_parent(CASES[IDS.index(case_id)])
    space = Space.of(parent.shape, 1, 16, size="large")
    savings = count_savings(parent, space)
    assert set(savings) == set(SIZE_METRICS)
    for saving in savings.values():
        assert saving.keys() == {*space.attention, *space.ffn}
    assert_sizes_are_exact(CostTable(space, savings), parent)


def test_query_heads_save_parameters_and_no_cache() -> None:
    parent = tiny_parent(CASES[IDS.index("llama-gqa")])
    savings = count_savings(parent, Space.of(parent.shape, 1, 16, size="large"))
    for choice in Space.of(parent.shape, 1, 16, size="large").attention:
        assert savings["kv_bytes_per_token"][choice] == pytest.approx((1 - choice.kv_groups / 3) / parent.shape.layers)
        if choice.queries_per_group is not None:
            whole_groups = replace(choice, queries_per_group=None)
            assert savings["params"][choice] > savings["params"][whole_groups]


def test_merged_kv_heads_save_cache_and_keep_query_heads() -> None:
    parent = tiny_parent(CASES[IDS.index("llama-gqa")])
    space, shape = Space.of(parent.shape, 1, 16, merge_kv=True), parent.shape
    savings, merged = count_savings(parent, space), MergedChoice.of(shape)[0]
    assert savings["kv_bytes_per_token"][merged] == pytest.approx((1 - 1 / 3) / shape.layers)
    rows = shape.rows(shape.full("attention")) - shape.rows(merged)
    params = sum(parameter.numel() for parameter in parent.model.parameters())
    assert savings["params"][merged] == pytest.approx(rows * shape.hidden_size / params)
    assert_sizes_are_exact(CostTable(space, savings), parent)


@pytest.mark.parametrize("drop", [True, False])
def test_calibration_scales_times_and_leaves_sizes_alone(drop: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = tiny_parent(CASES[IDS.index("llama-gqa")])
    measured = 0

    def slower_when_mixed(reference: Any, candidates: Any, *rest: Any) -> Any:
        nonlocal measured
        measured += 1
        own, (speed,) = paired_by_bytes(reference, candidates)
        if measured <= probes:
            return own, [speed]
        # Of what the probes promise, mixed children give eight tenths.
        ratio = 1 / (1 - 0.8 * (1 - 1 / speed.decode_speedup.median))
        slower = replace(speed.decode_speedup, median=ratio)
        return own, [replace(speed, decode_speedup=slower, prefill_speedup=slower)]

    monkeypatch.setattr(block_tables, "measure_paired", slower_when_mixed)
    split = Split("calibration", {"a": SourceTokens(tokens(4, SEQ_LEN), torch.ones(4))}, {"a": 1.0}, SEQ_LEN, bos=False)
    space = Space.of(parent.shape, 1, 10, drop=drop, size="large")
    probes = len(block_tables.probe_architectures(space))
    library = build_library(parent, split, ImportanceRecipe(), space)
    workload = Workload.from_recipe(WorkloadRecipe(prompt_tokens=8, generated_tokens=4), "float32", "cpu")
    built = build_tables(parent, split, library, workload, 1, TablesRecipe(tokens=64), show=silent)
    assert measured > probes, "some mixed child was measured"
    assert set(built.costs.saving) == {"decode", "prefill", *SIZE_METRICS}
    assert_sizes_are_exact(built.costs, parent)
    # Here a model is as fast as it is small.
    for architecture in mixed_architectures(space):
        saved = {column: 1 - built.costs.relative_time(architecture, column) for column in ("decode", "params")}
        assert saved["decode"] == pytest.approx(0.8 * saved["params"], rel=0.05)
    again = BlockTables.from_json(space, json.loads(json.dumps(built.to_json())))
    assert again == replace(built, influence=list(built.influence))
    assert BlockTables.read(json.loads(json.dumps(built.to_json()))) == again
