"""A dry run reads no weights: none are there, or there are more of them than the machine has memory for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Finished, Llmprune
from tiny import contents

from llmprune.core.recipe_text import to_yaml

PROGRAM = """
import resource, sys
from llmprune.cli.main import main
from llmprune.forecast import rates
from llmprune.models import stand_in
from llmprune.pipeline import fitting
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
sys.argv[0] = "llmprune"
rates.BUDGET_S, rates.LARGEST_SIDE, fitting.GENERAL_RECIPES = 0.02, 256, ()
rates.process_seconds, stand_in.STAND_IN_BYTES = lambda: 4.0, 2**28
try:
    main()
finally:
    print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base), file=sys.stderr)
"""
# Eight billion parameters in many layers: the fewer numbers a layer has, the sooner three of them are timed.
QWEN3_DEEP = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 160,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000},
    "tie_word_embeddings": False,
    "attention_bias": False,
    "hidden_act": "silu",
    "bos_token_id": 151_643,
    "eos_token_id": 151_645,
    "dtype": "bfloat16",
}


def without_weights(parent: Path) -> None:
    (parent / "model.safetensors").unlink()


def unreadable_weights(parent: Path) -> None:
    (parent / "model.safetensors").write_bytes(b"no tensor is in here")


@pytest.mark.parametrize(("engine", "spoil"), [("torch", without_weights), ("llamacpp", unreadable_weights)])
def test_a_model_without_weights_is_forecast(
    engine: str, spoil: Callable[[Path], None], finished_run: Finished, tmp_path: Path, llmprune: Llmprune
) -> None:
    parent = Path(shutil.copytree(finished_run.recipe.model.path, tmp_path / "parent"))
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(to_yaml(finished_run.recipe))
    # Vectors of 24 numbers are no blocks of 32.
    how = [f"model.path={parent}", f"workload.engine={engine}", "deploy.gguf_type=f16"]
    command = ("compress", recipe, *how, "--out", out, "--dry-run", "--json", "--quiet")
    there = llmprune(*command)
    assert there.code == 0, there.err
    spoil(parent)
    missing = llmprune(*command)
    assert missing.code == 0, missing.err
    for counted in ("forward_tokens", "backward_tokens", "timed_tokens", "peak_memory_bytes", "disk_bytes"):
        assert [s[counted] for s in missing.json["stages"]] == [s[counted] for s in there.json["stages"]], counted
    for name in ("params", "bytes", "kv_bytes_per_token", "decode_bytes", "workload", "rates_of"):
        assert missing.json[name] == there.json[name]
    assert missing.json["rates_of"]["weights"] == "random" and not out.exists()
    refused = llmprune("compress", recipe, *how, "--out", out, "--quiet")
    assert refused.code == 2, "the run itself does need weights"


def test_stages_that_are_done_are_known_without_weights(
    finished_run: Finished, copied: Path, tmp_path: Path, llmprune: Llmprune
) -> None:
    parent = Path(shutil.copytree(finished_run.recipe.model.path, tmp_path / "parent"))
    without_weights(parent)
    data = yaml.safe_load((copied / "recipe.yaml").read_text())
    data["model"]["path"] = str(parent)
    (copied / "recipe.yaml").write_text(yaml.safe_dump(data))
    before = contents(copied)
    found = llmprune("search", copied, "--dry-run", "--json", "--quiet")
    assert found.code == 0, found.err
    assert {stage["stage"] for stage in found.json["stages"] if not stage["done"]} == set()
    further = llmprune("search", copied, "--dry-run", "--json", "--quiet", "search.trials=9").json["stages"]
    assert [stage["stage"] for stage in further if not stage["done"]] == ["search"]
    assert contents(copied) == before


def dry_run(*arguments: object, home: Path) -> tuple[Any, int]:
    """The forecast, and the bytes of memory that it took beside the imports, of a process of its own."""
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, arguments), "--dry-run", "--json", "--quiet"],
        env={**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout), int(finished.stderr.split()[-1])


def test_a_large_model_of_the_hub_is_forecast_from_its_config(tmp_path: Path) -> None:
    """Eight billion parameters, of which the cache has config.json alone: no tokenizer, no weight."""
    commit, repo = "0" * 40, tmp_path / "hub" / "models--someone--large"
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "snapshots" / commit / "config.json").write_text(json.dumps(QWEN3_DEEP))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    quick = ("data.seq_len=16", "workload.prompt_tokens=4", "workload.generated_tokens=2", "search.targets=[1.01]")
    said, taken = dry_run(
        "compress",
        "someone/large",
        "--out",
        tmp_path / "run",
        "model.dtype=bfloat16",
        "export.pick=ppl_ratio<=2",
        *quick,
        home=tmp_path,
    )
    assert said["params"] == 8_676_091_904 and said["bytes"] == 2 * said["params"]
    # Three layers and some rows of 17 GB, and a half-sized child of them.
    assert said["rates_of"]["layers"] == 3 and said["rates_of"]["rows"] < 20_000
    assert taken < 2e9
    assert said["total"]["seconds"] > 0 and said["total"]["peak_memory_bytes"] > said["bytes"]
    assert said["reach"]["decode"]["fastest"] > said["reach"]["decode"]["halved"] > 1
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_not_there_is_one_line(llmprune: Llmprune, tmp_path: Path) -> None:
    for command in (
        ("compress", "someone/nothing", "--out", tmp_path / "run"),
        ("search", tmp_path / "run", "--recipe", "someone/nothing"),
    ):
        failed = llmprune(*command, "--dry-run", "--quiet")
        assert (failed.code, failed.out) == (2, "") and failed.err.count("\n") == 1, failed.err
        assert failed.err.startswith("error: cannot load model someone/nothing: ")
        assert "Give a Hub id, a directory" in failed.err and not (tmp_path / "run").exists()
