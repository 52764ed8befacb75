"""The `llmprune` command: results on stdout, progress on stderr; exit 0 done, 1 our fault, 2 input, 130 Ctrl-C."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from llmprune.errors import LlmpruneError, RecipeError, StorageError
from llmprune.recipe import (
    SPLIT_NAMES,
    ModelRecipe,
    Recipe,
    SplitName,
    WorkloadRecipe,
    apply_overrides,
    load_recipe,
    parse_recipe,
    parse_section,
    with_absolute_paths,
)
from llmprune.recipe_files import DEFAULT_RECIPE, copy_recipe, recipe_names, recipe_path
from llmprune.terminal import (
    bench_table,
    console,
    error_console,
    evaluation_table,
    front_table,
    inspection_table,
    print_json,
    print_trial,
    shown,
)

if TYPE_CHECKING:
    from llmprune.search.study import SearchOutcome

app = typer.Typer(
    help="Search a pretrained causal LM for the smaller network that is best at a measured speed.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
recipes = typer.Typer(help="The recipes that come with llmprune.", no_args_is_help=True)
app.add_typer(recipes, name="recipes")

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. search.trials=100")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")]
Storage = Annotated[
    str | None,
    typer.Option(
        envvar="LLMPRUNE_STORAGE",
        metavar="URL",
        help="Where trials are kept: postgresql://USER@HOST:PORT/DATABASE or grpc://HOST:PORT; default: a file in RUN.",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace a checkpoint that is there.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Batch = Annotated[int, typer.Option(help="Sequences at a time.")]
Prompt = Annotated[int, typer.Option("--prompt-tokens", help="Tokens of the prompt.")]
Generated = Annotated[int, typer.Option("--generated-tokens", help="Tokens decoded after it.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; default: torch's own choice.")]
Repeats = Annotated[int, typer.Option(help="Interleaved repeats.")]


@app.command()
def compress(
    model_or_recipe: Annotated[str, typer.Argument(help="Recipe (.yaml), Hub id, checkpoint directory or GGUF file.")],
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("--out", help="Run directory.")] = Path("runs/run"),
    storage: Storage = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run every stage: search, re-measure the front, write its checkpoints, export the recipe's pick."""
    from llmprune import run as stages

    recipe = _recipe(model_or_recipe, overrides)
    with _run(out, recipe, quiet, storage) as (run, report):
        to = Path(recipe.export.to) if recipe.export.to else run.directory.export
        result = stages.compress(run, to, report=report)
    _print(result, json, lambda: [front_table(result), f"exported {result['exported']['hash']} to {to}"])


@app.command()
def search(
    run_path: RunPath,
    overrides: Overrides = None,
    recipe: Annotated[str | None, typer.Option(help="Recipe, Hub id, directory or GGUF, to start a new run.")] = None,
    storage: Storage = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Search for architectures; continues the trials that are there, creates RUN (from --recipe) if there is none."""
    from llmprune import run as stages

    with _run(run_path, _recipe_of_run(run_path, recipe, overrides), quiet, storage) as (run, report):
        outcome = stages.search(run, report)
    _print_outcome(outcome, json)


@app.command()
def worker(run_path: RunPath, storage: Storage = None, json: Json = False, quiet: Quiet = False) -> None:
    """Help a search that `llmprune search` started: another process, on this machine or one like it."""
    from llmprune import run as stages
    from llmprune.workspace import Run

    run = Run.join(run_path, shown(quiet=quiet), storage=storage)
    run.say = _say(quiet)
    _print_outcome(stages.worker(run, None if quiet else print_trial(error_console())), json)


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
    from llmprune.search.storage import serve_proxy

    if storage is None:
        raise StorageError("a proxy stands before a database; name it with --storage postgresql://...")
    serve_proxy(storage, host, port, _say(quiet))


def _print_outcome(outcome: SearchOutcome, as_json: bool) -> None:
    from dataclasses import asdict

    _print(
        asdict(outcome),
        as_json,
        lambda: [
            f"{outcome.finished_trials} trials ({outcome.new_trials} new) in {outcome.seconds:.0f} s, "
            f"stopped by {outcome.stopped_by}"
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
    """Re-measure the best trials on validation tokens, beside the baselines; prints the front."""
    from llmprune import run as stages

    with _run(run_path, _recipe_of_run(run_path, None, overrides), quiet, storage) as (run, _):
        measured = stages.front(run)
    _print(measured, json, lambda: [front_table(measured)])


@app.command()
def baselines(
    run_path: RunPath,
    at: Annotated[list[float] | None, typer.Option(help="Measured speed-up to compare at; repeatable.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Which baseline; repeatable, default all.")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare published methods, luck and the run's front at the same measured speed; continues where it stopped."""
    from llmprune.comparison import baselines as compared
    from llmprune.recipe import BaselinesRecipe
    from llmprune.terminal import baselines_table

    recipe = _recipe_of_run(run_path, None, None)
    asked = {key: value for key, value in (("at", at), ("methods", method)) if value}
    rules = parse_section(BaselinesRecipe, recipe.baselines.model_dump() | asked)
    with _run(run_path, recipe, quiet) as (run, _):
        result = compared(run, rules)
    _print(result, json, lambda: [baselines_table(result)])


@app.command()
def export(
    run_path: RunPath,
    pick: Annotated[str | None, typer.Option(help="decode_speedup>=1.5, ppl_ratio<=1.2, or a hash.")] = None,
    to: Annotated[Path | None, typer.Option(help="Directory to write; default RUN/export.")] = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a child of the front as a checkpoint, proven in a fresh process."""
    from llmprune import run as stages
    from llmprune.search.budgets import parse_pick

    recipe = _recipe_of_run(run_path, None, None)
    wanted = parse_pick(pick or recipe.export.pick)
    with _run(run_path, recipe, quiet) as (run, _):
        written = stages.export(run, wanted, to or run.directory.export, force=force)
    _print(
        written,
        json,
        lambda: [
            f"exported {written['hash']} to {written['directory']} ({written['proof']['params']:,} parameters, "
            f"logits within {written['proof']['max_logit_difference']:.1e} after a reload)"
        ],
    )


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Hub id, checkpoint directory or GGUF file.")],
    device: Device = "auto",
    dtype: Dtype = "float32",
    batch: Batch = 1,
    prompt_tokens: Prompt = 128,
    generated_tokens: Generated = 32,
    threads: Threads = None,
    repeats: Repeats = 3,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what can be pruned, layer by layer: parameters, bytes, share of measured time."""
    from llmprune.inspection import inspect_parent
    from llmprune.measure.throughput import Workload
    from llmprune.models.parent import load_parent

    rules = _workload(batch, prompt_tokens, generated_tokens, threads, repeats)
    with shown(quiet=quiet)("loading and timing"):
        parent = load_parent(_model(model, device, dtype))
        result = inspect_parent(parent, Workload.from_recipe(rules, dtype, str(parent.device)), repeats)
    _print(result, json, lambda: [inspection_table(result)])


@app.command()
def bench(
    models: Annotated[list[str], typer.Argument(help="Checkpoints; the first is the reference.")],
    device: Device = "auto",
    dtype: Dtype = "float32",
    batch: Batch = 1,
    prompt_tokens: Prompt = 128,
    generated_tokens: Generated = 32,
    threads: Threads = None,
    repeats: Repeats = 9,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time checkpoints side by side in one interleaved run."""
    from llmprune.checkup import bench as bench_models

    rules = _workload(batch, prompt_tokens, generated_tokens, threads, repeats)
    result = bench_models([_model(model, device, dtype) for model in models], rules, shown(quiet=quiet))
    _print(result, json, lambda: [bench_table(result)])


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Hub id, checkpoint directory or GGUF file.")],
    data: Annotated[Path | None, typer.Option(help="Run directory or recipe whose text is used.")] = None,
    split: Annotated[str, typer.Option(help="calibration, search, validation or test.")] = "test",
    device: Device = "auto",
    dtype: Dtype = "float32",
    batch: Batch = 1,
    prompt_tokens: Prompt = 128,
    generated_tokens: Generated = 32,
    threads: Threads = None,
    repeats: Repeats = 3,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Perplexity of a checkpoint on held-out tokens, and its tokens per second."""
    from llmprune.checkup import evaluate as evaluate_model

    rules = _workload(batch, prompt_tokens, generated_tokens, threads, repeats)
    result = evaluate_model(_model(model, device, dtype), data, _split_name(split), rules, shown(quiet=quiet))
    _print(result, json, lambda: [evaluation_table(result)])


@app.command()
def validate(
    recipe: Annotated[Path, typer.Argument(help="Recipe file.")],
    overrides: Overrides = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check a recipe without running it; prints it with every default."""
    from llmprune.recipe import to_yaml
    from llmprune.search.budgets import parse_budget, parse_pick

    checked = load_recipe(recipe, overrides)
    parse_pick(checked.export.pick)
    for budget in checked.search.budgets:
        parse_budget(budget)
    _print(checked.model_dump(mode="json"), json, lambda: [to_yaml(checked).rstrip()])


@app.command()
def schema(json: Json = True, quiet: Quiet = False) -> None:
    """Print the JSON schema of a recipe."""
    print_json(Recipe.model_json_schema())


@recipes.command("ls")
def recipes_ls(json: Json = False, quiet: Quiet = False) -> None:
    """List the recipes."""
    names = recipe_names()
    _print({"recipes": names}, json, lambda: list(names))


@recipes.command("cp")
def recipes_cp(
    name: Annotated[str, typer.Argument(help="A name that `recipes ls` prints.")],
    to: Annotated[Path, typer.Argument(help="File or directory.")] = Path(),
) -> None:
    """Copy a recipe, to change it."""
    print(copy_recipe(name, to))


def main() -> None:
    """Entry point: turns errors into one line and an exit code."""
    try:
        app()
    except LlmpruneError as error:
        error_console().print("[red]error:[/red]", escape(_one_line(error)), soft_wrap=True)
        sys.exit(2)
    except SystemExit as ended:
        # typer catches Ctrl-C itself.
        if ended.code == 130:
            error_console().print("interrupted; the same command continues where this one stopped")
        raise


def _one_line(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines())


def _print(data: Any, as_json: bool, lines: Any) -> None:
    if as_json:
        print_json(data)
        return
    target = console()
    for line in lines():
        target.print(line, markup=False) if isinstance(line, str) else target.print(line)


def _recipe(model_or_recipe: str, overrides: list[str] | None) -> Recipe:
    """A recipe file, or the default recipe for a model."""
    if model_or_recipe.endswith((".yaml", ".yml")):
        return with_absolute_paths(load_recipe(Path(model_or_recipe), overrides))
    import yaml

    path = recipe_path(DEFAULT_RECIPE)
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    data["model"]["path"] = model_or_recipe
    data = apply_overrides(data, overrides or [])
    return with_absolute_paths(parse_recipe(data, origin=f"the default recipe for {model_or_recipe}"))


def _recipe_of_run(run: Path, recipe: str | None, overrides: list[str] | None) -> Recipe:
    from llmprune.run_directory import RunDirectory

    if recipe is not None:
        return _recipe(recipe, overrides)
    directory = RunDirectory(run)
    if not directory.recipe.is_file():
        raise RecipeError(f"{run} is not a run directory yet; name a recipe or model with --recipe to start one")
    directory.stored_recipe()
    return load_recipe(directory.recipe, overrides)


@contextmanager
def _run(path: Path, recipe: Recipe, quiet: bool, storage: str | None = None) -> Iterator[tuple[Any, Any]]:
    """A locked run, and the callback that tells of its trials."""
    from llmprune.run_directory import RunDirectory
    from llmprune.workspace import Run

    with RunDirectory(path).locked():
        run = Run.start(path, recipe, shown(quiet=quiet))
        run.storage, run.say = storage, _say(quiet)
        yield run, None if quiet else print_trial(error_console())


def _say(quiet: bool) -> Callable[[str], None]:
    """A line for the user beside the steps: on stderr, like them."""
    target = error_console()
    return (lambda line: None) if quiet else lambda line: target.print(line, markup=False, soft_wrap=True)


def _model(path: str, device: str, dtype: str) -> ModelRecipe:
    return parse_section(ModelRecipe, {"path": path, "device": device, "dtype": dtype})


def _workload(
    batch: int, prompt_tokens: int, generated_tokens: int, threads: int | None, repeats: int
) -> WorkloadRecipe:
    values = {
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "generated_tokens": generated_tokens,
        "threads": threads,
        "repeats": repeats,
    }
    return parse_section(WorkloadRecipe, values)


def _split_name(name: str) -> SplitName:
    for known in SPLIT_NAMES:
        if name == known:
            return known
    raise RecipeError(f"--split is one of {', '.join(SPLIT_NAMES)}; got {name!r}")
