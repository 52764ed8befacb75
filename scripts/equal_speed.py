"""Hold a run's child to other methods at exactly its own measured speed, on its own splits and on any other text.

    python scripts/equal_speed.py RUN [--text NAME=FILE]... [--seq-len 1024] [--method uniform shortgpt] [--json]

For each method two of its children are found, one slower and one faster than the search's. Then all are timed beside
the parent in one interleaved run, and scored; a method's nats at the child's speed are interpolated between its two,
window by window, linearly in the logarithm of the speed-up. Differences have paired bootstrap intervals (95%, over
windows; the noise of timing is not in them).

A FILE is .jsonl or .parquet (documents under `text`), or else plain text, one document a file (.txt, .raw, .py, ...);
it may be a pattern such as 'src/**/*.py', and a NAME may be given several files. Further texts are cut into windows
of --seq-len tokens, validation and test are the run's own.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from rich.table import Table
from texts import text_splits
from transformers import PreTrainedModel

from llmprune.baselines.given import Aim
from llmprune.baselines.ledger import Ledger
from llmprune.baselines.methods import METHODS
from llmprune.choices.architecture import Architecture
from llmprune.cli.terminal import console, print_json, shown
from llmprune.core.budgets import parse_pick, pick_record
from llmprune.core.errors import DataError, LlmpruneError
from llmprune.core.progress import Show
from llmprune.core.recipe import BaselineName
from llmprune.data.tokens import Split
from llmprune.evaluation.differences import differences_on_text
from llmprune.measure.quality.perplexity import quality_from_windows, score_windows
from llmprune.measure.record import engine_of
from llmprune.measure.speed.host import fingerprint
from llmprune.measure.speed.throughput import Speed, measure_paired
from llmprune.measure.speed.turns import timing
from llmprune.models.surgery import prune
from llmprune.pipeline.comparison import Contest, contest_of
from llmprune.pipeline.exports import exported_id
from llmprune.pipeline.judges import Judges
from llmprune.pipeline.prepare import prepare
from llmprune.pipeline.run import Run
from llmprune.pipeline.run_directory import RunDirectory, read_front

STEP = 1.02
"""From one offer of a method to the next, in estimated speed-up."""
OFFERS = 20
CLEAR = 0.01
"""A child this much slower or faster than the one that is compared will be so in another measurement too."""
QUICK_REPEATS = 3

Nats = Mapping[str, torch.Tensor]
"""Of one model on one text: (N,) nats a window, by source."""


@dataclass(frozen=True)
class Bracket:
    """Two children of a method about the speed of the one that is compared, and their place in the order of timing."""

    method: str
    slower: int
    faster: int


def neighbours(
    aim: Aim, measure: Callable[[Architecture], float], target: float
) -> tuple[Architecture, Architecture] | None:
    """Of what a method offers, the fastest child that is clearly slower than `target` and the slowest that is clearly
    faster, as measured; None if it has no child on one side."""
    measured: dict[Architecture, float] = {}

    def clear(architecture: Architecture, direction: int) -> bool:
        return direction * (measured[architecture] / target - 1) >= CLEAR

    for direction in (-1, 1):
        for step in range(1, OFFERS + 1):
            offered = aim(target * STEP ** (direction * step))
            if offered is None:
                break
            if offered not in measured:
                measured[offered] = measure(offered)
            if clear(offered, direction):
                break
    slower = [a for a in measured if clear(a, -1)]
    faster = [a for a in measured if clear(a, 1)]
    if not slower or not faster:
        return None
    return max(slower, key=measured.__getitem__), min(faster, key=measured.__getitem__)


def share_between(slower: float, faster: float, target: float) -> float:
    """How far `target` lies from the slower to the faster speed-up, on a log scale; beyond them below 0 or above 1."""
    return math.log(target / slower) / math.log(faster / slower)


def interpolated(slower: Nats, faster: Nats, share: float) -> dict[str, torch.Tensor]:
    """Nats a window of a child that is not there, a share of the way from one to the other."""
    return {name: (1 - share) * slower[name] + share * faster[name] for name in slower}


def compare(
    contest: Contest, child: Architecture, methods: Sequence[BaselineName], texts: Mapping[str, Split], repeats: int
) -> dict[str, Any]:
    """Find each method's children, time everything in one interleaved run, score it, and say who loses what."""
    run, prepared, show = contest.run, contest.prepared, contest.run.show
    parent, workload = prepared.parent, prepared.workload
    models = [prune(parent, child, prepared.library)]
    architectures = [child]
    target = _quick(contest, models[0])
    brackets: list[Bracket] = []
    out_of_reach: list[str] = []
    for name in methods:
        with show(f"finding children of {name} about {target:.2f}x"):
            found = _neighbours_of(contest, name, target)
        if found is None:
            out_of_reach.append(name)
            continue
        library = contest.judges.libraries([name])[name]
        brackets.append(Bracket(name, len(models), len(models) + 1))
        architectures += found
        models += [prune(parent, architecture, library) for architecture in found]
    with show("timing all in one run") as advance, timing(workload.device):
        of_parent, speeds = measure_paired(parent.model, models, workload, repeats, advance)
    figure = f"{run.recipe.search.phase}_speedup"
    speedups = [float(getattr(speed, figure).median) for speed in speeds]
    rows = [_on_text(name, split, parent.model, models, brackets, speedups, show) for name, split in texts.items()]
    return {
        "run": run.directory.path.name,
        "child": child.hash,
        "figure": figure,
        "speedup": speedups[0],
        "models": [
            {"hash": architecture.hash, **speed.to_json()}
            for architecture, speed in zip(architectures, speeds, strict=True)
        ],
        "parent": of_parent.to_json(),
        "methods": [_placed(bracket, architectures, speedups) for bracket in brackets],
        "out_of_reach": out_of_reach,
        "texts": rows,
        "measured_on": {"workload": workload.to_json(), "repeats": repeats, "host": fingerprint()},
    }


def _quick(contest: Contest, model: PreTrainedModel) -> float:
    workload = contest.prepared.workload
    with timing(workload.device):
        _, (speed,) = measure_paired(contest.prepared.parent.model, [model], workload, QUICK_REPEATS)
    return _median(contest.run, speed)


def _median(run: Run, speed: Speed) -> float:
    return float(getattr(speed, f"{run.recipe.search.phase}_speedup").median)


def _neighbours_of(contest: Contest, name: BaselineName, target: float) -> tuple[Architecture, Architecture] | None:
    rival, library = contest.entrant(name), contest.judges.libraries([name])[name]
    ledger = Ledger(rival.chooser.score, rival.chooser.split)
    aim = rival.method.aim(rival.given(ledger.nats))
    return neighbours(aim, lambda a: _quick(contest, prune(contest.prepared.parent, a, library)), target)


def _placed(bracket: Bracket, architectures: Sequence[Architecture], speedups: Sequence[float]) -> dict[str, Any]:
    slower, faster = speedups[bracket.slower], speedups[bracket.faster]
    share = share_between(slower, faster, speedups[0])
    return {
        "method": bracket.method,
        "slower": {"hash": architectures[bracket.slower].hash, "speedup": slower},
        "faster": {"hash": architectures[bracket.faster].hash, "speedup": faster},
        "share": share,
        "bracketed": 0 <= share <= 1,
    }


def _on_text(
    name: str,
    split: Split,
    parent: PreTrainedModel,
    models: Sequence[PreTrainedModel],
    brackets: Sequence[Bracket],
    speedups: Sequence[float],
    show: Show,
) -> dict[str, Any]:
    with show(f"scoring on {name}") as advance:
        nats: list[Nats] = []
        for model in (parent, *models):
            nats.append(score_windows(model, split))
            advance(len(nats), 1 + len(models))
    of_parent, own, *rest = nats

    def lost(of: Nats) -> float:
        return quality_from_windows(split, of).nats_per_token - quality_from_windows(split, of_parent).nats_per_token

    rivals = []
    for bracket in brackets:
        slower, faster = (rest[i - 1] for i in (bracket.slower, bracket.faster))
        share = share_between(speedups[bracket.slower], speedups[bracket.faster], speedups[0])
        between = interpolated(slower, faster, share)
        rivals.append(
            {
                "method": bracket.method,
                "nats_lost": lost(between),
                "nats_lost_slower": lost(slower),
                "nats_lost_faster": lost(faster),
                "child_less_method": next(iter(differences_on_text(split, between, own)), None),
            }
        )
    quality = quality_from_windows(split, of_parent)
    return {
        "text": name,
        "tokens": quality.tokens,
        "seq_len": split.seq_len,
        "bos": split.bos,
        "parent_nats": quality.nats_per_token,
        "nats_lost": lost(own),
        "methods": rivals,
    }


def table(result: Mapping[str, Any]) -> Table:
    """Nats lost on each text: the search's child, and each method at its speed."""
    engine = engine_of(result["measured_on"]["workload"])
    notes = [
        f"{row['method']}: between {row['slower']['speedup']:.3f}x and {row['faster']['speedup']:.3f}x"
        + ("" if row["bracketed"] else ", EXTRAPOLATED (time it again, with more repeats)")
        for row in result["methods"]
    ]
    notes += [f"{name}: has no child on both sides" for name in result["out_of_reach"]]
    shown_as = Table(
        title=f"Nats a token lost at {result['speedup']:.3f}x ({result['figure']}, {engine}), child {result['child']}",
        caption="; ".join(notes) + ". In brackets: search less method, 95%.",
        caption_justify="left",
    )
    shown_as.add_column("text")
    names = [row["method"] for row in result["methods"]]
    for column in ("tokens", "window", "parent", "search", *names):
        shown_as.add_column(column, justify="right", no_wrap=True)
    for row in result["texts"]:
        cells = [row["text"], f"{row['tokens']:,}", f"{row['seq_len']:,}", f"{row['parent_nats']:.3f}"]
        shown_as.add_row(*cells, f"{row['nats_lost']:+.3f}", *(_cell(row, rival) for rival in row["methods"]))
    return shown_as


def _cell(row: Mapping[str, Any], rival: Mapping[str, Any]) -> str:
    found = rival["child_less_method"]
    if found is None:
        return f"{rival['nats_lost']:+.3f}"
    less = 100 * (row["nats_lost"] / rival["nats_lost"] - 1) if rival["nats_lost"] > 0 else math.nan
    interval = f"{found['difference']:+.3f}, {found['low']:+.3f} to {found['high']:+.3f}"
    return f"{rival['nats_lost']:+.3f}\n({interval}; {less:+.0f}%)"


def child_of(run: Run, pick: str | None) -> Architecture:
    """The child that is compared: the run's export, or what is picked of its front."""
    wanted = pick or exported_id(run.directory.export) or run.recipe.export.pick
    return pick_record(read_front(run.directory).children, parse_pick(wanted)).architecture


def main() -> None:
    comparable = [name for name in get_args(BaselineName) if METHODS[name].finish is None]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory with a front")
    parser.add_argument("--pick", help="another child of the front than the export: budgets or an id")
    parser.add_argument("--method", nargs="+", choices=comparable, default=["uniform", "shortgpt"])
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens a window of the further texts")
    parser.add_argument("--tokens", type=int, default=32_768, help="of each further text, at most")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    try:
        with RunDirectory(arguments.run).locked():
            run = Run.open(arguments.run, shown(quiet=False))
            child = child_of(run, arguments.pick)
            prepared = prepare(run)
            parent, tokens = prepared.parent, prepared.tokens
            limit = parent.model.config.get_text_config().max_position_embeddings
            if arguments.text and not 2 <= arguments.seq_len <= limit:
                raise DataError(f"--seq-len must be from 2 to the model's {limit:,} positions, got {arguments.seq_len}")
            assert parent.tokenizer is not None, "a parent that was loaded has a tokenizer"
            further = text_splits(
                arguments.text, parent.tokenizer, arguments.seq_len, arguments.tokens, bos=tokens["test"].bos
            )
            texts = {"validation": tokens["validation"], "test": tokens["test"], **further}
            contest = contest_of(run, prepared, Judges(run, prepared))
            result = compare(contest, child, arguments.method, texts, arguments.repeats)
    except LlmpruneError as error:
        raise SystemExit(f"error: {error}") from None
    if arguments.json:
        print_json(result)
    else:
        console().print(table(result))


if __name__ == "__main__":
    main()
