"""The `llmprune` command: results on stdout, progress on stderr; exit 0 done, 1 our fault, 2 input, 130 Ctrl-C."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from llmprune.cli.checkpoints import app as of_checkpoints
from llmprune.cli.doctor import app as of_doctor
from llmprune.cli.drafts import app as of_drafts
from llmprune.cli.exits import app as of_exits
from llmprune.cli.forecast_view import print_forecast
from llmprune.cli.leash import end_with_stdin
from llmprune.cli.options import (
    DryRun,
    Json,
    Overrides,
    Quiet,
    RunPath,
    Storage,
    Workers,
    emit,
    joined_run,
    on_device,
    opened_run,
    recipe_from,
    recipe_of_run,
    speaker,
    watched,
)
from llmprune.cli.recipes import app as of_recipes
from llmprune.cli.terminal import error_console, shown
from llmprune.core.errors import LlmpruneError, StorageError
from llmprune.core.memory import out_of_memory
from llmprune.core.recipe_text import parse_section

if TYPE_CHECKING:
    from llmprune.measure.record import Front
    from llmprune.pipeline.run import Run
    from llmprune.search.study import SearchOutcome

app = typer.Typer(
    help="Search a pretrained causal LM for the smaller network that is best at a measured speed.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(of_checkpoints)
app.add_typer(of_recipes)
app.add_typer(of_doctor)
app.add_typer(of_drafts)
app.add_typer(of_exits)


@app.command()
def compress(
    model_or_recipe: Annotated[str, typer.Argument(help="Recipe (.yaml), Hub id, checkpoint directory or GGUF file.")],
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("--out", help="Run directory.")] = Path("runs/run"),
    recipe_name: Annotated[
        str | None, typer.Option("--recipe", help="For a model: the recipe, by a name that `recipes ls` prints.")
    ] = None,
    workers: Workers = None,
    storage: Storage = None,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run every stage: search, re-measure the front, write its checkpoints, export the recipe's pick."""
    from llmprune.cli.front_tables import front_table
    from llmprune.pipeline import commands
    from llmprune.pipeline.run_directory import read_front

    recipe = recipe_from(model_or_recipe, overrides, recipe_name)
    if dry_run:
        return print_forecast(out, recipe, "export", workers, storage, json, quiet)
    with opened_run(out, recipe, quiet, storage, workers) as (run, report):
        to = Path(recipe.export.to) if recipe.export.to else run.directory.export
        result = commands.compress(run, to, report=report)
        measured = read_front(run.directory)
        _draw_card_figures(run, result["exported"] and result["exported"]["id"], to)
    emit(result, json, lambda: [front_table(measured), *_told(result, measured, to)])


def _draw_card_figures(run: Run, exported: str | None, to: Path) -> None:
    """For the model card of a child that was exported from the run."""
    from llmprune.report.facts import gather
    from llmprune.report.page import write_card_figures

    if exported is None:
        return
    facts = gather(run)
    assert facts.front is not None, "a child was exported from it"
    with run.show("drawing what its model card shows"):
        write_card_figures(facts, next(one for one in facts.front.every if one.id == exported), to)


def _told(result: Mapping[str, Any], measured: Front, to: Path) -> list[str]:
    """What came of the export, and what may be quoted of the child."""
    from llmprune.cli.front_tables import quoted_lines

    if result["exported"] is None:
        return [f"exported nothing: {result['not_exported']}"]
    exported = next(child for child in measured.children if child.id == result["exported"]["id"])
    return [f"exported {exported.id} to {to}", *(f"  {line}" for line in quoted_lines(exported))]


@app.command()
def search(
    run_path: RunPath,
    overrides: Overrides = None,
    recipe: Annotated[str | None, typer.Option(help="Recipe, Hub id, directory or GGUF, to start a new run.")] = None,
    workers: Workers = None,
    storage: Storage = None,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Search for architectures; continues the trials that are there, creates RUN (from --recipe) if there is none."""
    from llmprune.pipeline import commands

    of_run = recipe_of_run(run_path, recipe, overrides)
    if dry_run:
        return print_forecast(run_path, of_run, "search", workers, storage, json, quiet)
    with opened_run(run_path, of_run, quiet, storage, workers) as (run, report):
        outcome = commands.search(run, report)
    _print_outcome(outcome, json)


@app.command()
def worker(
    run_path: RunPath,
    device: Annotated[
        str | None, typer.Option(help="Where it computes, such as cuda:1; default: model.device.")
    ] = None,
    storage: Storage = None,
    leashed: Annotated[bool, typer.Option("--leashed", hidden=True)] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Help a search that `llmprune search` started: another process, on this machine or one like it."""
    if leashed:
        end_with_stdin()
    from llmprune.pipeline import commands
    from llmprune.pipeline.run import Run

    run = Run.join(run_path, storage=storage)
    run.recipe = on_device(run.recipe, device)
    run.show, report = watched(run.recipe, quiet)
    run.say = speaker(quiet)
    _print_outcome(commands.worker(run, report), json)


@app.command("storage-proxy")
def storage_proxy(
    storage: Storage = None,
    host: Annotated[str, typer.Option(help="Address to listen on; there is no password, so mind who reaches it.")] = (
        "localhost"
    ),
    port: Annotated[int, typer.Option(min=1, max=65535)] = 13000,
    quiet: Quiet = False,
) -> None:
    """Stand before a database for workers that only reach this host; they name --storage grpc://HOST:PORT."""
    from llmprune.search.workers.storage import serve_proxy

    if storage is None:
        raise StorageError("a proxy stands before a database; name it with --storage postgresql://...")
    serve_proxy(storage, host, port, speaker(quiet))


def _print_outcome(outcome: SearchOutcome, as_json: bool) -> None:
    from dataclasses import asdict

    from llmprune.search.failures import told

    emit(
        asdict(outcome),
        as_json,
        lambda: [
            f"{outcome.finished_trials} trials ({outcome.new_trials} new) in {outcome.seconds:.0f} s, "
            f"stopped by {outcome.stopped_by}",
            *told(outcome.failed_because),
            *outcome.lost_workers,
        ],
    )


@app.command()
def front(
    run_path: RunPath,
    overrides: Overrides = None,
    storage: Storage = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Choose among the best trials on validation tokens, measure the chosen on test tokens; prints the front."""
    from llmprune.cli.front_tables import front_table
    from llmprune.pipeline import commands

    with opened_run(run_path, recipe_of_run(run_path, None, overrides), quiet, storage) as (run, _):
        measured = commands.front(run)
    emit(measured.stored(), json, lambda: [front_table(measured)])


@app.command()
def baselines(
    run_path: RunPath,
    at: Annotated[list[float] | None, typer.Option(help="Measured speed-up to compare at; repeatable.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Which baseline; repeatable, default all.")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare published methods, luck and the run's front at the same measured speed; continues where it stopped."""
    from llmprune.cli.front_tables import baselines_table
    from llmprune.core.recipe import BaselinesRecipe
    from llmprune.pipeline import commands

    recipe = recipe_of_run(run_path, None, None)
    asked = {key: value for key, value in (("at", at), ("methods", method)) if value}
    rules = parse_section(BaselinesRecipe, recipe.baselines.model_dump() | asked)
    with opened_run(run_path, recipe, quiet) as (run, _):
        result = commands.baselines(run, rules)
    emit(result.to_json(), json, lambda: [baselines_table(result)])


@app.command()
def recover(
    run_path: Annotated[
        Path, typer.Argument(metavar="RUN|DIR", help="Run directory, or a checkpoint in one that stands for its child.")
    ],
    overrides: Overrides = None,
    pick: Annotated[str | None, typer.Option(help="decode_speedup>=1.5, ppl_ratio<=1.2, or a child's id.")] = None,
    minutes: Annotated[float | None, typer.Option(help="As recover.minutes=...")] = None,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Those beside the front too, on as many tokens.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Distil a child of the front from its parent, and put it in its place; a stopped training goes on. Several
    processes train together: torchrun --nproc_per_node 2 -m llmprune recover RUN."""
    from llmprune.cli.front_tables import front_table
    from llmprune.core.budgets import parse_pick
    from llmprune.pipeline import commands
    from llmprune.pipeline.exports import exported_id, run_behind
    from llmprune.recover.team import Team

    if exported_id(run_path) is not None:
        run_path, child = run_behind(run_path)
        pick = pick or child
    asked = [] if minutes is None else [f"recover.minutes={minutes}", "recover.tokens=null"]
    recipe = recipe_of_run(run_path, None, [*(overrides or []), *asked])
    wanted = parse_pick(pick or recipe.export.pick)
    with Team.of_launch(recipe.model.device) as team:
        if not team.leads:
            commands.recover(joined_run(run_path, recipe, team.device), wanted, team, baselines=baselines)
            return
        with opened_run(run_path, recipe, quiet) as (run, _):
            run.recipe = on_device(run.recipe, team.device)
            recovered = commands.recover(run, wanted, team, baselines=baselines)
    emit(recovered.stored(), json, lambda: [front_table(recovered)])


@app.command()
def report(
    run_path: RunPath,
    to: Annotated[Path | None, typer.Option(help="HTML file to write; default RUN/report.html.")] = None,
    figures: Annotated[Path | None, typer.Option(help="Directory for every chart as SVG and PNG besides.")] = None,
    storage: Storage = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write one HTML file that shows what a run has found, and what it is doing: no model is loaded."""
    from llmprune.pipeline.run import Run
    from llmprune.report.facts import gather
    from llmprune.report.page import write_figures, write_report

    run = Run.join(run_path, shown(quiet=quiet), storage=storage)
    to = to or run.directory.report
    with run.show("drawing what the run has found"):
        facts = gather(run)
        write_report(facts, to)
        drawn = [] if figures is None else write_figures(facts, figures)
    written = {"report": str(to), "bytes": to.stat().st_size, "figures": [str(path) for path in drawn]}
    emit(written, json, lambda: [f"{to}: {to.stat().st_size / 1e6:.1f} MB", *map(str, drawn)])


@app.command()
def export(
    run_path: RunPath,
    pick: Annotated[str | None, typer.Option(help="decode_speedup>=1.5, ppl_ratio<=1.2, or a child's id.")] = None,
    to: Annotated[Path | None, typer.Option(help="Directory to write; default RUN/export.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a checkpoint that is there; export even an unusable child.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a child of the front as a checkpoint, proven in a fresh process."""
    from llmprune.cli.front_tables import quoted_lines
    from llmprune.core.budgets import parse_pick
    from llmprune.measure.record import Record
    from llmprune.pipeline import commands

    recipe = recipe_of_run(run_path, None, None)
    wanted = parse_pick(pick or recipe.export.pick)
    with opened_run(run_path, recipe, quiet) as (run, _):
        written = commands.export(run, wanted, to or run.directory.export, force=force)
        _draw_card_figures(run, written["id"], Path(written["directory"]))
    emit(
        written,
        json,
        lambda: [
            f"exported {written['id']} to {written['directory']} ({written['proof']['params']:,} parameters, "
            f"logits within {written['proof']['max_logit_difference']:.1e} after a reload)",
            *(f"  {line}" for line in quoted_lines(Record.from_json(written["figures"]))),
        ],
    )


def main() -> None:
    """Entry point: turns errors into one line and an exit code."""
    try:
        app()
    except Exception as error:
        told = error if isinstance(error, LlmpruneError) else out_of_memory(error)
        if told is None:
            raise
        error_console().print("[red]error:[/red]", escape(_one_line(told)), soft_wrap=True)
        sys.exit(2)
    except SystemExit as ended:
        # typer catches Ctrl-C itself.
        if ended.code == 130:
            error_console().print("interrupted; the same command continues where this one stopped")
        raise


def _one_line(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines())
