"""The command that lets tokens leave a model early, and how it shows what it found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from llmprune.cli.options import Force, Json, Overrides, Quiet, RunPath, emit, opened_run, recipe_of_run
from llmprune.cli.terminal import spread_text

if TYPE_CHECKING:
    from llmprune.exits.record import EstimatedExits, ExitRecord, ExitsFound
    from llmprune.measure.record import Quoted

app = typer.Typer()


@app.command()
def exits(
    run_path: RunPath,
    overrides: Overrides = None,
    recipe: Annotated[str | None, typer.Option(help="Recipe, Hub id, directory or GGUF, to start a new run.")] = None,
    pick: Annotated[
        str | None, typer.Option(help="worst_token_speedup>=0.8,decode_speedup>=1.1, or an id: what --to exports.")
    ] = None,
    to: Annotated[
        Path | None, typer.Option(help="Directory to export the pick to; default: nothing is exported.")
    ] = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Search after which layers a token may leave early, and how sure of it an exit has to be; measure the best."""
    from llmprune.core.budgets import parse_pick
    from llmprune.pipeline.exits import export_exits, find_exits

    of_run = recipe_of_run(run_path, recipe, overrides)
    wanted = parse_pick(pick or of_run.export.pick)
    with opened_run(run_path, of_run, quiet) as (run, _):
        found = find_exits(run)
        written = None if to is None else export_exits(run, wanted, to, force=force)
    told = (
        []
        if written is None
        else [f"exported {written['id']} to {written['directory']}, proven with exits and without"]
    )
    emit({**found.stored(), "exported": written}, json, lambda: [exits_table(found), *estimated_lines(found), *told])


def exits_table(found: ExitsFound) -> Table:
    """What was measured."""
    on = found.records[0].measured_on
    workload = on.workload
    table = Table(
        title="Models with exits, measured",
        caption=(
            "Nats over the parent's where every token leaves as it would in generation. Speed-ups over the parent in "
            f"torch, {workload['dtype']}, {workload['threads']} threads on {workload['device']}: {on.repeats} prompts "
            f"of {workload['prompt_tokens']} tokens, {workload['generated_tokens']} decoded in turn with the parent; "
            "median (10th-90th percentile) over prompts. Text: the split's own tokens; generated: what each finds "
            "likeliest."
        ),
        caption_justify="left",
    )
    table.add_column("", no_wrap=True)
    for column in ("exits", "left by each, by none"):
        table.add_column(column)
    splits = list(_quoted(found.records[0]))
    for column in (*(f"{name}: lost" for name in splits), "text", "generated", "dearest token"):
        table.add_column(column, justify="right", no_wrap=True)
    for record in found.records:
        table.add_row(
            f"{record.id}\n[dim]{record.mode}, trunk {record.trunk[:8]}[/dim]",
            record.made_of,
            " ".join(f"{share:.0%}" for share in record.depths),
            *(f"{on.nats_lost:+.4f}" for on in _quoted(record).values()),
            spread_text(record.decode_speedup),
            spread_text(record.generated_speedup),
            f"{record.worst_token_speedup:.2f}x",
        )
    return table


def _quoted(record: ExitRecord) -> dict[str, Quoted]:
    found = {"test": record.test, "unseen": record.unseen}
    return {name: on for name, on in found.items() if on is not None}


def estimated_lines(found: ExitsFound) -> Iterator[str]:
    """What the search had to choose from, and what takes no search, from stored figures: none of it was measured."""
    from llmprune.exits.record import rules_text

    for trunk in found.trunks:
        shares = ", ".join(f"{layer}: {share:.0%}" for layer, share in zip(trunk.layers, trunk.agreement, strict=True))
        yield f"trunk {trunk.id}, {trunk.decode_speedup:.2f}x without exits, whose likeliest token exits find: {shares}"
    rows: list[EstimatedExits] = [*found.front, *found.baselines]
    for one in sorted(rows, key=lambda one: one.decode_speedup):
        lost = one.nats_per_token - found.trunks[0].nats_per_token
        yield (
            f"estimated, {one.name}: {one.decode_speedup:.3f}x (dearest token {one.worst_token_speedup:.2f}x), "
            f"{lost:+.4f} nats, {one.mode}, trunk {one.trunk[:8]}, {rules_text(one.rules)}"
        )
