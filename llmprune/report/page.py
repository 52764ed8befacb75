"""The report of a run: one HTML file that needs nothing else, and its charts as files for papers and cards."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import vl_convert

from llmprune.core.files import atomic_path
from llmprune.core.recipe_text import to_yaml
from llmprune.measure.record import Record, text_of
from llmprune.publish.card import difference_text, metric_text
from llmprune.publish.contents import PICTURES
from llmprune.report.charts import figures, front_figure
from llmprune.report.drawing import Figure
from llmprune.report.facts import Facts
from llmprune.report.maps import maps_beside
from llmprune.report.rows import front_rows, picked_id

DRAW = """
const charts = JSON.parse(document.getElementById("charts").textContent);
const dark = window.matchMedia("(prefers-color-scheme: dark)");
async function draw() {
  const ink = dark.matches ? "#e6edf3" : "#1b1f24", line = dark.matches ? "#3d444d" : "#d0d7de";
  const words = {labelColor: ink, titleColor: ink};
  const config = {background: "transparent", font: "system-ui, sans-serif", view: {stroke: line},
    axis: {...words, gridColor: line, gridOpacity: 0.5, domainColor: line, tickColor: line}, legend: words,
    header: words, title: {color: ink}};
  const options = {config, renderer: "svg", actions: {export: true, source: false, compiled: false, editor: false}};
  const views = {};
  for (const [name, spec] of Object.entries(charts)) {
    views[name] = (await vegaEmbed("#chart-" + name, spec, options)).view;
  }
  const choosing = ["architecture", "time"].filter(name => name in views).map(name => views[name]);
  views.front?.addEventListener("click", (event, item) => {
    const id = item?.datum?.id;
    if (id) choosing.forEach(view => view.signal("chosen", id).runAsync());
  });
  document.body.dataset.drawn = "yes";
}
dark.addEventListener("change", draw);
draw();
"""
"""What the page runs: every chart, drawn again where the reader's colours change."""


def write_report(facts: Facts, to: Path) -> None:
    """Write the page, whole or not at all."""
    write_text(page(facts), to)


def write_figures(facts: Facts, directory: Path) -> list[Path]:
    """Write every chart as SVG and PNG; the files."""
    written = []
    for figure in figures(facts):
        for suffix, content in _drawn(figure):
            path = directory / f"{figure.name}.{suffix}"
            with atomic_path(path) as temporary:
                temporary.write_bytes(content)
            written.append(path)
    return written


def write_card_figures(facts: Facts, record: Record, directory: Path) -> None:
    """Draw what a model card shows of an exported child: the front that it was picked from, and its map."""
    assert facts.front is not None, "a child was exported from it"
    whole = facts.front.parent.architecture
    beside = {"parent": (whole, whole), f"child {record.id[:8]}": (record.architecture, whole)}
    charts = {"front": front_figure(facts.front, facts).chart, "architecture": maps_beside(beside)}
    for name, told in PICTURES.items():
        figure = Figure(name, told, "", charts[Path(name).stem])
        write_text(vl_convert.vegalite_to_svg(_on_white(figure)), directory / name)


def write_text(text: str, to: Path) -> None:
    """Write a page or a picture, whole or not at all."""
    with atomic_path(to) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _drawn(figure: Figure) -> Iterator[tuple[str, bytes]]:
    spec = _on_white(figure)
    yield "svg", vl_convert.vegalite_to_svg(spec).encode()
    yield "png", vl_convert.vegalite_to_png(spec, scale=2)


def _on_white(figure: Figure) -> dict[str, Any]:
    return figure.spec() | {"background": "white"}


def page(facts: Facts) -> str:
    """The report as HTML."""
    shown, front = figures(facts), facts.front
    return rendered(
        "page.html.jinja",
        facts.name,
        shown,
        facts=facts,
        headline=_headline(facts),
        tiles=_tiles(facts) if front and front.children else [],
        splits=list(front.parent.quoted) if front else [],
        quoted_of="; ".join(text_of(name, on) for name, on in front.parent.quoted.items()) if front else "",
        table=list(front_rows(front, facts.phase)) if front else [],
        alike=any(record.test and record.test.likeness for record in front.every) if front else False,
        drafts=front is not None and front.parent.draft is not None,
        resized=front.resized if front else None,
        evaluation=facts.evaluation,
        samples=facts.samples,
        provenance=list(_provenance(facts)),
        recipe=to_yaml(facts.recipe),
        number=_number,
        metric=metric_text,
        difference=difference_text,
    )


def rendered(template: str, title: str, shown: Sequence[Figure], **values: Any) -> str:
    """A page of ours with its charts, and all that draws them."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(lambda name: files(__package__).joinpath(name).read_text(encoding="utf-8")),
    )
    return environment.get_template(template).render(
        title=title,
        figures=shown,
        charts=_as_script({figure.name: figure.spec() for figure in shown}),
        library=_as_module(vl_convert.javascript_bundle(DRAW)),
        **values,
    )


def _number(value: Any, form: str) -> str:
    """A figure that is there, and finite."""
    return "-" if value is None or isinstance(value, jinja2.Undefined) else format(value, form)


def _as_script(data: Any) -> str:
    """JSON that ends no script element, whatever a file or a model is called."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _as_module(code: str) -> str:
    """JavaScript that ends no script element: the word stands in strings alone, where a backslash changes nothing."""
    return code.replace("</script", "<\\/script")


def _headline(facts: Facts) -> str:
    parent = facts.provenance.get("parent", {}).get("model", facts.recipe.model.path)
    workload = facts.recipe.workload
    cache = f" with a {workload.cache_type} KV cache" if workload.engine == "llamacpp" else ""
    done = f"{len(facts.trials)} trials" if facts.front is None else "its measured front"
    return (
        f"Smaller networks inside {parent}, searched for {facts.phase} speed in {workload.engine}{cache} (batch "
        f"{workload.batch}, {workload.prompt_tokens} prompt and {workload.generated_tokens} generated tokens): {done}."
    )


def _tiles(facts: Facts) -> list[tuple[str, str]]:
    """The pick at a glance."""
    assert facts.front is not None, "asked for a front alone"
    picked = next(one for one in facts.front.every if one.id == picked_id(facts))
    speed = picked.value(f"{facts.phase}_speedup")
    tiles = [("picked child", picked.id[:8]), (f"{facts.phase}, measured", f"{speed:.2f}x")]
    resized = facts.front.resized
    if resized is not None and not resized.is_whole:
        gained = resized.text_speedup(resized.chosen, facts.phase)
        tiles.append(("text a second, over the whole parent", f"{speed * gained:.2f}x"))
    for name, on in picked.quoted.items():
        if on.agreement and (draft := picked.draft_on(on.agreement)):
            tiles.append((f"differs, {name}", f"{1 - on.agreement.share:.1%}"))
            tiles.append((f"parent with it, {name}", f"{draft.speedup:.2f}x"))
            continue
        tiles.append((f"perplexity, {name}", f"{on.ppl_ratio:.2f}x"))
        if resized is not None and not resized.is_whole:
            lost = on.nats_per_byte - facts.front.parent.quoted[name].nats_per_byte
            tiles.append((f"nats a byte, {name}, over the whole parent", f"{resized.loss_with(lost, name):+.1%}"))
    return [*tiles, ("parameters", f"{picked.params / facts.front.parent.params:.0%}"), ("repairs", _repairs(picked))]


def _repairs(record: Record) -> str:
    return ", ".join(name.partition("-")[0] for name in record.done) or "none"


def _provenance(facts: Facts) -> Iterator[tuple[str, str]]:
    known = facts.provenance
    for title, section in (("parent", "parent"), ("searched on", "host"), ("versions", "versions")):
        if section in known:
            yield title, ", ".join(f"{key} {value}" for key, value in known[section].items() if value is not None)
    for name, source in known.get("data", {}).get("sources", {}).items():
        yield f"text, {name}", ", ".join(f"{key} {value}" for key, value in source.items())
    if facts.tables is None:
        yield "block tables", "none yet, or of an llmprune that did not say their space: charts of them are left out"
