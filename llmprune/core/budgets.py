"""Limits that people state: `decode_speedup>=1.5`, `params<=1e8`, `ppl_ratio<=1.2`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, TypeVar

from llmprune.core.errors import BudgetError, quoted

DRAFT_METRICS = ("disagreement", "draft_speedup")
"""Of children that are judged as drafts of their parent."""
QUALITY_METRICS = ("ppl_ratio", "ppl", "nats_per_token", "disagreement")
SPEED_METRICS = (
    *("decode_speedup", "prefill_speedup", "decode_tokens_per_s", "prefill_tokens_per_s"),
    "worst_token_speedup",
)
"""`decode_speedup` is of the mean token, `worst_token_speedup` of the dearest: they differ where tokens leave early."""
SIZE_METRICS = ("params", "bytes", "kv_bytes_per_token")
METRICS = (*QUALITY_METRICS, *SPEED_METRICS, *SIZE_METRICS, "draft_speedup")

_NUMBER = r"[0-9]+(?:_[0-9]+)*(?:\.[0-9]*)?(?:e[+-]?[0-9]{1,2})?"
_BUDGET = re.compile(rf"\s*([a-z_]+)\s*(>=|<=)\s*({_NUMBER})\s*", re.IGNORECASE)
_WORDS = ("prefill", "decode", "draft")
_NAME = re.compile(r"[0-9a-f]{16}")


class Axes(NamedTuple):
    """The two figures of a record by which a front is drawn."""

    quality: str
    """Lower is better."""
    speed: str
    """Higher is better."""


class Measured(Protocol):
    """What budgets are held against, and picks choose among: the records of children."""

    @property
    def id(self) -> str: ...

    @property
    def hash(self) -> str:
        """Of its architecture."""
        ...

    @property
    def made_of(self) -> str:
        """What tells it from other children of its architecture."""
        ...

    def value(self, metric: str) -> float: ...


MeasuredT = TypeVar("MeasuredT", bound=Measured)


@dataclass(frozen=True)
class Budget:
    """`metric` is at least (`>=`) or at most (`<=`) `limit`; a speed means its median."""

    metric: str
    relation: str
    limit: float

    def violation(self, value: float) -> float:
        """By how much `value` breaks the budget, relative to the limit; <= 0 holds it."""
        gap = self.limit - value if self.relation == ">=" else value - self.limit
        return gap / self.limit

    def __str__(self) -> str:
        return f"{self.metric}{self.relation}{self.limit:g}"


@dataclass(frozen=True)
class Pick:
    """What a person wants of a front: a child by its name, or budgets and what is best among those that hold them."""

    text: str
    child: str | None
    """An id, or the hash of an architecture."""
    budgets: tuple[Budget, ...]
    best: str

    def stricter(self, factor: float) -> Pick:
        """This pick with every limit moved by `factor` (above 1) to its strict side."""
        moved = (replace(b, limit=b.limit * factor if b.relation == ">=" else b.limit / factor) for b in self.budgets)
        return replace(self, budgets=tuple(moved))

    def violation(self, record: Measured) -> float:
        """By how much a record misses the budget that it misses most; nothing above 0 holds them all."""
        return max((budget.violation(record.value(budget.metric)) for budget in self.budgets), default=0.0)

    def value_of(self, record: Measured) -> float:
        """How good a record is, higher is better."""
        value = record.value(self.best)
        return -value if self.best in QUALITY_METRICS else value


def parse_budget(text: str) -> Budget:
    """Read one budget. Raises BudgetError naming what may stand there."""
    match = _BUDGET.fullmatch(text)
    if match is None:
        raise BudgetError(
            f"a budget is METRIC>=NUMBER or METRIC<=NUMBER, such as decode_speedup>=1.5; got {quoted(text)}"
        )
    metric, relation, number = match.groups()
    if metric not in METRICS:
        raise BudgetError(f"unknown metric {quoted(metric)} in {quoted(text)}; known are: {', '.join(METRICS)}")
    limit = float(number)
    if limit <= 0:
        raise BudgetError(f"the limit of a budget is positive; got {quoted(text)}")
    if math.isinf(limit):
        raise BudgetError(f"the limit of a budget is finite; got {quoted(text)}")
    return Budget(metric, relation, limit)


def parse_pick(text: str) -> Pick:
    """Read a pick: a child's id, an architecture's hash, or budgets separated by commas, optionally with the word
    `prefill`; or `draft`, with or without budgets.

    With a speed or size budget the best is the least nats per token; with quality budgets alone it is the fastest,
    in decode unless the pick says prefill; with `draft`, or a budget of drafts, the one with which its parent decodes
    fastest. Raises BudgetError.
    """
    text = text.strip()
    if _NAME.fullmatch(text):
        return Pick(text, text, (), "nats_per_token")
    parts = [part.strip() for part in text.split(",") if part.strip()]
    budgets = tuple(parse_budget(part) for part in parts if part not in _WORDS)
    of_drafts = "draft" in parts or any(budget.metric in DRAFT_METRICS for budget in budgets)
    if not budgets and not of_drafts:
        raise BudgetError(
            f"a pick is an id of 16 hex digits or budgets such as decode_speedup>=1.5; got {quoted(text)}"
        )
    phases = [part for part in parts if part in _WORDS]
    best = "nats_per_token"
    if of_drafts and phases in ([], ["draft"]):
        best = "draft_speedup"
    elif all(budget.metric in QUALITY_METRICS for budget in budgets):
        best = "prefill_speedup" if "prefill" in phases else "decode_speedup"
    elif phases:
        raise BudgetError(
            f"prefill or decode says in what the fastest child is fastest; {quoted(text)} asks for something else: "
            "leave the word out, or give quality limits only"
        )
    if len(phases) > 1:
        raise BudgetError(f"a pick names prefill, decode or draft, once; got {quoted(text)}")
    return Pick(text, None, budgets, best)


def pick_record(records: Iterable[MeasuredT], pick: Pick) -> MeasuredT:
    """The best record that holds the pick. Raises BudgetError naming the nearest if none does."""
    records = list(records)
    if not records:
        raise BudgetError("the front is empty; raise search.trials and run the search again")
    if pick.child is not None:
        return _named(records, pick.child)
    if held := holding(records, pick):
        return held[0]
    nearest = min(records, key=pick.violation)
    values = ", ".join(f"{b.metric} {nearest.value(b.metric):.4g}" for b in pick.budgets)
    raise BudgetError(
        f"no child on the front holds {quoted(pick.text)}; the nearest is {nearest.id} with {values}. "
        "Loosen the pick, or search on with more trials"
    )


def holding(records: Iterable[MeasuredT], pick: Pick) -> list[MeasuredT]:
    """All records that hold the budgets of a pick, the best first."""
    return sorted((one for one in records if pick.violation(one) <= 0), key=pick.value_of, reverse=True)


def _named(records: Sequence[MeasuredT], name: str) -> MeasuredT:
    """The child with this id, or else the only one whose architecture has this hash; measured twice, the first."""
    of_id = [record for record in records if record.id == name]
    of_hash = {record.id: record for record in reversed(records) if record.hash == name}
    if of_id or len(of_hash) == 1:
        return next(iter(of_id or of_hash.values()))
    if of_hash:
        children = "; ".join(f"{record.id} ({record.made_of})" for record in reversed(of_hash.values()))
        raise BudgetError(f"{name} is the architecture of {len(of_hash)} children, pick one by its id: {children}")
    known = ", ".join(record.id for record in records)
    raise BudgetError(f"no child has id or hash {name}; the front has: {known}")
