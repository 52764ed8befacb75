"""Checkpoints, loaded by a process that does not know llmprune, and the guards around writing them."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from closeness import assert_close, tolerance
from families import CASES, IDS, Slices, merging, tiny_model, tiny_parent, tokens
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from llmprune.choices.architecture import Architecture, ParentShape
from llmprune.choices.kv_groups import AttentionChoice
from llmprune.core.errors import ExportError, LlmpruneError, OutOfMemoryError, PushError
from llmprune.measure.value import SCHEMA
from llmprune.models import checkpoint, expected, fresh_process
from llmprune.models.checkpoint import METADATA_FILE, write_checkpoint
from llmprune.models.expected import Expected, Proof, prove
from llmprune.models.parent import Parent, make_parent
from llmprune.models.proof import digests
from llmprune.models.surgery import is_stock, prune, register_pruned_classes
from llmprune.publish.contents import read_contents

HETEROGENEOUS = (
    "llama-gqa",
    "llama-biased",
    "mistral-sliding",
    "qwen2-sliding",
    "qwen3-gqa",
    "smollm3-gqa",
    "granite-gqa",
    "gemma2-gqa",
    "gemma3_text-gqa",
    "olmo2-gqa",
    "phi3-longrope",
    "gpt_neox-parallel",
    "gpt2-mha",
    "opt-projected",
)
DEPTH = ("llama-gqa", "qwen2-sliding", "smollm3-gqa", "gemma3_text-gqa", "phi3-longrope", "opt-mha")
UNIFORM_FFN = ("llama-biased", "phi3-gqa", "gpt_neox-parallel", "gpt2-mha", "opt-mha")
QUERIES = ("llama-mqa", "qwen3-gqa", "gemma2-gqa", "olmo2-gqa", "phi3-longrope")
MERGED = ("llama-biased", "mistral-sliding", "qwen2-sliding", "qwen3-gqa", "gemma2-gqa", "olmo2-gqa", "phi3-longrope")
CHECKPOINTS = [
    *((case_id, "heterogeneous") for case_id in HETEROGENEOUS),
    *((case_id, "depth") for case_id in DEPTH),
    *((case_id, "uniform ffn") for case_id in UNIFORM_FFN),
    ("llama-gqa", "uniform both"),
    ("phi3-gqa", "uniform both"),
    ("gpt2-mha", "whole"),
    *((case_id, "queries") for case_id in QUERIES),
    ("llama-gqa", "uniform queries"),
    ("phi3-gqa", "uniform queries"),
    *((case_id, "merged") for case_id in MERGED),
    ("llama-mha", "uniform merged"),
    ("phi3-gqa", "uniform merged"),
]
PRUNED_CLASS = ("heterogeneous", "queries", "merged")

STRANGER = """
import json, os, sys
from pathlib import Path
sys.modules["llmprune"] = None  # from here on, `import llmprune` is a ModuleNotFoundError
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()
logging.set_verbosity_error()
torch.set_num_threads(1)
results = {}
for name, directory, stock in json.loads(Path(sys.argv[1]).read_text()):
    expected = load_file(directory + ".safetensors")

    def gap(model):
        with torch.inference_mode():
            return float((model(expected["tokens"]).logits - expected["logits"]).abs().max())

    model, info = AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=not stock, output_loading_info=True
    )
    result = {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    result["class"] = type(model).__name__
    result["gap"] = gap(model)
    generated = model.generate(
        expected["tokens"][:1], max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0
    )
    result["generated"] = generated[0].tolist()
    model.save_pretrained(directory + "-again")
    again = AutoModelForCausalLM.from_pretrained(directory + "-again", trust_remote_code=not stock)
    result["gap again"] = gap(again)
    for device_map in ("cpu", "auto"):
        placed = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=not stock, device_map=device_map)
        result["gap " + device_map] = gap(placed)
    result["refused"] = None
    try:
        AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=False)
    except ValueError as error:
        result["refused"] = str(error)
    results[name] = result
results["llmprune"] = [name for name, module in sys.modules.items() if name.split(".")[0] == "llmprune" and module]
print(json.dumps(results))
"""


def architecture_of(name: str, shape: ParentShape) -> Architecture:
    groups, width = shape.kv_groups, shape.ffn_width
    if name == "queries":
        choices = [AttentionChoice(max(1, groups - 1), 1), AttentionChoice(groups, shape.queries_per_group - 1)]
        return Architecture.of([(groups, width), (groups, 17), (0, width), (groups, 0)]).with_choices(
            enumerate(choices)
        )
    if name == "uniform queries":
        return shape.architecture.with_choices((i, AttentionChoice(groups, 1)) for i in range(shape.layers))
    if name.endswith("merged"):
        return merging(shape, {0: 1, 2: 1} if name == "merged" else dict.fromkeys(range(shape.layers), 1))
    return Architecture.of(
        {
            "heterogeneous": [(0, width), (groups - 1, 17), (0, 0), (groups, 0)],
            "depth": [(groups, width), (0, 0), (0, 0), (groups, width)],
            "uniform ffn": [(groups, 13)] * 4,
            "uniform both": [(groups - 1, 13)] * 4,
            "whole": [(groups, width)] * 4,
        }[name]
    )


def child_of(case_id: str, name: str = "heterogeneous") -> tuple[PreTrainedModel, Architecture, Parent]:
    parent = tiny_parent(CASES[IDS.index(case_id)])
    architecture = architecture_of(name, parent.shape)
    return prune(parent, architecture, Slices(parent)), architecture, parent


def greedy(child: PreTrainedModel) -> list[int]:
    found = child.generate(tokens()[:1], max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    return found[0].tolist()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every child of CHECKPOINTS, saved; beside each directory, a file of tokens and their logits."""
    root = tmp_path_factory.mktemp("children")
    directories = {}
    for case_id, name in CHECKPOINTS:
        child, _, _ = child_of(case_id, name)
        directory = root / f"{case_id} {name}".replace(" ", "-")
        child.save_pretrained(directory)
        with torch.inference_mode():
            logits = child(tokens()).logits
        save_file({"tokens": tokens(), "logits": logits}, f"{directory}.safetensors")
        (root / f"{directory.name}.json").write_text(json.dumps([is_stock(child.config), greedy(child)]))
        directories[f"{case_id} {name}"] = directory
    return directories


@pytest.fixture(scope="module")
def strangers(saved: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process without llmprune makes of all of them, forked as proofs are."""
    root = tmp_path_factory.mktemp("stranger")
    jobs = [(name, str(path), json.loads(Path(f"{path}.json").read_text())[0]) for name, path in saved.items()]
    (root / "script.py").write_text(STRANGER)
    (root / "jobs.json").write_text(json.dumps(jobs))
    environment = {**os.environ, "HF_MODULES_CACHE": str(root / "modules")}
    finished = fresh_process.run_script(str(root / "script.py"), [str(root / "jobs.json")], environment)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", [f"{case_id} {name}" for case_id, name in CHECKPOINTS])
def test_a_stranger_loads_the_network_that_was_saved(
    name: str, saved: dict[str, Path], strangers: dict[str, Any]
) -> None:
    found, (stock, generated) = strangers[name], json.loads(Path(f"{saved[name]}.json").read_text())
    assert strangers["llmprune"] == []
    assert found["missing_keys"] == found["unexpected_keys"] == found["mismatched_keys"] == []
    rounding = tolerance(float(load_file(f"{saved[name]}.safetensors")["logits"].abs().max()))
    for load in ("gap", "gap again", "gap cpu", "gap auto"):
        assert found[load] <= rounding, load
    assert found["generated"] == generated
    # A stock phi3 takes the head size to be the hidden size by the number of heads.
    of_phi3 = ("phi3-gqa uniform both", "phi3-gqa uniform queries")
    assert stock == (name.split(" ", 1)[1] not in PRUNED_CLASS and name not in of_phi3)
    assert found["class"].startswith("Pruned") != stock
    for directory in (saved[name], Path(f"{saved[name]}-again")):
        assert [path.name for path in directory.glob("*.py")] == ([] if stock else ["modeling_pruned.py"])
        assert {path.suffix for path in directory.iterdir()} <= {".json", ".safetensors", ".py"}
        config = json.loads((directory / "config.json").read_text())
        assert ("auto_map" in config) != stock
        assert ("per_layer_config" in config) != stock
    assert (found["refused"] is None) == stock
    if not stock:
        assert "trust_remote_code" in found["refused"]


def test_registered_classes_need_no_remote_code(saved: dict[str, Path]) -> None:
    register_pruned_classes()
    register_pruned_classes()  # twice is no error
    for name, directory in saved.items():
        expected = load_file(f"{directory}.safetensors")
        model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=False)
        with torch.inference_mode():
            assert_close(model(expected["tokens"]).logits, expected["logits"], msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_child_of_half_precision_is_proven_in_its_own_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    # Loaded, since `to` would round the rotary frequencies too.
    tiny_model(CASES[IDS.index("llama-gqa")]).save_pretrained(tmp_path / "parent")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "parent", dtype=dtype)
    parent = make_parent(model, None, source="half")
    architecture = architecture_of("heterogeneous", parent.shape)
    child = prune(parent, architecture, Slices(parent))
    proof = write_checkpoint(child, None, architecture, {}, tmp_path / "child")
    assert proof.max_logit_difference <= 1e-6
    assert {tensor.dtype for tensor in load_file(tmp_path / "child" / "model.safetensors").values()} == {dtype}
    assert json.loads((tmp_path / "child" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go, so that a test can see what is left of them."""
    directory = tmp_path / "scratch"
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    return directory


@pytest.mark.parametrize(
    ("case_id", "name"),
    [
        ("llama-gqa", "heterogeneous"),
        ("llama-gqa", "queries"),
        ("llama-gqa", "merged"),
        ("gpt2-mha", "uniform ffn"),
    ],
)
def test_written_checkpoint(case_id: str, name: str, tmp_path: Path, scratch: Path) -> None:
    child, architecture, _ = child_of(case_id, name)
    tokenizer = tiny_tokenizer() if name == "heterogeneous" else None
    directory = tmp_path / "out" / "child"
    proof = write_checkpoint(child, tokenizer, architecture, {"parent": "tiny"}, directory)
    params = sum(parameter.numel() for parameter in set(child.parameters()))
    assert proof.params == params and proof.stock_class == (name == "uniform ffn")
    assert proof.max_logit_difference <= 1e-5 and proof.generation_gap <= 1e-5
    written = json.loads((directory / METADATA_FILE).read_text())
    assert written["hash"] == architecture.hash and written["parent"] == "tiny" and written["format"] == 1
    assert Architecture.from_json(written["architecture"]) == architecture
    assert written["proof"]["params"] == params and written["proof"]["stock_class"] == proof.stock_class
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}
    assert written["files"] == {name: digest for name, digest in digests.items() if name != METADATA_FILE}
    weights = [path.name for path in directory.iterdir() if path.suffix not in (".json", ".py", ".jinja")]
    assert weights == ["model.safetensors"]
    assert (directory / "tokenizer.json").exists() == (tokenizer is not None)
    assert directory.stat().st_mode & 0o777 == 0o755
    modes = {path.stat().st_mode & 0o777 for path in directory.iterdir()}
    assert len(modes) == 1, "whoever may read one file of a checkpoint may read all"
    assert [path.name for path in directory.parent.iterdir()] == ["child"]
    assert list(scratch.iterdir()) == []


def test_how_a_checkpoint_likes_to_generate_is_no_part_of_its_proof(tmp_path: Path) -> None:
    """A child that ends at once, or must not repeat itself, is as good as another."""
    child, architecture, _ = child_of("llama-gqa")
    with torch.no_grad():
        likeliest = (
            child(torch.randint(5, 60, (1, 8), generator=torch.Generator().manual_seed(0))).logits[0, -1].argmax()
        )
        # Whatever it reads, it finds these two likeliest: the first is its EOS.
        child.get_output_embeddings().weight.data *= 1e-3
        child.get_output_embeddings().weight.data[[int(likeliest), 7]] *= 1e3
    child.generation_config = GenerationConfig(
        eos_token_id=int(likeliest), suppress_tokens=[7], repetition_penalty=3.0, pad_token_id=0
    )
    proof = write_checkpoint(child, None, architecture, {}, tmp_path / "child")
    assert proof.generation_gap <= 1e-5
    kept = json.loads((tmp_path / "child" / "generation_config.json").read_text())
    assert (kept["suppress_tokens"], kept["repetition_penalty"]) == ([7], 3.0)


def test_a_proof_starts_an_interpreter_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: Callable[..., Any]
) -> None:
    """As every proof does outside of this suite, which forks them (see forked.py)."""
    monkeypatch.setattr(fresh_process, "run_script", started)
    child, architecture, _ = child_of("llama-gqa")
    proof = write_checkpoint(child, tiny_tokenizer(), architecture, {}, tmp_path / "child")
    assert proof.max_logit_difference <= 1e-5 and not proof.stock_class
    (tmp_path / "script.py").write_text("import os, sys; print(os.getppid(), 'torch' in sys.modules, *sys.argv[1:])")
    finished = started(str(tmp_path / "script.py"), ["here"], dict(os.environ))
    assert finished.stdout.split() == [str(os.getpid()), "False", "here"] and finished.returncode == 0


def mapped_from(place: int) -> str:
    """The file that a place in this process's memory is mapped from; "" if it is mapped from none."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, _, *path = line.split(maxsplit=5)
        start, stop = (int(end, 16) for end in span.split("-"))
        if start <= place < stop:
            return path[0] if path else ""
    raise AssertionError(f"{place:x} is no place in memory")


@pytest.mark.parametrize("case_id", ["llama-gqa", "gemma3_text-gqa", "gpt2-mha"])
def test_a_child_has_no_tensors_of_its_own_while_it_is_proven(
    case_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child, architecture, parent = child_of(case_id)
    with torch.inference_mode():
        before, logits = digests(child.state_dict()), child(tokens()).logits
    places = {name: tensor.data_ptr() for name, tensor in parent.model.state_dict().items()}
    seen: list[set[str]] = []

    def looking(held_to: Expected, staging: Path) -> Proof:
        seen.append({mapped_from(tensor.data_ptr()) for tensor in child.state_dict().values()})
        assert seen[-1] == {str(staging / "model.safetensors")}
        return prove(held_to, staging)

    monkeypatch.setattr(checkpoint, "prove", looking)
    proof = write_checkpoint(child, None, architecture, {}, tmp_path / "child")
    assert len(seen) == 1 and proof.max_logit_difference <= 1e-5
    assert {name: tensor.data_ptr() for name, tensor in parent.model.state_dict().items()} == places
    with torch.inference_mode():
        assert digests(child.state_dict()) == before
        assert_close(child(tokens()).logits, logits)


def test_a_child_with_hooks_of_several_devices_is_written_without_them(tmp_path: Path) -> None:
    child, architecture, _ = child_of("llama-gqa")
    dispatch_model(child, {"": "cpu"}, force_hooks=True)
    proof = write_checkpoint(child, None, architecture, {}, tmp_path / "child")
    assert proof.max_logit_difference <= 1e-5
    assert not hasattr(child, "_hf_hook") and not hasattr(child, "hf_device_map")


def stub_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "prove", lambda *_: Proof(0.0, 0.0, 1, False))


def test_existing_directory_is_kept_without_force_and_replaced_with_it(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_proof(monkeypatch)
    child, architecture, _ = child_of("llama-gqa")
    directory = tmp_path / "child"
    directory.mkdir()
    (directory / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match=r"exists and is not empty; use --force"):
        write_checkpoint(child, None, architecture, {}, directory)
    with pytest.raises(ExportError, match=r"does not look like a checkpoint .*name another"):
        write_checkpoint(child, None, architecture, {}, directory, force=True)
    assert [path.name for path in directory.iterdir()] == ["notes.txt"]
    (directory / "config.json").write_text("{}")
    write_checkpoint(child, None, architecture, {}, directory, force=True)
    assert not (directory / "notes.txt").exists() and (directory / METADATA_FILE).exists()
    with pytest.raises(ExportError, match="is a file; name a directory"):
        write_checkpoint(child, None, architecture, {}, directory / "config.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["child", "scratch"]


def test_a_directory_of_chat_templates_is_part_of_the_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub_proof(monkeypatch)
    child, architecture, _ = child_of("llama-gqa")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}  # type: ignore[assignment]
    facts = {"figures": {"schema": SCHEMA}, "parent": {"a": 1}, "provenance": {"a": 1}, "recipe": {"a": 1}}
    write_checkpoint(child, tokenizer, architecture, facts, tmp_path / "child")
    name = "additional_chat_templates/tool_use.jinja"
    assert name in json.loads((tmp_path / "child" / METADATA_FILE).read_text())["files"]
    assert name in {file.name for file in read_contents(tmp_path / "child").files}
    (tmp_path / "child" / name).write_text("{{ other }}")
    with pytest.raises(PushError, match=r"tool_use\.jinja has changed since"):
        read_contents(tmp_path / "child")


def test_an_old_checkpoint_survives_a_failed_proof(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Proof:
        raise ExportError("no proof")

    monkeypatch.setattr(checkpoint, "prove", fail)
    child, architecture, _ = child_of("llama-gqa")
    (tmp_path / "child").mkdir()
    (tmp_path / "child" / "config.json").write_text("old")
    with pytest.raises(ExportError, match="no proof"):
        write_checkpoint(child, None, architecture, {}, tmp_path / "child", force=True)
    assert (tmp_path / "child" / "config.json").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["child", "scratch"]


def _perturbed(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.0.mlp.down_proj.weight"] += 0.01


def _swapped(weights: dict[str, torch.Tensor]) -> None:
    first, second = (f"model.layers.{i}.post_attention_layernorm.weight" for i in (0, 1))
    weights[first], weights[second] = weights[second], weights[first]


def _deleted(weights: dict[str, torch.Tensor]) -> None:
    del weights["model.layers.1.self_attn.q_proj.weight"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_perturbed, r"other weights than the scored child: model\.layers\.0\.mlp\.down_proj"),
        (_swapped, r"other weights than the scored child: model\.layers\.\d\.post_attention_layernorm"),
        (_deleted, r"missing keys: model\.layers\.1\.self_attn\.q_proj\.weight"),
    ],
)
def test_a_damaged_checkpoint_is_not_written(
    damage: Callable[[dict[str, torch.Tensor]], None],
    message: str,
    tmp_path: Path,
    scratch: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save = checkpoint.save_files

    def damaging(child: PreTrainedModel, tokenizer: Any, directory: Path) -> None:
        save(child, tokenizer, directory)
        weights = load_file(directory / "model.safetensors")
        damage(weights)
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(checkpoint, "save_files", damaging)
    child, architecture, _ = child_of("llama-gqa")
    with pytest.raises(ExportError, match=message):
        write_checkpoint(child, None, architecture, {}, tmp_path / "child")
    assert [path.name for path in tmp_path.iterdir()] == ["scratch"]
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"unexpected": ["lm_head.bias"]}, "has unexpected keys: lm_head.bias"),
        ({"mismatched": ["lm_head.weight"]}, "has mismatched keys: lm_head.weight"),
        ({"finite": False}, "NaN or infinite logits"),
        ({"max_logit_difference": float("nan")}, "max_logit_difference nan"),
        ({"generation_gap": 0.5}, r"generation_gap 0\.5 > .*e-05, 64 steps of torch\.float32 at its largest logit"),
        ({"weights": {"lm_head.weight": "0"}}, "has other weights than the scored child: lm_head.weight"),
        ({"params": 1}, "has 1 parameters, the scored child 34,"),
        ({"llmprune_imported": True}, "imported llmprune"),
        ({"tokenizer_equal": False}, "the reloaded tokenizer gives other token ids"),
    ],
)
def test_whatever_differs_fails_the_proof(
    found: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child, _, _ = child_of("llama-gqa")
    good = {
        **{key: [] for key in ("missing", "unexpected", "mismatched")},
        **dict.fromkeys(("max_logit_difference", "generation_gap"), 0.0),
        "params": sum(parameter.numel() for parameter in set(child.parameters())),
        "weights": digests(child.state_dict()),
        "finite": True,
        "llmprune_imported": False,
    }
    for answer in (good, {**good, **found}):
        finished = subprocess.CompletedProcess(
            [], 0, stdout=f"a line of someone else's\n{json.dumps(answer)}\n", stderr=""
        )
        monkeypatch.setattr(fresh_process, "run_script", lambda *_, finished=finished: finished)
        if answer is good:
            prove(Expected.of(child, None), tmp_path)
            continue
        with pytest.raises(ExportError, match=message):
            prove(Expected.of(child, None), tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_limit_follows_the_largest_logit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of bfloat16 is 0.5 at a logit of 100, and far too much at one of 2."""
    child, _, _ = child_of("llama-gqa")
    child = child.to(dtype)
    params = sum(parameter.numel() for parameter in set(child.parameters()))
    found: dict[str, Any] = {
        **{key: [] for key in ("missing", "unexpected", "mismatched")},
        **{"finite": True, "llmprune_imported": False, "weights": digests(child.state_dict()), "params": params},
    }
    step = torch.finfo(dtype).eps * 64

    def held_to(largest_logit: float) -> Expected:
        return replace(Expected.of(child, None), inputs={"logits": torch.tensor([-largest_logit, 1.0])})

    for figure in ("max_logit_difference", "generation_gap"):
        off = {**found, "max_logit_difference": 0.0, "generation_gap": 0.0, figure: step}
        assert expected._judge(off, held_to(100.0)).params == params
        with pytest.raises(ExportError, match=f"{figure} .* 4 steps of {dtype}"):
            expected._judge(off, held_to(2.0))


def test_a_checkpoint_that_does_not_load_fails_the_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child, _, _ = child_of("llama-gqa")
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="Traceback ...\nOSError: no weights\n")
    monkeypatch.setattr(fresh_process, "run_script", lambda *_: failed)
    with pytest.raises(ExportError, match="does not load in a fresh process: OSError: no weights"):
        prove(Expected.of(child, None), tmp_path)


KILLED = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
TOO_LARGE = "import torch; torch.empty(2**60, dtype=torch.uint8)"


@pytest.mark.parametrize(
    ("script", "what"), [(KILLED, r"its 0\.00 GiB of weights was killed"), (TOO_LARGE, "1,073,741,824.0 GiB more")]
)
def test_a_proof_without_room_says_so_and_leaves_nothing(
    script: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "script.py").write_text(script)
    monkeypatch.setattr("llmprune.models.proof.__file__", str(tmp_path / "script.py"))
    child, architecture, _ = child_of("llama-gqa")
    with pytest.raises(OutOfMemoryError, match=rf"\(proving .*{what}.* are free on this machine now.*model\.dtype"):
        write_checkpoint(child, None, architecture, {}, tmp_path / "child")
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["OSError", "SafetensorError"],
)
def test_a_full_disk_leaves_nothing(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr(checkpoint, "save_files", full)
    child, architecture, _ = child_of("llama-gqa")
    with pytest.raises(ExportError, match=r"child failed: .*No space left on device"):
        write_checkpoint(child, None, architecture, {}, tmp_path / "child")
    assert list(tmp_path.iterdir()) == []


@contextmanager
def largest_file(size_bytes: int) -> Iterator[None]:
    """What a full disk does, done by the kernel: a write past this size fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_weights_that_do_not_fit_leave_nothing(tmp_path: Path) -> None:
    child, architecture, _ = child_of("llama-gqa")
    with largest_file(20_000), pytest.raises(LlmpruneError, match="File too large"):
        write_checkpoint(child, None, architecture, {}, tmp_path / "child")
    assert list(tmp_path.iterdir()) == []
