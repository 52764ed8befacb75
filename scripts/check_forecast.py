"""Hold a forecast to a whole run: forecast, run `llmprune compress`, and print both side by side.

    python scripts/check_forecast.py RECIPE --out RUN [--json] [SETTING ...]

RUN must not be there yet. Time and peak memory of each stage are those between the lines that `compress` prints at its
beginning and end; memory is the resident set of the process, sampled ten times a second, less what the process holds
once Python and torch are imported, as forecasts leave that out. The peak of all is the kernel's own (getrusage, the
proofs' processes included). Mapped files, such as the library's, are in the resident set and not in the forecast.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

CLI = "import sys; sys.argv[0] = 'llmprune'; from llmprune.cli.main import main; main()"
IMPORTS = (
    "import resource, llmprune, llmprune.pipeline.commands; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
)
STAGES = {
    "cutting text": "tokens",
    "ordering and refitting": "library",
    "estimating what": "estimate",
    "scoring what choices cost together": "together",
    "scoring choices exactly": "exact",
    "measuring what each choice": "probes",
    "walking from the parent": "path",
    "searching": "search",
    "choosing the baseline": "front",
    "ordering blocks by": "front",
    "re-measuring": "front",
    "writing and proving": "checkpoints",
    "exporting": "checkpoints",
}
"""How the steps begin that `compress` prints, and the stage of the forecast that each belongs to."""
FILES = {"tokens": ["tokens.safetensors"], "library": ["library"], "checkpoints": ["children", "export"]}
"""What each stage leaves in the run directory."""
NOT_FORECAST = "not forecast"
_BEGUN = re.compile(r"(\S.*) \.\.\.$")
_ENDED = re.compile(r"  (\S.*): done in \d+ s$")
_SAMPLE_S = 0.1
# The kernel counts kilobytes, macOS bytes.
_MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024


@dataclass
class Actual:
    """What a run took, by stage."""

    seconds: dict[str, float] = field(default_factory=dict)
    resident_bytes: dict[str, int] = field(default_factory=dict)
    open_steps: list[str] = field(default_factory=list)
    since: float = 0.0

    @property
    def stage(self) -> str:
        """The innermost step that is known decides."""
        return next((found for step in reversed(self.open_steps) if (found := stage_of(step))), NOT_FORECAST)

    def line(self, text: str, now: float) -> None:
        """A line that `compress` printed, and when: time goes to the stage that was at work until then."""
        begun, ended = _BEGUN.match(text), _ENDED.match(text)
        if begun or ended:
            self.until(now)
        if begun:
            self.open_steps.append(begun[1])
        elif ended and ended[1] in self.open_steps:
            self.open_steps.remove(ended[1])

    def until(self, now: float) -> None:
        self.seconds[self.stage] = self.seconds.get(self.stage, 0.0) + now - self.since
        self.since = now

    def sample(self, resident_bytes: int) -> None:
        self.resident_bytes[self.stage] = max(self.resident_bytes.get(self.stage, 0), resident_bytes)


def stage_of(step: str) -> str | None:
    return next((stage for beginning, stage in STAGES.items() if step.startswith(beginning)), None)


def forecast(command: Sequence[str]) -> Any:
    """What `compress --dry-run` says."""
    finished = subprocess.run([*command, "--dry-run", "--json", "--quiet"], stdout=subprocess.PIPE, check=True)
    return json.loads(finished.stdout)


def watched(command: Sequence[str]) -> tuple[Actual, int]:
    """Run `compress`: what it took by stage, and the peak of its resident memory in bytes."""
    before, actual = time.monotonic(), Actual(since=time.monotonic())
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        ended = threading.Event()
        sampler = threading.Thread(target=_sample, args=(process.pid, actual, ended))
        sampler.start()
        for line in process.stderr:
            print(line, end="", file=sys.stderr)
            actual.line(line.rstrip("\n"), time.monotonic())
        process.wait()
        ended.set()
        sampler.join()
    if process.returncode:
        raise SystemExit(f"compress ended with exit code {process.returncode} after {time.monotonic() - before:.0f} s")
    actual.until(time.monotonic())
    return actual, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * _MAXRSS_BYTES


def _sample(pid: int, actual: Actual, ended: threading.Event) -> None:
    while not ended.wait(_SAMPLE_S):
        try:
            actual.sample(psutil.Process(pid).memory_info().rss)
        except psutil.NoSuchProcess:
            return


def disk_bytes(run: Path, names: Iterable[str]) -> int:
    """Of files and of directories with all that is in them."""
    places = [run / name for name in names]
    files = [file for place in places for file in ([place] if place.is_file() else place.rglob("*"))]
    return sum(file.stat().st_size for file in files if file.is_file())


def compared(said: Mapping[str, Any], actual: Actual, peak_bytes: int, base_bytes: int, run: Path) -> dict[str, Any]:
    """Forecast and actual figures of every stage, and of all together; memory beside `base_bytes`."""
    rows = []
    for stage in said["stages"]:
        name = stage["stage"]
        sampled = actual.resident_bytes.get(name)
        rows.append(
            {
                "stage": name,
                "forecast_seconds": stage["seconds"],
                "actual_seconds": actual.seconds.get(name, 0.0),
                "forecast_memory_bytes": stage["peak_memory_bytes"],
                "actual_memory_bytes": None if sampled is None else max(0, sampled - base_bytes),
                "forecast_disk_bytes": stage["disk_bytes"],
                "actual_disk_bytes": disk_bytes(run, FILES[name]) if name in FILES else None,
            }
        )
    total = said["total"]
    return {
        "stages": rows,
        "not_forecast_seconds": actual.seconds.get(NOT_FORECAST, 0.0),
        "total": {
            "stage": "in all",
            "forecast_seconds": total["seconds"],
            "actual_seconds": sum(actual.seconds.values()),
            "forecast_memory_bytes": total["peak_memory_bytes"],
            "actual_memory_bytes": peak_bytes - base_bytes,
            "forecast_disk_bytes": total["disk_bytes"],
            "actual_disk_bytes": disk_bytes(run, ["."]),
        },
        "python_and_torch_bytes": base_bytes,
    }


def lines(result: Mapping[str, Any]) -> list[str]:
    """A table: every figure as forecast / actual."""
    return [*table([*result["stages"], result["total"]]), *_beside(result)]


def table(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Every figure as forecast / actual."""
    found = [f"{'stage':<12}{'seconds':>20}{'memory, MB':>20}{'disk, MB':>20}   (forecast / actual)"]
    for row in rows:
        pairs = []
        for figure, unit, scale in (("seconds", "", 1.0), ("memory_bytes", "", 1e6), ("disk_bytes", "", 1e6)):
            said, was = row[f"forecast_{figure}"], row[f"actual_{figure}"]
            pairs.append(f"{said / scale:,.0f} / {'-' if was is None else f'{was / scale:,.0f}'}{unit}")
        found.append(f"{row['stage']:<12}" + "".join(f"{pair:>20}" for pair in pairs))
    return found


def _beside(result: Mapping[str, Any]) -> list[str]:
    return [
        f"Beside that: {result['not_forecast_seconds']:.0f} s in steps that are not forecast (loading, starting), and "
        f"{result['python_and_torch_bytes'] / 1e6:,.0f} MB of Python and torch."
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("settings", nargs="*", help="overrides such as search.trials=2")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.out.exists():
        raise SystemExit(f"{arguments.out} is there already: what is done in it would cost nothing; name another --out")
    command = [sys.executable, "-c", CLI, "compress", arguments.recipe, *arguments.settings, "--out", arguments.out]
    command = [str(part) for part in command]
    imported = subprocess.run([sys.executable, "-c", IMPORTS], stdout=subprocess.PIPE, text=True, check=True)
    said = forecast(command)
    # The children so far are in the kernel's maximum too; the run itself is the largest of them.
    actual, peak_bytes = watched(command)
    result = compared(said, actual, peak_bytes, int(imported.stdout) * _MAXRSS_BYTES, arguments.out)
    print(json.dumps(result, indent=2) if arguments.json else "\n".join(lines(result)))


if __name__ == "__main__":
    main()
