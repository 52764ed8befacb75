"""Maps of children: what is left of every block of the parent, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping

import altair as alt

from llmprune.choices.architecture import Architecture
from llmprune.measure.record import Front
from llmprune.report.drawing import Figure, data_of, side_by_side
from llmprune.report.facts import Facts
from llmprune.report.rows import cells_of, map_rows, picked_id, titled


def map_figure(front: Front, facts: Facts) -> Figure:
    """What is left of every block, of the children that are chosen, side by side."""
    rows = list(map_rows(front))
    chart = side_by_side(_map_cells(), rows, picked_id(facts))
    caption = (
        "Exact. Share of every block's units (KV groups, FFN channels) that a child keeps, layer by layer, "
        "and the type of its weights where it has one of its own; vocabulary: embedding and output head."
    )
    return Figure("architecture", "Architecture map", caption, chart)


def maps_beside(maps: Mapping[str, tuple[Architecture, Architecture]]) -> alt.FacetChart:
    """What is left of every block of several children, by what each is called: its architecture and its parent's."""
    titles = {name: titled(name, architecture) for name, (architecture, _) in maps.items()}
    rows = [{"title": titles[name], **row} for name, pair in maps.items() for row in cells_of(*pair)]
    columns = alt.Column("title:N", title=None, sort=list(titles.values()))
    return alt.layer(*_map_cells(), data=data_of(rows)).facet(column=columns)


def _map_cells() -> list[alt.Chart]:
    """Cells in the colour of what is left, and in them the types of weights that blocks have of their own."""
    placed = alt.Chart().encode(
        x=alt.X("block:N", title=None, sort=["attention", "FFN"], axis=alt.Axis(labelAngle=0, orient="top")),
        y=alt.Y("layer:O", title="layer of the parent"),
    )
    cells: alt.Chart = (
        placed.mark_rect(stroke="#8884", strokeWidth=0.5)
        .encode(
            color=alt.Color(
                "kept:Q",
                title="share kept",
                scale=alt.Scale(domain=[0, 1], scheme="viridis"),
                legend=alt.Legend(format=".0%"),
            ),
            tooltip=[
                alt.Tooltip("title:N", title="child"),
                alt.Tooltip("layer:O"),
                alt.Tooltip("block:N"),
                alt.Tooltip("units:N", title="kept"),
            ],
        )
        .properties(width=150, height=alt.Step(13))
    )
    types = placed.mark_text(fontSize=9).encode(
        text="stored:N", color=alt.condition("datum.kept > 0.6", alt.value("black"), alt.value("white"))
    )
    return [cells, types.properties(width=150, height=alt.Step(13))]
