"""The search for rules: an Optuna study over exits, thresholds, criteria and trunks, scored from stored figures alone.

Mean and worst-case cost are constraints (NACHOS, arXiv 2401.13330), beside two objectives: nats a token and speed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import optuna
from optuna.exceptions import ExperimentalWarning

from llmprune.core.budgets import Budget
from llmprune.core.progress import Advance
from llmprune.core.recipe_exits import ExitsRecipe
from llmprune.exits.costs import NEVER, ExitCosts
from llmprune.exits.policy import Mode, estimate
from llmprune.exits.record import EstimatedExits
from llmprune.exits.statistics import ExitStatistics
from llmprune.models.modeling_pruned import Criterion, ExitRules, Keys

WAITING = (1, 2, 4, 8, 16, 32)
POPULATION = 50
GRID = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Thresholds of the baseline: one exit, the largest probability, as in CALM (arXiv 2207.07061)."""
LEAST = 1e-4
"""Threshold: at 0 an exit would let go whoever disagrees with the one before."""
ALL_LEAVE = 2**31
"""More than will ever wait: of the baseline in which no token goes deeper."""


@dataclass(frozen=True, eq=False)
class Trunk:
    """A model with trained exits, as far as rules are scored on it."""

    id: str
    decode_speedup: float
    """Measured over the parent, without exits."""
    statistics: ExitStatistics
    costs: ExitCosts

    def estimated(self, rules: ExitRules, mode: Mode, name: str) -> EstimatedExits:
        found = estimate(self.statistics, self.costs, rules, mode)
        return EstimatedExits(
            name=name,
            trunk=self.id,
            mode=mode,
            rules=rules.to_json(),
            nats_per_token=found.nats_per_token,
            decode_speedup=self.decode_speedup / found.mean_cost,
            worst_token_speedup=self.decode_speedup / found.worst_cost,
            depths=found.depths,
        )

    @cached_property
    def layers(self) -> tuple[int, ...]:
        return self.statistics.layers


def search_rules(
    trunks: Sequence[Trunk],
    recipe: ExitsRecipe,
    budgets: Sequence[Budget],
    parent_nats: float,
    advance: Advance = lambda done, total: None,
) -> list[EstimatedExits]:
    """Every set of rules that was tried and holds the budgets, none twice. The first trunk is the parent."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        sampler = optuna.samplers.NSGAIISampler(population_size=min(POPULATION, recipe.trials), seed=recipe.seed)
        study = optuna.create_study(directions=["minimize", "maximize"], sampler=sampler)
    holding: dict[str, EstimatedExits] = {}
    for number in range(recipe.trials):
        trial = study.ask()
        trunk, mode, rules = _suggested(trial, trunks, recipe)
        found = trunk.estimated(rules, mode, "search")
        violations = {str(one): one.violation(value_of(found, one.metric, parent_nats)) for one in budgets}
        for text, violation in violations.items():
            trial.set_constraint(text, violation)
        study.tell(trial, (found.nats_per_token, found.decode_speedup))
        if all(violation <= 0 for violation in violations.values()):
            holding[f"{found.trunk} {found.mode} {found.rules}"] = found
        advance(number + 1, recipe.trials)
    return list(holding.values())


def value_of(found: EstimatedExits, metric: str, parent_nats: float) -> float:
    """An estimated figure by the name that budgets use."""
    if metric == "ppl_ratio":
        return math.exp(found.nats_per_token - parent_nats)
    return math.exp(found.nats_per_token) if metric == "ppl" else float(getattr(found, metric))


def _suggested(trial: optuna.Trial, trunks: Sequence[Trunk], recipe: ExitsRecipe) -> tuple[Trunk, Mode, ExitRules]:
    """Every trial has a value for every parameter, whether its rules need it: crossover then knows them all. A
    threshold is the share of tokens that would leave, were all to arrive."""
    trunk = trunks[trial.suggest_int("trunk", 0, len(trunks) - 1)]
    mode: Mode = "draft" if trial.suggest_categorical("drafts", [False, True]) else "early"
    criterion: Criterion = recipe.criteria[trial.suggest_int("criterion", 0, len(recipe.criteria) - 1)]
    waiting = WAITING[trial.suggest_int("waiting", 0, len(WAITING) - 1)]
    exact = trial.suggest_categorical("exact", [False, True])
    last = len(trunk.layers) - 1
    # The same place in every trunk, whatever its depth.
    places = [round(trial.suggest_float(f"place_{name}", 0, 1) * last) for name in ("one", "two")]
    shares = [trial.suggest_float(f"share_{name}", 0.01, 1) for name in ("one", "two")]
    several = trial.suggest_categorical("exits", [1, 2]) == 2
    if criterion == "agreement":
        # It takes two exits; the first one lets nobody go.
        several, mode = last > 0, "early"
    if mode == "draft" or not several or (places[0] == places[1] and criterion != "agreement"):
        places, shares = places[:1], shares[:1]
    elif places[0] == places[1]:
        places = [max(0, places[0] - 1), max(1, places[0])]
    places = sorted(places)
    thresholds, before = [], None
    for place, share in zip(places, shares, strict=True):
        confident = trunk.statistics.confident(criterion, place, before)
        level = max(LEAST, round(float(confident.float().quantile(1 - share)), 4))
        thresholds.append(NEVER if criterion == "agreement" and before is None else level)
        before = place
    layers = tuple(trunk.layers[place] for place in places)
    keys: Keys = "exact" if exact or mode == "draft" else "propagated"
    return trunk, mode, ExitRules(layers, criterion, tuple(thresholds), waiting, keys)


def baselines(trunk: Trunk) -> Iterator[EstimatedExits]:
    """What takes no search: every token leaves at one layer; one threshold of the largest probability at one exit."""
    for layer in trunk.layers:
        fixed = trunk.estimated(ExitRules((layer,), "gate", (0.0,), ALL_LEAVE), "early", "fixed")
        # No token goes deeper, so none is dearer than another.
        yield fixed.model_copy(update={"worst_token_speedup": fixed.decode_speedup})
    for layer in trunk.layers:
        for threshold in GRID:
            yield trunk.estimated(ExitRules((layer,), "top1", (threshold,), WAITING[-1]), "early", "grid")


def non_dominated(found: Iterable[EstimatedExits]) -> list[EstimatedExits]:
    """What no other beats in both nats and speed, slowest first."""
    front: list[EstimatedExits] = []
    for one in sorted(found, key=lambda one: (-one.decode_speedup, one.nats_per_token)):
        if not front or one.nats_per_token < front[-1].nats_per_token:
            front.append(one)
    return front[::-1]


def beyond(found: Iterable[EstimatedExits], trunks: Sequence[Trunk]) -> list[EstimatedExits]:
    """The rules that no trunk beats as it is, without exits."""
    plain = [(trunk.statistics.trunk_nats, trunk.decode_speedup) for trunk in trunks]
    return [
        one
        for one in found
        if all(one.nats_per_token < nats or one.decode_speedup > speedup for nats, speedup in plain)
    ]


def worth_measuring(found: Sequence[EstimatedExits], trunks: Sequence[Trunk], size: int) -> list[EstimatedExits]:
    """At most `size` of an estimated front, as far from each other in speed as they go: of what is faster than the
    parent, if anything is. One of them is the fastest that drafts, which loses nothing."""
    front = non_dominated(beyond(found, trunks)) or non_dominated(found)
    drafting = max((one for one in found if one.mode == "draft"), key=lambda one: one.decode_speedup, default=None)
    chosen = [drafting] if drafting is not None else []
    left = [one for one in front if one.mode == "early" and one.decode_speedup > 1] or front
    left = [one for one in left if one is not drafting]
    while left and len(chosen) < size:
        farthest = max(
            left,
            key=lambda one: min(
                (abs(math.log(one.decode_speedup / other.decode_speedup)) for other in chosen if other.mode == "early"),
                default=math.inf if one is left[-1] else 0.0,
            ),
        )
        chosen.append(farthest)
        left.remove(farthest)
    return sorted(chosen, key=lambda one: one.decode_speedup)
