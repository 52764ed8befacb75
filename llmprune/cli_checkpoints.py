"""The commands that work on checkpoints, whoever wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmprune.cli_options import Device, Force, Json, Quiet, emit, model_recipe
from llmprune.recipe import DeployRecipe, parse_section
from llmprune.terminal import formats_table, shown

app = typer.Typer(no_args_is_help=True)


@app.command()
def formats(json: Json = False, quiet: Quiet = False) -> None:
    """List the formats a child can be written in, what each can hold, and what serves it."""
    from llmprune.deploy.formats import described

    rows = described()
    emit({"formats": rows}, json, lambda: [formats_table(rows)])


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="Checkpoint directory, Hub id or GGUF file.")],
    form: Annotated[list[str], typer.Option("--format", help="gguf or vllm; repeatable.")],
    gguf_type: Annotated[str, typer.Option(help="f32, f16 or q8_0: how gguf stores weights.")] = "f16",
    to: Annotated[Path | None, typer.Option(help="Directory to write to; default: the checkpoint's own.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16: what weights are read as.")] = "float32",
    device: Device = "cpu",
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a checkpoint in further formats, each proven as far as it can be run here."""
    from llmprune.conversion import convert as convert_checkpoint

    rules = parse_section(DeployRecipe, {"formats": form, "gguf_type": gguf_type})
    recipe = model_recipe(model, device, dtype)
    result = convert_checkpoint(recipe, rules, to, shown(quiet=quiet), force=force)
    lines = [f"{row['format']}: {result['directory']}/{row['file']} ({row['proof']})" for row in result["formats"]]
    emit(result, json, lambda: lines)
