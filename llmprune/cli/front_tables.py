"""The tables of a front and of the baselines: what is quoted of what was chosen, and on which text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from llmprune.cli.terminal import spread_text
from llmprune.search.judging import QUOTED


def quoted_splits(parent: Mapping[str, Any]) -> list[str]:
    """Names of the splits that figures are quoted of, in a front or comparison with this parent."""
    return [name for name in QUOTED if name in parent]


def text_of(name: str, quoted: Mapping[str, Any]) -> str:
    """What the figures of a split must not be quoted without."""
    return (
        f"{name} ({quoted['dataset']}, {quoted['tokens']:,} tokens in windows of {quoted['seq_len']}, "
        f"{'with' if quoted['bos'] else 'no'} BOS)"
    )


def quoted_lines(record: Mapping[str, Any]) -> list[str]:
    """A line a split: what a child loses there."""
    return [
        f"{text_of(name, record[name])}: {_figure(record[name]['nats_lost'], '+.3f')} nats a token lost, perplexity "
        f"{_figure(record[name]['ppl'], '.2f')} ({_figure(record[name]['ppl_ratio'], '.2f')} x the parent's)"
        for name in quoted_splits(record)
    ]


def front_table(front: Mapping[str, Any]) -> Table:
    """The measured front, and the baselines beside it."""
    parent = front["parent"]
    measured_on, splits = parent["measured_on"], quoted_splits(parent)
    workload = measured_on["workload"]
    quoted = "; ".join(text_of(name, parent[name]) for name in splits)
    marked = any(not record["usable"] for record in (*front["children"], *front["baselines"]))
    table = Table(
        title="Front, measured",
        caption=(
            f"Nats and perplexity: {quoted}. Chosen on other text, the {measured_on['split']} split of "
            f"{measured_on['dataset']}. Batch {workload['batch']}, {workload['prompt_tokens']} prompt + "
            f"{workload['generated_tokens']} generated tokens, {workload['dtype']}, {workload['threads']} threads on "
            f"{workload['device']}{', compiled' if workload.get('compile') else ''}{_timed_by(workload)}. Speed-ups "
            "are medians of paired ratios (10th-90th percentile)."
            + (" Unusable: perplexity beyond front.usable_ppl_ratio times the parent's." if marked else "")
        ),
        caption_justify="left",
    )
    table.add_column("", no_wrap=True)
    of_splits = (f"{name}: nats (lost)\nPPL (x parent)" for name in splits)
    for column in ("params", "bytes", "KV bytes\na token", *of_splits):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("prefill tokens/s\nspeed-up", "decode tokens/s\nspeed-up"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_row(*_cells("parent", parent, splits))
    table.add_section()
    for record in front["children"]:
        table.add_row(*_cells("child", record, splits))
    table.add_section()
    for record in front["baselines"]:
        table.add_row(*_cells(record["name"], record, splits))
    return table


def _cells(label: str, record: Mapping[str, Any], splits: list[str]) -> Iterator[str]:
    yield f"{label}\n[dim]{record['hash']}[/dim]" + ("" if record["usable"] else "\n[red]unusable[/red]")
    yield f"{record['params'] / 1e6:.1f}M"
    yield f"{record['bytes'] / 1e6:.0f}M\n[dim]{_stored_as(record)}[/dim]"
    yield f"{record['kv_bytes_per_token']:,}"
    for split in splits:
        on = record[split]
        nats, ppl = _figure(on["nats_per_token"], ".3f"), _figure(on["ppl"], ".2f")
        yield f"{nats} ({_figure(on['nats_lost'], '+.3f')})\n{ppl} ({_figure(on['ppl_ratio'], '.2f')}x)"
    yield f"{record['prefill_tokens_per_s']['median']:.0f}\n{spread_text(record['prefill_speedup'])}"
    yield f"{record['decode_tokens_per_s']['median']:.1f}\n{spread_text(record['decode_speedup'])}"


def _stored_as(record: Mapping[str, Any]) -> str:
    """How the weights are stored whose bytes a record counts; older records count torch's and do not say so."""
    return str(record.get("stored_as", record["measured_on"]["workload"]["dtype"]))


def _figure(value: float | None, form: str) -> str:
    """JSON has no infinity; a figure that is one is None there."""
    return "inf" if value is None else format(value, form)


def _timed_by(workload: Mapping[str, Any]) -> str:
    """The engine, where it is not the one that scored."""
    if workload.get("engine", "torch") == "torch":
        return ""
    return f"; timed in llama.cpp from {workload['gguf_type']} GGUF files, scored in torch"


def baselines_table(result: Mapping[str, Any]) -> Table:
    """What each method loses at the same measured speed-ups, and what choosing its child cost."""
    parent, cells = result["parent"], {(entry["method"], entry["at"]): entry for entry in result["results"]}
    measured_on, targets = parent["measured_on"], sorted({at for _, at in cells})
    phase, splits = result["speed"].removesuffix("_speedup"), quoted_splits(parent)
    chosen_on = measured_on["split"]
    has = ", ".join(f"{parent[name]['nats_per_token']:.3f} on {name}" for name in splits)
    texts = [*(text_of(name, parent[name]) for name in splits), text_of(chosen_on, measured_on)]
    table = Table(
        title=f"Nats a token lost at measured {phase} speed-ups (the parent has {has})",
        caption=f"{'; '.join(texts)}. Children are settled on by the {chosen_on} split, and by no other figure; "
        "~ interpolated between two measured children. Minutes of choosing; evals: forward passes over the search "
        "tokens, passes for statistics and tables included",
        caption_justify="left",
        min_width=90,
    )
    table.add_column("method")
    table.add_column("text", no_wrap=True)
    for at in targets:
        for column in (f"lost at {at:g}x", "min", "evals"):
            table.add_column(column, justify="right", no_wrap=True)
    for method in dict.fromkeys(method for method, _ in cells):
        row = (text for at in targets for text in _compared(cells.get((method, at)), splits))
        table.add_row(method, "\n".join([*splits, chosen_on]), *row)
    return table


def _compared(entry: Mapping[str, Any] | None, splits: list[str]) -> tuple[str, str, str]:
    if entry is None:
        return "", "", ""
    lost, effort = "out of reach", entry["effort"]
    if entry["nats_lost"] is not None:
        sign = "~" if entry["interpolated"] else ""
        losses = [*(entry[name]["nats_lost"] for name in splits), entry["nats_lost"]]
        lost = "\n".join(f"{sign}{_figure(loss, '+.3f')}" for loss in losses)
    elif not entry["why"].startswith(lost):
        lost = "failed"
    return lost, f"{effort['minutes']:.1f}", f"{effort['forward_equivalents']:.0f}"
