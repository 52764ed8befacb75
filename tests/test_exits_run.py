"""`llmprune exits` on a tiny run, from the command line to a checkpoint that leaves early in a fresh process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Llmprune
from transformers import AutoModelForCausalLM

from llmprune.core.errors import ExportError, PushError, RecipeError
from llmprune.core.files import read_json
from llmprune.core.recipe_exits import CRITERIA, CriterionName
from llmprune.core.recipe_text import apply_overrides, parse_recipe
from llmprune.exits.record import ExitsFound
from llmprune.models.modeling_pruned import Criterion, ExitRules, ExitsCache
from llmprune.pipeline.exits import check_exits_recipe
from llmprune.pipeline.run import Run
from llmprune.pipeline.run_directory import RunDirectory
from llmprune.publish.contents import read_contents
from llmprune.report.facts import gather
from llmprune.report.page import page

QUICK = ("exits.minutes=0.02", "exits.trials=60", "exits.repeats=1", "exits.size=2")


def test_exits_of_a_run_are_found_picked_and_exported(copied: Path, tmp_path: Path, llmprune: Llmprune) -> None:
    to = tmp_path / "exits"
    said = llmprune("exits", copied, *QUICK, "--json", "-q")
    assert said.code == 0, said.err
    found = ExitsFound.from_json({key: value for key, value in said.json.items() if key != "exported"})
    assert said.json["exported"] is None and len(found.records) == 2 and len(found.trunks) == 2
    assert found.trunks[0].id == found.parent and found.trunks[0].layers == (1, 2)
    for record in found.records:
        assert record.test is not None and record.test.nats_lost == record.test.nats_lost
        assert sum(record.depths) == pytest.approx(1)
        assert record.estimated.rules == record.rules
    record = next((one for one in found.records if one.mode == "early"), found.records[0])
    # Found for the same inputs, nothing is made again; a table, where no JSON is asked for.
    before = (copied / "exits.json").stat().st_mtime_ns
    said = llmprune("exits", copied, *QUICK, "--pick", record.id, "--to", to)
    assert said.code == 0, said.err
    assert (copied / "exits.json").stat().st_mtime_ns == before
    assert f"exported {record.id}" in said.out and "estimated, " in said.out and record.id in said.out
    loaded: Any = AutoModelForCausalLM.from_pretrained(to)
    assert ExitRules.of(loaded.config) == ExitRules.from_json(record.rules)
    cache, ids = ExitsCache(loaded), torch.tensor([[5, 6, 7]])
    out = loaded.generate(
        ids, max_new_tokens=6, do_sample=False, eos_token_id=None, exits="early", past_key_values=cache
    )
    assert out.shape == (1, 9) and len(cache.left_at) == 5
    metadata = read_json(to / "llmprune.json")
    assert metadata["exits"]["id"] == record.id and metadata["proof"]["stock_class"] is False
    assert str(copied.parent) not in json.dumps(metadata)
    with pytest.raises(PushError, match="holds a model with exits"):
        read_contents(to)
    for command in (("prove", to, "--data", copied), ("compare", to)):
        refused = llmprune(*command, "-q")
        assert refused.code == 2 and "holds a model with exits" in " ".join(refused.err.split()), refused.err
    said = llmprune("convert", to, "--format", "gguf", "--to", tmp_path / "gguf")
    assert said.code == 2 and "gguf cannot hold a model with exits" in said.err


def test_a_pick_that_no_rules_hold_is_refused_with_the_nearest(
    copied: Path, tmp_path: Path, llmprune: Llmprune
) -> None:
    assert llmprune("exits", copied, *QUICK, "exits.trunks=1", "-q").code == 0
    for pick, said in (
        ("worst_token_speedup>=900", "no child on the front holds"),
        ("bytes<=5", "they do not change bytes"),
    ):
        refused = llmprune("exits", copied, *QUICK, "exits.trunks=1", "--pick", pick, "--to", tmp_path / "x", "-q")
        assert refused.code == 2 and said in " ".join(refused.err.split()), refused.err
    limited = llmprune("exits", copied, *QUICK, "exits.trunks=1", "exits.budgets=[decode_speedup>=900]", "-q")
    assert limited.code == 2 and "exits.budgets decode_speedup>=900" in " ".join(limited.err.split())
    shown = page(gather(Run(RunDirectory(copied), RunDirectory(copied).stored_recipe())))
    assert "Where tokens leave" in shown


@pytest.mark.parametrize(
    ("override", "error", "said"),
    [
        ("workload.engine=llamacpp", RecipeError, "workload.engine=llamacpp"),
        ("workload.batch=2", RecipeError, "workload.batch=1, got 2"),
        ("deploy.formats=[hf,gguf]", ExportError, "gguf cannot hold"),
        ("exits.budgets=[bytes<=5]", RecipeError, "got bytes<=5"),
    ],
)
def test_what_exits_cannot_do_is_refused_before_anything_is_loaded(override: str, error: Any, said: str) -> None:
    sources = [{"name": "a", "path": "a.txt"}]
    data = apply_overrides({"model": {"path": "nowhere"}, "data": {"sources": sources}}, [override])
    with pytest.raises(error, match=said):
        check_exits_recipe(parse_recipe(data, origin="here"))


def test_criteria_have_the_same_names_in_recipes_and_configs() -> None:
    assert CriterionName == Criterion and len(CRITERIA) == 5
