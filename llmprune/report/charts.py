"""The charts of a report, as Vega-Lite: drawn by the reader's browser in the page, by vl-convert into SVG and PNG."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt

from llmprune.measure.record import Front
from llmprune.report.drawing import Figure, data_of, side_by_side
from llmprune.report.exits import exit_figures
from llmprune.report.facts import Facts
from llmprune.report.maps import map_figure
from llmprune.report.rows import (
    Row,
    choice_rows,
    curve_rows,
    front_rows,
    hypervolume_rows,
    picked_id,
    repair_rows,
    time_rows,
    trial_rows,
    vocabulary_facts,
    within_use,
)

_OF_DRAFTS = (
    "The parent wrote that text; what decoding with a child as draft gives it stands in the tooltips and below."
)

WIDTH = 460
ROLES = ("child", "baseline", "before its repair", "parent")
SHAPES = ("circle", "square", "triangle-down", "diamond")


def figures(facts: Facts) -> list[Figure]:
    """What there is to see of a run so far, most telling first."""
    found: list[Figure] = []
    if facts.front is not None:
        found += [front_figure(facts.front, facts), map_figure(facts.front, facts)]
        if facts.tables is not None:
            found.append(time_figure(facts.front, facts))
    if facts.curves:
        found.append(recovery_figure(facts))
    if facts.tables is not None:
        found.append(sensitivity_figure(facts))
    if facts.trials:
        found += [trials_figure(facts), progress_figure(facts)]
    if facts.trials and facts.tables is not None:
        found.append(foretold_figure(facts))
    if facts.exits is not None:
        found += exit_figures(facts.exits)
    return found


def front_figure(front: Front, facts: Facts) -> Figure:
    """Quality against measured speed."""
    phase = facts.phase
    rows, beyond = within_use(list(front_rows(front, phase)))
    speed = alt.X("speedup:Q", title=f"{phase} speed-up over the parent, measured", scale=alt.Scale(zero=False))
    of_drafts = front.parent.draft is not None
    figure, what = ("test_differs:Q", "Tokens that differ") if of_drafts else ("test_lost:Q", "Nats a token lost")
    lost = alt.Y(figure, title=f"{what.lower()}, test", scale=alt.Scale(zero=True))
    base = alt.Chart(data_of(rows))
    bars = base.mark_rule(opacity=0.5).encode(x=alt.X("slow:Q"), x2="fast:Q", y=lost, color=_role_color())
    points = base.mark_point(size=110, filled=True, opacity=0.95).encode(
        x=speed,
        y=lost,
        color=_role_color(),
        shape=alt.Shape("role:N", title=None, scale=alt.Scale(domain=list(ROLES), range=list(SHAPES))),
        tooltip=_tooltips(rows, phase),
    )
    named = base.transform_filter("datum.role != 'before its repair'")
    names = named.mark_text(align="left", dx=9, dy=-7, fontSize=11).encode(
        x=speed, y=lost, text="title:N", color=_role_color()
    )
    layers: list[alt.Chart] = [bars, points, names]
    if repaired := repair_rows(front, phase):
        line = alt.Chart(data_of(repaired)).mark_line(strokeDash=[4, 3], opacity=0.6, color="#888")
        layers.insert(0, line.encode(x=speed, y=lost, detail="line:N", order="order:Q"))
    on = front.parent.test
    assert on is not None, "a stored front quotes the test split"
    caption = (
        f"Measured. {what} on the test split ({on.dataset}, {on.tokens:,} tokens in windows of "
        f"{on.seq_len}), which nothing was chosen on, against the median paired {phase} speed-up; bars reach from its "
        "10th to its 90th percentile. Lower and further right is better. A click shows a child in the maps below."
        + (f" {_OF_DRAFTS}" if of_drafts else "")
        + (" Dashed lines lead from a child as it was cut to what its repair made of it." if repaired else "")
        + "".join(f" Unusable, and beyond the top: {row['title']}, {row['test_lost']:+.3f}." for row in beyond)
    )
    chart = alt.layer(*layers).properties(width=WIDTH + 160, height=320)
    return Figure("front", "Quality against measured speed", caption, chart)


def _tooltips(rows: Sequence[Row], phase: str) -> list[alt.Tooltip]:
    quoted = [name for name in ("test", "unseen") if any(f"{name}_lost" in row for row in rows)]
    return [
        alt.Tooltip("id:N"),
        alt.Tooltip("role:N"),
        alt.Tooltip("speedup:Q", title=f"{phase} speed-up", format=".3f"),
        *(alt.Tooltip(f"{name}_lost:Q", title=f"nats lost, {name}", format="+.3f") for name in quoted),
        *(alt.Tooltip(f"{name}_ppl_ratio:Q", title=f"x parent's perplexity, {name}", format=".2f") for name in quoted),
        *(
            one
            for name in quoted
            if any(f"{name}_differs" in row for row in rows)
            for one in (
                alt.Tooltip(f"{name}_differs:Q", title=f"differ, {name}", format=".1%"),
                alt.Tooltip(f"{name}_with_it:Q", title=f"parent with it as draft, {name}", format=".2f"),
                alt.Tooltip(f"{name}_drafted:Q", title=f"tokens drafted a round, {name}"),
            )
        ),
        *(
            [
                alt.Tooltip("same_top:Q", title="same likeliest token as the parent", format=".1%"),
                alt.Tooltip("kl:Q", title="KL from the parent, nats", format=".3f"),
            ]
            if any("kl" in row for row in rows)
            else []
        ),
        alt.Tooltip("params:Q", title="parameters", format=","),
        alt.Tooltip("bytes:Q", title="bytes", format=","),
        alt.Tooltip("done:N", title="repairs"),
    ]


def _role_color() -> alt.Color:
    # Okabe and Ito's palette, told apart by shape as well.
    return alt.Color(
        "role:N",
        title=None,
        scale=alt.Scale(domain=list(ROLES), range=["#0072B2", "#D55E00", "#999999", "#009E73"]),
        legend=alt.Legend(orient="top", symbolOpacity=1),
    )


def time_figure(front: Front, facts: Facts) -> Figure:
    """Where the time goes, before and after."""
    assert facts.tables is not None, "there are tables to read"
    rows = list(time_rows(front, facts.tables, facts.phase))
    bars = (
        alt.Chart()
        .mark_bar()
        .encode(
            x=alt.X("share:Q", title="of the parent's time", axis=alt.Axis(format=".1%")),
            y=alt.Y("layer:O", title="layer of the parent"),
            color=alt.Color("block:N", title=None, scale=alt.Scale(range=["#0072B2", "#E69F00"])),
            tooltip=["title:N", "layer:O", "block:N", alt.Tooltip("share:Q", format=".2%")],
        )
        .properties(width=240, height=alt.Step(13))
    )
    chart = side_by_side([bars], rows, picked_id(facts))
    caption = (
        f"Estimated: {facts.phase} time of every block as a share of the whole parent's, from the cost table, which "
        "was measured on whole children. What is no block (embedding, head, overhead) is not drawn."
    )
    return Figure("time", "Where the time goes", caption, chart)


def recovery_figure(facts: Facts) -> Figure:
    """What distillation gave back, by tokens."""
    chart = (
        alt.Chart(data_of(curve_rows(facts.curves)))
        .mark_line(point=True)
        .encode(
            x=alt.X("tokens:Q", title="tokens learnt from", axis=alt.Axis(format="~s")),
            y=alt.Y("nats:Q", title="nats a token, held out", scale=alt.Scale(zero=False)),
            color=alt.Color("child:N", title="child, as cut"),
            tooltip=["child:N", alt.Tooltip("tokens:Q", format=","), alt.Tooltip("nats:Q", format=".4f")],
        )
        .properties(width=WIDTH + 160, height=240)
    )
    caption = (
        "Measured, on recovery text that is held out: nats a token of each distilled child by the tokens it has "
        "learnt from; " + "; ".join(f"{c.child[:8]} {c.seconds / 60:.1f} minutes" for c in facts.curves) + "."
    )
    return Figure("recovery", "Recovery", caption, chart)


def sensitivity_figure(facts: Facts) -> Figure:
    """What each choice costs, layer by layer."""
    assert facts.tables is not None, "there are tables to read"
    rows = list(choice_rows(facts.tables, facts.phase))
    cells = (
        alt.Chart(data_of(rows))
        .mark_rect()
        .encode(
            x=alt.X("left:N", title="what is left", sort=alt.EncodingSortField("place"), axis=alt.Axis(labelAngle=-60)),
            y=alt.Y("layer:O", title="layer of the parent"),
            color=alt.Color(
                "shade:Q",
                title="nats a token",
                scale=alt.Scale(type="log", scheme="magma", reverse=True),
                legend=alt.Legend(format=".2~g"),
            ),
            tooltip=[
                "layer:O",
                "block:N",
                alt.Tooltip("left:N", title="what is left"),
                alt.Tooltip("nats:Q", title="nats a token lost", format="+.4f"),
                alt.Tooltip("saved:Q", title=f"{facts.phase} time saved", format=".2%"),
            ],
        )
        .properties(width=alt.Step(26), height=alt.Step(13))
        .facet(column=alt.Column("block:N", title=None, sort=["attention", "FFN"]))
        .resolve_scale(x="independent")
    )
    caption = (
        f"Estimated, on {facts.recipe.tables.tokens:,} tokens of the estimate split: nats a token that the parent "
        "loses when this block alone keeps only so much. Hover for the time it saves."
        + "".join(
            f" Embedding and output head in {stored}: {nats:+.4f} nats, {saved:.1%} of the {facts.phase} time."
            for stored, nats, saved in vocabulary_facts(facts.tables, facts.phase)
        )
    )
    return Figure("sensitivity", "What each block is worth", caption, cells)


def trials_figure(facts: Facts) -> Figure:
    """Every trial."""
    rows = list(trial_rows(facts.trials, facts.phase, facts.tables))
    chart = (
        alt.Chart(data_of(rows))
        .mark_point(filled=True, size=70)
        .encode(
            x=alt.X("speedup:Q", title=f"{facts.phase} speed-up, measured", scale=alt.Scale(zero=False)),
            y=alt.Y("nats:Q", title="nats a token, search split", scale=alt.Scale(zero=False)),
            color=alt.Color("number:Q", title="trial", scale=alt.Scale(scheme="viridis")),
            tooltip=[
                alt.Tooltip("number:Q", title="trial"),
                "from:N",
                alt.Tooltip("speedup:Q", format=".3f"),
                alt.Tooltip("nats:Q", format=".4f"),
                alt.Tooltip("minutes:Q", format=".1f"),
            ],
        )
        .properties(width=WIDTH + 160, height=280)
    )
    on = facts.trials[0].record.measured_on
    caption = f"Measured: every trial, one-shot, on the search split ({on.dataset}, {on.tokens:,} tokens)."
    return Figure("trials", "Trials", caption, chart)


def progress_figure(facts: Facts) -> Figure:
    """How the search went on, by trials and by minutes."""
    base = alt.Chart(data_of(hypervolume_rows(facts.trials, facts.phase))).mark_line(
        interpolate="step-after", point=True
    )
    area = alt.Y("area:Q", title="hypervolume, nats x speed-up")
    sides = [
        base.encode(x=alt.X(f"{name}:Q", title=name), y=area, tooltip=["trials:Q", "minutes:Q", "area:Q"]).properties(
            width=WIDTH // 2 + 40, height=200
        )
        for name in ("trials", "minutes")
    ]
    caption = (
        f"Measured, sampler {facts.recipe.search.sampler}: the area between the trials so far and a corner at the "
        "parent's speed and the worst trial's nats. More is better; where it stays flat, nothing better was found."
    )
    return Figure("progress", "Search progress", caption, alt.hconcat(*sides))


def foretold_figure(facts: Facts) -> Figure:
    """How far the tables can be trusted."""
    assert facts.tables is not None, "there are tables to read"
    rows = list(trial_rows(facts.trials, facts.phase, facts.tables))
    parent = next((row["nats"] for row in rows if row["from"] == "parent"), None)
    for row in rows:
        lost = None if parent is None or row["nats"] is None else row["nats"] - parent
        row |= {"lost": lost}
    sides = [
        _beside_itself(rows, f"foretold_{name}", name, title)
        for name, title in (("speedup", f"{facts.phase} speed-up"), ("lost", "nats a token lost"))
        if any(row[name] is not None and row[f"foretold_{name}"] is not None for row in rows)
    ]
    caption = "Estimated by the block tables (across) against measured (up), every trial; the line is where they agree."
    return Figure("foretold", "Foretold and measured", caption, alt.hconcat(*sides))


def _beside_itself(rows: Sequence[Row], across: str, up: str, title: str) -> alt.LayerChart | alt.FacetChart:
    known = [row for row in rows if row[up] is not None and row[across] is not None]
    values = [value for row in known for value in (row[across], row[up])]
    ends = [{"both": min(values)}, {"both": max(values)}]
    line = alt.Chart(data_of(ends)).mark_line(color="#999", strokeDash=[4, 3]).encode(x="both:Q", y="both:Q")
    points = (
        alt.Chart(data_of(known))
        .mark_point(filled=True, size=60)
        .encode(
            x=alt.X(f"{across}:Q", title=f"{title}, estimated", scale=alt.Scale(zero=False)),
            y=alt.Y(f"{up}:Q", title="measured", scale=alt.Scale(zero=False)),
            tooltip=[
                "number:Q",
                "from:N",
                alt.Tooltip(f"{across}:Q", format=".3f"),
                alt.Tooltip(f"{up}:Q", format=".3f"),
            ],
        )
    )
    return alt.layer(line, points).properties(width=WIDTH // 2 + 40, height=220)
