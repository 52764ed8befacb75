"""The report as a reader's browser shows it: charts are drawn, a click and a choice show a child, figures are those of
front.json, and nothing is asked of any network."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from conftest import Finished

from llmprune.pipeline.run import Run
from llmprune.pipeline.run_directory import read_front
from llmprune.report.facts import gather
from llmprune.report.page import write_report

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
QUIET += ["--disable-sync", "--no-first-run", "--virtual-time-budget=20000"]
EARLY = "<script>window.wrong = []; addEventListener('error', e => wrong.push(String(e.message)));</script>"
DRIVER = """
<script type="module">
const told = {};
try {
const wait = () => new Promise(done => setTimeout(done, 100));
while (!document.body.dataset.drawn) await wait();
const of = id => [...document.querySelectorAll(`#chart-${id} svg text`)].map(text => text.textContent);
told.drawn = [...document.querySelectorAll(".chart")].map(chart => [chart.id, chart.querySelectorAll("svg").length]);
told.before = of("architecture");
const mark = [...document.querySelectorAll("#chart-front svg path")].find(p => p.__data__?.datum?.id === "CLICKED");
const box = mark.getBoundingClientRect();
const place = {bubbles: true, clientX: box.x + box.width / 2, clientY: box.y + box.height / 2};
for (const kind of ["pointerdown", "mousedown", "pointerup", "mouseup", "click"]) {
  mark.dispatchEvent(new MouseEvent(kind, place));
}
await wait(); await wait();
told.clicked = of("architecture");
const list = document.querySelector("#chart-architecture select");
list.selectedIndex = [...list.options].findIndex(option => option.textContent === "CHOSEN");
list.dispatchEvent(new Event("change", {bubbles: true}));
await wait(); await wait();
told.chosen = of("architecture");
told.rows = [...document.querySelectorAll("tbody tr")].map(row => [...row.cells].map(cell => cell.textContent));
told.asked = performance.getEntriesByType("resource").map(entry => entry.name);
} catch (error) { window.wrong.push(String(error)); }
told.wrong = window.wrong;
const out = document.createElement("pre");
out.id = "told"; out.textContent = JSON.stringify(told);
document.body.append(out);
</script>
"""


@pytest.mark.skipif(BROWSER is None, reason="needs a Chromium (Debian: apt-get install chromium)")
def test_a_reader_finds_the_child_of_a_click_and_of_a_choice(finished_run: Finished, tmp_path: Path) -> None:
    run = Run.join(finished_run.path)
    front, page = read_front(run.directory), tmp_path / "report.html"
    write_report(gather(run), page)
    clicked, chosen = front.children[-1], front.children[0]
    text = page.read_text(encoding="utf-8").replace("<head>", "<head>" + EARLY, 1)
    driver = DRIVER.replace("CLICKED", clicked.id).replace("CHOSEN", chosen.id[:8])
    # The charts' library has such words in its strings.
    before, _, after = text.rpartition("</body>")
    page.write_text(f"{before}{driver}</body>{after}", encoding="utf-8")
    told = _driven(page, tmp_path)
    assert all(charts >= 1 for _, charts in told["drawn"]) and len(told["drawn"]) == 7
    assert told["wrong"] == [] and told["asked"] == []
    assert "parent" in told["clicked"] and clicked.id[:8] in told["clicked"]
    assert chosen.id[:8] in told["chosen"]
    rows = {row[0]: row[1:] for row in told["rows"]}
    for child in front.children:
        speed, lost = rows[f"child {child.id[:8]}"][:2]
        assert child.test is not None
        assert (speed.split()[0], lost) == (f"{child.decode_speedup.median:.2f}x", f"{child.test.nats_lost:+.3f}")


def _driven(page: Path, scratch: Path) -> dict[str, Any]:
    assert BROWSER is not None
    command = [BROWSER, *QUIET, f"--user-data-dir={scratch / 'profile'}", "--dump-dom", page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = re.search(r'<pre id="told">(.*?)</pre>', shown.stdout, re.DOTALL)
    assert found, shown.stderr[-2000:]
    told = json.loads(unescape(found[1]))
    assert isinstance(told, dict)
    return told
