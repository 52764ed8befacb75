"""What was found of exits in one run: typed values with JSON of their own, from the search to the report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from llmprune.core.errors import BudgetError
from llmprune.exits.policy import Mode
from llmprune.measure.quality.perplexity import Figure
from llmprune.measure.record import MeasuredOn, Quoted
from llmprune.measure.speed.throughput import Spread
from llmprune.measure.value import Value
from llmprune.models.modeling_pruned import ExitRules

PICKED_BY = ("ppl_ratio", "ppl", "nats_per_token", "decode_speedup", "decode_tokens_per_s", "worst_token_speedup")
"""Metrics that rules for leaving decide."""


class EstimatedExits(Value):
    """Of one set of rules, from stored figures and costs alone; speed-ups are over the parent."""

    name: str
    """Who made them: "search", or a baseline ("fixed": every token leaves at one layer; "grid": one threshold)."""
    trunk: str
    mode: Mode
    rules: dict[str, Any]
    nats_per_token: Figure
    decode_speedup: float
    worst_token_speedup: float
    depths: tuple[float, ...]


class TrunkFigures(Value):
    """A model that exits were put into."""

    id: str
    nats_per_token: Figure
    """On the search split, as all estimates are."""
    decode_speedup: float
    layers: tuple[int, ...]
    """Behind which its candidate exits stand."""
    agreement: tuple[float, ...]
    """Of each, how often it finds the trunk's likeliest token."""
    kl: tuple[float, ...]
    """Of each, KL a token from the trunk on text that was held out."""
    trained_tokens: int
    trained_seconds: float
    costs: dict[str, Any]
    """See `ExitCosts`: shares of the trunk's decode step."""


class ExitRecord(Value):
    """What was measured of a model with exits, beside the parent."""

    id: str
    hash: str
    """Of the trunk's architecture."""
    trunk: str
    mode: Mode
    rules: dict[str, Any]
    nats_per_token: Figure
    """On the validation split, every token leaving where it would; so are `ppl` and `ppl_ratio`."""
    ppl: Figure
    ppl_ratio: Figure
    decode_tokens_per_s: Spread
    decode_speedup: Spread
    """Of the split's own text, or of drafting of the model's, prompt by prompt."""
    worst_token_speedup: float
    depths: tuple[float, ...]
    """Share of the split's tokens that left by each exit; the last by none. Of drafting, of what was timed."""
    generated_speedup: Spread
    """Of what each model finds likeliest itself, and `generated_depths` of that."""
    generated_depths: tuple[float, ...]
    estimated: EstimatedExits
    measured_on: MeasuredOn
    test: Quoted | None = None
    unseen: Quoted | None = None

    @property
    def made_of(self) -> str:
        """What tells it from other rules in the same trunk."""
        return f"{self.mode}, {rules_text(self.rules)}"

    def value(self, metric: str) -> float:
        """A figure by the name that budgets use; of a measured speed, its median."""
        if metric not in PICKED_BY:
            raise BudgetError(f"exits are picked by {', '.join(PICKED_BY)}; they do not change {metric}")
        found = getattr(self, metric)
        return float(found.median if isinstance(found, Spread) else found)


class ExitsFound(Value):
    """All of `exits.json`."""

    parent: str
    trunks: tuple[TrunkFigures, ...]
    front: tuple[EstimatedExits, ...]
    """Estimated, slowest first: what neither other rules nor a trunk without exits beat in both nats and speed."""
    baselines: tuple[EstimatedExits, ...]
    records: tuple[ExitRecord, ...]
    """Measured."""
    trials: int


def exits_id(trunk: str, mode: Mode, rules: ExitRules, trained: str) -> str:
    """16 hex digits, of the trunk, what is done with tokens that leave, the rules, and the name of the training."""
    made_of = json.dumps([trunk, mode, rules.to_json(), trained], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(made_of.encode()).hexdigest()[:16]


def rules_text(rules: Mapping[str, Any]) -> str:
    """Rules in a line."""
    at = ", ".join(f"{layer} at {level:.3g}" for layer, level in zip(rules["layers"], rules["thresholds"], strict=True))
    return f"behind layer {at} by {rules['criterion']}, {rules['keys']} keys, at most {rules['waiting']} waiting"
