"""How good the parts of the search are, on the model of a finished run: the tables, the evaluation, the samplers.

    python scripts/bench_search.py RUN [--only SECTION]... [--json]

Sections, each stored in RUN/bench-SECTION.json when it is done and not run again:
  scores      the one-backward estimate against exact replace-one-block scores: rank correlation, and cost
  costs       the additive cost table against the measured time of mixed children
  evaluation  candidates decided per minute: plain full passes, prefix reuse, racing, both, and racing by KL
  samplers    quality after a few trials of each sampler against 200 trials of NSGA-II from random starts
  patience    the samplers that do not race, with 100 trials each
RUN is a run directory that `llmprune search` has made. Quality is in nats a token on its search tokens (fewer for
`scores`, `samplers` and `patience`; each result says how many); all timings are taken in turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench_sections import costs, evaluation, patience, samplers, scores

from llmprune.cli.terminal import print_json, shown
from llmprune.core.files import read_json, write_json
from llmprune.pipeline.prepare import Prepared, prepare
from llmprune.pipeline.run import Run
from llmprune.pipeline.run_directory import RunDirectory

SECTIONS: dict[str, Callable[[Run, Prepared], dict[str, Any]]] = {
    "scores": scores,
    "costs": costs,
    "evaluation": evaluation,
    "samplers": samplers,
    "patience": patience,
}


def lines(name: str, found: Mapping[str, Any]) -> list[str]:
    """A section as a person reads it."""
    if name == "scores":
        ranks = zip(found["spearman_with_exact_kl"].items(), found["spearman_with_exact_nats"].values(), strict=True)
        return [
            f"scores, {found['tokens']:,} tokens: the estimate of all {found['choices_in_library']} choices took "
            f"{found['estimate_seconds_in_forwards']:.1f} forward passes, an exact score "
            f"{found['exact_seconds_in_forwards_a_choice']:.2f} each",
            *(f"  Spearman, {kind}: {kl:.2f} with exact KL, {nats:.2f} with exact nats" for (kind, kl), nats in ranks),
        ]
    if name == "costs":
        errors = found["median_absolute_error"]
        return [
            f"costs, {len(found['children'])} mixed children: median absolute error of time "
            + ", ".join(f"{phase} {100 * error:.1f}%" for phase, error in errors.items())
        ]
    if name == "evaluation":
        return [
            f"evaluation, {found['candidates']} candidates on {found['tokens']:,} tokens, {found['kept']} kept:",
            *(
                f"  {way}: {row['decided_per_minute']:.1f} a minute ({row['times_plain']:.2f}x), same verdict on "
                f"{row['same_verdict']}"
                for way, row in found["ways"].items()
            ),
            f"  a sliced child scores {found['sliced_child_against_masked_parent']:.2f}x as fast as a masked parent",
        ]
    if name == "patience":
        return [
            f"samplers that do not race, {found['trials']} trials each:",
            *(
                f"  {sampler}: +{row['nats_lost']:.3f} nats (+{row['nats_lost_held_out']:.3f} held out) in "
                f"{row['minutes']:.1f} minutes"
                for sampler, row in found["samplers"].items()
            ),
        ]
    cold = found["cold_nsga2"]
    return [
        f"samplers at {found['target']:g}x (estimated), {found['trials']} trials on {found['tokens']:,} tokens:",
        *(
            f"  {sampler}: +{row['nats_lost']:.3f} nats (+{row['nats_lost_held_out']:.3f} held out) in "
            f"{row['minutes']:.1f} minutes; NSGA-II's {cold['trials']} cold trials "
            + (f"equalled after {row['trials_to_cold_nsga2']}" if row["trials_to_cold_nsga2"] else "not equalled")
            for sampler, row in found["samplers"].items()
        ),
        f"  cold nsga2: +{cold['nats_lost']:.3f} nats after {cold['trials']} trials, {cold['minutes']:.1f} minutes",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--only", action="append", choices=list(SECTIONS))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    with RunDirectory(arguments.run).locked():
        run = Run.open(arguments.run, shown(quiet=False))
        prepared = prepare(run)
        for name in arguments.only or SECTIONS:
            path = arguments.run / f"bench-{name}.json"
            if not path.is_file():
                write_json(path, SECTIONS[name](run, prepared))
            found[name] = read_json(path)
    if arguments.json:
        print_json(found)
    else:
        print("\n".join(line for name in found for line in lines(name, found[name])))


if __name__ == "__main__":
    main()
