"""What a person sees: progress on stderr, tables on stdout."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as TimeLeft
from rich.table import Table
from rich.text import Text

from llmprune.core.progress import SEARCHING, Advance, Show, naming_steps, silent
from llmprune.measure.quality.agreement import Draft
from llmprune.measure.record import Quoted, Record, engine_of
from llmprune.measure.speed.throughput import Spread

# Piped output has no width of its own; a table cut at 80 columns would lose figures.
PIPED_WIDTH = 140
SECONDS_BETWEEN_LINES = 30


def console() -> Console:
    """stdout, for results."""
    return Console(width=None if sys.stdout.isatty() else PIPED_WIDTH, highlight=False)


def error_console() -> Console:
    """stderr, for progress and errors."""
    return Console(stderr=True, highlight=False)


class _Rate(ProgressColumn):
    """Steps a second, or seconds a step where one takes long."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each", style="dim")


def shown(*, quiet: bool, searching: RenderableType | None = None) -> Show:
    """How stages tell their progress: bars on stderr, lines where stderr is no terminal, nothing if quiet. `searching`
    is drawn beneath the bar of a search."""
    if quiet:
        return naming_steps(silent)
    target = error_console()
    return naming_steps(_bars(target, searching) if target.is_terminal else _lines(target))


class _Bars(Progress):
    """A bar, and what is drawn beneath it."""

    beneath: RenderableType | None = None

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.beneath is not None:
            yield self.beneath


def _bars(target: Console, searching: RenderableType | None) -> Show:
    @contextmanager
    def show(description: str) -> Iterator[Advance]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TimeElapsedColumn(),
            TimeLeft(),
        )
        bars = _Bars(*columns, console=target)
        bars.beneath = searching if description == SEARCHING else None
        with bars as progress:
            task = progress.add_task(description, total=None)

            def advance(done: int, total: int) -> None:
                progress.update(task, completed=done, total=total)

            yield advance
            # A step without parts is one part.
            if progress.tasks[0].total is None:
                advance(1, 1)

    return show


def _lines(target: Console) -> Show:
    """Where no bar can be drawn (a log, CI): a line at the start, every half minute, and at the end."""

    @contextmanager
    def show(description: str) -> Iterator[Advance]:
        started = last = time.monotonic()
        target.print(f"{description} ...", soft_wrap=True)

        def advance(done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= SECONDS_BETWEEN_LINES and 0 < done < total:
                last = now
                left = (now - started) / done * (total - done)
                target.print(f"  {description}: {done}/{total}, about {left:.0f} s left", soft_wrap=True)

        yield advance
        target.print(f"  {description}: done in {time.monotonic() - started:.0f} s", soft_wrap=True)

    return show


def print_trial(target: Console) -> Callable[[int, Record], None]:
    """A line a trial."""

    def report(finished: int, record: Record) -> None:
        as_draft = f", as a draft {differs(record)}" if record.draft else ""
        target.print(
            f"  trial {finished:>3}  {record.id}  decode {record.decode_speedup.median:.2f}x  "
            f"prefill {record.prefill_speedup.median:.2f}x  "
            f"{record.nats_per_token:.3f} nats/token ({record.ppl_ratio:.2f} x parent PPL){as_draft}",
            style="dim",
            soft_wrap=True,
        )

    return report


def print_json(data: Any) -> None:
    """One object on stdout."""
    sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def spread_text(spread: Spread | Mapping[str, float]) -> str:
    """A speed-up's median, 10th and 90th percentile."""
    spread = spread if isinstance(spread, Spread) else Spread(**spread)
    return f"{spread.median:.2f}x ({spread.low:.2f}-{spread.high:.2f})"


def draft_text(draft: Draft) -> str:
    """What a draft is worth to its parent."""
    return f"{draft.speedup:.2f}x (k={draft.drafted})" if draft.drafted else "1x (no draft)"


def differs(record: Record, on: Quoted | None = None) -> str:
    """How often a draft is wrong, and what it is worth; by the text that it was chosen on, or by another."""
    agreement = record.agreement if on is None else on.agreement
    draft = record.draft_on(agreement)
    assert agreement is not None and draft is not None, "it was measured as a draft"
    return f"{1 - agreement.share:.1%} differ: {draft_text(draft)}"


def bench_table(result: Mapping[str, Any]) -> Table:
    """Speeds side by side; the first model is the reference."""
    table = Table(title=f"Speed, measured side by side ({engine_of(result['measured_on']['workload'])})")
    table.add_column("model", overflow="fold")
    for column in ("params", "prefill tok/s", "speed-up", "decode tok/s", "speed-up"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in result["models"]:
        table.add_row(
            row["model"],
            f"{row['params'] / 1e6:.1f}M",
            f"{row['prefill_tokens_per_s']['median']:.0f}",
            spread_text(row["prefill_speedup"]),
            f"{row['decode_tokens_per_s']['median']:.1f}",
            spread_text(row["decode_speedup"]),
        )
    return table


_WORTH_TRYING = 0.1
"""Share of decode time from which on `inspect` names the vocabulary."""


def inspection_table(result: Mapping[str, Any]) -> Table:
    """What every block holds, and what it takes of the time."""
    shape, outside = result["shape"], result["outside_blocks"]
    table = Table(
        title=f"{result['model']} ({result['model_type']}): {result['params'] / 1e6:.1f}M parameters, "
        f"{result['bytes'] / 1e6:.0f} MB in {result['stored_as']}, {result['kv_bytes_per_token']:,} KV bytes a token",
        caption=f"hidden size {shape['hidden_size']}, {shape['queries_per_group']} query heads a KV group, "
        f"head dim {shape['head_dim']}; shares are of one pass; {outside['prefill']:.0%} of prefill and "
        f"{outside['decode']:.0%} of decode are outside of all blocks: embeddings, output, norms",
        caption_justify="left",
    )
    table.add_column("layer", justify="right")
    for kind, units in (("attention", "KV groups"), ("FFN", "width")):
        for column in (units, f"{kind} params", "MB", "of prefill", "of decode"):
            table.add_column(column, justify="right", no_wrap=True)
    for layer in result["layers"]:
        cells = [str(layer["layer"])]
        for kind, units in (("attention", "kv_groups"), ("ffn", "ffn_width")):
            block = layer[kind]
            cells += [f"{block[units]:,}", f"{block['params']:,}", f"{block['bytes'] / 1e6:.1f}"]
            cells += [f"{100 * block[share]:.1f}%" for share in ("prefill_share", "decode_share")]
        table.add_row(*cells)
    return table


def advice(result: Mapping[str, Any]) -> str:
    """Which dimension has the time, and what half of it could save at the most."""
    held, totals = result["vocabulary"], result["totals"]["decode"]
    named = {"attention": "attention", "ffn": "FFN", "vocabulary": "the output head"}
    parts = [f"{named[word]} {totals[word]:.0%}" for word in sorted(totals, key=lambda word: -totals[word])]
    text = (
        f"decode time goes to {', '.join(parts)}; {held['rows']:,} rows of embedding and head are "
        f"{held['params'] / result['params']:.0%} of the parameters"
    )
    if totals["vocabulary"] >= _WORTH_TRYING:
        most = 1 / (1 - totals["vocabulary"] / 2)
        text += (
            f": half of them would decode up to {most:.2f}x as many tokens a second, of text that is more tokens then; "
            "space.vocabulary=auto measures what pays"
        )
    return text


def formats_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What each format can hold."""
    table = Table(title="Formats", show_lines=True)
    for column in ("format", "holds", "served by"):
        table.add_column(column, overflow="fold", no_wrap=column == "format")
    for row in rows:
        table.add_row(row["format"], row["holds"], row["served_by"])
    return table


def push_lines(result: Mapping[str, Any]) -> list[str]:
    """What a push did; of a dry run, what it would do: the files, then the model card as it is."""
    total = sum(file["bytes"] for file in result["files"])
    told = f"{len(result['files'])} files, {total:,} bytes"
    if "card" in result:
        width = max(len(file["name"]) for file in result["files"])
        listed = [f"{file['name']:<{width}}  {file['bytes']:>15,}" for file in result["files"]]
        return [f"{told} would go to {result['repo']}", *listed, "", result["card"]]
    visible = "private" if result["private"] else "public"
    if not result["new_commit"]:
        return [f"{result['url']} ({visible}) has these {told} already, in commit {result['commit']}"]
    removed = f", {len(result['removed'])} files of an earlier push removed" if result["removed"] else ""
    return [f"pushed {told} to {result['url']} ({visible}){removed}", f"commit {result['commit_url']}"]
