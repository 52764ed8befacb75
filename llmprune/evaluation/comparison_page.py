"""A comparison of children as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmprune.choices.architecture import Architecture
from llmprune.core.files import atomic_path
from llmprune.evaluation.comparing import alike, figure_rows, kept_of, measured_on, read_on
from llmprune.report.charts import Figure, maps_beside
from llmprune.report.page import rendered


def write_comparison(result: Mapping[str, Any], to: Path) -> None:
    """Write what `compare` has found, whole or not at all."""
    text = comparison_page(result)
    with atomic_path(to) as temporary:
        temporary.write_text(text, encoding="utf-8")


def comparison_page(result: Mapping[str, Any]) -> str:
    """What `compare` has found, as HTML: figures, maps, layers that differ, and tokens that models disagree over."""
    models, behaviour = result["models"], result.get("behaviour")
    architectures = {f"{row['model']} ({row['id'][:8]})": Architecture.from_json(row["architecture"]) for row in models}
    figure = Figure(
        "architecture",
        "Architecture maps",
        "Exact. Units of every block (KV groups, FFN channels) that each child keeps, as a share of the most that the "
        "block has in any of them.",
        maps_beside(architectures),
    )
    return rendered(
        "comparison.html.jinja",
        f"{len(models)} {'child' if len(models) == 1 else 'children'} side by side",
        [figure],
        models=models,
        rows=list(figure_rows(models)),
        measured_on=measured_on(models),
        layers=[(layer["layer"], kept_of(layer)) for layer in result["differing_layers"]],
        behaviour=behaviour,
        read_on=read_on(behaviour["measured_on"]) if behaviour else "",
        alike=alike,
    )
