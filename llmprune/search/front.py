"""The front: which trials are worth re-measuring, and which of those stay once they are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress

from llmprune.core.budgets import Axes, Budget, Pick, pick_record
from llmprune.core.errors import BudgetError
from llmprune.measure.record import Front, Record


def non_dominated(records: Iterable[Record], axes: Axes) -> list[Record]:
    """Records that no other beats in both figures, a speed's being its median; slowest first."""
    front: list[Record] = []
    for record in sorted(records, key=lambda r: (-r.value(axes.speed), r.value(axes.quality))):
        if not front or record.value(axes.quality) < front[-1].value(axes.quality):
            front.append(record)
    return front[::-1]


def with_verdicts(front: Front, most_ppl_ratio: float) -> Front:
    """The front with `usable` in every record: whether its perplexity is at most so many times the parent's; of a
    draft, whether the parent is faster with it than alone.

    It goes by the tokens that children are chosen on: those of the quoted figures decide nothing.
    """

    def judged(record: Record) -> Record:
        usable = record.ppl_ratio <= most_ppl_ratio if record.draft is None else record.draft.drafted > 0
        return record.model_copy(update={"usable": usable})

    return front.model_copy(
        update={
            "parent": judged(front.parent),
            **{name: tuple(map(judged, getattr(front, name))) for name in ("children", "baselines", "one_shot")},
        }
    )


def unusable(record: Record, most_ppl_ratio: float) -> str:
    """Why a child is not exported, and what would do."""
    if record.draft is not None:
        return (
            f"{record.id} would slow its parent down: as a draft it disagrees on {record.value('disagreement'):.0%} of "
            f"the tokens that the parent writes, and takes {1 / record.decode_speedup.median:.0%} of its time a token; "
            f"search on with more trials, train it longer, or export it all the same with llmprune export RUN --pick "
            f"{record.id} --force"
        )
    return (
        f"{record.id} has {record.ppl_ratio:.4g} times its parent's perplexity, and is unusable beyond "
        f"front.usable_ppl_ratio={most_ppl_ratio:g}; pick a slower child, search on with more trials or lower "
        f"search.targets, or export it all the same with llmprune export RUN --pick {record.id} --force"
    )


def holding_budgets(records: Sequence[Record], budgets: Sequence[Budget]) -> list[Record]:
    """The records that hold every budget. Raises BudgetError if there is none."""
    holding = [r for r in records if all(b.violation(r.value(b.metric)) <= 0 for b in budgets)]
    if not holding:
        stated = ", ".join(str(budget) for budget in budgets)
        raise BudgetError(f"none of {len(records)} trials holds the budgets {stated}; loosen them, or search on")
    return holding


def candidates_for_front(children: Sequence[Record], axes: Axes, size: int, picks: Sequence[Pick]) -> list[Record]:
    """At most `size` trials to re-measure, slowest first: what the picks would choose (earlier ones first, if not all
    fit), then the non-dominated ones that lie farthest in speed (on a log scale) from those chosen already."""
    front, speed = non_dominated(children, axes), axes.speed
    chosen: dict[str, Record] = {}
    for pick in picks:
        with suppress(BudgetError):
            # A child that is named is wanted, though another may beat it.
            wanted = pick_record(children if pick.child else front, pick)
            if len(chosen) < size:
                chosen[wanted.id] = wanted
    while len(chosen) < size and (left := [record for record in front if record.id not in chosen]):
        farthest = max(left, key=lambda record: _distance(record, list(chosen.values()), speed))
        chosen[farthest.id] = farthest
    return sorted(chosen.values(), key=lambda record: record.value(speed))


def _distance(record: Record, chosen: Sequence[Record], speed: str) -> float:
    """How far a record's speed is from the nearest one chosen; with none chosen, the fastest comes first."""
    own = math.log(record.value(speed))
    return min((abs(own - math.log(other.value(speed))) for other in chosen), default=own)
