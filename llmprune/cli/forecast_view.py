"""What a person sees of a forecast: the stages, whether they fit, and which recipe to take."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from llmprune.cli.options import emit
from llmprune.cli.terminal import shown
from llmprune.core.errors import RecipeError
from llmprune.core.recipe import Recipe

Until = Literal["search", "export"]


def forecast_table(result: Mapping[str, Any]) -> Table:
    """What every stage of a run will cost."""
    rates = result["rates"]
    table = Table(
        title=f"Forecast for {result['model']} ({result['params'] / 1e6:.1f}M parameters), nothing is written",
        caption=f"measured now, on {_stood_in(result['rates_of'])}: {1 / rates['forward_s_per_token']:.0f} tokens/s "
        f"scored, {rates['prefill_s']:.3g} s a prompt, {rates['decode_step_s']:.3g} s a decode step, "
        f"{rates['float64_flops_per_s'] / 1e9:.1f} GFLOP/s in float64. Children are counted as large and as slow as "
        "the parent; memory is without Python and torch.",
        caption_justify="left",
    )
    table.add_column("stage")
    for column in ("scored tokens", "backward", "timed", "forward\nequivalents", "GFLOP\nfloat64", "time"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("peak memory", "disk"):
        table.add_column(column, justify="right", no_wrap=True)
    for stage in result["stages"]:
        if stage["done"]:
            table.add_row(stage["stage"], "done", *[""] * 7)
            continue
        counts = (f"{stage[f'{name}_tokens']:,}" for name in ("forward", "backward", "timed"))
        sizes = (f"{stage[name] / 1e6:,.0f} MB" for name in ("peak_memory_bytes", "disk_bytes"))
        flops = f"{stage['float64_flops'] / 1e9:,.1f}"
        table.add_row(
            stage["stage"], *counts, f"{stage['forward_equivalents']:,.0f}", flops, _duration(stage["seconds"]), *sizes
        )
    total = result["total"]
    table.add_section()
    sizes = (f"{total[name] / 1e6:,.0f} MB" for name in ("peak_memory_bytes", "disk_bytes"))
    table.add_row("in all", *[""] * 3, f"{total['forward_equivalents']:,.0f}", "", _duration(total["seconds"]), *sizes)
    return table


def fit_lines(fit: Mapping[str, Any]) -> Iterator[str]:
    """Whether a run fits, what does not, and what would make it fit."""
    room = fit["room"]
    free = (
        f"{_size(room['memory_bytes'])} of memory free on {room['memory_of']}, {_size(room['disk_bytes'])} of disk at "
        f"{room['disk_of']}"
    )
    if fit["fits"]:
        yield f"fits: {_size(fit['peak_memory_bytes'])} of memory and {_size(fit['disk_bytes'])} of disk; {free}"
        if fit["parent_waits"]:
            yield f"  meanwhile the parent waits in CPU memory, in: {', '.join(fit['parent_waits'])}"
        return
    yield f"does not fit: {free}"
    for lack in fit["lacks"]:
        helps = f"; {lack['setting']} makes it fit" if lack["setting"] else ""
        before = ", with what is written before it" if lack["what"] == "disk" else ""
        yield f"  {lack['stage']} needs {_size(lack['needed_bytes'])} of {lack['what']}{before}{helps}"
    settings = shlex.join(fit["settings"])
    if fit["fits_with_settings"]:
        yield f"  all of it fits with {settings}"
    elif fit["settings"]:
        least = _size(fit["peak_memory_bytes_with_settings"])
        yield f"  no setting that was tried makes all of it fit: {least} of memory with {settings}"
    else:
        yield "  no setting that was tried helps"


def recipe_lines(advice: Mapping[str, Any], model: str) -> Iterator[str]:
    """Which of the recipes that come along to take for a model."""
    for one in advice["recipes"]:
        yield f"recipe {one['recipe']}: {_verdict(one)}"
    if advice["use"] is None:
        yield "no recipe that comes along can be used here: change a copy of one (llmprune recipes cp), or the machine"
        return
    (settings,) = (one["settings"] for one in advice["recipes"] if one["recipe"] == advice["use"])
    command = ["llmprune", "compress", model, "--recipe", advice["use"], *settings]
    yield f"use: {shlex.join(command)}"


def _verdict(advice: Mapping[str, Any]) -> str:
    if advice["problem"] is not None:
        return f"cannot be used, {advice['problem']}"
    fit, settings = advice["fit"], shlex.join(advice["settings"])
    if fit["fits_with_settings"]:
        needs = f"{_size(fit['peak_memory_bytes_with_settings'])} of memory"
        return f"{_duration(advice['seconds'])} at the most, fits ({needs})" + (f" with {settings}" if settings else "")
    stages = ", ".join(dict.fromkeys(lack["stage"] for lack in fit["lacks"]))
    least = f"; {_size(fit['peak_memory_bytes_with_settings'])} of memory with {settings}" if settings else ""
    return f"does not fit ({stages}){least}"


def _stood_in(rates_of: Mapping[str, Any]) -> str:
    """What was timed."""
    layers, rows = rates_of["of_layers"], rates_of["of_rows"]
    if (rates_of["layers"], rates_of["rows"]) == (layers, rows):
        return f"random weights in the model's shape ({layers} layers)"
    return (
        f"random weights in {rates_of['layers']} of the model's {layers} layers and {rates_of['rows']:,} of its "
        f"{rows:,} rows of vocabulary, drawn out to all"
    )


def _size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"


def print_forecast(
    path: Path,
    recipe: Recipe,
    until: Until,
    workers: str | None,
    storage: str | None,
    json: bool,
    quiet: bool,
) -> None:
    """Of the command that would search, or compress, in the directory. Raises as that would before its first stage."""
    if workers is not None:
        raise RecipeError("a forecast is of one process; give --dry-run without --workers")
    from llmprune.pipeline.inspection import forecast_run
    from llmprune.tables.reach import described, reach_from_json

    result = forecast_run(path, recipe, until, shown(quiet=quiet), storage=storage)

    def lines() -> Iterator[Any]:
        yield forecast_table(result)
        if result["reach"]:
            yield described(reach_from_json(result["reach"]))
        yield from result["warnings"]
        yield from fit_lines(result["fit"])
        if result["recipes"]:
            yield from recipe_lines(result["recipes"], recipe.model.path)

    emit(result, json, lines)
