"""`model.dtype: auto`: what it comes to on a CPU and elsewhere, and that one dtype is what all of a run speaks of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Finished
from families import CASES, tiny_model
from tiny import tiny_recipe, tiny_tokenizer

from llmprune.core.errors import ModelError
from llmprune.core.progress import silent
from llmprune.core.recipe import WorkloadRecipe
from llmprune.core.recipe_files import DEFAULT_RECIPE, recipe_path
from llmprune.core.recipe_inputs import ModelRecipe
from llmprune.evaluation import bench as module
from llmprune.evaluation.bench import bench
from llmprune.models import loading
from llmprune.models.loading import dtype_of, load_model
from llmprune.models.parent import load_parent
from llmprune.pipeline.prepare import lay_ground
from llmprune.pipeline.run import Run

# No GPU is needed to see what would be loaded on another device than a CPU.
ELSEWHERE = torch.device("meta")


@pytest.fixture
def bfloat16_parent(tmp_path: Path) -> Path:
    tiny_model(CASES[0]).to(torch.bfloat16).save_pretrained(tmp_path / "parent")
    tiny_tokenizer().save_pretrained(tmp_path / "parent")
    return tmp_path / "parent"


def test_no_recipe_need_name_a_dtype() -> None:
    assert "dtype" not in yaml.safe_load(recipe_path(DEFAULT_RECIPE).read_text(encoding="utf-8"))["model"]
    assert ModelRecipe(path="x").dtype == "auto"


@pytest.mark.parametrize(
    ("dtype", "device", "loaded"),
    [
        ("auto", torch.device("cpu"), "float32"),
        ("auto", ELSEWHERE, "bfloat16"),
        ("float16", ELSEWHERE, "float16"),
        ("bfloat16", torch.device("cpu"), "bfloat16"),
    ],
)
def test_auto_is_the_checkpoint_s_own_but_on_a_cpu(
    dtype: Any, device: torch.device, loaded: str, bfloat16_parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "resolve_device", lambda name: device)
    model, _ = load_model(ModelRecipe(path=str(bfloat16_parent), dtype=dtype))
    assert dtype_of(model) == loaded


def test_a_config_without_a_dtype_leaves_it_to_the_weights(
    bfloat16_parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = bfloat16_parent / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}))
    monkeypatch.setattr(loading, "resolve_device", lambda name: ELSEWHERE)
    assert dtype_of(load_model(ModelRecipe(path=str(bfloat16_parent)))[0]) == "bfloat16"


def test_a_dtype_that_nothing_computes_in_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model(CASES[0]).to(torch.float64).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr(loading, "resolve_device", lambda name: ELSEWHERE)
    with pytest.raises(ModelError, match=r"is stored in float64; name the dtype .* model\.dtype=float32 or"):
        load_model(ModelRecipe(path=str(tmp_path)))


def test_what_auto_came_to_holds_to_the_end_of_a_run(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    run = Run.start(tmp_path / "run", recipe)
    assert lay_ground(run).workload.dtype == "float32"
    assert run.directory.read_provenance()["parent"]["dtype"] == "float32"
    # As if the run had begun on a GPU, and went on here.
    begun = Run.start(tmp_path / "begun", recipe)
    begun.directory.note(parent={"dtype": "bfloat16", "licence": None})
    ground = lay_ground(begun)
    assert dtype_of(ground.parent.model) == ground.workload.dtype == "bfloat16"
    assert begun.directory.read_provenance()["parent"]["dtype"] == "bfloat16"


def test_a_checkpoint_names_the_dtype_that_its_figures_are_of(finished_run: Finished) -> None:
    assert finished_run.recipe.model.dtype == "auto"
    metadata = json.loads((finished_run.export / "llmprune.json").read_text())
    assert metadata["recipe"]["model"]["dtype"] == metadata["provenance"]["parent"]["dtype"] == "float32"
    assert metadata["figures"]["measured_on"]["workload"]["dtype"] == "float32"


def test_models_side_by_side_are_in_one_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = {"one": tiny_model(CASES[0]), "other": tiny_model(CASES[0]).to(torch.bfloat16)}
    monkeypatch.setattr(module, "load_model", lambda recipe, check: (loaded[recipe.path], None))
    with pytest.raises(ModelError, match="one in float32, other in bfloat16; name one with --dtype"):
        bench([ModelRecipe(path=name) for name in loaded], WorkloadRecipe(), silent)


def test_a_parent_of_bfloat16_is_float32_on_a_cpu(bfloat16_parent: Path) -> None:
    assert load_parent(ModelRecipe(path=str(bfloat16_parent), device="cpu")).model.dtype == torch.float32
