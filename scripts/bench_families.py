"""A whole search on each model of the zoo: is the search any good beyond one family?

    python scripts/bench_families.py [--family NAME]... [--only SECTION]... [--again] [--zoo assets/zoo]
                                     [--out runs/bench-families] [--trials N] [--json]

Sections, each stored in OUT/FAMILY/bench-SECTION.json when it is done, and not run again without --again:
  scores   estimated against exact scores on the same held-out tokens, for widths, KV groups and drops apart: rank
           correlation with its bootstrap interval, and bias
  times    predicted against measured prefill time of mixed children
  search   nats a token that the search's child loses beside random and uniform at equal measured prefill speed
  repair   nats a token that a child with half of every block loses: one-shot, after its sequential refit, distilled
OUT/FAMILY is a run directory; what a search keeps there (library, tables, trials) is used again, also after a change
of the code, unless --again removes it too. OUT/families.json holds all figures. Models come from scripts/zoo.py. Exits
with 1 if a family failed, and with 2 if one is not in the zoo.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from family_sections import CLEAR_STANDARD_ERRORS, SECTIONS, Sizes, recipe_of
from rich.table import Table
from zoo import FACTS
from zoo_models import VALUES

from llmprune.cli.terminal import console, print_json, shown
from llmprune.core.errors import LlmpruneError
from llmprune.core.files import read_json, write_json
from llmprune.core.progress import Show
from llmprune.pipeline.run import Run
from llmprune.pipeline.run_directory import RunDirectory

Found = Mapping[str, Mapping[str, Any]]
"""By family, then by section: its figures, or `failed` and why."""


def bench(
    family: str, zoo: Path, directory: Path, sections: Sequence[str], sizes: Sizes, show: Show, *, again: bool = False
) -> dict[str, Any]:
    """The figures of some sections for one family; a section that cannot be measured says why."""
    if again:
        shutil.rmtree(directory, ignore_errors=True)
    found: dict[str, Any] = {}
    recipe = recipe_of(zoo / family, zoo / "text", sizes)
    directory.mkdir(parents=True, exist_ok=True)
    with RunDirectory(directory).locked():
        run = Run.start(directory, recipe, show)
        for name in sections:
            path = directory / f"bench-{name}.json"
            if not path.is_file():
                try:
                    write_json(path, SECTIONS[name](run, sizes))
                except LlmpruneError as error:
                    found[name] = {"failed": f"{type(error).__name__}: {error}"}
                    continue
            found[name] = read_json(path)
    return found


def scores_table(found: Found) -> Table:
    """Estimated against exact, a row a family and kind."""
    table = Table(title="Estimated against exact scores", caption=_scores_caption(found), caption_justify="left")
    for column in ("family", "kind"):
        table.add_column(column, no_wrap=True)
    for column in (
        "n",
        "Spearman",
        "95% interval",
        "estimated - exact,\nmedian nats",
        "estimated / exact,\nmedian (n)",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("exact,\nmedian nats", "in standard\nerrors", "unusable"):
        table.add_column(column, justify="right", no_wrap=True)
    for family, sections in found.items():
        if "scores" not in sections:
            continue
        if why := sections["scores"].get("failed"):
            table.add_row(family, f"failed: {why}")
            continue
        for kind, row in sections["scores"]["kinds"].items():
            table.add_row(
                family,
                kind,
                str(row["n"]),
                number(row["spearman"], ".2f"),
                f"{number(row['spearman_low'], '.2f')} to {number(row['spearman_high'], '.2f')}",
                number(row["median_difference_nats"], "+.4f"),
                f"{number(row['median_ratio'], '.2f')} ({row['n_ratio']})",
                number(row["median_exact_nats"], "+.4f"),
                number(row["median_standard_errors"], ".1f"),
                str(row["unusable"]),
            )
        table.add_section()
    return table


def _scores_caption(found: Found) -> str:
    tokens = sorted({s["scores"]["tokens"] for s in found.values() if "tokens" in s.get("scores", {})})
    return (
        f"Both on the same {' or '.join(f'{n:,}' for n in tokens)} held-out tokens. Interval: bootstrap over the n "
        f"choices. Ratios: of choices whose exact score is at least {CLEAR_STANDARD_ERRORS:g} standard errors. "
        "Unusable: the score is infinite or NaN, and is in no other column."
    )


def search_table(found: Found) -> Table:
    """Nats lost at equal measured speed, and the error of predicted time, a row a family."""
    methods = ("llmprune", "uniform", "random")
    speeds = sorted({r["at"] for s in found.values() for r in s.get("search", {}).get("results", ())})
    table = Table(
        title="Nats a token lost at equal measured prefill speed-up",
        caption="~ interpolated in the logarithm of the speed-up between two measured children; - not reached. Time "
        "error: predicted against measured time of n mixed children, median absolute and median.",
        caption_justify="left",
    )
    table.add_column("family", no_wrap=True)
    for at in speeds:
        for method in methods:
            table.add_column(f"{method}\n{at:g}x", justify="right", no_wrap=True)
    for column in ("never\nworse", "trials", "half of all,\nits refit,\ndistilled", "time error (n)"):
        table.add_column(column, justify="right", no_wrap=True)
    for family, sections in found.items():
        searched, timed = sections.get("search", {}), sections.get("times", {})
        cells = {(row["method"], row["at"]): row for row in searched.get("results", ())}
        lost = [_lost(cells.get((method, at))) for at in speeds for method in methods]
        verdict = {True: "yes", False: "NO", None: ""}[searched.get("never_worse")]
        error = ""
        if "children" in timed:
            absolute, signed = timed["median_absolute_error"], timed["median_error"]
            error = f"{100 * absolute:.1f}%, {100 * signed:+.1f}% ({len(timed['children'])})"
        repaired = sections.get("repair", {})
        refit = (
            "{one_shot:+.3f}\n{refit:+.3f}\n{distilled:+.3f}".format(**repaired["nats_lost"])
            if "nats_lost" in repaired
            else ""
        )
        failed = "; ".join(s["failed"] for s in (searched, timed, repaired) if "failed" in s)
        ending = f"failed: {failed}" if failed else error
        table.add_row(family, *lost, verdict, str(searched.get("trials", "")), refit, ending)
    return table


def _lost(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return ""
    if cell["nats_lost"] is None:
        return "-"
    return f"{'~' if cell['interpolated'] else ''}{cell['nats_lost']:+.3f}"


def number(value: float | None, form: str) -> str:
    """A figure, or `-` where there is none."""
    return "-" if value is None else format(value, form)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append", choices=list(VALUES), help="default: all")
    parser.add_argument("--only", action="append", choices=list(SECTIONS))
    parser.add_argument("--again", action="store_true", help="forget what is stored of these families")
    parser.add_argument("--zoo", type=Path, default=Path("assets/zoo"))
    parser.add_argument("--out", type=Path, default=Path("runs/bench-families"))
    parser.add_argument("--trials", type=int, default=Sizes.trials)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    families = arguments.family or list(VALUES)
    if missing := [family for family in families if not (arguments.zoo / family / FACTS).is_file()]:
        wanted = " ".join(f"--family {family}" for family in missing)
        print(
            f"error: {arguments.zoo} must hold {', '.join(missing)}; run scripts/zoo.py {wanted} --to {arguments.zoo}",
            file=sys.stderr,
        )
        return 2
    torch.set_num_threads(1)
    sizes, show = replace(Sizes(), trials=arguments.trials), shown(quiet=False)
    found: dict[str, dict[str, Any]] = {}
    for family in families:
        print(f"{family}:", file=sys.stderr)
        directory, sections = arguments.out / family, arguments.only or list(SECTIONS)
        found[family] = bench(family, arguments.zoo, directory, sections, sizes, show, again=arguments.again)
    write_json(arguments.out / "families.json", found)
    if arguments.json:
        print_json(found)
    else:
        console().print(scores_table(found))
        console().print(search_table(found))
    return 1 if any("failed" in section for sections in found.values() for section in sections.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
