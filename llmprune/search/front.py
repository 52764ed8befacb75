"""The front: which trials are worth re-measuring, and which of those stay once they are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from llmprune.core.budgets import Budget, Pick, metric_value, pick_record
from llmprune.core.errors import BudgetError
from llmprune.search.judging import Record


def non_dominated(records: Iterable[Record], speed: str) -> list[Record]:
    """Records that no other beats in both nats per token and median `speed`; slowest first."""
    front: list[Record] = []
    for record in sorted(records, key=lambda r: (-metric_value(r, speed), r["nats_per_token"])):
        if not front or record["nats_per_token"] < front[-1]["nats_per_token"]:
            front.append(record)
    return front[::-1]


def with_verdicts(front: Mapping[str, Any], most_ppl_ratio: float) -> dict[str, Any]:
    """The front with `usable` in every record: whether its perplexity is at most so many times the parent's.

    It goes by the tokens that children are chosen on: those of the quoted figures decide nothing.
    """

    def judged(record: Record) -> Record:
        return {**record, "usable": record["ppl_ratio"] <= most_ppl_ratio}

    return {
        "parent": judged(front["parent"]),
        "children": [judged(record) for record in front["children"]],
        "baselines": [judged(record) for record in front["baselines"]],
    }


def unusable(record: Mapping[str, Any], most_ppl_ratio: float) -> str:
    """Why a child is not exported, and what would do."""
    ratio = record["ppl_ratio"]
    return (
        f"{record['hash']} has {ratio:.4g} times its parent's perplexity, and is unusable beyond "
        f"front.usable_ppl_ratio={most_ppl_ratio:g}; pick a slower child, search on with more trials or lower "
        f"search.targets, or export it all the same with llmprune export RUN --pick {record['hash']} --force"
    )


def holding_budgets(records: Sequence[Record], budgets: Sequence[Budget]) -> list[Record]:
    """The records that hold every budget. Raises BudgetError if there is none."""
    holding = [r for r in records if all(b.violation(metric_value(r, b.metric)) <= 0 for b in budgets)]
    if not holding:
        stated = ", ".join(str(budget) for budget in budgets)
        raise BudgetError(f"none of {len(records)} trials holds the budgets {stated}; loosen them, or search on")
    return holding


def candidates_for_front(children: Sequence[Record], speed: str, size: int, picks: Sequence[Pick]) -> list[Record]:
    """At most `size` trials to re-measure, slowest first: what the picks would choose (earlier ones first, if not all
    fit), then the non-dominated ones that lie farthest in speed (on a log scale) from those chosen already."""
    front = non_dominated(children, speed)
    chosen: dict[str, Record] = {}
    for pick in picks:
        with suppress(BudgetError):
            # A child that is named is wanted, though another may beat it.
            wanted = pick_record(children if pick.hash else front, pick)
            if len(chosen) < size:
                chosen[wanted["hash"]] = dict(wanted)
    while len(chosen) < size and (left := [record for record in front if record["hash"] not in chosen]):
        farthest = max(left, key=lambda record: _distance(record, list(chosen.values()), speed))
        chosen[farthest["hash"]] = farthest
    return sorted(chosen.values(), key=lambda record: metric_value(record, speed))


def _distance(record: Record, chosen: Sequence[Record], speed: str) -> float:
    """How far a record's speed is from the nearest one chosen; with none chosen, the fastest comes first."""
    own = math.log(metric_value(record, speed))
    return min((abs(own - math.log(metric_value(other, speed))) for other in chosen), default=own)
