"""Checkpoints side by side: what does not compare is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import CASES, Case, tiny_model
from tiny import tiny_tokenizer

from llmprune.core.errors import DataError, ModelError, RecipeError
from llmprune.core.progress import silent
from llmprune.core.recipe import WorkloadRecipe
from llmprune.core.recipe_inputs import ModelRecipe
from llmprune.core.recipe_text import parse_recipe
from llmprune.evaluation.bench import bench
from llmprune.models.parent import check_lengths, make_parent

WORKLOAD = WorkloadRecipe(prompt_tokens=4, generated_tokens=2, repeats=1)


def saved(directory: Path, vocab_size: int) -> ModelRecipe:
    tiny_model(Case("llama", "small", {**CASES[0].values, "vocab_size": vocab_size})).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return ModelRecipe(path=str(directory), device="cpu")


def test_models_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    large, small = saved(tmp_path / "large", 300), saved(tmp_path / "small", 200)
    with pytest.raises(DataError, match=r"small has a vocabulary of 200 and would be given token id 299"):
        bench([large, small], WORKLOAD, silent)
    assert len(bench([small], WORKLOAD, silent)["models"]) == 1


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (
            "data",
            {"unseen": [{"name": "b", "path": "b.txt"}], "unseen_seq_len": 129},
            r"data.unseen_seq_len must be at most .* 128 positions; got 129",
        ),
        ("data", {"seq_len": 129}, r"data.seq_len must be at most .* 128 positions; got 129"),
        ("workload", {"prompt_tokens": 128, "generated_tokens": 2}, r"workload.prompt_tokens \+ .* got 130"),
    ],
)
def test_lengths_beyond_the_positions_are_refused(section: str, values: dict[str, int], message: str) -> None:
    parent = make_parent(tiny_model(CASES[0]), None, source="tiny")
    data = {
        "model": {"path": "tiny"},
        "data": {"sources": [{"name": "a", "path": "a.txt"}], "seq_len": 64},
        "workload": {"prompt_tokens": 8, "generated_tokens": 2},
    }
    check_lengths(parent, parse_recipe(data, origin="test"))
    data[section] = {**data[section], **values}
    with pytest.raises(RecipeError, match=message):
        check_lengths(parent, parse_recipe(data, origin="test"))


def test_models_are_timed_in_llamacpp(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", 300)
    timed = WORKLOAD.model_copy(update={"engine": "llamacpp"})
    result = bench([model, model], timed, silent, gguf_type="f32")
    assert result["measured_on"]["workload"]["gguf_type"] == "f32"
    assert all(row["decode_tokens_per_s"]["median"] > 0 for row in result["models"])
    opt = next(case for case in CASES if case.model_type == "opt")
    tiny_model(opt).save_pretrained(tmp_path / "opt")
    with pytest.raises(ModelError, match=r"llama\.cpp cannot run .*opt: gguf holds the families .*; got opt"):
        bench([ModelRecipe(path=str(tmp_path / "opt"), device="cpu")], timed, silent)
