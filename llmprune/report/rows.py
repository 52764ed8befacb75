"""The rows that charts are drawn from: plain values, one mapping a mark."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from llmprune.choices.architecture import Architecture
from llmprune.choices.choice import Choice
from llmprune.choices.dimensions import BLOCK_KINDS, WHOLE_MODEL
from llmprune.core.budgets import parse_pick, pick_record
from llmprune.core.errors import BudgetError
from llmprune.measure.record import Front, Record
from llmprune.measure.speed.throughput import Spread
from llmprune.report.facts import Curve, Facts, Judged
from llmprune.tables.block_tables import BlockTables

Row = dict[str, Any]
KIND_NAMES = {"attention": "attention", "ffn": "FFN"}


def front_rows(front: Front, phase: str) -> Iterator[Row]:
    """Every record of a front with its role, speed and what it loses on text that nothing was chosen on."""
    for role, records in (
        ("parent", (front.parent,)),
        ("child", front.children),
        ("baseline", front.baselines),
        ("before its repair", front.one_shot),
    ):
        for record in records:
            yield _of_record(record, role, phase)


def within_use(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Rows of a front that a chart has room for, and those of unusable children that lose so much more than any usable
    one that it would have room for nothing else. How often drafts differ has an end, so all have room."""
    if any("test_differs" in row for row in rows):
        return list(rows), []
    most = max((row["test_lost"] or 0.0 for row in rows if row["usable"]), default=0.0)
    beyond = [row for row in rows if not row["usable"] and (row["test_lost"] or 0.0) > 2 * most > 0]
    return [row for row in rows if row not in beyond], beyond


def _of_record(record: Record, role: str, phase: str) -> Row:
    speed: Spread = getattr(record, f"{phase}_speedup")
    quoted = {f"{name}_lost": _finite(found.nats_lost) for name, found in record.quoted.items()}
    quoted |= {f"{name}_ppl": _finite(found.ppl) for name, found in record.quoted.items()}
    quoted |= {f"{name}_ppl_ratio": _finite(found.ppl_ratio) for name, found in record.quoted.items()}
    like = record.test.likeness if record.test else None
    quoted |= {"kl": _finite(like.kl), "same_top": like.same_top} if like else {}
    for name, found in record.quoted.items():
        if found.agreement and (draft := record.draft_on(found.agreement)):
            quoted[f"{name}_differs"] = 1 - found.agreement.share
            quoted[f"{name}_with_it"] = draft.speedup
            quoted[f"{name}_drafted"] = draft.drafted
    return {
        "id": record.id,
        "title": title_of(record, role),
        "role": role,
        "speedup": speed.median,
        "slow": speed.low,
        "fast": speed.high,
        "params": record.params,
        "bytes": record.bytes,
        "bits": record.bits,
        "done": ", ".join(record.done) or "nothing: one-shot",
        "usable": record.usable is not False,
        **quoted,
    }


def title_of(record: Record, role: str) -> str:
    """What a record is called beside others."""
    return record.name if role in ("parent", "baseline") else record.id[:8]


def repair_rows(front: Front, phase: str) -> list[Row]:
    """For each record that was repaired a line from what it was before to what it is."""
    found = []
    for record in (*front.children, *front.baselines):
        if (before := front.before_repair(record)) is not None:
            ends = (_of_record(before, "before its repair", phase), _of_record(record, "child", phase))
            found += [{**row, "line": record.id, "order": order} for order, row in enumerate(ends)]
    return found


def map_rows(front: Front) -> Iterator[Row]:
    """How much of each block of the parent is left in every child and baseline."""
    for record, role in _drawn(front):
        for row in cells_of(record.architecture, front.parent.architecture):
            yield {"id": record.id, "title": titled(title_of(record, role), record.architecture), **row}


def titled(name: str, architecture: Architecture) -> str:
    """What a map of blocks is called: it has no cell for the vocabulary."""
    stored = architecture.vocabulary.stored
    return f"{name}, vocabulary in {stored}" if stored else name


def cells_of(architecture: Architecture, whole: Architecture) -> Iterator[Row]:
    """How much an architecture keeps of each block of its parent's."""
    for (layer, choice), (_, full) in zip(architecture.blocks(), whole.blocks(), strict=True):
        yield {
            "layer": layer,
            "block": KIND_NAMES[choice.kind],
            "kept": choice.units / full.units,
            "stored": choice.stored or "",
            "units": f"{choice.units:,} of {full.units:,} {'KV groups' if choice.kind == 'attention' else 'wide'}"
            + (f", {choice.stored}" if choice.stored else ""),
        }


def time_rows(front: Front, tables: BlockTables, phase: str) -> Iterator[Row]:
    """Share of the parent's time that each block takes, in the parent and in every child, as the cost table has it."""
    saving = tables.costs.saving[phase]
    dropped = {kind: max(saving[choice] for choice in tables.costs.space.ladder(kind)) for kind in BLOCK_KINDS}
    for record, role in _drawn(front):
        for layer, choice in record.architecture.blocks():
            yield {
                "id": record.id,
                "title": title_of(record, role),
                "layer": layer,
                "block": KIND_NAMES[choice.kind],
                "share": dropped[choice.kind] - saving[choice],
            }


def _drawn(front: Front) -> list[tuple[Record, str]]:
    """The parent, children and baselines, each once: a baseline may be a child of the front too."""
    every = [
        (front.parent, "parent"),
        *((r, "child") for r in front.children),
        *((r, "baseline") for r in front.baselines),
    ]
    return list({record.id: (record, role) for record, role in reversed(every)}.values())[::-1]


def choice_rows(tables: BlockTables, phase: str) -> Iterator[Row]:
    """What every choice costs, put alone into the parent, and what it saves."""
    space = tables.costs.space
    for kind in BLOCK_KINDS:
        for place, choice in enumerate(space.ladder(kind)[:-1]):
            for layer in range(space.shape.layers):
                nats = tables.delta_nats[layer, choice]
                yield {
                    "layer": layer,
                    "block": KIND_NAMES[kind],
                    "place": place,
                    "left": _left(choice),
                    "nats": _finite(nats),
                    # A colour per factor: what is lost spans orders of magnitude, and noise may be below nothing.
                    "shade": _finite(max(nats, 1e-4)),
                    "saved": tables.costs.saving[phase][choice],
                }


def vocabulary_facts(tables: BlockTables, phase: str) -> Iterator[tuple[str, float, float]]:
    """Each type that embedding and output head may have, nats a token that it costs alone, and the share of time that
    it saves."""
    for choice in tables.costs.space.vocabulary[:-1]:
        yield choice.label, tables.delta_nats[WHOLE_MODEL, choice], tables.costs.saving[phase][choice]


def _left(choice: Choice) -> str:
    if not choice.units:
        return "dropped"
    return f"{choice.units:,}" + (f" {choice.stored}" if choice.stored else "")


def trial_rows(trials: Sequence[Judged], phase: str, tables: BlockTables | None) -> Iterator[Row]:
    """Every trial as it was measured on the search tokens, and as the tables had foretold it."""
    for trial in trials:
        record = trial.record
        row: Row = {
            "number": trial.number,
            "from": trial.started_as or "the sampler",
            "minutes": trial.minutes,
            "speedup": record.value(f"{phase}_speedup"),
            "nats": _finite(record.nats_per_token),
            "params": record.params,
        }
        yield row | (foretold(tables, record.architecture, phase) if tables else {})


def foretold(tables: BlockTables, architecture: Architecture, phase: str) -> Row:
    """Speed-up and nats lost of an architecture as the tables have them."""
    return {
        "foretold_speedup": tables.costs.speedup(architecture, phase),
        "foretold_lost": _finite(tables.nats_lost(architecture)),
    }


def hypervolume_rows(trials: Iterable[Judged], phase: str) -> list[Row]:
    """After each trial, the area that the best so far cover: nats a token below the worst of all, times the speed-up
    beyond 1."""
    points = [(t, t.record.value(f"{phase}_speedup"), t.record.nats_per_token) for t in trials]
    finite = [nats for _, _, nats in points if math.isfinite(nats)]
    worst, seen, rows = max(finite, default=0.0), list[tuple[float, float]](), []
    for done, (trial, speed, nats) in enumerate(points, start=1):
        if math.isfinite(nats):
            seen.append((speed, nats))
        rows.append({"trials": done, "minutes": trial.minutes, "area": covered(seen, worst)})
    return rows


def covered(points: Iterable[tuple[float, float]], worst: float) -> float:
    """The area between (1, worst) and points of (speed-up, nats) that lie beyond it in both: their hypervolume."""
    area, level = 0.0, worst
    for speed, nats in sorted(points, key=lambda point: (-point[0], point[1])):
        if speed > 1 and nats < level:
            area += (speed - 1) * (level - nats)
            level = nats
    return area


def curve_rows(curves: Iterable[Curve]) -> Iterator[Row]:
    """The checks of every distillation."""
    for curve in curves:
        for tokens, nats in curve.checks:
            yield {"child": curve.child[:8], "tokens": tokens, "nats": _finite(nats)}


def picked_id(facts: Facts) -> str:
    """The child that is shown first: the recipe's pick, or without one that holds it the slowest of the front."""
    assert facts.front is not None, "there is a front to pick from"
    children = facts.front.children
    try:
        return pick_record(children, parse_pick(facts.recipe.export.pick)).id
    except BudgetError:
        return children[0].id if children else facts.front.parent.id


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None
