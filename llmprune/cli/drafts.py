"""The command that hands over a draft."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from llmprune.cli.options import Force, Json, Quiet, RunPath, emit, opened_run, recipe_of_run
from llmprune.cli.terminal import spread_text
from llmprune.core.budgets import parse_pick

app = typer.Typer()


@app.command()
def draft(
    run_path: RunPath,
    pick: Annotated[str, typer.Option(help="draft (the best), disagreement<=0.3, or a child's id.")] = ("draft"),
    to: Annotated[Path | None, typer.Option(help="Directory to write; default RUN/draft.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Test prompts that the parent goes on with.")] = 20,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="At most, behind each.")] = 128,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a child as the draft of its parent (speculative decoding), measure what that gives, and show how it is
    served; of a run with search.objective=draft."""
    from llmprune.pipeline import commands

    with opened_run(run_path, recipe_of_run(run_path, None, None), quiet) as (run, _):
        to = to or run.directory.draft
        written = commands.draft(run, parse_pick(pick), to, prompts=prompts, new_tokens=new_tokens, force=force)
    emit(written, json, lambda: list(_lines(written)))


def _lines(written: Mapping[str, Any]) -> Iterator[str]:
    found = written["decoding"]
    yield f"exported draft {written['id']} to {written['directory']}"
    yield (
        f"decoded {found['prompts']} test prompts, up to {found['new_tokens']} tokens behind each, beside the parent's "
        f"{found['tokens_per_s_alone']:.1f} tokens/s:"
    )
    yield f"  with the draft {_worth(found)}"
    yield f"  with prompt lookup, which needs no model, {_worth(found['lookup'])}"
    yield _sameness(found)
    for engine, command in written["commands"].items():
        yield f"{engine}: {command}"


def _worth(found: Mapping[str, Any]) -> str:
    return (
        f"{found['mean_speedup']:.2f}x ({spread_text(found['speedup'])} of single prompts), up to {found['drafted']} "
        f"drafted and {found['tokens_a_round']:.2f} written a round; these rounds foretell "
        f"{found['foretold_speedup']:.2f}x by passes measured just before"
    )


def _sameness(found: Mapping[str, Any]) -> str:
    if found["identical"] == found["prompts"]:
        return f"all {found['prompts']} texts are what the parent writes alone, token for token"
    told = f"{found['identical']} of {found['prompts']} texts are what the parent writes alone, token for token"
    if found["ties"]:
        told += f"; {found['ties']} part where two tokens are so near that rounding decides"
    if found["differ"]:
        told += f"; {found['differ']} part although no rounding explains it: do not use this draft, and report it"
    return told
