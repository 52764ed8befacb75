"""What a child's figures differ by from its parent's, sample by sample: rows for people, and for the model card."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from llmprune.data.tokens import Split
from llmprune.evaluation.tasks import TaskResult
from llmprune.measure.quality.significance import Floats, first_mean, mcnemar, paired_bootstrap

TEXT = "text"
"""The name of what is no task: nats of the windows of a split."""


def _a_weight(means: Sequence[Floats]) -> Floats:
    """Sum of the first figures by sum of the second, their weights."""
    return np.asarray(means[0][..., 0] / means[0][..., 1])


# By the names of lm-eval's own aggregations. What is not here (F1, BLEU, ...) is reported without a comparison.
STATISTICS: dict[str, Callable[[Sequence[Floats]], Floats]] = {
    "mean": first_mean,
    "perplexity": lambda means: np.exp(-first_mean(means)),
    "weighted_perplexity": lambda means: np.exp(-_a_weight(means)),
    "bits_per_byte": lambda means: -_a_weight(means) / math.log(2),
}


def differences_on_text(
    split: Split, parent: Mapping[str, torch.Tensor], child: Mapping[str, torch.Tensor]
) -> list[dict[str, Any]]:
    """The difference in nats a token of the mixture, its windows drawn within their sources; none if one is infinite.

    `parent` and `child` are nats a window, as `score_windows` gives them.
    """
    models = [[nats[name].numpy()[:, None] for name in split.sources] for nats in (parent, child)]
    if not all(np.isfinite(nats).all() for model in models for nats in model):
        return []
    weights = [split.weights[name] for name in split.sources]

    def nats_per_token(means: Sequence[Floats]) -> Floats:
        mixed = [weight * mean[..., 0] for weight, mean in zip(weights, means, strict=True)]
        return np.asarray(sum(mixed) / (split.seq_len - 1))

    found = paired_bootstrap(models[0], models[1], nats_per_token)
    return [{"task": TEXT, "metric": "nats_per_token", **found.to_json()}]


def differences_on_tasks(
    aggregations: Mapping[str, Mapping[str, str]],
    parent: Mapping[str, TaskResult],
    child: Mapping[str, TaskResult],
) -> list[dict[str, Any]]:
    """A row for each metric of each task: McNemar's test where samples are right or wrong, else the bootstrap."""
    rows = []
    for task, result in child.items():
        assert parent[task].documents == result.documents, f"the models were asked other questions in {task}"
        for metric, scores in result.scores.items():
            reference = parent[task].scores.get(metric, ())
            how = aggregations.get(task, {}).get(metric.partition(",")[0], "")
            if how not in STATISTICS or len(reference) != len(scores):
                continue
            if how == "mean" and all(score in (0, 1) for score in (*reference, *scores)):
                found = mcnemar(reference, scores)
            else:
                figures = [np.array(one, dtype=np.float64).reshape(len(one), -1) for one in (reference, scores)]
                found = paired_bootstrap([figures[0]], [figures[1]], STATISTICS[how])
            rows.append({"task": task, "metric": metric, **found.to_json()})
    return rows
