"""The lower bounds that are tested are those that are declared."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import oldest
import pytest


def test_every_dependency_is_held_to_its_lower_bound(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["oldest.py", "torch=9.9"])
    oldest.main()
    lines = capsys.readouterr().out.split()
    declared = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["dependencies"]
    assert len(lines) == len(declared) and "torch==9.9" in lines
    for line in lines:
        name, _, bound = line.partition("==")
        assert name == "torch" or any(d.startswith(f"{name}>={bound}") for d in declared), line


def test_a_dependency_without_a_lower_bound_is_named() -> None:
    with pytest.raises(SystemExit, match="got 'torch<3'"):
        oldest.lower_bounds(["torch<3"])
