"""Memory that ran out, under every name that it has: one line that says where, what was asked for, and what fits."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Finished, Llmprune
from tiny import contents

from llmprune.core import memory
from llmprune.core.errors import LlmpruneError, ModelError
from llmprune.core.memory import exhausted, out_of_memory, what_takes_less
from llmprune.core.progress import SEARCHING, naming_steps, silent, step_of
from llmprune.core.recipe_inputs import ModelRecipe
from llmprune.models import fresh_process
from llmprune.models.loading import load_model

ON_A_GPU = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.65 GiB of which 1.06 GiB is "
    "free. Including non-PyTorch memory, this process has 22.57 GiB memory in use."
)
ON_A_CPU = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "3221225472 bytes. Error code 12 (Cannot allocate memory)"
)


def raising(error: Exception) -> Callable[..., Any]:
    def raises(*_: Any, **__: Any) -> Any:
        raise error

    return raises


@pytest.mark.parametrize(
    ("raises", "told"),
    [
        (
            raising(torch.OutOfMemoryError(ON_A_GPU)),
            "2.00 GiB more were asked for; GPU 0 has a total capacity of 23.65 GiB of which 1.06 GiB is free; it takes "
            "less with model.device=cpu, model.dtype=bfloat16 or a smaller model",
        ),
        (raising(RuntimeError(ON_A_CPU)), "3.0 GiB more were asked for; "),
        (raising(MemoryError()), "MemoryError; "),
        (raising(OSError(12, "Cannot allocate memory")), "OSError: [Errno 12] Cannot allocate memory; "),
        (lambda *_: torch.empty(2**60, dtype=torch.uint8), "1,073,741,824.0 GiB more were asked for; "),
        (lambda *_: np.empty(2**60, dtype=np.uint8), "1.00 EiB more were asked for; "),
    ],
    ids=["cuda", "cpu", "python", "kernel", "torch itself", "numpy itself"],
)
def test_memory_that_ran_out_is_an_error_of_the_users(
    raises: Callable[..., Any], told: str, llmprune: Llmprune, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmprune.pipeline.fitting.advise_on", lambda *_: {})
    monkeypatch.setattr("llmprune.models.parent.load_parent", raises)
    result = llmprune("inspect", "a/model", "--quiet")
    assert (result.code, result.out) == (2, "")
    assert result.err.count("\n") == 1 and result.err.startswith(f"error: out of memory (loading and timing): {told}")
    assert "the same command goes on from there" in result.err
    assert ("GiB are free on this machine now" in result.err) == ("GPU" not in result.err)


@pytest.mark.parametrize("error", [RuntimeError("size mismatch for lm_head.weight"), IndexError("out of range")])
def test_other_faults_are_not_dressed_up(error: Exception, llmprune: Llmprune, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmprune.pipeline.fitting.advise_on", lambda *_: {})
    monkeypatch.setattr("llmprune.models.parent.load_parent", raising(error))
    with pytest.raises(type(error), match=str(error)):
        llmprune("inspect", "a/model", "--quiet")


def test_what_is_the_users_error_already_stays_as_it_is() -> None:
    assert out_of_memory(ModelError("llama.cpp cannot run it: out of memory")) is None
    assert isinstance(exhausted("killed", ""), LlmpruneError)


def test_a_model_too_large_to_load_is_not_called_unreadable(
    finished_run: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", raising(RuntimeError(ON_A_CPU)))
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator") as caught:
        load_model(ModelRecipe(path=finished_run.recipe.model.path, device="cpu"))
    assert out_of_memory(caught.value) is not None


def test_the_innermost_step_is_named() -> None:
    show = naming_steps(silent)
    with pytest.raises(MemoryError) as caught, show("writing"), show("searching"):
        raise MemoryError
    assert step_of(caught.value) == "searching" and step_of(MemoryError()) == ""


@pytest.mark.parametrize(
    ("step", "setting"),
    [
        ("ordering and refitting blocks", "data.calibration_tokens, importance.method=flap"),
        ("estimating what each choice loses", "tables.tokens"),
        ("measuring what each choice saves", "workload.batch"),
        (SEARCHING, "data.seq_len or workload.batch"),
        ("distilling 0123 on 4,096 tokens, bfloat16", "recover.gradient_checkpointing=true"),
        ("", "model.dtype=bfloat16"),
    ],
)
def test_each_step_has_settings_of_its_own(step: str, setting: str) -> None:
    assert setting in what_takes_less("", step)


def test_in_a_container_its_own_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CONTAINER", tmp_path)
    assert "of 2.0 GiB are free" not in str(exhausted("killed", ""))
    (tmp_path / "memory.max").write_text("2147483648\n")
    (tmp_path / "memory.current").write_text("2040109466\n")
    assert "0.1 GiB of 2.0 GiB are free on this machine now" in str(exhausted("killed", ""))
    (tmp_path / "memory.max").write_text("max\n")
    assert "of 2.0 GiB are free" not in str(exhausted("killed", ""))


def test_an_export_whose_proof_is_killed_leaves_the_run_as_it_was(
    llmprune: Llmprune, finished_run: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = subprocess.CompletedProcess([], -9, stdout="", stderr="")
    monkeypatch.setattr(fresh_process, "run_script", lambda *_: killed)
    before = contents(finished_run.path)
    pick = ("--pick", "ppl_ratio<=1000", "--to", tmp_path / "child", "--quiet")
    result = llmprune("export", finished_run.path, *pick)
    assert result.code == 2 and result.err.count("\n") == 1
    assert "out of memory (proving a checkpoint in a fresh process): the process that loads its 0.00 GiB" in result.err
    assert contents(finished_run.path) == before and list(tmp_path.iterdir()) == []
