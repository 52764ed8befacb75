"""The command that looks at the machine."""

from __future__ import annotations

import typer
from rich.markup import escape
from rich.table import Table

from llmprune.cli.options import Json, Quiet, emit

app = typer.Typer()
_STYLES = {"ok": "green", "note": "yellow", "problem": "red"}


@app.command()
def doctor(json: Json = False, quiet: Quiet = False) -> None:
    """Say whether this machine is ready: versions, devices, memory, disk, llama.cpp, tokens. Exit code 2 if not."""
    from llmprune.pipeline.doctor import Finding, examine, examined

    def screen(findings: list[Finding]) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for one in findings:
            told = f"{one.told}; {one.todo}" if one.todo else one.told
            # Square brackets may be an extra of a package.
            table.add_row(f"[{_STYLES[one.state]}]{one.state}[/]", one.name, escape(told))
        return table

    findings = examine()
    result = examined(findings)
    emit(result, json, lambda: [screen(findings)])
    if not result["usable"]:
        raise typer.Exit(2)
