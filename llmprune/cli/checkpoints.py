"""The commands that work on checkpoints, whoever wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llmprune.cli.options import (
    Batch,
    ChatTemplate,
    Device,
    Dtype,
    FewShot,
    Force,
    Generated,
    IncludePath,
    Json,
    Limit,
    Multiturn,
    Output,
    OwnDtype,
    Parent,
    Prompt,
    Quiet,
    Repeats,
    TaskBatch,
    Tasks,
    Threads,
    emit,
    model_recipe,
    speaker,
    split_name,
    task_names,
    workload_recipe,
)
from llmprune.cli.terminal import advice, bench_table, formats_table, inspection_table, shown
from llmprune.core.recipe import DeployRecipe
from llmprune.core.recipe_text import parse_section

GgufWeights = Annotated[str, typer.Option("--gguf-type", help="f32, f16 or q8_0: how gguf stores weights.")]

app = typer.Typer(no_args_is_help=True)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Hub id, checkpoint directory or GGUF file.")],
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch: Batch = 1,
    prompt_tokens: Prompt = 128,
    generated_tokens: Generated = 32,
    threads: Threads = None,
    repeats: Repeats = 3,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show which recipe fits this machine, and what can be pruned, layer by layer: parameters, bytes, share of measured
    time; and what that can reach."""
    from llmprune.cli.forecast_view import recipe_lines
    from llmprune.measure.speed.throughput import Workload
    from llmprune.models.loading import dtype_of
    from llmprune.models.parent import load_parent
    from llmprune.pipeline.fitting import advise_on
    from llmprune.pipeline.inspection import inspect_parent
    from llmprune.tables.reach import described, reach_from_json

    rules = workload_recipe(batch, prompt_tokens, generated_tokens, threads, repeats)
    recipe, show = model_recipe(model, device, dtype), shown(quiet=quiet)
    # Before the weights are there, which take memory.
    recipes = advise_on(recipe, Path(), show)
    with show("loading and timing"):
        parent = load_parent(recipe)
        workload = Workload.from_recipe(rules, dtype_of(parent.model), str(parent.device))
        result = {**inspect_parent(parent, workload, repeats), "recipes": recipes}
    reached = described(reach_from_json(result["reach"]))
    emit(result, json, lambda: [inspection_table(result), advice(result), reached, *recipe_lines(recipes, model)])


@app.command()
def bench(
    models: Annotated[list[str], typer.Argument(help="Checkpoints; the first is the reference.")],
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch: Batch = 1,
    prompt_tokens: Prompt = 128,
    generated_tokens: Generated = 32,
    threads: Threads = None,
    repeats: Repeats = 9,
    engine: Annotated[str, typer.Option(help="torch, or llamacpp: then models are timed from GGUF files.")] = "torch",
    gguf_type: GgufWeights = "f16",
    cache_type: Annotated[str, typer.Option(help="f16 or q8_0: how llama.cpp stores the KV cache.")] = "f16",
    compiled: Annotated[bool, typer.Option("--compile", help="As torch.compile makes them.")] = False,
    graphs: Annotated[
        bool | None, typer.Option("--graphs/--no-graphs", help="As CUDA graphs; default: on a CUDA device.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time checkpoints side by side in one interleaved run."""
    from llmprune.evaluation.bench import bench as bench_models

    how: dict[str, Any] = {"engine": engine, "cache_type": cache_type, "compile": compiled}
    how["graphs"] = "auto" if graphs is None else graphs
    rules = workload_recipe(batch, prompt_tokens, generated_tokens, threads, repeats, **how)
    files = parse_section(DeployRecipe, {"gguf_type": gguf_type})
    recipes = [model_recipe(model, device, dtype) for model in models]
    result = bench_models(recipes, rules, shown(quiet=quiet), gguf_type=files.gguf_type)
    emit(result, json, lambda: [bench_table(result)])


@app.command()
def compare(
    models: Annotated[list[str], typer.Argument(help="Exported children, or run directories that stand for theirs.")],
    parent: Parent = None,
    data: Annotated[Path | None, typer.Option(help="Run directory or recipe whose text is read.")] = None,
    split: Annotated[str, typer.Option(help="calibration, search, validation, test or unseen.")] = "test",
    most: Annotated[int, typer.Option(min=1, max=100, help="Tokens and passages that are shown of each child.")] = 5,
    html: Annotated[Path | None, typer.Option(help="HTML file to write besides.")] = None,
    device: Device = "auto",
    dtype: OwnDtype = "auto",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what children keep, what was measured of them, and where they behave unlike their parent."""
    from llmprune.evaluation.comparing import compare as compare_models
    from llmprune.evaluation.comparing import comparison_tables
    from llmprune.evaluation.comparison_page import write_comparison

    result = compare_models(
        models,
        parent,
        data=data,
        split=split_name(split),
        most=most,
        device=device,
        dtype=dtype,
        show=shown(quiet=quiet),
        say=speaker(quiet),
    )
    if html is not None:
        write_comparison(result, html)
    emit(result, json, lambda: comparison_tables(result))


@app.command("eval")
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Checkpoints (Hub id, directory, GGUF) or run directories.")],
    parent: Parent = None,
    tasks: Tasks = None,
    limit: Limit = None,
    num_fewshot: FewShot = None,
    include_path: IncludePath = None,
    apply_chat_template: ChatTemplate = False,
    fewshot_as_multiturn: Multiturn = None,
    task_batch: TaskBatch = 1,
    output: Output = None,
    data: Annotated[Path | None, typer.Option(help="Run directory or recipe whose text is used.")] = None,
    split: Annotated[str, typer.Option(help="calibration, search, validation, test or unseen.")] = "test",
    device: Device = "auto",
    dtype: OwnDtype = "auto",
    batch: Batch = 1,
    prompt_tokens: Prompt = 128,
    generated_tokens: Generated = 32,
    threads: Threads = None,
    repeats: Repeats = 3,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Perplexity, tokens per second and lm-eval tasks of models, beside their parent; continues where it stopped."""
    from llmprune.evaluation.evaluate import Questions
    from llmprune.evaluation.evaluate import evaluate as evaluate_models
    from llmprune.evaluation.table import evaluation_table

    rules = workload_recipe(batch, prompt_tokens, generated_tokens, threads, repeats)
    questions = Questions(
        rules,
        task_names(tasks),
        limit,
        num_fewshot,
        include_path,
        apply_chat_template,
        fewshot_as_multiturn,
        task_batch,
        data=data,
        split=split_name(split),
    )
    result = evaluate_models(
        models,
        parent,
        questions,
        device=device,
        dtype=dtype,
        output=output,
        show=shown(quiet=quiet),
        say=speaker(quiet),
    )
    emit(result, json, lambda: [evaluation_table(result)])


@app.command()
def formats(json: Json = False, quiet: Quiet = False) -> None:
    """List the formats a child can be written in, what each can hold, and what serves it."""
    from llmprune.formats.limits import described

    rows = described()
    emit({"formats": rows}, json, lambda: [formats_table(rows)])


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="Checkpoint directory, Hub id or GGUF file.")],
    form: Annotated[list[str], typer.Option("--format", help="gguf, vllm or torchao; repeatable.")],
    gguf_type: GgufWeights = "f16",
    to: Annotated[Path | None, typer.Option(help="Directory to write to; default: the checkpoint's own.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16: what weights are read as.")] = "float32",
    device: Device = "cpu",
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a checkpoint in further formats, each proven as far as it can be run here."""
    from llmprune.publish.conversion import convert as convert_checkpoint

    rules = parse_section(DeployRecipe, {"formats": form, "gguf_type": gguf_type})
    recipe = model_recipe(model, device, dtype)
    result = convert_checkpoint(recipe, rules, to, shown(quiet=quiet), force=force)
    lines = [f"{row['format']}: {result['directory']}/{row['file']} ({row['proof']})" for row in result["formats"]]
    emit(result, json, lambda: lines)


@app.command()
def push(
    path: Annotated[Path, typer.Argument(metavar="RUN|DIR", help="Run directory (its export), or a checkpoint.")],
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="Repository on the Hub; made if it is missing.")],
    licence: Annotated[
        str | None, typer.Option(help="The parent's licence, whose terms you have read; default: deploy.licence.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make the repository public; default: private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to; default: main.")] = None,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show files and model card; send nothing.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Push an exported checkpoint to the Hugging Face Hub, with a model card; continues where it stopped."""
    from dataclasses import asdict

    from llmprune.cli.terminal import push_lines
    from llmprune.pipeline.run_directory import RunDirectory
    from llmprune.publish import hub
    from llmprune.publish.contents import read_contents

    hub.check_repo(repo)
    of_run = RunDirectory(path)
    contents = read_contents(of_run.export if of_run.recipe.is_file() else path, shown(quiet=quiet))
    token = None if dry_run else hub.required_token()
    card = hub.card_of(contents, repo, hub.settled_licence(contents, licence, token))
    files = [{"name": f.path_in_repo, "bytes": f.upload_info.size} for f in hub.additions_of(contents, card)]
    result = {"repo": repo, "files": files, "card": card}
    if token is not None:
        pushed = hub.push(contents, card, repo, token, public=public, revision=revision, message=message, quiet=quiet)
        result = {"repo": repo, "files": files, **asdict(pushed)}
    emit(result, json, lambda: push_lines(result))


@app.command()
def prove(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Exported checkpoint that was trained or changed since.")
    ],
    data: Annotated[
        Path | None, typer.Option(help="Run directory whose text it is judged on; default: its own.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code beside the weights that is not llmprune's.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prove and judge a changed checkpoint anew, under a name of its own: then it is pushed like any other."""
    from llmprune.cli.front_tables import quoted_lines
    from llmprune.evaluation.proving import prove_anew
    from llmprune.measure.record import Record

    result = prove_anew(directory, data, shown(quiet=quiet), trust_remote_code=trust_remote_code)
    off = result["proof"]["max_logit_difference"]
    proven = f"{directory} is {result['id']}, proven (logits within {off:.1e} after a reload)"
    emit(result, json, lambda: [proven, *(f"  {line}" for line in quoted_lines(Record.from_json(result["figures"])))])
