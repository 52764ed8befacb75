"""Too few calibration tokens for what is refitted on them are told of, once, with the number that would do."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import tiny_recipe

from llmprune.blocks import statistics
from llmprune.blocks.statistics import few_tokens_warning
from llmprune.choices.architecture import ParentShape
from llmprune.pipeline.prepare import stock_up
from llmprune.pipeline.run import Run


def test_four_tokens_an_input_of_the_widest_projection_are_enough() -> None:
    shape = ParentShape(layers=2, hidden_size=64, kv_groups=2, queries_per_group=2, head_dim=32, ffn_width=3_000)
    assert few_tokens_warning(shape, 12_000) is None
    said = few_tokens_warning(shape, 11_999)
    assert said is not None and "11,999" in said and "3,000 inputs" in said and "data.calibration_tokens=12000" in said


def test_a_run_says_it_when_it_builds_its_library_and_not_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "TOKENS_AN_INPUT", 16)
    recipe = tiny_recipe(tmp_path)
    for told in (1, 0):
        said: list[str] = []
        run = Run.start(tmp_path / "run", recipe)
        run.say = said.append
        assert stock_up(run).library.hash
        assert len(said) == told and all("data.calibration_tokens=512" in line for line in said)
