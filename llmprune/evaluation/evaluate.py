"""Evaluate checkpoints side by side: perplexity, tokens per second and tasks, and whether they differ from the parent.

Every figure is stored as soon as it is known, under a hash of all that it depends on: the model's files, the text or
the task's documents, settings and versions. An evaluation that was stopped goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmprune.core.errors import DataError, RunDirectoryError
from llmprune.core.files import write_json
from llmprune.core.progress import Show
from llmprune.core.recipe import WorkloadRecipe
from llmprune.core.recipe_inputs import SplitName
from llmprune.core.recipe_text import load_recipe
from llmprune.data.store import load_token_splits
from llmprune.data.tokens import Split, build_token_splits
from llmprune.evaluation.bench import check_tokenizer, check_vocabulary
from llmprune.evaluation.differences import differences_on_tasks, differences_on_text
from llmprune.evaluation.store import Store, place_for, versions
from llmprune.evaluation.subjects import Subject, find_subjects, recipe_in
from llmprune.evaluation.tasks import TaskResult, TaskSet, open_tasks, run_task
from llmprune.measure.quality.likeness import TOP_K, ParentsLogits
from llmprune.measure.quality.perplexity import quality_from_windows, score_windows
from llmprune.measure.quality.significance import CONFIDENCE, DRAWS, SEED
from llmprune.measure.speed.host import fingerprint
from llmprune.measure.speed.throughput import Workload, measure_paired
from llmprune.models.sizes import parameter_count
from llmprune.pipeline.run_directory import RunDirectory
from llmprune.publish.contents import EVALUATION_FILE


@dataclass(frozen=True)
class Questions:
    """What is asked of every model."""

    workload: WorkloadRecipe
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    num_fewshot: int | None = None
    include_path: Path | None = None
    chat_template: bool = False
    """Prompts of tasks are rendered through the tokenizer's chat template."""
    multiturn: bool | None = None
    """Each few-shot example is a turn of its own; default: as `chat_template`."""
    batch_size: int = 1
    """Requests of a task that go through the model together."""
    data: Path | None = None
    """A run directory, whose stored tokens are used, or a recipe; default: what the first model lies in or carries."""
    split: SplitName = "test"


@dataclass(frozen=True)
class _Answers:
    """What one model came to."""

    params: int
    nats: Mapping[str, torch.Tensor] | None
    tasks: Mapping[str, TaskResult]


def evaluate(
    models: Sequence[str],
    parent: str | None,
    questions: Questions,
    *,
    device: str,
    dtype: str,
    output: Path | None,
    show: Show,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Perplexity on a split, tokens per second and tasks of checkpoints, compared with their parent if it is known.

    The result goes to `output`, to `evaluation.json` in each checkpoint but the parent's, and to the run's
    `evaluations` if the first checkpoint lies in one. Raises LlmpruneError, as a rule before any weight is read.
    """
    if output is not None and output.is_dir():
        raise RunDirectoryError(f"--output must be a file, and {output} is a directory; name {output / 'results.json'}")
    with show("finding models, tasks and text"):
        subjects = find_subjects(models, parent, device=device, dtype=dtype, say=say)
        tasks = _tasks(questions)
        text = _text(subjects, questions, say)
    store = Store(place_for(subjects, output))
    base = {"dtype": subjects[0].recipe.dtype, "device": subjects[0].device, "versions": versions()}
    answers = [_answers(subject, base, text, tasks, questions, store, show) for subject in subjects]
    likenesses = _likenesses(subjects, base, text, store, show)
    speeds, workload = _speeds(subjects, base, questions.workload, store, show)
    if store.found:
        say(f"{store.found} of {store.found + store.made} results were in {store.place} already")
    result = {
        "format": 1,
        "models": [
            _record(subject, answer, speed, likeness, text)
            for subject, answer, speed, likeness in zip(subjects, answers, speeds, likenesses, strict=True)
        ],
        "comparisons": _comparisons(subjects, answers, text, tasks),
        "versions": versions(),
        "measured_on": {
            "dtype": base["dtype"],
            "workload": workload,
            "repeats": questions.workload.repeats,
            "task_batch_size": questions.batch_size,
            "significance": {"confidence": CONFIDENCE, "bootstrap_draws": DRAWS, "seed": SEED},
            "host": fingerprint(),
        },
    }
    _write(result, subjects, store, output, say)
    return result


def _tasks(questions: Questions) -> TaskSet | None:
    if not questions.tasks:
        return None
    return open_tasks(
        questions.tasks,
        limit=questions.limit,
        num_fewshot=questions.num_fewshot,
        include_path=questions.include_path,
        chat_template=questions.chat_template,
        multiturn=questions.multiturn,
    )


def _text(subjects: Sequence[Subject], questions: Questions, say: Callable[[str], None]) -> Split | None:
    """The split that is scored; None if there is none, and there are tasks to go on with."""
    subject = next(one for one in subjects if one.role != "parent" or len(subjects) == 1)
    try:
        return split_of(subject, questions.data, questions.split)
    except DataError as error:
        if questions.data is not None or not questions.tasks:
            raise
        say(f"no perplexity: {error}")
        return None


def split_of(subject: Subject, data: Path | None, split: SplitName) -> Split:
    """A split of a run's or recipe's text; by default of the run that a checkpoint lies in, or of the recipe in it.
    Raises DataError."""
    if data is None:
        places = Path(subject.recipe.path).expanduser().resolve().parents
        data = next((place for place in places if RunDirectory(place).tokens.is_file()), None)
    if data is not None and data.is_dir():
        run = RunDirectory(data)
        if not run.tokens.is_file():
            raise DataError(f"{data} holds no tokens.safetensors; name a run directory that llmprune search made")
        return load_token_splits(run.tokens)[split]
    recipe = load_recipe(data) if data is not None else recipe_in(subject.directory)
    if recipe is None:
        raise DataError(
            f"{subject.name} does not say what text to evaluate on; name a run directory or a recipe with --data"
        )
    return build_token_splits(recipe.data, subject.loaded[1])[split]


def _answers(
    subject: Subject,
    base: Mapping[str, Any],
    text: Split | None,
    tasks: TaskSet | None,
    questions: Questions,
    store: Store,
    show: Show,
) -> _Answers:
    base = {"model": subject.identity, **base}
    params = store.recall("params", base, lambda: parameter_count(subject.load(show)[0]))
    nats = None
    if text is not None:
        stored = store.recall("text", {**base, "split": text.hash}, lambda: _scored(subject, text, show))
        nats = {name: torch.tensor(_infinite(values), dtype=torch.float64) for name, values in stored.items()}
    results: dict[str, TaskResult] = {}
    for name, identity in tasks.identities.items() if tasks is not None else ():
        assert tasks is not None
        asked = {
            "task": name,
            "identity": identity,
            "limit": tasks.limit,
            "num_fewshot": tasks.num_fewshot,
            "batch_size": questions.batch_size,
            # The text's rule is the recipe's; without a text, each tokenizer does as it does.
            "bos": text.bos if text is not None else "auto",
        }

        def run(name: str = name, tasks: TaskSet = tasks) -> dict[str, Any]:
            model, tokenizer = subject.load(show)
            with show(f"{subject.name}: {name}") as advance:
                found = run_task(
                    model,
                    tokenizer,
                    tasks,
                    name,
                    bos=text.bos if text is not None else None,
                    batch_size=questions.batch_size,
                    progress=advance,
                )
            return {task: result.to_json() for task, result in found.items()}

        stored = store.recall("task", {**base, **asked}, run)
        results |= {task: TaskResult.from_json(result) for task, result in stored.items()}
    return _Answers(params, nats, results)


def _scored(subject: Subject, text: Split, show: Show) -> dict[str, list[float | None]]:
    model, tokenizer = subject.load(show)
    check_tokenizer(model, tokenizer, subject.name, text)
    with show(f"{subject.name}: text") as advance:
        nats = score_windows(model, text, advance)
    # JSON has no infinity.
    return {name: [None if value == float("inf") else value for value in row.tolist()] for name, row in nats.items()}


def _likenesses(
    subjects: Sequence[Subject], base: Mapping[str, Any], text: Split | None, store: Store, show: Show
) -> list[dict[str, Any] | None]:
    """How alike each model is to the parent on the text; None of the parent itself, or where there is none."""
    parent, children = subjects[0], subjects[1:]
    if parent.role != "parent" or text is None:
        return [None] * len(subjects)
    key = {"parent": parent.identity, "split": text.hash, "top_k": TOP_K, **base}
    logits: ParentsLogits | None = None

    def recalled(child: Subject, text: Split) -> dict[str, Any]:
        def found() -> dict[str, Any]:
            nonlocal logits
            logits = logits or ParentsLogits(parent.load(show)[0], text)
            model, _ = child.load(show)
            with show(f"{child.name}: text, beside its parent"):
                return logits.beside(model).model_dump(mode="json")

        stored: dict[str, Any] = store.recall("likeness", {"model": child.identity, **key}, found)
        return stored

    return [None, *(recalled(child, text) for child in children)]


def _infinite(values: Sequence[float | None]) -> list[float]:
    return [float("inf") if value is None else value for value in values]


def _speeds(
    subjects: Sequence[Subject], base: Mapping[str, Any], rules: WorkloadRecipe, store: Store, show: Show
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Of all models, timed in turns with the first, and the workload that was timed."""
    workload = Workload.from_recipe(rules, base["dtype"], base["device"])
    key = {
        **base,
        "models": [subject.identity for subject in subjects],
        "workload": workload.to_json(),
        "repeats": rules.repeats,
        "host": fingerprint(),
    }

    def measure() -> list[dict[str, Any]]:
        models = [subject.load(show)[0] for subject in subjects]
        for subject, model in zip(subjects, models, strict=True):
            check_vocabulary(model, subject.name, models[0].config.get_text_config().vocab_size - 1)
        with show("timing") as advance:
            # A lone checkpoint is timed against itself: its tokens per second are what is asked for.
            reference, others = measure_paired(models[0], models[1:] or models[:1], workload, rules.repeats, advance)
        return [speed.to_json() for speed in (reference, *others)][: len(subjects)]

    return store.recall("speed", key, measure), workload.to_json()


def _record(
    subject: Subject,
    answers: _Answers,
    speed: Mapping[str, Any],
    likeness: Mapping[str, Any] | None,
    text: Split | None,
) -> dict[str, Any]:
    quality = None
    if text is not None and answers.nats is not None:
        figures = quality_from_windows(text, answers.nats).to_json()
        quality = {key: figures[key] for key in ("nats_per_token", "nats_per_byte", "ppl", "per_source")}
        quality |= {} if likeness is None else {"likeness": likeness}
        quality["measured_on"] = {key: figures[key] for key in ("dataset", "split", "seq_len", "tokens", "bos")}
    shown = ("metrics", "samples", "limit", "num_fewshot", "version", "bos", "chat_template")
    tasks = {name: {key: getattr(result, key) for key in shown} for name, result in answers.tasks.items()}
    return {
        "model": subject.name,
        "role": subject.role,
        "params": answers.params,
        "id": subject.id,
        "hash": subject.hash,
        "quality": quality,
        "speed": speed,
        "tasks": tasks,
    }


def _comparisons(
    subjects: Sequence[Subject], answers: Sequence[_Answers], text: Split | None, tasks: TaskSet | None
) -> list[dict[str, Any]]:
    if subjects[0].role != "parent":
        return []
    parent, rows = answers[0], []
    for subject, child in zip(subjects[1:], answers[1:], strict=True):
        found = []
        if text is not None and parent.nats is not None and child.nats is not None:
            found += differences_on_text(text, parent.nats, child.nats)
        if tasks is not None:
            found += differences_on_tasks(tasks.aggregations, parent.tasks, child.tasks)
        rows += [{"model": subject.name, **row} for row in found]
    return rows


def _without_place(row: Mapping[str, Any]) -> dict[str, Any]:
    """What travels with a checkpoint names files, not the places they had on this machine."""
    local = Path(row["model"]).expanduser()
    return {**row, "model": local.resolve().name if local.exists() else row["model"]}


def _write(
    result: Mapping[str, Any],
    subjects: Sequence[Subject],
    store: Store,
    output: Path | None,
    say: Callable[[str], None],
) -> None:
    if store.place is not None:
        write_json(store.place / EVALUATION_FILE, result)
    if output is not None:
        write_json(output, result)
    for subject in subjects:
        if subject.role == "parent" or subject.directory is None:
            continue
        models = [one for one in result["models"] if one["role"] == "parent" or one["model"] == subject.name]
        compared = [row for row in result["comparisons"] if row["model"] == subject.name]
        own = {**result, "models": [*map(_without_place, models)], "comparisons": [*map(_without_place, compared)]}
        try:
            write_json(subject.directory / EVALUATION_FILE, own)
        except RunDirectoryError as error:
            # The figures are not lost: they are on stdout, in the output and where single results are stored.
            say(str(error))
