"""A checkpoint that somebody trained: proven and judged anew, or refused as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Finished, Llmprune
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmprune.measure.quality.perplexity import score
from llmprune.models.samples import continuations
from llmprune.pipeline.prepare import stock_up
from llmprune.pipeline.run import Run

PUSH = ("--licence", "apache-2.0", "--dry-run")


@pytest.fixture
def trained(copied: Path, finished_run: Finished) -> Path:
    """The run's export, its weights other than they were."""
    directory = Path(shutil.copytree(finished_run.export, copied / "export", dirs_exist_ok=True))
    change_weights(directory, lambda name, weight: weight + 0.02 * torch.randn_like(weight))
    return directory


def change_weights(directory: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    (file,) = directory.glob("*.safetensors")
    torch.manual_seed(0)
    save_file({name: change(name, weight) for name, weight in load_file(file).items()}, file, {"format": "pt"})


def facts(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "llmprune.json").read_text())
    return found


def test_what_was_trained_is_another_child_that_can_be_pushed(trained: Path, llmprune: Llmprune, copied: Path) -> None:
    before = facts(trained)
    refused = llmprune("push", trained, "user/name", *PUSH)
    assert refused.code == 2 and "changed since the checkpoint was proven" in " ".join(refused.err.split())
    result = llmprune("prove", trained, "--json")
    assert result.code == 0, result.err
    after, figures = facts(trained), result.json["figures"]
    assert after["id"] == result.json["id"] == figures["id"] != before["id"]
    (name,) = set(figures["done"]) - set(before["figures"].get("done", []))
    assert name.startswith("trained-") and after["figures"]["done"][-1] == name
    model = AutoModelForCausalLM.from_pretrained(trained, trust_remote_code=True).eval()
    splits = stock_up(Run.open(copied)).tokens
    assert figures["nats_per_token"] == pytest.approx(score(model, splits["validation"]).nats_per_token, rel=1e-5)
    assert figures["nats_per_token"] != before["figures"]["nats_per_token"]
    test = score(model, splits["test"]).nats_per_token
    assert figures["test"]["nats_per_token"] == pytest.approx(test, rel=1e-5)
    lost = test - after["parent"]["figures"]["test"]["nats_per_token"]
    assert figures["test"]["nats_lost"] == pytest.approx(lost, rel=1e-4)
    assert figures["decode_speedup"] == before["figures"]["decode_speedup"]
    prompts = [sample["prompt"] for sample in before["samples"]]
    own = continuations(model, AutoTokenizer.from_pretrained(trained, trust_remote_code=True), prompts)
    assert [sample["child"] for sample in after["samples"]] == own
    assert [sample["parent"] for sample in after["samples"]] == [sample["parent"] for sample in before["samples"]]
    pushed = llmprune("push", trained, "user/name", *PUSH)
    assert pushed.code == 0, pushed.err
    again = llmprune("prove", trained, "--json")
    assert again.code == 0 and again.json["id"] == after["id"], "nothing was changed since"


def test_a_run_does_not_replace_what_was_trained(trained: Path, llmprune: Llmprune, copied: Path) -> None:
    assert llmprune("prove", trained, "--quiet").code == 0
    kept = facts(trained)
    result = llmprune("compress", copied / "recipe.yaml", "--out", copied, "--quiet")
    told = " ".join(result.err.split())
    assert result.code == 2 and "was trained since it was exported (trained-" in told and "--force" in told
    assert facts(trained) == kept


def test_other_files_alone_make_no_other_child(trained: Path, finished_run: Finished, llmprune: Llmprune) -> None:
    (weights,) = finished_run.export.glob("*.safetensors")
    shutil.copy(weights, trained)
    config = json.loads((trained / "generation_config.json").read_text())
    (trained / "generation_config.json").write_text(json.dumps({**config, "max_new_tokens": 7}))
    result = llmprune("prove", trained, "--json")
    assert result.code == 0, result.err
    assert result.json["id"] == facts(finished_run.export)["id"]
    assert llmprune("push", trained, "user/name", *PUSH).code == 0


def _reshaped(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] + 1}))


def _broken(directory: Path) -> None:
    change_weights(directory, lambda name, weight: torch.full_like(weight, torch.nan) if "norm" in name else weight)


def _without_a_tensor(directory: Path) -> None:
    (file,) = directory.glob("*.safetensors")
    tensors = load_file(file)
    del tensors[next(name for name in tensors if "layers" in name)]
    save_file(tensors, file, {"format": "pt"})


def _with_code(directory: Path) -> None:
    (directory / "modeling_pruned.py").write_text("raise SystemExit('it ran')")


def _with_code_elsewhere(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    named = {"AutoModelForCausalLM": "somebody/else--modeling.Model"}
    (directory / "config.json").write_text(json.dumps({**config, "auto_map": named}))


def _with_a_gguf_file(directory: Path) -> None:
    (directory / "model-F16.gguf").write_bytes(b"GGUF")


def _without_metadata(directory: Path) -> None:
    (directory / "llmprune.json").unlink()


def _of_an_older_llmprune(directory: Path) -> None:
    known = facts(directory)
    del known["library"]
    (directory / "llmprune.json").write_text(json.dumps(known))


def _judged_on_other_text(directory: Path) -> None:
    known = facts(directory)
    known["figures"]["measured_on"]["tokens"] += 1
    (directory / "llmprune.json").write_text(json.dumps(known))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (_reshaped, "misshapes 1 tensors that its config implies"),
        (_broken, "NaN"),
        (_without_a_tensor, "lacks 1 tensors"),
        (_with_code, "not the modeling file of this llmprune, and the proof would run it"),
        (_with_code_elsewhere, "names code in auto_map that is not modeling_pruned.py"),
        (_with_a_gguf_file, "model-F16.gguf, made of its weights as they were"),
        (_without_metadata, "holds no llmprune.json"),
        (_of_an_older_llmprune, "of an older llmprune"),
        (_judged_on_other_text, "name its own run with --data"),
    ],
)
def test_what_cannot_be_proven_stays_as_it_was(
    trained: Path, llmprune: Llmprune, spoil: Callable[[Path], None], told: str
) -> None:
    spoil(trained)
    before = {path.name: path.read_bytes() for path in trained.iterdir() if path.is_file()}
    result = llmprune("prove", trained)
    assert result.code == 2 and told in " ".join(result.err.split()), result.err
    assert {path.name: path.read_bytes() for path in trained.iterdir() if path.is_file()} == before


def test_a_checkpoint_without_a_run_needs_its_text(trained: Path, llmprune: Llmprune, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(trained, tmp_path / "alone"))
    result = llmprune("prove", alone)
    assert result.code == 2 and "name one with --data" in " ".join(result.err.split())
    run = trained.parent
    assert llmprune("prove", alone, "--data", run, "--quiet").code == 0
