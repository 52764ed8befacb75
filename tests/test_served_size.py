"""The bytes that tables, cards and budgets speak of are those of the file that is served."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import gguf
import pytest
from families import CASES, IDS, Case, Slices, tiny_parent
from test_gguf import BLOCKY, SHAPES
from tiny import tiny_recipe, tiny_tokenizer

from llmprune.choices.architecture import Architecture
from llmprune.choices.space import Space
from llmprune.cli.front_tables import front_table
from llmprune.core.budgets import SIZE_METRICS, parse_pick
from llmprune.core.errors import ExportError
from llmprune.core.recipe import GgufType, Recipe
from llmprune.core.recipe_text import parse_recipe
from llmprune.formats.gguf import write_gguf
from llmprune.formats.served_size import served_size
from llmprune.measure.speed.llamacpp import GgufModel
from llmprune.models.parent import Parent
from llmprune.models.sizes import size_of
from llmprune.models.surgery import prune, skeleton
from llmprune.numerics.ggml import TYPES
from llmprune.pipeline.commands import export, front, search
from llmprune.pipeline.run import Run
from llmprune.pipeline.run_directory import RunDirectory
from llmprune.tables.block_tables import count_savings
from llmprune.tables.costs import CostTable

BLOCKS = Case("llama", "blocky", {**BLOCKY, "tie_word_embeddings": True})
WIDE = Case("llama", "wide", {**BLOCKS.values, "hidden_size": 256, "head_dim": 64, "intermediate_size": 768})
PADDING = gguf.GGUF_DEFAULT_ALIGNMENT


def tensors_of(path: Path) -> dict[str, int]:
    return {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("family", ["llama-gqa", "llama-biased", "llama-llama3-rope", "qwen2-gqa"])
@pytest.mark.parametrize("shape", ["varying", "no attention first", "holes everywhere", "first layer gone", "uniform"])
def test_every_byte_of_a_childs_tensors_is_counted(shape: str, family: str, tmp_path: Path) -> None:
    parent, architecture = tiny_parent(CASES[IDS.index(family)]), Architecture.of(SHAPES[shape])
    assert_exact(parent, architecture, "f16", tmp_path / "child.gguf")


@pytest.mark.parametrize("weights", get_args(GgufType))
def test_every_type_is_counted(weights: GgufType, tmp_path: Path) -> None:
    parent = tiny_parent(BLOCKS if TYPES[weights].block <= 32 else WIDE)
    step = parent.shape.ffn_width // 3
    for i, layers in enumerate(([(4, 3 * step)] * 4, [(0, 2 * step), (4, 0), (0, 0), (2, step)])):
        assert_exact(parent, Architecture.of(layers), weights, tmp_path / f"{i}.gguf")


def assert_exact(parent: Parent, architecture: Architecture, weights: GgufType, path: Path) -> None:
    child = prune(parent, architecture, Slices(parent))
    write_gguf(child, None, path, weights)
    said, tensors = served_size(child, parent.shape, architecture, weights), tensors_of(path)
    assert said.stored_as == f"GGUF {weights}"
    assert said.bytes == sum(tensors.values())
    with GgufModel(path) as model:
        assert said.bytes == model.bytes
    lookup = 0 if child.config.tie_word_embeddings else tensors["token_embd.weight"]
    assert said.decode_bytes == said.bytes - lookup
    # What is left of the file is metadata, and what aligns each tensor.
    data = gguf.GGUFReader(path).data_offset
    assert 0 <= path.stat().st_size - data - said.bytes < PADDING * len(tensors)
    without_weights = skeleton(parent, architecture)
    assert served_size(without_weights, parent.shape, architecture, weights) == said
    assert said.params == size_of(child, parent.shape, architecture).params


def test_the_cache_is_llama_cpps() -> None:
    parent = tiny_parent(BLOCKS)
    whole = parent.shape.architecture
    said = served_size(parent.model, parent.shape, whole, "q8_0")
    assert (
        said.kv_bytes_per_token
        == 2 * 2 * 16 * 4 * 4
        == size_of(parent.model, parent.shape, whole).kv_bytes_per_token / 2
    )
    first = whole.with_choice(0, type(whole.layers[0].attention)(0))
    # llama.cpp cannot load a first layer without attention: one head of zeros is cached there.
    assert served_size(skeleton(parent, first), parent.shape, first, "q8_0").kv_bytes_per_token == 2 * 2 * 16 * 13


def test_torch_holds_what_it_held() -> None:
    parent = tiny_parent(BLOCKS)
    whole = parent.shape.architecture
    said = served_size(parent.model, parent.shape, whole, None)
    assert said == size_of(parent.model, parent.shape, whole) and said.stored_as == "float32"
    assert said.bytes == 4 * said.params


def test_a_child_that_no_file_holds_has_no_size() -> None:
    parent = tiny_parent(BLOCKS)
    architecture = Architecture.of([(4, 96), (4, 40), (4, 96), (4, 96)])
    with pytest.raises(ExportError, match="ffn_width must be a multiple of 32"):
        served_size(skeleton(parent, architecture), parent.shape, architecture, "q8_0")


def test_the_cost_table_counts_the_file() -> None:
    parent = tiny_parent(BLOCKS)
    space = Space.of(parent.shape, 1, 32)
    costs = CostTable(space, count_savings(parent, space, "q8_0"))
    assert set(costs.saving) == set(SIZE_METRICS)
    whole = served_size(parent.model, parent.shape, parent.shape.architecture, "q8_0")
    for layers in ([(4, 96), (3, 64), (0, 32), (2, 96)], [(1, 0), (4, 0), (2, 32), (0, 96)]):
        architecture = Architecture.of(layers)
        own = served_size(skeleton(parent, architecture), parent.shape, architecture, "q8_0")
        for metric in ("params", "bytes", "kv_bytes_per_token"):
            share = getattr(own, metric) / getattr(whole, metric)
            assert costs.relative_time(architecture, metric) == pytest.approx(share, rel=1e-9), metric
    float32 = count_savings(parent, space)["bytes"]
    assert costs.saving["bytes"] != pytest.approx(float32, rel=1e-3)


def changed(recipe: Recipe, **sections: dict[str, Any]) -> Recipe:
    data = recipe.model_dump(mode="json")
    for section, values in sections.items():
        data[section] |= values
    return parse_recipe(data, origin="changed")


def test_a_run_timed_in_llama_cpp_speaks_of_the_file_that_it_exports(tmp_path: Path) -> None:
    recipe = changed(
        tiny_recipe(tmp_path),
        workload={"engine": "llamacpp", "threads": 1},
        deploy={"formats": ["hf", "gguf"], "gguf_type": "f16"},
        search={"trials": 2},
        front={"size": 1, "baselines": []},
    )
    with RunDirectory(tmp_path / "run").locked():
        run = Run.start(tmp_path / "run", recipe)
        search(run)
        found = front(run)
        written = export(run, parse_pick(recipe.export.pick), tmp_path / "child")
    (child,) = found.children
    tensors = tensors_of(tmp_path / "child" / "model-F16.gguf")
    assert child.bytes == sum(tensors.values()) and child.stored_as == "GGUF f16"
    assert found.parent.stored_as == "GGUF f16" and written["figures"]["bytes"] == child.bytes
    cells = list(front_table(found).columns[2].cells)
    assert len(cells) == 2 and all("GGUF f16" in str(cell) for cell in cells)


def test_a_file_with_a_tokenizer_is_its_tensors_and_metadata(tmp_path: Path) -> None:
    parent = tiny_parent(BLOCKS)
    path = tmp_path / "model.gguf"
    write_gguf(parent.model, tiny_tokenizer(parent.model.config.vocab_size), path, "q8_0")
    said = served_size(parent.model, parent.shape, parent.shape.architecture, "q8_0")
    assert sum(tensors_of(path).values()) == said.bytes < path.stat().st_size
