"""What the commands of `llmprune` share: their options, the recipe and run behind them, and how results are printed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmprune.cli.terminal import console, error_console, print_json, print_trial, shown
from llmprune.core.errors import RecipeError, TaskError, quoted, shortened
from llmprune.core.progress import Show
from llmprune.core.recipe import Recipe, WorkloadRecipe
from llmprune.core.recipe_files import DEFAULT_RECIPE, recipe_path
from llmprune.core.recipe_inputs import SPLIT_NAMES, ModelRecipe, SplitName
from llmprune.core.recipe_text import apply_overrides, load_recipe, parse_recipe, parse_section, with_absolute_paths
from llmprune.core.yaml_text import read_yaml_file

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from llmprune.measure.record import Record

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
Workers = Annotated[
    str | None,
    typer.Option(
        "--workers",
        metavar="DEVICE,...",
        help="Search in several processes: cuda:0,cuda:1 (a GPU each) or cpu,cpu (sharing the cores); all other stages "
        "are on the first.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what it would cost, stage by stage; write nothing.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a checkpoint that is there.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, or cuda:0,cuda:1 to spread a model.")]
Dtype = Annotated[
    str, typer.Option(help="auto (the checkpoint's own on a GPU, float32 on a CPU), float32, bfloat16 or float16.")
]
Batch = Annotated[int, typer.Option(help="Sequences at a time.")]
Prompt = Annotated[int, typer.Option("--prompt-tokens", help="Tokens of the prompt.")]
Generated = Annotated[int, typer.Option("--generated-tokens", help="Tokens decoded after it.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; default: torch's own choice.")]
Repeats = Annotated[int, typer.Option(help="Interleaved repeats.")]
# Of `eval`.
Parent = Annotated[str | None, typer.Option(help="What the models were pruned from; default: what they or RUN name.")]
Tasks = Annotated[str | None, typer.Option(metavar="NAME,...", help="lm-eval tasks, groups or tags.")]
Limit = Annotated[int | None, typer.Option(help="Take the first so many documents of each task.")]
FewShot = Annotated[int | None, typer.Option("--num-fewshot", help="Examples in a prompt; default: the task's own.")]
IncludePath = Annotated[Path | None, typer.Option("--include-path", help="Directory with task files of your own.")]
ChatTemplate = Annotated[
    bool, typer.Option("--apply-chat-template", help="Render prompts of tasks through the tokenizer's chat template.")
]
Multiturn = Annotated[
    bool | None,
    typer.Option(help="Make each few-shot example a turn of its own; default: with --apply-chat-template."),
]
TaskBatch = Annotated[int, typer.Option("--task-batch", min=1, help="Requests of a task at a time.")]
Output = Annotated[Path | None, typer.Option("--output", help="JSON file for the results.")]
OwnDtype = Annotated[str, typer.Option("--dtype", help="auto (the checkpoint's own), float32, bfloat16 or float16.")]


def emit(data: Any, as_json: bool, lines: Any) -> None:
    """The result on stdout: one JSON object, or what `lines()` gives."""
    if as_json:
        print_json(data)
        return
    target = console()
    for line in lines():
        # soft_wrap: a line of text is the terminal's to wrap, and stays a line in a file.
        target.print(line, markup=False, soft_wrap=True) if isinstance(line, str) else target.print(line)


def recipe_from(model_or_recipe: str, overrides: list[str] | None, by: str | None = None) -> Recipe:
    """A recipe file; or for a model the recipe called `by` that comes along, by default the default one."""
    if model_or_recipe.endswith((".yaml", ".yml")):
        if by is not None:
            raise RecipeError(f"--recipe names the recipe for a model; {shortened(model_or_recipe)} is a recipe itself")
        return with_absolute_paths(load_recipe(Path(model_or_recipe), overrides))
    name = by or DEFAULT_RECIPE
    data = read_yaml_file(recipe_path(name))
    data["model"]["path"] = model_or_recipe
    data = apply_overrides(data, overrides or [])
    return with_absolute_paths(parse_recipe(data, origin=f"the {name} recipe for {shortened(model_or_recipe)}"))


def recipe_of_run(run: Path, recipe: str | None, overrides: list[str] | None) -> Recipe:
    """The recipe that a run goes on with; with `recipe`, the one that it starts with. Raises RecipeError."""
    from llmprune.pipeline.run_directory import RunDirectory

    if recipe is not None:
        return recipe_from(recipe, overrides)
    directory = RunDirectory(run)
    if not directory.recipe.is_file():
        raise RecipeError(f"{run} is not a run directory yet; name a recipe or model with --recipe to start one")
    directory.stored_recipe()
    return load_recipe(directory.recipe, overrides)


@contextmanager
def opened_run(
    path: Path, recipe: Recipe, quiet: bool, storage: str | None = None, workers: str | None = None
) -> Iterator[tuple[Any, Any]]:
    """A locked run, and the callback that tells of its trials; `workers` are the devices that it searches on."""
    from llmprune.pipeline.run import Run
    from llmprune.pipeline.run_directory import RunDirectory

    devices: tuple[str, ...] = ()
    if workers is not None:
        from llmprune.pipeline.crew import devices_of

        devices = devices_of(workers, recipe)
    with RunDirectory(path).locked():
        show, report = watched(recipe, quiet)
        run = Run.start(path, recipe, show)
        run.storage, run.say = storage, speaker(quiet)
        run.recipe, run.workers = on_device(run.recipe, next(iter(devices), None)), devices[1:]
        yield run, report


def watched(recipe: Recipe, quiet: bool) -> tuple[Show, Any]:
    """How the stages of a run tell their progress, and the callback that tells of its trials."""
    if quiet:
        return shown(quiet=True), None
    from llmprune.cli.search_view import SearchView

    view = SearchView(recipe.search.axes, recipe.search.targets)
    line = print_trial(error_console())

    def report(finished: Sequence[FrozenTrial], made: Record) -> None:
        view.look(finished)
        line(len(finished), made)

    return shown(quiet=False, searching=view), report


def joined_run(path: Path, recipe: Recipe, device: str | None) -> Any:
    """A run that another process holds, to read."""
    from llmprune.pipeline.run import Run
    from llmprune.pipeline.run_directory import RunDirectory

    return Run(RunDirectory(path), on_device(recipe, device), joined=True)


def on_device(recipe: Recipe, device: str | None) -> Recipe:
    """The recipe for one process of several, if it was told where to compute."""
    model = recipe.model.model_copy(update={"device": device}) if device else recipe.model
    return recipe.model_copy(update={"model": model})


def speaker(quiet: bool) -> Callable[[str], None]:
    """A line for the user beside the steps: on stderr, like them."""
    target = error_console()
    return (lambda line: None) if quiet else lambda line: target.print(line, markup=False, soft_wrap=True)


def model_recipe(path: str, device: str, dtype: str) -> ModelRecipe:
    """The model section of a command's options. Raises RecipeError."""
    return parse_section(ModelRecipe, {"path": path, "device": device, "dtype": dtype})


def workload_recipe(
    batch: int, prompt_tokens: int, generated_tokens: int, threads: int | None, repeats: int, **others: Any
) -> WorkloadRecipe:
    """The workload section of a command's options. Raises RecipeError."""
    values = {
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "generated_tokens": generated_tokens,
        "threads": threads,
        "repeats": repeats,
        **others,
    }
    return parse_section(WorkloadRecipe, values)


def task_names(text: str | None) -> tuple[str, ...]:
    """The names in a list with commas, each once. Raises TaskError if there is none in it."""
    names = tuple(dict.fromkeys(name.strip() for name in (text or "").split(",") if name.strip()))
    if text is not None and not names:
        raise TaskError(f"--tasks must name a task, such as piqa,arc_easy; got {quoted(text)}")
    return names


def split_name(name: str) -> SplitName:
    """A split by name. Raises RecipeError."""
    for known in SPLIT_NAMES:
        if name == known:
            return known
    raise RecipeError(f"--split is one of {', '.join(SPLIT_NAMES)}; got {quoted(name)}")
