"""What rules for leaving do to a text, from stored statistics and costs alone: which token leaves where, what that
loses, and what each token takes. No model runs here.

Shapes: W windows, N positions of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmprune.exits.costs import ExitCosts
from llmprune.exits.statistics import ExitStatistics
from llmprune.models.modeling_pruned import ExitRules

Mode = Literal["early", "draft"]
"""Whether tokens that leave are taken, or verified by the whole model."""


@dataclass(frozen=True)
class Scan:
    """What one exit did at every position, (W, N)."""

    leaves: Tensor
    brought: Tensor
    """Of a token that went deeper, how many went with it; 0 elsewhere."""


@dataclass(frozen=True, eq=False)
class Estimated:
    """Of one set of rules on one split; costs are shares of the trunk's decode step."""

    nats_per_token: float
    mean_cost: float
    worst_cost: float
    """The most that any token can take under these rules, whatever the text."""
    depths: tuple[float, ...]
    """Share of tokens that left by each exit; the last by none."""


def scan(confident_WN: Tensor, arrives_WN: Tensor, carried_WN: Tensor, most_waiting: int) -> Scan:
    """Go through each window in order: a token that arrives leaves if it is confident and fewer than `most_waiting`
    wait here; else it goes deeper, with all who wait. `carried_WN` came from the exit before, with the token."""
    leaves, brought = torch.zeros_like(arrives_WN), torch.zeros(arrives_WN.shape, dtype=torch.int64)
    rows = zip(confident_WN.tolist(), arrives_WN.tolist(), carried_WN.tolist(), strict=True)
    for w, (confident, arrives, carried) in enumerate(rows):
        waiting, left, took = 0, [False] * len(arrives), [0] * len(arrives)
        for t, (sure, here, more) in enumerate(zip(confident, arrives, carried, strict=True)):
            if not here:
                continue
            waiting += more
            if sure and waiting < most_waiting:
                left[t], waiting = True, waiting + 1
            else:
                took[t], waiting = waiting, 0
        leaves[w], brought[w] = torch.tensor(left), torch.tensor(took)
    return Scan(leaves, brought)


def follow(rules: ExitRules, confidence: Sequence[Tensor]) -> list[Scan]:
    """What each exit does with a text, given its confidence at every position, (W, N)."""
    scans: list[Scan] = []
    arrives = torch.ones_like(confidence[0], dtype=torch.bool)
    carried = torch.zeros(arrives.shape, dtype=torch.int64)
    for confident, threshold in zip(confidence, rules.thresholds, strict=True):
        scans.append(scan(confident >= threshold, arrives, carried, rules.waiting))
        arrives, carried = arrives & ~scans[-1].leaves, scans[-1].brought
    return scans


def left_at(scans: Sequence[Scan]) -> Tensor:
    """By which exit each token left, (W, N); as many as there are exits: by none."""
    found = torch.full(scans[0].leaves.shape, len(scans))
    for i, one in enumerate(scans):
        found[one.leaves] = i
    return found


def confidences(statistics: ExitStatistics, rules: ExitRules) -> list[Tensor]:
    places = [statistics.layers.index(layer) for layer in rules.layers]
    before = [None, *places[:-1]]
    return [statistics.confident(rules.criterion, own, one) for own, one in zip(places, before, strict=True)]


def estimate(statistics: ExitStatistics, costs: ExitCosts, rules: ExitRules, mode: Mode = "early") -> Estimated:
    """Nats (of exact keys and values, whatever the rules have) and costs. What is drafted and verified costs no nats;
    how often a draft is right is as often as exit and trunk agree on this text."""
    if mode == "draft":
        return _drafting(statistics, costs, rules)
    scans = follow(rules, confidences(statistics, rules))
    left = left_at(scans)
    nats = statistics.trunk_nats_WN.clone()
    for i, layer in enumerate(rules.layers):
        nats = torch.where(left == i, statistics.nats_EWN[statistics.layers.index(layer)], nats)
    depths = [float(statistics.mean_of((left == i).double())) for i in range(len(rules.layers) + 1)]
    mean_cost = float(statistics.mean_of(torch.from_numpy(token_costs(costs, rules, scans))))
    return Estimated(float(statistics.mean_of(nats)), mean_cost, worst_cost(costs, rules, mode), tuple(depths))


def token_costs(costs: ExitCosts, rules: ExitRules, scans: Sequence[Scan]) -> NDArray[np.float64]:
    """What each token takes, (W, N)."""
    total = np.full(scans[0].leaves.shape, costs.layers_between(None, rules.layers[0]))
    here = np.ones(total.shape, dtype=bool)
    ends = (*rules.layers[1:], None)
    for one, first, last in zip(scans, rules.layers, ends, strict=True):
        total += here * _check(costs, rules)
        leaves, brought = one.leaves.numpy(), one.brought.numpy()
        if rules.criterion == "gate":
            total += leaves * costs.heads(1)
        here = here & ~leaves
        total += here * _deeper(costs, rules, first, last, brought)
    total += here * costs.heads(1)
    return total


def worst_cost(costs: ExitCosts, rules: ExitRules, mode: Mode) -> float:
    """Of a token that every exit looks at and none lets go, with as many others as may wait; of drafting, of a token
    that is all that is left of a full draft."""
    total = costs.layers_between(None, rules.layers[0])
    if mode == "draft":
        drafting = total + _check(costs, rules) + (costs.heads(1) if rules.criterion == "gate" else 0.0)
        together = 1 + rules.waiting
        deep = costs.layers_between(rules.layers[0], None, together) + costs.heads(together)
        return float(rules.waiting * drafting + total + deep)
    for i, (first, last) in enumerate(zip(rules.layers, (*rules.layers[1:], None), strict=True)):
        # A full room, and all who came along from full rooms before it.
        total += _check(costs, rules) + _deeper(costs, rules, first, last, np.asarray((i + 1) * rules.waiting))
    return float(total + costs.heads(1))


def _check(costs: ExitCosts, rules: ExitRules) -> float:
    return costs.gate if rules.criterion == "gate" else float(costs.heads(1)) + costs.figures


def _deeper(costs: ExitCosts, rules: ExitRules, first: int, last: int | None, brought: NDArray[Any]) -> Any:
    if rules.keys == "exact":
        return costs.layers_between(first, last, 1 + brought)
    return costs.layers_between(first, last) + costs.keys_between(first, last, brought)


def _drafting(statistics: ExitStatistics, costs: ExitCosts, rules: ExitRules) -> Estimated:
    (layer,) = rules.layers
    place = statistics.layers.index(layer)
    (confident,) = confidences(statistics, replace(rules, keys="exact"))
    sure_WN = (confident >= rules.thresholds[0]).tolist()
    right_WN = (statistics.top_EWN[place] == statistics.trunk_top_WN).tolist()
    first, check = float(costs.layers_between(None, layer)), _check(costs, rules)
    head = float(costs.heads(1)) if rules.criterion == "gate" else 0.0
    deep = [float(costs.layers_between(layer, None, n) + costs.heads(n)) for n in range(1, rules.waiting + 2)]
    spent, accepted = [], []
    for sure, right in zip(sure_WN, right_WN, strict=True):
        t, cost, kept, count = 0, 0.0, 0, len(sure)
        while t < count:
            drafts = 0
            while t + drafts < count - 1 and drafts < rules.waiting and sure[t + drafts]:
                drafts += 1
            good = next((j for j in range(drafts) if not right[t + j]), drafts)
            looks = drafts + (drafts < rules.waiting)
            cost += (drafts + 1) * first + looks * check + drafts * head + deep[drafts]
            t, kept = t + good + 1, kept + good
        spent.append(cost / t)
        accepted.append(kept / t)
    of_drafts = float((torch.tensor(accepted).double() * statistics.weights_W).sum())
    mean = float((torch.tensor(spent).double() * statistics.weights_W).sum())
    return Estimated(statistics.trunk_nats, mean, worst_cost(costs, rules, "draft"), (of_drafts, 1 - of_drafts))
