"""Files are whole or absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmprune.core.errors import RunDirectoryError
from llmprune.core.files import atomic_path, read_json, write_json


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"kept": "é"})
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, float("nan"))
    assert read_json(path) == {"kept": "é"}
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunDirectoryError, match=r"cannot write .*a\.json: No space left on device"):
        write_json(tmp_path / "a.json", [])
    assert not list(tmp_path.iterdir())


def test_safetensors_own_write_errors_are_named(tmp_path: Path) -> None:
    cannot_write = pytest.raises(RunDirectoryError, match=r"cannot write .*t\.safetensors: .*os error")
    with cannot_write, atomic_path(tmp_path / "t.safetensors"):
        save_file({"t": torch.zeros(1)}, tmp_path / "missing" / "t")


def test_corrupt_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'{"a": \xff')
    for name, message in (("a.json", r"a\.json is not JSON .*delete it"), ("b.json", r"cannot read .*b\.json")):
        with pytest.raises(RunDirectoryError, match=message):
            read_json(tmp_path / name)
