"""The figures of `evaluation.json`, for a model card: of a checkpoint and, where it is there, its parent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import EvalResult
from pydantic import BaseModel, ValidationError

from llmprune.core.errors import PushError


class Metric(BaseModel):
    value: float
    stderr: float | None = None


class Task(BaseModel):
    metrics: dict[str, Metric]
    samples: int
    limit: int | None = None
    num_fewshot: int | None = None
    version: Any = None
    bos: bool | None = None
    chat_template: bool | None = None


class Evaluated(BaseModel):
    """One model's figures."""

    model: str
    role: Literal["parent", "child", "model"]
    id: str | None = None
    quality: dict[str, Any] | None = None
    tasks: dict[str, Task] = {}


class Comparison(BaseModel):
    """How a model's metric differs from the parent's on the same samples."""

    model: str
    task: str
    metric: str
    difference: float
    low: float | None = None
    high: float | None = None
    test: str
    p: float | None = None
    samples: int
    flips: int | None = None


class _File(BaseModel):
    format: Literal[1]
    models: list[Evaluated]
    comparisons: list[Comparison] = []


@dataclass(frozen=True)
class Row:
    """One line of a card's table: a metric of the child beside the parent's."""

    task: str
    metric: str
    child: Metric
    parent: Metric | None
    samples: int
    few_shot: int | None
    comparison: Comparison | None


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation says of one child."""

    child: Evaluated
    parent: Evaluated | None
    comparisons: tuple[Comparison, ...]

    def quality(self) -> Iterator[tuple[str, str, str]]:
        """Name, the parent's and the child's figure of what was measured of their perplexity."""
        parents = (self.parent and self.parent.quality) or {}
        own = self.child.quality or {}
        for key in ("nats_per_token", "nats_per_byte", "ppl"):
            if key in own:
                yield key, f"{parents[key]:.4f}" if key in parents else "", f"{own[key]:.4f}"
        if likeness := own.get("likeness"):
            yield "KL from the parent, nats a token", "", f"{likeness['kl']:.4f}"
            yield "same likeliest token as the parent", "", f"{likeness['same_top']:.1%}"

    def rows(self) -> Iterator[Row]:
        for name, task in self.child.tasks.items():
            parents = self.parent.tasks.get(name) if self.parent else None
            for metric, value in task.metrics.items():
                compared = (c for c in self.comparisons if (c.task, c.metric) == (name, metric))
                beside = parents.metrics.get(metric) if parents else None
                yield Row(name, metric, value, beside, task.samples, task.num_fewshot, next(compared, None))

    def results(self) -> Iterator[EvalResult]:
        """The child's own, as the Hub's model index has them."""
        quality = self.child.quality
        if quality and "ppl" in quality:
            yield perplexity_result(quality["ppl"], quality)
        for row in self.rows():
            yield EvalResult(
                task_type="text-generation",
                dataset_type=row.task,
                dataset_name=row.task,
                dataset_args=_args(self.child.tasks[row.task]),
                metric_type=row.metric,
                metric_value=row.child.value,
                metric_name=row.metric,
            )


def perplexity_result(ppl: float, measured_on: dict[str, Any]) -> EvalResult:
    """A perplexity with the text it was measured on, as far as that is told."""
    dataset = str(measured_on.get("dataset", "text"))
    return EvalResult(
        task_type="text-generation",
        dataset_type=dataset,
        dataset_name=dataset,
        dataset_split=measured_on.get("split"),
        dataset_args={key: measured_on[key] for key in ("seq_len", "tokens", "bos") if key in measured_on},
        metric_type="perplexity",
        metric_value=ppl,
        metric_name="perplexity",
    )


def read_evaluation(path: Path, child_id: str) -> Evaluation:
    """What the file says of the child with this id. Raises PushError if it is no evaluation, or one of others."""
    try:
        data = _File.model_validate_json(path.read_bytes())
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "file"
        raise PushError(f"{path} is no evaluation: {where}: {problem['msg']}; make it again, or take it away") from None
    child = next((model for model in data.models if model.id == child_id), None)
    if child is None:
        raise PushError(
            f"{path} evaluates {', '.join(str(model.id) for model in data.models) or 'nothing'}, not "
            f"{child_id}, which lies beside it; evaluate this checkpoint, or take the file away"
        )
    parent = next((model for model in data.models if model.role == "parent"), None)
    return Evaluation(child, parent, tuple(c for c in data.comparisons if c.model == child.model))


def _args(task: Task) -> dict[str, Any]:
    facts = {
        "num_few_shot": task.num_fewshot,
        "limit": task.limit,
        "samples": task.samples,
        "version": task.version,
        "bos": task.bos,
        "chat_template": task.chat_template,
    }
    return {key: value for key, value in facts.items() if value is not None}
