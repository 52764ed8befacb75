"""The tables of a front and of the baselines: what is quoted of what was chosen, and on which text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from llmprune.cli.terminal import differs, draft_text, spread_text
from llmprune.core.recipe_inputs import SplitName
from llmprune.measure.record import Front, Record, cache_type_of, how_run, text_of
from llmprune.measure.resized import size_text
from llmprune.pipeline.comparison import Compared


def quoted_lines(record: Record) -> list[str]:
    """A line a split: what a child loses there."""
    return [
        f"{text_of(name, on)}: {on.nats_lost:+.3f} nats a token lost, perplexity {on.ppl:.2f} "
        f"({on.ppl_ratio:.2f} x the parent's)"
        + (f"; the same likeliest token before {on.likeness.same_top:.0%}" if on.likeness else "")
        + (f"; as a draft {differs(record, on)}" if record.draft else "")
        for name, on in record.quoted.items()
    ]


def front_table(front: Front) -> Table:
    """The measured front, and the baselines beside it."""
    on, splits = front.parent.measured_on, list(front.parent.quoted)
    workload = on.workload
    quoted = "; ".join(text_of(name, found) for name, found in front.parent.quoted.items())
    marked = any(not record.usable for record in (*front.children, *front.baselines))
    table = Table(
        title="Front, measured",
        caption=(
            f"Nats and perplexity: {quoted}. Chosen on other text, the {on.split} split of "
            f"{on.dataset}. Batch {workload['batch']}, {workload['prompt_tokens']} prompt + "
            f"{workload['generated_tokens']} generated tokens, {workload['dtype']}, {workload['threads']} threads on "
            f"{workload['device']}{how_run(workload)}{_timed_by(workload, front)}. "
            f"Speed-ups are medians of paired ratios (10th-90th percentile).{_of_fewer_rows(front)}{_of_drafts(front)}"
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
    table.add_row(*_cells("parent", front.parent, splits))
    table.add_section()
    for record in front.children:
        table.add_row(*_cells("child", record, splits))
    table.add_section()
    for record in front.baselines:
        table.add_row(*_cells(record.name, record, splits))
    if front.one_shot:
        table.add_section()
    for record in front.one_shot:
        name = record.name if any(record.hash == one.hash for one in front.baselines) else "child"
        table.add_row(*_cells(f"{name}, before", record, splits))
    return table


def _cells(label: str, record: Record, splits: Sequence[SplitName]) -> Iterator[str]:
    done = "".join(f"\n[dim]{name}[/dim]" for name in record.done)
    yield f"{label}\n[dim]{record.id}[/dim]{done}" + ("" if record.usable else "\n[red]unusable[/red]")
    yield f"{record.params / 1e6:.1f}M"
    # Which types, the architecture says.
    stored = "GGUF mixed" if "+" in record.stored_as else record.stored_as
    yield f"{record.bytes / 1e6:.0f}M\n[dim]{stored}\n{record.bits:.1f} bits[/dim]"
    yield f"{record.kv_bytes_per_token:,}"
    for split in splits:
        on = record.quoted[split]
        alike = f"\n[dim]{on.likeness.same_top:.0%} same top[/dim]" if on.likeness else ""
        if record.draft:
            alike = f"\n[bold]{differs(record, on)}[/bold]"
        yield f"{on.nats_per_token:.3f} ({on.nats_lost:+.3f})\n{on.ppl:.2f} ({on.ppl_ratio:.2f}x){alike}"
    yield f"{record.prefill_tokens_per_s.median:.0f}\n{spread_text(record.prefill_speedup)}"
    yield f"{record.decode_tokens_per_s.median:.1f}\n{spread_text(record.decode_speedup)}"


def _of_fewer_rows(front: Front) -> str:
    """What the parent is beside the whole one, where that was cut as a whole."""
    resized = front.resized
    if resized is None or resized.is_whole:
        return ""
    chosen = resized.chosen
    return (
        f" The parent has {size_text(chosen, resized.whole)} of {size_text(resized.whole)} and lost "
        f"{resized.loss(chosen):+.1%} nats a byte by that (validation text); bytes of text a second over the whole "
        f"parent's are these speed-ups x {resized.text_speedup(chosen, 'decode'):.3f} in decode, x "
        f"{resized.text_speedup(chosen, 'prefill'):.3f} in prefill."
    )


def _of_drafts(front: Front) -> str:
    """What the figures of drafts mean, and what they stand beside."""
    if front.parent.draft is None or front.lookup is None:
        return ""
    return (
        " The parent wrote the text, greedily, behind the first tokens of each window. Differ: tokens before which a "
        "child finds another one likeliest; behind it how much faster the parent decodes, losing nothing, with the "
        "child as draft of k tokens a round, by counted rounds and measured passes. Prompt lookup, which needs no "
        f"model: {draft_text(front.lookup)} (validation text)."
    )


def _timed_by(workload: Mapping[str, Any], front: Front) -> str:
    """The engine, where it is not the one that scored."""
    if workload.get("engine", "torch") == "torch":
        return ""
    types = " (mixed: some blocks in a type of their own)" if any("+" in r.stored_as for r in front.every) else ""
    how = f"with a KV cache of {cache_type_of(workload)}, from {workload['gguf_type']} GGUF files{types}"
    return f"; timed in llama.cpp {how}, scored in torch"


def baselines_table(result: Compared) -> Table:
    """What each method loses at the same measured speed-ups, and what choosing its child cost."""
    quoted, chosen_by = result.parent.quoted, result.parent.measured_on
    cells = {(entry["method"], entry["at"]): entry for entry in result.results}
    targets, phase = sorted({at for _, at in cells}), result.speed.removesuffix("_speedup")
    splits, chosen_on = list(quoted), chosen_by.split
    has = ", ".join(f"{on.nats_per_token:.3f} on {name}" for name, on in quoted.items())
    texts = [*(text_of(name, on) for name, on in quoted.items()), text_of(chosen_on, chosen_by)]
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


def _compared(entry: Mapping[str, Any] | None, splits: Sequence[SplitName]) -> tuple[str, str, str]:
    if entry is None:
        return "", "", ""
    lost, effort = "out of reach", entry["effort"]
    if entry["nats_lost"] is not None:
        sign = "~" if entry["interpolated"] else ""
        losses = [*(entry[name]["nats_lost"] for name in splits), entry["nats_lost"]]
        # JSON has no infinity; a loss that is one is None there.
        lost = "\n".join(f"{sign}inf" if loss is None else f"{sign}{loss:+.3f}" for loss in losses)
    elif not entry["why"].startswith(lost):
        lost = "failed"
    return lost, f"{effort['minutes']:.1f}", f"{effort['forward_equivalents']:.0f}"
