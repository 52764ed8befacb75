"""What charts are made of: a figure with its caption, its data, and the same marks for two children."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import altair as alt

from llmprune.report.rows import Row


class Figure(NamedTuple):
    """A chart with what it must not be shown without."""

    name: str
    """Of its file and its place in the page."""
    title: str
    caption: str
    """Data, unit, and whether it is estimated or measured."""
    chart: alt.TopLevelMixin

    def spec(self) -> dict[str, Any]:
        """Vega-Lite. Its data lies in it."""
        found = self.chart.to_dict(validate=False)
        assert isinstance(found, dict), "a chart is an object"
        return found


def side_by_side(marks: Sequence[alt.Chart], rows: Iterable[Row], picked: str) -> alt.FacetChart:
    """The same marks for two children, chosen from lists, which the keyboard reaches; at first the pick and the
    parent."""
    rows = list(rows)
    titles = {row["id"]: row["title"] for row in rows}
    first = {"chosen": picked, "beside": next(iter(titles))}
    listed = {
        name: alt.binding_select(options=list(titles), labels=list(titles.values()), name=f"{label} ")
        for name, label in (("chosen", "child"), ("beside", "beside"))
    }
    return (
        alt.layer(*marks, data=data_of(rows))
        .add_params(*(alt.param(name=name, value=first[name], bind=listed[name]) for name in first))
        .transform_filter(" || ".join(f"datum.id == {name}" for name in first))
        .facet(column=alt.Column("title:N", title=None))
    )


def data_of(rows: Iterable[Row]) -> alt.Data:
    return alt.Data(values=list(rows))  # type: ignore[no-untyped-call]
