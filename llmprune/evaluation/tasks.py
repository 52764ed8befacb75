"""Tasks of lm-eval on a model in memory, with the figures that `lm_eval --model hf` gives for its checkpoint.

The model goes into lm-eval's own HFLM and `simple_evaluate`, so prompts, BOS and prefix tokens, truncation, seeds and
metrics are lm-eval's. One name - a task, a group or a tag - is one call, so that a name's figures can be kept while the
next is at work. With a batch size over 1 that shows: lm-eval batches the requests of all tasks of a call together, and
a request's log-likelihood moves in its last bits with what it is padded beside.

lm-eval is imported when tasks are asked for: that takes seconds.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import io
import json
import logging
import math
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmprune.core.errors import TaskError, quoted
from llmprune.core.progress import Advance
from llmprune.data.bos import opening_with_bos, puts_bos

_LOGGERS = ("lm_eval", "datasets", "transformers")
_NEIGHBOURS = 3
# What a task file that is wrong, or data that is not there, raises.
_UNREADABLE = (OSError, LookupError, ValueError, TypeError, AttributeError, ImportError, RuntimeError)


@dataclass(frozen=True)
class TaskResult:
    """What one task, or the aggregate of a group, came to. Keys are metrics, `metric,filter` if the filter is named."""

    metrics: Mapping[str, Mapping[str, float | None]]
    """`value` and `stderr`; None for what is no finite number."""
    samples: int
    limit: int | None
    num_fewshot: int | None
    version: str | float | None
    scores: Mapping[str, Sequence[Any]]
    """For each metric, a figure of each sample - a number, or a (sum, weight) pair - in the order of the documents."""
    documents: Sequence[str]
    """Hashes of the samples' documents."""
    bos: bool
    """Whether prompts were opened with BOS; a chat template that writes it is not doubled, nor counted here."""
    chat_template: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TaskResult:
        """Inverse of `to_json`."""
        return cls(**data)


@dataclass(frozen=True, eq=False)
class TaskSet:
    """Tasks that were found by name, and whose data is at hand."""

    manager: Any
    """lm-eval's TaskManager, which knows more tasks than these."""
    limit: int | None
    num_fewshot: int | None
    chat_template: bool
    """Prompts are turns of a chat, rendered through the tokenizer's template."""
    multiturn: bool
    """Each few-shot example is a turn of its own."""
    identities: Mapping[str, str]
    """For each name, SHA-256 over what its figures depend on but the model: its tasks' settings and documents."""
    aggregations: Mapping[str, Mapping[str, str]]
    """For each task, how each metric's samples are put together: mean, weighted_perplexity, ..."""


def open_tasks(
    names: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: Path | None = None,
    chat_template: bool = False,
    multiturn: bool | None = None,
) -> TaskSet:
    """Find tasks and read their data, so that what is missing is missed before a model is loaded.

    `limit` takes the first so many documents of each task; `num_fewshot` replaces a task's own number of examples,
    unless that is a 0 its author fixed. `multiturn` is as `chat_template` by default, as in lm-eval's own command.
    Raises TaskError, naming the task.
    """
    multiturn = chat_template if multiturn is None else multiturn
    if multiturn and not chat_template:
        raise TaskError("--fewshot-as-multiturn makes turns of a chat; it goes with --apply-chat-template only")
    for name, value, least in (("--limit", limit, 1), ("--num-fewshot", num_fewshot, 0)):
        if value is not None and value < least:
            raise TaskError(f"{name} must be at least {least}, got {value}")
    if include_path is not None and not any(include_path.glob("**/*.yaml")):
        raise TaskError(f"--include-path must be a directory with task files (.yaml) in it, got {include_path}")
    with _quiet():
        manager = _manager(names, include_path)
        identities: dict[str, str] = {}
        aggregations: dict[str, dict[str, str]] = {}
        for name in names:
            tasks = _load(manager, name)
            chat = [{"multiturn": multiturn}] if chat_template else []
            identities[name] = _sha256([_identity(task, limit, num_fewshot) for task in tasks.values()] + chat)
            aggregations |= {
                task_name: {metric: getattr(how, "__name__", "") for metric, how in task.aggregation().items()}
                for task_name, task in tasks.items()
            }
    return TaskSet(manager, limit, num_fewshot, chat_template, multiturn, identities, aggregations)


def run_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: TaskSet,
    name: str,
    *,
    bos: bool | None = None,
    batch_size: int = 1,
    progress: Advance | None = None,
) -> dict[str, TaskResult]:
    """Evaluate a model on one name of a set: the result of each of its tasks and groups, by name.

    Prompts are opened with BOS if `bos` says so, by default if the tokenizer itself does so. `progress(done, total)`
    counts requests. Raises TaskError if lm-eval refuses the task or the model, or the tokenizer has no chat template
    and one is asked for; DataError if it cannot do as `bos` says.
    """
    assert name in tasks.identities, f"{name} was not opened"
    if tasks.chat_template and not tokenizer.chat_template:
        raise TaskError(
            f"--apply-chat-template renders prompts through the tokenizer's chat template, and that of "
            f"{model.config.name_or_path or 'this model'} has none; leave it out"
        )
    bos = puts_bos(tokenizer) if bos is None else bos
    tokenizer = opening_with_bos(tokenizer, bos)
    with _quiet(progress):
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        try:
            found: Any = simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                tasks=[name],
                num_fewshot=tasks.num_fewshot,
                limit=tasks.limit,
                task_manager=tasks.manager,
                apply_chat_template=tasks.chat_template,
                fewshot_as_multiturn=tasks.multiturn,
            )
        except ValueError as error:
            raise TaskError(f"task {name} cannot be run: {_cause(error)}") from error
    return {task: _result(found, task, tasks, bos) for task in found["results"]}


def _manager(names: Sequence[str], include_path: Path | None) -> Any:
    """A TaskManager that knows `names`; without lm-eval's own 15,000 tasks, whose index takes 20 s, if it can do so."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import Kind

    if include_path is not None:
        own = TaskManager(include_path=include_path, include_defaults=False)
        entries = [own.task_index.get(name) for name in names]
        # A group may name tasks that are not its neighbours.
        if all(entry is not None and entry.kind in (Kind.TASK, Kind.PY_TASK) for entry in entries):
            return own
    manager = TaskManager(include_path=include_path)
    for name in names:
        if name not in manager.task_index and not Path(name).is_file():
            near = difflib.get_close_matches(name, manager.all_tasks, _NEIGHBOURS)
            meant = f"; did you mean {', '.join(near)}?" if near else ";"
            raise TaskError(
                f"no task is called {quoted(name)}{meant} `lm_eval ls tasks` lists lm-eval's own, and --include-path "
                "names a directory with others"
            )
    return manager


def _load(manager: Any, name: str) -> dict[str, Any]:
    """The tasks that a name stands for. Raises TaskError."""
    from datasets.exceptions import DatasetsError

    # As `simple_evaluate` does: some tasks shuffle their answers as they are read.
    random.seed(0)
    np.random.seed(1234)
    try:
        tasks: dict[str, Any] = manager.load([name])["tasks"]
        for task in tasks.values():
            if len(task.eval_docs) == 0:
                raise ValueError("it has no documents")
    except (*_UNREADABLE, DatasetsError) as error:
        raise TaskError(
            f"task {name} cannot be read: {_cause(error)}. Its data must be cached, on the Hub and within reach, or "
            "named by a task file (dataset_path: json, dataset_kwargs: {data_files: ...}) under --include-path"
        ) from error
    return tasks


def _identity(task: Any, limit: int | None, num_fewshot: int | None) -> str:
    if num_fewshot is not None and task.get_config("num_fewshot") != 0:
        task.set_config("num_fewshot", num_fewshot)
    settings = task.dump_config()
    # Where a task file lies is no part of what it asks.
    settings["metadata"] = {key: v for key, v in (settings.get("metadata") or {}).items() if key != "config_source"}
    documents = list(islice(task.eval_docs, limit))
    examples = list(task.fewshot_docs() or ()) if task.get_config("num_fewshot") else []
    return _sha256([settings, documents, examples])


def _result(found: Mapping[str, Any], task: str, tasks: TaskSet, bos: bool) -> TaskResult:
    figures = found["results"][task]
    values = {key: value for key, value in figures.items() if "," in key and "_stderr," not in key}
    metrics = {}
    for key, value in values.items():
        metric, _, used = key.partition(",")
        metrics[_label(metric, used)] = {
            "value": _finite(value),
            "stderr": _finite(figures.get(f"{metric}_stderr,{used}")),
        }
    samples = found["samples"].get(task, [])
    scores: dict[str, list[Any]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            scores.setdefault(_label(metric, sample["filter"]), []).append(_score(sample[metric]))
    first = samples[0]["filter"] if samples else None
    return TaskResult(
        metrics=metrics,
        samples=int(figures.get("sample_len", 0)),
        limit=tasks.limit,
        num_fewshot=found["n-shot"].get(task),
        version=found["versions"].get(task),
        scores={metric: values for metric, values in scores.items() if None not in values},
        documents=[sample["doc_hash"] for sample in samples if sample["filter"] == first],
        bos=bos,
        chat_template=tasks.chat_template,
    )


def _label(metric: str, used: str) -> str:
    return metric if used == "none" else f"{metric},{used}"


def _finite(value: Any) -> float | None:
    """lm-eval says "N/A" where it has no figure."""
    if isinstance(value, (str, bytes)) or not isinstance(value, (int, float, np.number, np.bool_)):
        return None
    return float(value) if math.isfinite(value) else None


def _score(value: Any) -> float | list[float] | None:
    """A sample's figure as numbers; None for what is neither a number nor a pair of them."""
    if isinstance(value, (tuple, list)):
        pair = [_finite(part) for part in value]
        return [part for part in pair if part is not None] if len(pair) == 2 and None not in pair else None
    return _finite(value)


def _sha256(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()


def _cause(error: BaseException) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    return f"{text:.300}" if text else type(error).__name__


@contextmanager
def _quiet(progress: Advance | None = None) -> Iterator[None]:
    """lm-eval prints on stdout, logs, warns and draws bars; here only results are on stdout, and `progress` tells."""
    import datasets
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.evaluator
    import lm_eval.models.huggingface
    import tqdm

    class Silent(tqdm.tqdm):  # type: ignore[misc]
        """Draws nothing."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

    class Told(Silent):
        """Of requests: a disabled bar does not count, so it counts itself."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._done, self._of = 0, kwargs.get("total")

        def update(self, n: float | None = 1) -> bool | None:
            self._done += int(n or 0)
            if progress is not None and self._of:
                progress(self._done, int(self._of))
            return None

    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for name in _LOGGERS:
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        if not datasets.are_progress_bars_disabled():
            stack.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        for module, attribute, stand_in in (
            (tqdm, "tqdm", Silent),
            (lm_eval.api.model, "tqdm", Silent),
            (lm_eval.api.task, "tqdm", Silent),
            (lm_eval.models.huggingface, "tqdm", Told),
            # These ask pip, lscpu, nvidia-smi and git, for seconds and not without noise, what is recorded elsewhere.
            (lm_eval.evaluator, "add_env_info", lambda storage: None),
            (lm_eval.evaluator, "get_git_commit_hash", lambda: None),
        ):
            stack.callback(setattr, module, attribute, getattr(module, attribute))
            setattr(module, attribute, stand_in)
        yield
