"""How the work of a search grows with layers and choices, counted; and that the forecast's formulas say the same."""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from llmprune.blocks.library import build_library
from llmprune.blocks.solve import gathered_choices
from llmprune.blocks.statistics import statistics_bytes
from llmprune.choices.merged import MergedChoice
from llmprune.choices.space import Space
from llmprune.core.recipe import ImportanceRecipe
from llmprune.forecast.work import (
    estimate_flops_per_token,
    gram_flops_per_token,
    graph_bytes_per_token,
    layer_library_bytes,
    layer_solver_flops,
)

SCRIPTS = Path(__file__).parents[1] / "scripts"
TOKENS = 128


@cache
def script(name: str) -> ModuleType:
    """A script as a module, with those that it imports."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# The script finds its neighbour by this name.
counting = script("counting")
count_work = script("count_work")


measure = count_work.measure


@cache
def measured(layers: int, choices: int) -> Any:
    return measure(layers, choices)


def space_of(layers: int, choices: int) -> Space:
    space = count_work.tiny_space(count_work.tiny_llama(layers), choices)
    assert isinstance(space, Space)
    return space


def test_the_estimate_is_one_pass_each_way_whatever_the_choices() -> None:
    for choices in (4, 8):
        estimate = measured(2, choices)["estimate"]
        assert estimate["forward_layer_tokens"] == estimate["backward_layer_tokens"] == 2 * TOKENS
    assert measured(4, 4)["estimate"]["forward_layer_tokens"] == 4 * TOKENS
    assert measured(4, 4)["estimate"]["backward_layer_tokens"] == 4 * TOKENS


@pytest.mark.parametrize(("layers", "choices"), [(2, 4), (2, 8), (4, 4)])
def test_formulas_say_what_is_counted(layers: int, choices: int) -> None:
    row, space = measured(layers, choices), space_of(layers, choices)
    assert row["estimate"]["local_flops"] == layers * TOKENS * estimate_flops_per_token(space)
    assert row["library"]["forward_layer_tokens"] == layers * TOKENS
    assert row["library"]["peak_statistics_bytes"] == statistics_bytes(space.shape)
    solver = layers * layer_solver_flops(space, ImportanceRecipe()).total
    # The formula leaves out what is of a lower order than I^3, of which a tiny block has more than a large one.
    assert solver == pytest.approx(row["library"]["float64_flops"], rel=0.15)
    assert layers * layer_library_bytes(space, 4) == pytest.approx(row["library"]["bytes_on_disk"], rel=0.02)


def test_local_work_is_linear_in_choices() -> None:
    few, many = (measured(2, choices)["estimate"]["local_flops"] for choices in (4, 8))
    attention = TOKENS * 2 * 2 * 32 * 16
    ffn = TOKENS * 2 * 2 * 32 * 64
    # Evenly spaced widths from 0 to F: those of C choices besides F add up to (C - 1) / 2 F.
    assert (few, many) == (attention + ffn * 3 / 2, attention + ffn * 7 / 2)


def test_everything_but_exact_scores_is_linear_in_layers() -> None:
    exponents = count_work.exponents([measured(2, 4), measured(4, 4)], "layers")
    for name, exponent in exponents.items():
        if name == "library.peak_statistics_bytes":
            assert exponent == pytest.approx(0, abs=0.01), "one layer's lie in memory"
        elif name != "path_step.knapsack_seconds" and not name.startswith("exact."):
            assert exponent == pytest.approx(1, abs=0.01), name


def test_exact_scores_run_the_parent_once_and_then_what_comes_after_the_change() -> None:
    for layers in (2, 4):
        expected = TOKENS * (layers + sum(layers - layer for layer in range(layers)))
        assert measured(layers, 4)["exact"]["forward_layer_tokens"] == expected


def test_gram_products_are_counted_in_float32() -> None:
    parent, split, space = count_work.tiny_llama(2), count_work.tiny_split(), space_of(2, 4)
    with counting.Flops() as plain, torch.inference_mode():
        parent.model.base_model(input_ids=split.sources["random"].windows, use_cache=False)
    with counting.Flops() as flops:
        build_library(parent, split, ImportanceRecipe(), space)
    grams = flops.by_dtype[torch.float32] - plain.by_dtype[torch.float32]
    assert grams == 2 * TOKENS * gram_flops_per_token(space.shape)


def test_merged_kv_heads_are_counted_too(tmp_path: Path) -> None:
    parent, split = count_work.tiny_llama(2), count_work.tiny_split()
    shape, rules = parent.shape, ImportanceRecipe()
    spaces = [Space.of(shape, 1, 16, merge_kv=merge) for merge in (False, True)]
    gathered, float64, stored, forecast = [], [], [], []
    for directory, space in zip((tmp_path / "plain", tmp_path / "merging"), spaces, strict=True):
        with counting.Flops() as flops:
            library = build_library(parent, split, rules, space, directory, input_hash="x")
        gathered.append(flops.by_dtype[torch.float32])
        float64.append(flops.by_dtype[torch.float64])
        stored.append(sum(file.stat().st_size for file in directory.iterdir()))
        forecast.append(count_work.local_flops(parent, split, library))
        assert forecast[-1] == 2 * TOKENS * estimate_flops_per_token(space)
    plain, merging = (gram_flops_per_token(shape, gathered_choices(space, rules)) for space in spaces)
    assert gathered[1] - gathered[0] == 2 * TOKENS * (merging - plain) > 0
    solver = [2 * layer_solver_flops(space, rules).refits for space in spaces]
    assert float64[1] - float64[0] == pytest.approx(solver[1] - solver[0], rel=0.01)
    files = [2 * layer_library_bytes(space, 4) for space in spaces]
    assert files[1] - files[0] == pytest.approx(stored[1] - stored[0], rel=0.05)
    assert not gathered_choices(spaces[1], ImportanceRecipe(refit=False))
    assert graph_bytes_per_token(shape, 4, MergedChoice.of(shape)[:1]) - graph_bytes_per_token(shape, 4) == 2 * 4 * 32


def test_the_script_prints_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(count_work, "measure", measured)
    arguments = ["--layers", "2", "4", "--choices", "4", "8", "--depth", "2"]
    monkeypatch.setattr(sys, "argv", ["count_work.py", *arguments, "--json"])
    count_work.main()
    data = json.loads(capsys.readouterr().out)
    assert [row["layers"] for row in data["layers"]["rows"]] == [2, 4]
    assert data["ffn_choices"]["exponents"]["estimate.backward_layer_tokens"] == pytest.approx(0)
    monkeypatch.setattr(sys, "argv", ["count_work.py", *arguments])
    count_work.main()
    assert "| estimate.forward_layer_tokens | 256 | 512 | 1.00 |" in capsys.readouterr().out
