"""An evaluation as people read it: a row a figure, a column a model, and how each child differs from the parent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from llmprune.evaluation.differences import TEXT


def evaluation_table(result: Mapping[str, Any]) -> Table:
    """Text by source, speed and tasks; under a child's figure its difference from the parent's, if that was tested."""
    models = result["models"]
    differences = {(row["model"], row["task"], row["metric"]): row for row in result["comparisons"]}
    table = Table(title="Evaluation, side by side", caption=_caption(result), caption_justify="left")
    table.add_column("figure", overflow="fold")
    for model in models:
        table.add_column(f"{model['model']}\n{model['role']}", justify="right", overflow="fold")
    table.add_row("parameters", *(f"{model['params'] / 1e6:.1f}M" for model in models))
    for phase in ("prefill", "decode"):
        table.add_row(f"{phase} tokens/s", *(_speed(model["speed"], phase) for model in models))
    table.add_section()
    for source in _sources(models):
        table.add_row(f"{source}: nats/token, nats/byte, PPL", *(_text(model["quality"], source) for model in models))
    if any(model["quality"] for model in models):
        cells = []
        for model in models:
            row = differences.get((model["model"], TEXT, "nats_per_token"))
            cells.append(_text(model["quality"], None) + (f"\n{_difference(row)}" if row else ""))
        table.add_row("mixture: nats/token, nats/byte, PPL", *cells)
    if any(_likeness(model) for model in models):
        table.add_row("beside the parent: KL, same likeliest token", *map(_likeness, models))
    table.add_section()
    for task, metric in _metrics(models):
        cells = []
        for model in models:
            row = differences.get((model["model"], task, metric))
            cells.append(_metric(model["tasks"].get(task), metric) + (f"\n{_difference(row)}" if row else ""))
        first = next(model["tasks"][task] for model in models if task in model["tasks"])
        asked = f"{first['samples']:,} samples, {first['num_fewshot']}-shot{', chat' if first['chat_template'] else ''}"
        table.add_row(f"{task} {metric}\n[dim]{asked}, {'with' if first['bos'] else 'no'} BOS[/dim]", *cells)
    return table


def _caption(result: Mapping[str, Any]) -> str:
    measured_on = result["measured_on"]
    workload = measured_on["workload"]
    parts = [
        f"{measured_on['dtype']}; batch {workload['batch']}, {workload['prompt_tokens']} prompt + "
        f"{workload['generated_tokens']} generated tokens, {workload['threads']} threads on {workload['device']}."
    ]
    quality = next((model["quality"] for model in result["models"] if model["quality"]), None)
    if quality is not None:
        text = quality["measured_on"]
        parts.append(
            f"{text['dataset']}, {text['split']} split: {text['tokens']:,} tokens in windows of {text['seq_len']}"
            f"{' with' if text['bos'] else ', no'} BOS."
        )
    if result["comparisons"]:
        level = measured_on["significance"]["confidence"]
        parts.append(
            f"Differences from the parent with {100 * level:.0f}% intervals, paired by sample (McNemar's exact test or "
            "the bootstrap)."
        )
    elif all(model["role"] == "model" for model in result["models"]):
        parts.append("No parent is known, so nothing is compared; name one with --parent.")
    return " ".join(parts)


def _sources(models: list[Any]) -> list[str]:
    return list(next((model["quality"]["per_source"] for model in models if model["quality"]), {}))


def _metrics(models: list[Any]) -> list[tuple[str, str]]:
    found = {(t, metric): None for model in models for t, task in model["tasks"].items() for metric in task["metrics"]}
    return list(found)


def _text(quality: Mapping[str, Any] | None, source: str | None) -> str:
    if quality is None:
        return ""
    row = quality if source is None else quality["per_source"][source]
    figures = (_number(row[key], digits) for key, digits in (("nats_per_token", 4), ("nats_per_byte", 4), ("ppl", 2)))
    return "  ".join(figures)


def _likeness(model: Mapping[str, Any]) -> str:
    found = (model["quality"] or {}).get("likeness")
    return f"{_number(found['kl'], 4)}  {found['same_top']:.1%}" if found else ""


def _speed(speed: Mapping[str, Any], phase: str) -> str:
    return f"{speed[f'{phase}_tokens_per_s']['median']:.1f} ({speed[f'{phase}_speedup']['median']:.2f}x)"


def _metric(task: Mapping[str, Any] | None, metric: str) -> str:
    figures = task and task["metrics"].get(metric)
    if not figures:
        return ""
    stderr = "" if figures["stderr"] is None else f" ± {_number(figures['stderr'], 4)}"
    return f"{_number(figures['value'], 4)}{stderr}"


def _difference(row: Mapping[str, Any]) -> str:
    flips = "" if row.get("flips") is None else f", {row['flips']} changed"
    return f"[dim]{row['difference']:+.4f} ({row['low']:+.4f} to {row['high']:+.4f}), p {row['p']:.2g}{flips}[/dim]"


def _number(value: float | None, digits: int) -> str:
    """None is a figure that is not finite."""
    return "-" if value is None else f"{value:.{digits}f}"
