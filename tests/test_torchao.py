"""Children in int8 by torchao: written as safetensors, proven in a fresh process, and refused where they cannot be."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import Finished
from families import CASES, IDS, Slices, tiny_model, tiny_parent, tokens
from safetensors import safe_open
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM

from llmprune.choices.architecture import Architecture
from llmprune.core.errors import ExportError, PushError, UnsupportedModelError
from llmprune.core.progress import silent
from llmprune.core.recipe import DeployRecipe, WorkloadRecipe
from llmprune.core.recipe_inputs import ModelRecipe
from llmprune.evaluation.bench import bench
from llmprune.formats import torchao
from llmprune.formats.limits import check_parent
from llmprune.models import checkpoint
from llmprune.models.licence import Licence
from llmprune.models.parent import Parent, make_parent
from llmprune.models.surgery import prune
from llmprune.publish.card import model_card
from llmprune.publish.contents import TORCHAO_DIRECTORY, read_contents
from llmprune.publish.conversion import convert, write_formats

INSTALLED = importlib.util.find_spec("torchao") is not None
needs_torchao = pytest.mark.skipif(not INSTALLED, reason="torchao is not installed")
ONE_OF_EACH = {case.model_type: case for case in reversed(CASES) if case.model_type != "gpt2"}
RULES = DeployRecipe(formats=("hf", "torchao"))
HOLES = {"varying": lambda g, f: [(0, f), (g, 0), (0, 0), (g - 1, 7)], "stock": lambda g, f: [(g, f)] * 3 + [(0, 0)]}


def child_of(parent: Parent, layers: str) -> Any:
    return prune(parent, Architecture.of(HOLES[layers](parent.shape.kv_groups, parent.shape.ffn_width)), Slices(parent))


@needs_torchao
@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_what_is_reloaded_is_what_was_quantised(family: str, tmp_path: Path) -> None:
    child = child_of(tiny_parent(ONE_OF_EACH[family]), "varying")
    with torch.inference_mode():
        before = child(tokens()).logits
    (written,) = write_formats(child, tiny_tokenizer(), RULES, tmp_path)
    assert written["format"] == TORCHAO_DIRECTORY and written["proof"].startswith("the same weights and logits")
    with torch.inference_mode():
        assert torch.equal(child(tokens()).logits, before), "the child was changed"
    with safe_open(tmp_path / TORCHAO_DIRECTORY / "model.safetensors", "pt") as file:
        stored = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert torch.int8 in stored
    assert (tmp_path / TORCHAO_DIRECTORY / "modeling_pruned.py").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {TORCHAO_DIRECTORY}, "nothing is left beside it"


@needs_torchao
def test_a_child_whose_layers_are_alike_stays_stock(tmp_path: Path) -> None:
    write_formats(child_of(tiny_parent(CASES[0]), "stock"), None, RULES, tmp_path)
    assert not list((tmp_path / TORCHAO_DIRECTORY).glob("*.py"))
    AutoModelForCausalLM.from_pretrained(tmp_path / TORCHAO_DIRECTORY)


@needs_torchao
def test_weights_are_the_childs_rounded_row_by_row(tmp_path: Path) -> None:
    child = child_of(tiny_parent(CASES[0]), "varying")
    write_formats(child, None, RULES, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / TORCHAO_DIRECTORY, trust_remote_code=True)
    exact = dict(child.named_parameters())
    rounded = 0
    for name, weight in model.named_parameters():
        if hasattr(weight, "__tensor_flatten__"):
            step_R1 = exact[name].abs().amax(1, keepdim=True) / 127
            assert bool(((weight.dequantize() - exact[name]).abs() <= 0.51 * step_R1).all()), name
            rounded += 1
        else:
            assert torch.equal(weight, exact[name]), name
    assert rounded == sum(name.endswith("_proj.weight") for name in exact)


@needs_torchao
def test_a_checkpoint_is_converted_and_timed_beside_itself(tmp_path: Path) -> None:
    child_of(tiny_parent(CASES[0]), "varying").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = ModelRecipe(path=str(tmp_path), device="cpu")
    convert(model, DeployRecipe(formats=("torchao",)), None, silent, force=False)
    with pytest.raises(ExportError, match="is not empty; use --force"):
        convert(model, DeployRecipe(formats=("torchao",)), None, silent, force=False)
    convert(model, DeployRecipe(formats=("torchao",)), None, silent, force=True)
    quick = WorkloadRecipe(prompt_tokens=4, generated_tokens=2, repeats=1)
    int8 = ModelRecipe(path=str(tmp_path / TORCHAO_DIRECTORY), device="cpu")
    found = bench([model, int8], quick, silent)["models"]
    assert found[0]["params"] == found[1]["params"]
    with pytest.raises(UnsupportedModelError, match=r"torchao is quantised \(torchao\); float weights are needed"):
        convert(int8, DeployRecipe(formats=("torchao",)), tmp_path / "again", silent, force=False)


@needs_torchao
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_what_it_is_beside_int8(dtype: torch.dtype, tmp_path: Path) -> None:
    parent = make_parent(tiny_model(CASES[0]).to(dtype), None, source="half")
    write_formats(child_of(parent, "varying"), None, RULES, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / TORCHAO_DIRECTORY, trust_remote_code=True, dtype="auto")
    assert model.dtype == dtype


@needs_torchao
def test_files_that_are_not_what_was_quantised_are_not_kept(tmp_path: Path) -> None:
    parent = tiny_parent(CASES[0])
    child, other = child_of(parent, "varying"), child_of(tiny_parent(CASES[0], seed=1), "varying")
    saved = checkpoint.save_files

    def swapped(model: Any, tokenizer: Any, directory: Path) -> None:
        if hasattr(model, "hf_quantizer"):
            saved(torchao._quantised(other, tmp_path / "other"), tokenizer, directory)
        else:
            saved(other, None, tmp_path / "other")
            saved(model, tokenizer, directory)

    with (
        patch.object(torchao, "save_files", swapped),
        pytest.raises(ExportError, match=r"other weights than the scored child: .*\.qdata"),
    ):
        torchao.write_torchao(child, None, tmp_path / "int8")
    assert {path.name for path in tmp_path.iterdir()} == {"other"}


def test_it_says_what_is_missing() -> None:
    parent = tiny_parent(CASES[0])
    with (
        patch.object(importlib.util, "find_spec", return_value=None),
        pytest.raises(UnsupportedModelError, match=r"torchao is not installed; pip install 'llmprune\[torchao\]'"),
    ):
        check_parent(parent, RULES, "medium")


def test_gpt2_has_no_linear_layers() -> None:
    parent = tiny_parent(CASES[next(i for i, name in enumerate(IDS) if name.startswith("gpt2"))])
    with pytest.raises(
        UnsupportedModelError, match=r"deploy\.formats names torchao, .* gpt2 are of another class; use hf"
    ):
        check_parent(parent, RULES, "medium")


@needs_torchao
def test_it_is_pushed_as_it_was_proven(finished_run: Finished, tmp_path: Path) -> None:
    child = Path(shutil.copytree(finished_run.export, tmp_path / "child"))
    convert(ModelRecipe(path=str(child), device="cpu"), DeployRecipe(formats=("torchao",)), None, silent, force=False)
    contents = read_contents(child)
    named = {file.name for file in contents.files}
    assert {"torchao/config.json", "torchao/model.safetensors", "torchao/modeling_pruned.py"} <= named
    card = model_card(contents, "user/tiny", Licence("mit"))
    assert 'hf download user/tiny --include "torchao/*"' in card and 'from_pretrained("./torchao", ' in card
    weights = child / TORCHAO_DIRECTORY / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(PushError, match=r"torchao/model\.safetensors has changed since"):
        read_contents(child)
