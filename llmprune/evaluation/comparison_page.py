"""A comparison of children as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmprune.choices.architecture import Architecture
from llmprune.evaluation.comparing import alike, figure_rows, kept_of, measured_on, read_on
from llmprune.report.drawing import Figure
from llmprune.report.maps import maps_beside
from llmprune.report.page import rendered, write_text


def write_comparison(result: Mapping[str, Any], to: Path) -> None:
    """Write what `compare` has found, whole or not at all."""
    write_text(comparison_page(result), to)


def comparison_page(result: Mapping[str, Any]) -> str:
    """What `compare` has found, as HTML: figures, maps, layers that differ, and tokens that models disagree over."""
    models, behaviour = result["models"], result.get("behaviour")
    maps = {
        f"{row['model']} ({row['id'][:8]})": (
            Architecture.from_json(row["architecture"]),
            Architecture.from_json(row["parents_architecture"]),
        )
        for row in models
    }
    figure = Figure(
        "architecture",
        "Architecture maps",
        "Exact. Share of every block's units (KV groups, FFN channels) that each child keeps of its parent's.",
        maps_beside(maps),
    )
    return rendered(
        "comparison.html.jinja",
        "A child beside its parent" if len(models) == 1 else f"{len(models)} children side by side",
        [figure],
        models=models,
        rows=list(figure_rows(models)),
        measured_on=measured_on(models),
        layers=[(layer["layer"], kept_of(layer)) for layer in result["differing_layers"]],
        behaviour=behaviour,
        read_on=read_on(behaviour["measured_on"]) if behaviour else "",
        alike=alike,
    )
