"""`llmprune doctor`: one screen of what a machine is, without a secret on it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from conftest import Llmprune

from llmprune.core.errors import ModelError
from llmprune.measure.room import Memory
from llmprune.pipeline import doctor
from llmprune.pipeline.doctor import Finding, examine, examined

SECRET = "hf_this_is_nobodys_token_0123456789"


def found(name: str) -> Finding:
    return next(one for one in examine() if one.name == name)


def test_it_is_one_screen_and_one_object(llmprune: Llmprune) -> None:
    shown = llmprune("doctor")
    assert shown.code == 0 and shown.err == ""
    lines = shown.out.splitlines()
    assert len(lines) <= 24 and all(line.split()[0] in ("ok", "note", "problem") for line in lines), shown.out
    data = llmprune("doctor", "--json").json
    assert data["usable"] and len(data["findings"]) == len(lines)
    names = {row["name"]: row for row in data["findings"]}
    assert names["torch"]["told"] == torch.__version__ and names["network"]["told"].startswith("not tried")
    assert {"transformers", "optuna", "lm-eval", "datasets", "accelerate", "memory", "llama.cpp"} <= names.keys()
    assert all(row["todo"] for row in names.values() if row["state"] != "ok")


def test_no_secret_is_printed(llmprune: Llmprune, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("HOME", str(tmp_path / "anna"))
    monkeypatch.setattr(doctor.constants, "HF_HUB_CACHE", str(tmp_path / "anna" / "hub"))
    monkeypatch.setenv("LLMPRUNE_STORAGE", "postgresql://me:hush@host/trials?sslpassword=hush")
    for arguments in (("doctor",), ("doctor", "--json")):
        shown = llmprune(*arguments)
        assert shown.code == 0 and "there is one" in shown.out and "~/hub" in shown.out
        assert "postgresql://me:***@host/trials" in shown.out
        for secret in (SECRET, SECRET[3:20], "hush", "anna"):
            assert secret not in shown.out + shown.err
    monkeypatch.setattr(doctor, "get_token", lambda: None)
    monkeypatch.delenv("LLMPRUNE_STORAGE")
    token = found("Hub token")
    assert (token.state, token.todo) == ("note", "for gated models and for llmprune push: hf auth login")
    assert found("trials").told == "a file in each run (LLMPRUNE_STORAGE is not set)"


def test_a_package_that_is_missing_or_too_old_is_a_problem(llmprune: Llmprune, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "requires", lambda _: ["optuna<6,>=999", "torch>=2", 'optuna-x>=1; extra == "dev"'])
    shown = llmprune("doctor")
    assert shown.code == 2 and "optuna<6,>=999 is needed; pip install 'optuna<6,>=999'" in shown.out
    assert "problem" in shown.out
    assert llmprune("doctor", "--json").code == 2 and not llmprune("doctor", "--json").json["usable"]
    monkeypatch.setattr(doctor, "PACKAGES", ("not-there-at-all",))
    assert found("not-there-at-all") == Finding(
        "not-there-at-all", "problem", "not installed", "pip install 'not-there-at-all'"
    )


def test_what_llmprune_asks_for_is_held_to() -> None:
    asked = doctor.requires("llmprune") or []
    for name in doctor.PACKAGES:
        assert any(text.startswith((f"{name}>", f"{name}<")) for text in asked), name


def test_a_device_that_cannot_compute_is_a_problem(llmprune: Llmprune, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("no kernel image is available\nsecond line")

    monkeypatch.setattr(doctor.torch, "ones", broken)
    shown = llmprune("doctor")
    assert shown.code == 2 and "cannot compute: no kernel image is available; install torch anew" in shown.out
    assert "second line" not in shown.out
    monkeypatch.setattr(doctor.torch, "ones", lambda *shape, **_: torch.zeros(*shape))
    assert "a product of ones is wrong" in found("torch on cpu").told


def test_gpus_are_listed_with_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(doctor.torch.cuda, "get_device_name", lambda device: "A card")
    monkeypatch.setattr(doctor, "device_memory", lambda device: Memory(24 * 10**9, 23 * 10**9))
    monkeypatch.setattr(doctor, "_broken", lambda device: "it is hot" if device.index == 1 else None)
    assert found("torch on cuda:0") == Finding("torch on cuda:0", "ok", "A card, 23.0 GB of 24.0 GB free")
    assert found("torch on cuda:1").state == "problem" and not examined(examine())["usable"]


def test_a_gpu_that_torch_does_not_see_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "version").write_text("NVRM")
    monkeypatch.setattr(doctor, "NVIDIA", tmp_path / "version")
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: False)
    assert found("torch on cpu").state == "note" and "does not see" in found("torch on cpu").told


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ModelError("llama.cpp is needed and not there (x); pip install 'llmprune[llamacpp]'"), "pip install"),
        (OSError("libgomp.so.1: cannot open shared object file"), "does not load: libgomp.so.1"),
    ],
)
def test_without_llamacpp_it_says_what_to_do(
    error: Exception, told: str, llmprune: Llmprune, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise error

    monkeypatch.setattr(doctor, "library", missing)
    shown = llmprune("doctor")
    # The extra in square brackets is no markup.
    assert shown.code == 0 and told in shown.out and ("llmprune[llamacpp]" in shown.out) == ("[" in str(error))
    assert found("llama.cpp").state == "note"


def test_more_threads_than_processors_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    monkeypatch.setattr(doctor.torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(doctor, "processors", lambda: 2)
    one = found("threads")
    assert (one.state, one.told) == ("note", "torch 8, OMP_NUM_THREADS 8, 2 processors for this process")
    assert one.todo is not None and "OMP_NUM_THREADS=2" in one.todo


def test_a_limit_and_little_memory_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "device_memory", lambda _: Memory(4 * 10**9, 10**9, limited=True))
    one = found("memory")
    assert one.state == "note" and one.told == "1.0 GB of 4.0 GB free (the limit of this process's control group)"


def test_disks_that_are_full_or_cannot_be_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "free_disk", lambda _: 10**9)
    assert (found("disk here").state, found("disk here").told[:11]) == ("note", "1.0 GB free")
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    assert [found(f"disk{name}").state for name in (" here", ", temporary", ", HF cache")] == [
        "note",
        "problem",
        "note",
    ]

    def nowhere() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    assert found("disk, temporary").told == "No usable temporary directory found"


def test_offline_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in doctor.OFFLINE:
        monkeypatch.delenv(name, raising=False)
    assert found("network").state == "ok"
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "yes")
    assert found("network").state == "note" and "HF_DATASETS_OFFLINE keeps to what is cached" in found("network").told


def test_it_does_not_reach_for_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection"))
    examine()
