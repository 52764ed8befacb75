"""The charts of models whose tokens leave early: which leave where, and what rules the search had to choose from."""

from __future__ import annotations

from collections.abc import Iterator

import altair as alt

from llmprune.exits.record import EstimatedExits, ExitsFound, rules_text
from llmprune.report.drawing import Figure, data_of
from llmprune.report.rows import Row

WIDTH = 460


def exit_figures(found: ExitsFound) -> list[Figure]:
    """Those of a run's `exits.json`."""
    return [_depths(found), _rules(found)]


def _depths(found: ExitsFound) -> Figure:
    rows = list(depth_rows(found))
    base = alt.Chart(data_of(rows))
    layers = sorted({layer for record in found.records for layer in record.rules["layers"]})
    order = [*(f"behind layer {layer}" for layer in layers), "by none"]
    chart = base.mark_bar().encode(
        y=alt.Y("model:N", title=None, sort=None, axis=alt.Axis(labelLimit=320)),
        x=alt.X("share:Q", title="share of tokens", axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, 1])),
        color=alt.Color("left:N", title="left", sort=order, scale=alt.Scale(scheme="viridis")),
        row=alt.Row("of:N", title=None),
        tooltip=["model:N", "of:N", "left:N", alt.Tooltip("share:Q", format=".1%")],
    )
    on = found.records[0].measured_on
    caption = (
        f"Measured. Text: the {on.split} split ({on.dataset}, {on.tokens:,} tokens in windows of {on.seq_len}), each "
        "token leaving as it would in generation; generated: what each model found likeliest itself, which is surer of "
        "itself. Of models that draft, the share of tokens whose draft the whole model kept."
    )
    return Figure("exits", "Where tokens leave", caption, chart.properties(width=WIDTH))


def _rules(found: ExitsFound) -> Figure:
    chart = (
        alt.Chart(data_of(rule_rows(found)))
        .mark_point(filled=True, size=70, opacity=0.9)
        .encode(
            x=alt.X("speedup:Q", title="decode speed-up over the parent", scale=alt.Scale(zero=False)),
            y=alt.Y("lost:Q", title="nats a token lost", scale=alt.Scale(zero=True)),
            color=alt.Color("role:N", title=None),
            shape=alt.Shape("role:N", title=None),
            tooltip=["role:N", "rules:N", alt.Tooltip("speedup:Q", format=".3f"), alt.Tooltip("lost:Q", format="+.4f")],
        )
        .properties(width=WIDTH + 160, height=280)
    )
    caption = (
        f"Estimated from stored figures and timed parts on the search split, {found.trials:,} trials: what no other "
        "rules and no trunk beat, beside what takes no search (every token leaves at one layer; one threshold at one "
        "exit). Trunks are models without exits."
    )
    return Figure("exit-rules", "Rules for leaving", caption, chart)


def depth_rows(found: ExitsFound) -> Iterator[Row]:
    """A row a model, kind of text and exit."""
    for record in found.records:
        layers = [f"behind layer {layer}" for layer in record.rules["layers"]]
        for of, depths in (("text", record.depths), ("generated", record.generated_depths)):
            for left, share in zip([*layers, "by none"], depths, strict=True):
                yield {"model": f"{record.id[:8]}, {record.mode}", "of": of, "left": left, "share": share}


def rule_rows(found: ExitsFound) -> Iterator[Row]:
    """A row a set of rules, and a trunk without any."""
    parent = found.trunks[0].nats_per_token
    for trunk in found.trunks:
        rules = f"{trunk.id[:8]}, no exits"
        yield {
            "role": "trunk",
            "rules": rules,
            "speedup": trunk.decode_speedup,
            "lost": trunk.nats_per_token - parent,
        }
    rows: list[EstimatedExits] = [*found.front, *found.baselines]
    for one in rows:
        role = one.mode if one.name == "search" else one.name
        lost = one.nats_per_token - parent
        yield {"role": role, "rules": rules_text(one.rules), "speedup": one.decode_speedup, "lost": lost}
