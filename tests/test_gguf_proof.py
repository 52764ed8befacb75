"""The proof of a GGUF file: good files pass however much their child minds rounding, wrong ones do not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from accelerate import dispatch_model
from families import COMMON, Case, Slices, tiny_model, tiny_parent, tokens
from test_gguf import BLOCKY
from torch import nn
from transformers import PreTrainedModel

from llmprune.choices.architecture import Architecture
from llmprune.core.errors import ExportError
from llmprune.core.recipe import DeployRecipe, GgufType
from llmprune.formats.gguf import write_gguf
from llmprune.models.surgery import prune
from llmprune.publish import gguf_proof
from llmprune.publish.conversion import write_formats
from llmprune.publish.gguf_proof import prove_gguf

TYPES: tuple[GgufType, ...] = ("f32", "f16", "q8_0")


def child_of(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    parent = tiny_parent(Case("llama", "blocky", BLOCKY))
    parent.model.to(dtype)
    return prune(parent, Architecture.of([(0, 96), (2, 64), (4, 0), (2, 32)]), Slices(parent))


def sensitive() -> PreTrainedModel:
    """Logits so large that a little rounding changes which token is likely."""
    model = tiny_model(Case("llama", "sensitive", {**BLOCKY, "tie_word_embeddings": False}))
    with torch.no_grad():
        model.get_submodule("lm_head").weight.mul_(80)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weights", TYPES)
def test_a_good_file_is_proven_and_its_child_stays(weights: GgufType, dtype: torch.dtype, tmp_path: Path) -> None:
    child, path = child_of(dtype), tmp_path / "child.gguf"
    before = {name: (value.data_ptr(), value.clone()) for name, value in child.state_dict().items()}
    logits = child(tokens()).logits
    write_gguf(child, None, path, weights)
    proof = prove_gguf(child, path, weights)
    assert 0 <= proof.contents_kl < gguf_proof.MAX_CONTENTS_KL / 10
    for name, value in child.state_dict().items():
        assert value.data_ptr() == before[name][0] and torch.equal(value, before[name][1]), name
    assert torch.equal(child(tokens()).logits, logits)
    assert [file.name for file in tmp_path.iterdir()] == ["child.gguf"]


def test_a_child_that_minds_rounding_is_written(tmp_path: Path) -> None:
    (written,) = write_formats(sensitive(), None, DeployRecipe(formats=("gguf",), gguf_type="q8_0"), tmp_path)
    assert written["proof"].startswith("run in llama.cpp: KL to transformers")
    proof = prove_gguf(sensitive(), tmp_path / written["file"], "q8_0")
    assert proof.child_kl > 0.05 and proof.contents_kl < gguf_proof.MAX_CONTENTS_KL / 10
    assert str(gguf.GGUFReader(tmp_path / written["file"]).fields["general.name"].contents()) == "model-Q8_0"


def _swapped_layers(model: Any) -> None:
    layers = model.model.layers
    layers[1], layers[2] = layers[2], layers[1]


def _one_row(model: Any) -> None:
    weight = model.model.layers[2].mlp.down_proj.weight
    weight[0] += weight.std()


def _other_base(model: Any) -> None:
    model.config.rope_parameters["rope_theta"] *= 2
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)


@pytest.mark.parametrize("damage", [_swapped_layers, _one_row, _other_base])
@pytest.mark.parametrize("weights", TYPES)
def test_the_file_of_another_model_is_refused(
    weights: GgufType, damage: Callable[[nn.Module], None], tmp_path: Path
) -> None:
    """Also where rounding alone does more than any fixed limit would allow."""
    child, path = sensitive(), tmp_path / "child.gguf"
    other = copy.deepcopy(child)
    with torch.no_grad():
        damage(other)
    write_gguf(other, None, path, weights)
    with pytest.raises(ExportError, match=r"something else from child\.gguf: KL .*its numbers are not the child's"):
        prove_gguf(child, path, weights)


@pytest.mark.parametrize("weights", TYPES)
def test_a_file_with_a_spoilt_tensor_is_refused(weights: GgufType, tmp_path: Path) -> None:
    child, path = sensitive(), tmp_path / "child.gguf"
    write_gguf(child, None, path, weights)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path, "r+").tensors}
    stored = tensors["blk.1.ffn_up.weight"].data
    # Numbers change places within the tensor, as at a wrong offset.
    stored[:] = stored[::-1].copy()
    stored.flush()
    with pytest.raises(ExportError, match="its numbers are not the child's"):
        prove_gguf(child, path, weights)


def test_an_engine_that_computes_something_else_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contents are right, but what llama.cpp makes of the file itself is not."""
    child, path = child_of(), tmp_path / "child.gguf"
    write_gguf(child, None, path, "q8_0")
    plain = gguf_proof._logits
    monkeypatch.setattr(gguf_proof, "_logits", lambda file, ids: plain(file, ids) * (0.7 if file == path else 1.0))
    with pytest.raises(ExportError, match="rounding does not explain it"):
        prove_gguf(child, path, "q8_0")


def test_a_child_with_hooks_of_several_devices_is_proven(tmp_path: Path) -> None:
    child = tiny_model(Case("llama", "spread", {**COMMON, **BLOCKY}))
    dispatch_model(child, {"": "cpu"}, force_hooks=True)
    hook = child._hf_hook
    write_gguf(child, None, tmp_path / "child.gguf", "f16")
    prove_gguf(child, tmp_path / "child.gguf", "f16")
    assert child._hf_hook is hook, "the child keeps its own"
