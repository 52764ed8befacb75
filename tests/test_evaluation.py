"""Checkpoints judged beside their parent: who the parent is, what is stored, and what goes on after a stop."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from closeness import tolerance
from conftest import Finished, Llmprune
from tasks_tiny import own_tasks_of, write_tasks
from tiny import contents
from transformers import AutoModelForCausalLM

from llmprune.core.errors import ModelError
from llmprune.core.recipe_inputs import ModelRecipe
from llmprune.data.store import load_token_splits
from llmprune.evaluation import evaluate as evaluation
from llmprune.evaluation.subjects import find_subjects, identity_of
from llmprune.evaluation.tasks import open_tasks, run_task
from llmprune.measure.quality.significance import mcnemar
from llmprune.models.loading import load_model, stored_dtype
from llmprune.pipeline.run_directory import RunDirectory

QUICK = ("--prompt-tokens", "8", "--generated-tokens", "4", "--repeats", "1", "--device", "cpu")
NAMES = ("tiny_choice", "tiny_text")


@pytest.fixture(autouse=True)
def own_data_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="module")
def task_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def run(copied: Path, finished_run: Finished) -> Path:
    """A run with an export."""
    shutil.copytree(finished_run.export, copied / "export")
    return copied


def options(task_files: Path) -> list[object]:
    return ["--tasks", ",".join(NAMES), "--include-path", task_files, "--limit", 12, *QUICK]


def test_a_run_is_its_export_beside_its_parent(
    llmprune: Llmprune,
    run: Path,
    finished_run: Finished,
    task_files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "results.json"
    # lm-eval asks git where it is; outside of a checkout that is no noise of ours either.
    monkeypatch.chdir(tmp_path)
    result = llmprune("eval", run, *options(task_files), "--output", output, "--json", "--quiet")
    assert (result.code, result.err) == (0, "")
    parent, child = result.json["models"]
    assert (parent["role"], child["role"]) == ("parent", "child")
    assert parent["model"] == finished_run.recipe.model.path and parent["hash"] is None and parent["id"] is None
    metadata = json.loads((run / "export" / "llmprune.json").read_text())
    assert (child["id"], child["hash"]) == (metadata["id"], metadata["hash"])
    assert child["params"] == metadata["proof"]["params"] < parent["params"]
    assert parent["speed"]["decode_speedup"]["median"] == 1.0
    rows = {(row["task"], row["metric"]): row for row in result.json["comparisons"]}
    assert rows.keys() == {
        *(("text", "nats_per_token"), ("tiny_choice", "acc"), ("tiny_choice", "acc_norm")),
        *(("tiny_text", "word_perplexity"), ("tiny_text", "bits_per_byte")),
    }
    for (task, metric), row in rows.items():
        figures = [
            model["quality"][metric] if task == "text" else model["tasks"][task]["metrics"][metric]["value"]
            for model in (parent, child)
        ]
        rounding = tolerance(max(map(abs, figures)), dtype=torch.float64)
        assert row["difference"] == pytest.approx(figures[1] - figures[0], abs=rounding), "of the very figures above it"
        assert row["low"] <= row["difference"] <= row["high"] and 0 < row["p"] <= 1
        assert row["test"] == ("mcnemar" if task == "tiny_choice" else "bootstrap")
        assert row["model"] == child["model"] and row["samples"] == (12 if task != "text" else row["samples"])
    for file in (output, run / "evaluations" / "evaluation.json"):
        assert json.loads(file.read_text()) == result.json
    travels = (run / "export" / "evaluation.json").read_text()
    assert str(run.parent) not in travels and str(Path(parent["model"]).parent) not in travels
    names = [Path(model["model"]).name for model in result.json["models"]]
    assert [model["model"] for model in json.loads(travels)["models"]] == names
    assert [row["p"] for row in json.loads(travels)["comparisons"]] == [row["p"] for row in result.json["comparisons"]]
    printed = llmprune("eval", run, *options(task_files))
    assert "tiny_choice acc" in printed.out and "mixture" in printed.out and "McNemar" in printed.out
    assert "results were in" in printed.err


def test_tests_are_of_the_samples(run: Path, finished_run: Finished, task_files: Path, llmprune: Llmprune) -> None:
    """McNemar's p and the text's difference, from scores that are taken here again."""
    result = llmprune("eval", run, *options(task_files), "--json", "--quiet").json
    tasks = open_tasks(["tiny_choice"], limit=12, include_path=task_files)
    answers = []
    for path in (finished_run.recipe.model.path, str(run / "export")):
        model, tokenizer = load_model(ModelRecipe(path=path, device="cpu"))
        answers.append(run_task(model, tokenizer, tasks, "tiny_choice")["tiny_choice"].scores["acc"])
    (row,) = (row for row in result["comparisons"] if row["metric"] == "acc")
    assert row["p"] == mcnemar(*answers).p and row["difference"] == float(np.subtract(*answers[::-1]).mean())
    windows = load_token_splits(RunDirectory(run).tokens)["test"]
    (row,) = (row for row in result["comparisons"] if row["task"] == "text")
    assert row["samples"] == sum(len(source.windows) for source in windows.sources.values())


def test_a_stopped_evaluation_goes_on(
    llmprune: Llmprune, run: Path, task_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the parent's second task; the second time, only what is missing is asked."""
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    asked: list[str] = []

    def watched(stop_at: int | None) -> Callable[..., Any]:
        def run_and_note(model: Any, tokenizer: Any, tasks: Any, name: str, **rest: Any) -> Any:
            asked.append(f"{name} of {model.config.model_type}")
            if len(asked) == stop_at:
                raise KeyboardInterrupt
            return run_task(model, tokenizer, tasks, name, **rest)

        return run_and_note

    monkeypatch.setattr(evaluation, "run_task", watched(2))
    stopped = llmprune("eval", run, *options(task_files), "--quiet")
    assert stopped.code == 130 and asked == ["tiny_choice of llama", "tiny_text of llama"]
    asked.clear()
    monkeypatch.setattr(evaluation, "run_task", watched(None))
    resumed = llmprune("eval", run, *options(task_files), "--json", "--quiet").json
    assert len(asked) == 3 and "tiny_choice of llama" not in asked
    asked.clear()
    uninterrupted = llmprune("eval", whole, *options(task_files), "--json", "--quiet").json
    assert len(asked) == 4
    for one, other in zip(resumed["models"], uninterrupted["models"], strict=True):
        assert {key: one[key] for key in ("params", "quality", "tasks")} == {
            key: other[key] for key in ("params", "quality", "tasks")
        }
    asked.clear()
    monkeypatch.setattr("llmprune.evaluation.subjects.load_model", lambda *_: pytest.fail("all is known"))
    assert llmprune("eval", run, *options(task_files), "--json", "--quiet").json["models"] == resumed["models"]
    assert not asked


def test_other_weights_and_other_questions_are_asked_anew(
    llmprune: Llmprune, run: Path, task_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def noted(model: Any, tokenizer: Any, tasks: Any, name: str, **rest: Any) -> Any:
        asked.append(name)
        return run_task(model, tokenizer, tasks, name, **rest)

    monkeypatch.setattr(evaluation, "run_task", noted)
    base = ["eval", run, "--tasks", "tiny_choice", "--include-path", task_files, *QUICK, "--quiet"]
    for added, expected in (([], 2), ([], 0), (["--limit", 5], 2), (["--num-fewshot", 1], 2), (["--task-batch", 4], 2)):
        asked.clear()
        assert llmprune(*base, *added).code == 0
        assert len(asked) == expected, added
    model, _ = load_model(ModelRecipe(path=str(run / "export"), device="cpu"))
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    model.save_pretrained(run / "export")
    asked.clear()
    assert llmprune(*base).code == 0
    assert len(asked) == 1, "the child's; the parent is as it was"


def test_a_child_without_a_known_parent_is_not_compared(
    llmprune: Llmprune, finished_run: Finished, tmp_path: Path, task_files: Path
) -> None:
    child = Path(shutil.copytree(finished_run.export, tmp_path / "child"))
    alone = llmprune("eval", child, "--data", finished_run.path, *QUICK)
    assert alone.code == 0 and "was pruned from parent" in alone.err and "No parent is known" in alone.out
    stored = json.loads((child / "evaluation.json").read_text())
    assert [model["role"] for model in stored["models"]] == ["model"] and stored["comparisons"] == []
    parent = finished_run.recipe.model.path
    two = llmprune(
        "eval", child, parent, child, "--parent", parent, "--data", finished_run.path, *QUICK, "--json", "--quiet"
    )
    assert [model["role"] for model in two.json["models"]] == ["parent", "child"], "each once"
    assert not (Path(parent) / "evaluation.json").exists()
    names = [row["task"] for row in two.json["comparisons"]]
    assert names == ["text"]


def test_without_text_there_are_tasks(
    llmprune: Llmprune, finished_run: Finished, task_files: Path, tmp_path: Path
) -> None:
    parent = Path(shutil.copytree(finished_run.recipe.model.path, tmp_path / "parent"))
    result = llmprune("eval", parent, "--output", tmp_path / "o.json", *options(task_files), "--json")
    assert result.code == 0 and "no perplexity" in result.err
    (model,) = result.json["models"]
    assert model["quality"] is None and set(model["tasks"]) == set(NAMES)
    assert (tmp_path / "o.evaluations").is_dir() and not (parent / "evaluations").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--tasks nothing_such", "no task is called 'nothing_such'"),
        ("--tasks ,", "--tasks must name a task"),
        ("--tasks tiny_choice --limit 0", "--limit must be at least 1"),
        ("--parent {tmp}/gone", "is not a directory with a config.json"),
        ("--output {tmp}", "--output must be a file"),
        ("{tmp}/gone", "is not a directory with a config.json"),
        ("{bare}", "has exported no checkpoint yet; run llmprune export"),
        ("{half}", "models side by side must be in one dtype"),
    ],
)
def test_an_error_of_the_user_comes_before_any_weights(
    arguments: str,
    message: str,
    llmprune: Llmprune,
    run: Path,
    finished_run: Finished,
    task_files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(run / "recipe.yaml", bare)
    half = Path(shutil.copytree(finished_run.recipe.model.path, tmp_path / "half"))
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    monkeypatch.setattr("llmprune.evaluation.subjects.load_model", lambda *_: pytest.fail("too late"))
    before = contents(tmp_path)
    places = {"tmp": tmp_path, "bare": bare, "half": half}
    filled = [part.format(**places) for part in arguments.split()]
    with own_tasks_of("piqa"):
        result = llmprune("eval", run, *filled, "--include-path", task_files, *QUICK, "--quiet")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: ") and result.err.count("\n") == 1 and message in result.err, result.err
    assert contents(tmp_path) == before


def test_a_damaged_result_is_not_believed(llmprune: Llmprune, run: Path) -> None:
    assert llmprune("eval", run, *QUICK, "--quiet").code == 0
    (file, *_) = sorted((run / "evaluations").glob("params-*.json"))
    file.write_text(json.dumps({"key": {}, "result": 3}))
    result = llmprune("eval", run, *QUICK, "--quiet")
    assert result.code == 2 and "is damaged; delete it and start again" in result.err


def test_the_dtype_is_the_checkpoint_s_own(finished_run: Finished, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished_run.recipe.model.path, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    assert stored_dtype(ModelRecipe(path=str(tmp_path / "half"))) == "bfloat16"
    (subject,) = find_subjects([str(tmp_path / "half")], None, device="cpu", dtype="auto", say=lambda line: None)
    assert subject.recipe.dtype == "bfloat16"
    config = tmp_path / "half" / "config.json"
    config.write_text(json.dumps({key: v for key, v in json.loads(config.read_text()).items() if key != "dtype"}))
    with pytest.raises(ModelError, match=r"does not say its dtype in config.json; name one with --dtype"):
        stored_dtype(ModelRecipe(path=str(tmp_path / "half")))


def test_what_is_written_beside_a_model_is_no_part_of_it(finished_run: Finished, tmp_path: Path) -> None:
    child = Path(shutil.copytree(finished_run.export, tmp_path / "child"))
    recipe = ModelRecipe(path=str(child))
    first = identity_of(recipe)
    (child / "evaluation.json").write_text("{}")
    (child / "README.md").write_text("a card")
    assert identity_of(recipe) == first
    (child / "modeling_pruned.py").write_text("changed")
    assert identity_of(recipe) != first


def test_a_stranger_s_checkpoint_fetches_nothing(
    finished_run: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub model that it names as its parent is not in the cache: said, and left alone."""
    child = Path(shutil.copytree(finished_run.export, tmp_path / "child"))
    metadata = json.loads((child / "llmprune.json").read_text())
    metadata["recipe"]["model"] |= {"path": "someone/model", "trust_remote_code": True}
    (child / "llmprune.json").write_text(json.dumps(metadata))
    asked: list[dict[str, Any]] = []

    def noted(*_: Any, **options: Any) -> str:
        asked.append(options)
        raise OSError("not cached")

    monkeypatch.setattr("llmprune.evaluation.subjects.cached_file", noted)
    said: list[str] = []
    (subject,) = find_subjects([str(child)], None, device="cpu", dtype="auto", say=said.append)
    assert subject.role == "model" and "someone/model, which is not a Hub model in the cache" in said[0]
    assert [options["local_files_only"] for options in asked] == [True]
