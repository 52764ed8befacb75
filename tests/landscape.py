"""A search without a model: a loss that is additive but for pairs of neighbours, and tables that know it badly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import optuna
from optuna.samplers import BaseSampler
from tiny import record_of

from llmprune.choices.architecture import Architecture, ParentShape
from llmprune.choices.dimensions import BLOCK_KINDS
from llmprune.choices.space import Space
from llmprune.core.budgets import Axes
from llmprune.core.recipe import SpaceSize
from llmprune.search.parameters import suggest, to_params
from llmprune.search.samplers.guide import Guide, History
from llmprune.tables.allocate import Allocator
from llmprune.tables.costs import CostTable

PARENT_NATS = 3.0
TARGETS = (1.3, 1.6)


def space_of(layers: int, *, size: SpaceSize = "medium", drop: bool = True) -> Space:
    shape = ParentShape(layers, hidden_size=64, kv_groups=3, queries_per_group=2, head_dim=8, ffn_width=1536)
    return Space.of(shape, 1, 256, drop=drop, size=size)


SPACES = {
    "small": space_of(4, size="small"),
    "layer": space_of(8, size="layer"),
    "medium": space_of(4),
    "large": space_of(4, size="large"),
    "no-drop": space_of(4, drop=False),
}


@dataclass(frozen=True)
class Landscape:
    """True losses by block and choice, a surcharge where neighbouring blocks both lose, and time that is linear.

    `table_noise`: standard deviation of the log of the table's errors. `measured`: share of the estimated saving that
    is really saved.
    """

    space: Space
    seed: int = 0
    table_noise: float = 0.8
    interaction: float = 4.0
    measured: float = 0.9

    @cached_property
    def guide(self) -> Guide:
        return self.guide_for(TARGETS)

    def guide_for(self, targets: Sequence[float]) -> Guide:
        # The race's slices of tokens are short: its scores are off by a little.
        race = lambda raced: min(raced, key=self.noisy_nats)  # noqa: E731
        return Guide(self.allocator, Axes("nats_per_token", "decode_speedup"), tuple(targets), race, self.estimate)

    def estimate(self, at: Architecture) -> dict[Any, float]:
        """What each change of one block truly costs there, with the errors of the tables: at the parent, the tables."""
        here = self.nats(at)
        return {
            (layer, choice): self.errors[layer, choice.kind] * (self.nats(at.with_choice(layer, choice)) - here)
            for layer, choice in self.loss
        }

    @cached_property
    def loss(self) -> dict[Any, float]:
        rng = np.random.default_rng(self.seed)
        scale = {block: rng.lognormal(-3.5, 0.8) for block in self.space.blocks()}
        full = self.space.shape.rows
        return {
            (layer, choice): scale[layer, kind] * (1.0 - full(choice) / full(self.space.shape.full(kind))) ** 1.5
            for layer, kind in self.space.blocks()
            for choice in self.space.ladder(kind)
        }

    @cached_property
    def errors(self) -> dict[Any, float]:
        """The factor by which tables and estimates are off, for each block."""
        rng = np.random.default_rng(self.seed + 1)
        return {block: rng.lognormal(0.0, self.table_noise) for block in self.space.blocks()}

    @cached_property
    def allocator(self) -> Allocator:
        delta_nats = {
            (layer, choice): self.errors[layer, choice.kind] * loss for (layer, choice), loss in self.loss.items()
        }
        rows, full = self.space.shape.rows, self.space.shape.full
        whole = {"attention": 0.2 / self.space.shape.layers, "ffn": 0.6 / self.space.shape.layers}
        saving = {
            choice: whole[kind] * (1.0 - rows(choice) / rows(full(kind)))
            for kind in BLOCK_KINDS
            for choice in self.space.ladder(kind)
        }
        return Allocator(delta_nats, CostTable(self.space, {"decode": saving, "prefill": saving}))

    def nats(self, architecture: Architecture) -> float:
        losses = [self.loss[block] for block in architecture.blocks()]
        pairs = sum(a * b for a, b in zip(losses, losses[2:], strict=False))
        return PARENT_NATS + sum(losses) + self.interaction * len(losses) ** 0.5 * pairs

    def noisy_nats(self, architecture: Architecture) -> float:
        return self.nats(architecture) + 0.01 * (int(architecture.hash[:4], 16) / 65536 - 0.5)

    def speedup(self, architecture: Architecture) -> float:
        saving = 1.0 - self.allocator.costs.relative_time(architecture, "decode")
        return 1.0 / (1.0 - self.measured * saving)

    def record(self, architecture: Architecture) -> dict[str, Any]:
        return record_of(architecture, self.nats(architecture), self.speedup(architecture)).stored()

    def study(self, *, seeds: bool = True, storage: optuna.storages.BaseStorage | None = None) -> optuna.Study:
        """A new study with the parent and the allocations of the tables queued."""
        study = optuna.create_study(directions=["minimize", "maximize"], storage=storage)
        allocated = [self.allocator.best({"decode": target}) for target in TARGETS] if seeds else []
        for architecture in [self.space.shape.architecture, *allocated]:
            if seeds and architecture is not None:
                study.enqueue_trial(to_params(architecture, self.space), skip_if_exists=True)
        return study

    def run(self, study: optuna.Study, sampler: BaseSampler, trials: int) -> list[Architecture]:
        """Ask, judge and tell `trials` times, as the search does; what was proposed."""
        study.sampler = sampler
        return [self.finish(study, study.ask()) for _ in range(trials)]

    def finish(self, study: optuna.Study, trial: optuna.Trial) -> Architecture:
        architecture = suggest(trial, self.space)
        known = [other.user_attrs for other in study.get_trials(deepcopy=False)]
        if not any(attrs.get("hash") == architecture.hash for attrs in known):
            trial.set_user_attr("record", self.record(architecture))
        trial.set_user_attr("hash", architecture.hash)
        study.tell(trial, [self.nats(architecture), self.speedup(architecture)])
        return architecture

    def best(self, study: optuna.Study, target: float) -> float:
        """Nats over the parent of the best known child that holds a target; infinite if none does."""
        found = History.of(study, self.guide, but=-1).best(target)
        return found.loss - PARENT_NATS if found is not None and found.holds(target) else float("inf")
