"""Tasks of lm-eval: our route gives the figures of its own command, and what cannot be asked is refused early."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import Finished, Llmprune
from tasks_tiny import TASKS, own_tasks_of, write_tasks

from llmprune.core.errors import TaskError
from llmprune.core.recipe_inputs import ModelRecipe
from llmprune.data.bos import opening_with_bos
from llmprune.evaluation.tasks import TaskSet, open_tasks, run_task
from llmprune.models.loading import load_model

LIMIT = 14


@pytest.fixture(autouse=True)
def own_data_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="module")
def task_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}> {% endif %}"
# Runs one command after another. Reading lm-eval's own 15,000 tasks takes ten seconds, and none of them is asked for.
OWN_COMMAND = """
import json, sys
from lm_eval import tasks
from lm_eval.__main__ import cli_evaluate

class TaskManager(tasks.TaskManager):
    def __init__(self, **settings):
        super().__init__(include_defaults=False, **settings)

tasks.TaskManager = TaskManager
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["lm_eval", *arguments]
    cli_evaluate()
"""


@dataclass(frozen=True)
class Route:
    """A checkpoint, how it is asked, and what `lm_eval` writes of it then."""

    child: Path
    fewshot: int | None
    chat: bool
    found: Any


@pytest.fixture(scope="module")
def routes(finished_run: Finished, task_files: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Route]:
    """By lm-eval's own command, in a process of its own that trusts the checkpoint's code."""
    root = tmp_path_factory.mktemp("own command")
    asked: dict[str, tuple[int | None, bool]] = {"plain": (None, False), "chat": (2, True)}
    commands = []
    for name, (fewshot, chat) in asked.items():
        child = Path(shutil.copytree(finished_run.export, root / name / "child"))
        assert (child / "modeling_pruned.py").is_file(), "a child that needs its own code elsewhere"
        command = ["run", "--model", "hf", "--model_args", f"pretrained={child},trust_remote_code=True"]
        command += ["--tasks", ",".join(TASKS), "--include_path", str(task_files), "--limit", str(LIMIT)]
        command += ["--device", "cpu", "--output_path", str(root / name / "out"), "--log_samples"]
        command += [] if fewshot is None else ["--num_fewshot", str(fewshot)]
        if chat:
            (child / "chat_template.jinja").write_text(CHAT)
            command.append("--apply_chat_template")
        commands.append(command)
    finished = subprocess.run(
        [sys.executable, "-c", OWN_COMMAND, json.dumps(commands)],
        env={**os.environ, "HF_MODULES_CACHE": str(root / "modules"), "HF_DATASETS_CACHE": str(root / "datasets")},
        capture_output=True,
        text=True,
        check=False,
        cwd=root,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    made = {}
    for name, (fewshot, chat) in asked.items():
        (file,) = (root / name / "out").rglob("results_*.json")
        made[name] = Route(root / name / "child", fewshot, chat, json.loads(file.read_text()))
    return made


@pytest.mark.parametrize("name", ["plain", "chat"])
def test_both_routes_give_the_same_figures(
    name: str, routes: dict[str, Route], llmprune: Llmprune, finished_run: Finished, task_files: Path
) -> None:
    child, fewshot, chat, theirs = astuple(routes[name])
    asked = [*("--tasks", ",".join(TASKS), "--include-path", task_files, "--limit", LIMIT)]
    asked += [] if fewshot is None else ["--num-fewshot", fewshot]
    asked += ["--apply-chat-template"] if chat else []
    quick = ("--prompt-tokens", 8, "--generated-tokens", 4, "--repeats", 1, "--device", "cpu")
    result = llmprune("eval", child, *asked, *quick, "--data", finished_run.path, "--json", "--quiet")
    assert (result.code, result.err) == (0, "")
    (ours,) = (model["tasks"] for model in result.json["models"])
    assert ours.keys() == theirs["results"].keys() == TASKS.keys()
    figures = 0
    for task, found in ours.items():
        expected = {key: value for key, value in theirs["results"][task].items() if "," in key}
        for label, figure in found["metrics"].items():
            metric, _, used = label.partition(",")
            assert figure["value"] == expected.pop(f"{metric},{used or 'none'}")
            stderr = expected.pop(f"{metric}_stderr,{used or 'none'}")
            assert figure["stderr"] == (None if stderr == "N/A" else stderr)
            figures += 1
        assert not expected, "a figure of theirs that is not among ours"
        assert found["samples"] == theirs["n-samples"][task]["effective"] == LIMIT
        assert found["num_fewshot"] == theirs["n-shot"][task]
        assert found["version"] == theirs["versions"][task]
        assert (found["bos"], found["chat_template"]) == (False, chat)
    assert figures == 5
    values = {figure["value"] for task in ours.values() for figure in task["metrics"].values()}
    assert len(values) > 3 and 0 < ours["tiny_choice"]["metrics"]["acc"]["value"] < 1, "figures that can differ"


@pytest.fixture(scope="module")
def opened(task_files: Path) -> TaskSet:
    return open_tasks(list(TASKS), limit=LIMIT, include_path=task_files)


def test_samples_amount_to_the_figures(finished_run: Finished, opened: TaskSet) -> None:
    model, tokenizer = load_model(ModelRecipe(path=str(finished_run.export), device="cpu"))
    seen: list[tuple[int, int]] = []
    choice = run_task(model, tokenizer, opened, "tiny_choice", progress=lambda done, total: seen.append((done, total)))[
        "tiny_choice"
    ]
    for metric in ("acc", "acc_norm"):
        assert set(choice.scores[metric]) <= {0.0, 1.0} and len(choice.scores[metric]) == LIMIT
        assert sum(choice.scores[metric]) / LIMIT == pytest.approx(choice.metrics[metric]["value"])
    assert len(choice.documents) == LIMIT == len(set(choice.documents))
    assert seen[-1] == (3 * LIMIT, 3 * LIMIT), "a request an answer"
    text = run_task(model, tokenizer, opened, "tiny_text")["tiny_text"]
    sums = [sum(column) for column in zip(*text.scores["word_perplexity"], strict=True)]
    assert text.metrics["word_perplexity"]["value"] == pytest.approx(math.exp(-sums[0] / sums[1]))
    assert opened.aggregations["tiny_text"] == {
        "word_perplexity": "weighted_perplexity",
        "bits_per_byte": "bits_per_byte",
    }
    again = type(text).from_json(json.loads(json.dumps(text.to_json())))
    assert again.scores == text.scores and again.metrics == text.metrics


def test_bos_opens_prompts_where_the_rule_says_so(finished_run: Finished, opened: TaskSet) -> None:
    model, tokenizer = load_model(ModelRecipe(path=str(finished_run.export), device="cpu"))
    adding = opening_with_bos(tokenizer, True)

    def nats(tokenizer: Any, bos: bool | None) -> tuple[Any, bool]:
        found = run_task(model, tokenizer, opened, "tiny_generate", bos=bos)["tiny_generate"]
        return prompts.pop(), found.bos

    prompts: list[Any] = []
    generate = type(model).generate

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        prompts[:] = [kwargs["input_ids"][0].tolist()]
        return generate(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "generate", noted)
        plain, opened_with = nats(tokenizer, None), nats(tokenizer, True)
        assert (plain[1], opened_with[1]) == (False, True) and opened_with[0] == [0, *plain[0]]
        assert nats(adding, None) == opened_with and nats(adding, False) == plain


def test_a_chat_needs_a_template(finished_run: Finished, task_files: Path) -> None:
    model, tokenizer = load_model(ModelRecipe(path=str(finished_run.export), device="cpu"))
    chat = open_tasks(["tiny_choice"], limit=2, include_path=task_files, chat_template=True)
    with pytest.raises(TaskError, match=r"--apply-chat-template renders .* has none; leave it out"):
        run_task(model, tokenizer, chat, "tiny_choice")


def test_a_group_is_asked_as_one_and_brings_its_tasks(finished_run: Finished, tmp_path: Path) -> None:
    files = write_tasks(tmp_path / "tasks")
    (files / "tiny_group.yaml").write_text(
        "group: tiny_group\ntask: [tiny_choice]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    model, tokenizer = load_model(ModelRecipe(path=str(finished_run.export), device="cpu"))
    with own_tasks_of("piqa"):
        tasks = open_tasks(["tiny_group"], limit=LIMIT, include_path=files)
    assert tasks.identities.keys() == {"tiny_group"} and tasks.aggregations.keys() == {"tiny_choice"}
    found = run_task(model, tokenizer, tasks, "tiny_group")
    assert found.keys() == {"tiny_group", "tiny_choice"}
    assert found["tiny_group"].metrics["acc"]["value"] == found["tiny_choice"].metrics["acc"]["value"]
    assert not found["tiny_group"].scores and len(found["tiny_choice"].scores["acc"]) == LIMIT


def test_an_identity_tells_of_settings_and_documents_but_not_of_places(task_files: Path, tmp_path: Path) -> None:
    def identity(directory: Path, **changes: Any) -> str:
        options = {"limit": 5, "include_path": directory, **changes}
        return open_tasks(["tiny_choice"], **options).identities["tiny_choice"]

    first = identity(task_files)
    assert identity(task_files, limit=6) != first
    assert identity(task_files, num_fewshot=1) != first
    chats = {identity(task_files, chat_template=True, multiturn=multiturn) for multiturn in (None, True, False)}
    assert len(chats) == 2 and first not in chats
    elsewhere = write_tasks(tmp_path / "elsewhere")
    file = elsewhere / "tiny_choice.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[4]["answer"] = (rows[4]["answer"] + 1) % 3
    changed = write_tasks(tmp_path / "changed")
    (changed / "tiny_choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert identity(changed) != identity(elsewhere)
    assert identity(changed, limit=4) == identity(changed, limit=4)


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["tiny_choise"], {}, r"no task is called 'tiny_choise'; did you mean tiny_choice"),
        (["tiny_choice"], {"limit": 0}, r"--limit must be at least 1, got 0"),
        (["tiny_choice"], {"num_fewshot": -1}, r"--num-fewshot must be at least 0, got -1"),
        (["tiny_choice"], {"multiturn": True}, r"--fewshot-as-multiturn .* goes with --apply-chat-template only"),
        (["lost"], {}, r"task lost cannot be read: .*lost.jsonl"),
        (["odd"], {}, r"task odd cannot be read: "),
        (["piqa"], {"include_path": None}, r"task piqa cannot be read: .*Its data must be cached"),
        (["tiny_choice"], {"include_path": Path("nowhere")}, r"--include-path must be a directory .* got nowhere"),
    ],
)
def test_what_cannot_be_asked_is_said_before_a_model_is_loaded(
    names: list[str], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    files = write_tasks(tmp_path / "tasks")
    for name, before, after in (
        ("lost", "tiny_choice.jsonl", "lost.jsonl"),
        ("odd", "test_split: test", "test_split: x"),
    ):
        text = (
            (files / "tiny_choice.yaml")
            .read_text()
            .replace(before, after)
            .replace("task: tiny_choice", f"task: {name}")
        )
        (files / f"{name}.yaml").write_text(text)
    with own_tasks_of("piqa"), pytest.raises(TaskError, match=message):
        open_tasks(names, **{"include_path": files, **options})
