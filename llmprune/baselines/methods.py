"""The table of baselines: by its name in recipes, what a method does and what it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from llmprune.baselines.allocation import bits, milp
from llmprune.baselines.chance import best_of_random
from llmprune.baselines.depth import blockpruner, may_drop, shortgpt, sleb, uniform_depth
from llmprune.baselines.flap import compensation, flap, needs_bias
from llmprune.baselines.given import Aim, Given, Path, along
from llmprune.baselines.uniform import uniform
from llmprune.blocks.library import BlockLibrary
from llmprune.choices.architecture import Architecture
from llmprune.choices.space import Space
from llmprune.core.errors import RecipeError
from llmprune.core.recipe import BaselineName, EngineName, ImportanceRecipe
from llmprune.formats.gguf_limits import gguf_mixes
from llmprune.models.parent import Parent
from llmprune.search.judging import Finish
from llmprune.search.warm_starts import parents_in_types

ALL_TABLES = 4
"""Passes over their tokens that all block tables take: block influence one, a forward and a backward pass three."""


@dataclass(frozen=True)
class Method:
    """A baseline: a `path`, whose cost adds up along it, or an answer to each speed-up (`aimed`)."""

    path: Callable[[Given], Path] | None = None
    aimed: Callable[[Given, float], Architecture | None] | None = None
    importance: ImportanceRecipe | None = None
    """Of a library of its own; None uses the run's."""
    finish: Callable[[Parent, BlockLibrary], Finish] | None = None
    """What is done to a pruned child, and no checkpoint holds."""
    statistics: bool = False
    """Whether it needs the pass over the calibration tokens."""
    table_passes: int = 0
    """Passes over the tokens of the block tables that it needs; a backward pass counts as two."""

    most_scored: Callable[[Space, int], int] = lambda space, draws: 0
    """How many passes over the search tokens it chooses by at the most, in a space and with so many draws of luck."""
    greedy: bool = False
    """Whether it scores every block at every step."""
    draws: bool = False
    """Whether its children depend on the seed."""
    mixes: bool = False
    """Whether layers of its children differ, whatever the space."""

    def aim(self, given: Given) -> Aim:
        """The method at work."""
        if self.path is not None:
            return along(self.path(given), given.speedup)
        assert self.aimed is not None, "a method is a path or is aimed"
        return partial(self.aimed, given)

    def can_export(self, parent: Parent, architecture: Architecture) -> bool:
        """Whether a checkpoint can hold what this method's child computes."""
        return self.finish is None or not needs_bias(parent, architecture)

    def preparation_tokens(self, calibration_tokens: int, table_tokens: int) -> int:
        """Tokens that are read before anything is chosen."""
        return self.statistics * calibration_tokens + self.table_passes * table_tokens

    def facts(self, seed: int, draws: int, greedy_tokens: int | None) -> list[Any]:
        """What its children depend on beside what all methods' depend on, as JSON."""
        return [
            self.importance.decisive() if self.importance else None,
            [seed, draws] if self.draws else None,
            *([greedy_tokens] if self.greedy else []),
        ]


def _own(method: str) -> ImportanceRecipe:
    return ImportanceRecipe.model_validate({"method": method, "refit": False})


def _uniforms(space: Space, draws: int) -> int:
    """All uniform widths are near the speed."""
    return sum(c.units > 0 for c in space.attention) * sum(c.units > 0 for c in space.ffn)


def _wholes(space: Space, draws: int) -> int:
    """One depth in each type of weights; a single one is not scored."""
    typed = len(parents_in_types(space))
    return typed and 1 + typed


def _removals(space: Space, blocks: int) -> int:
    """Every removal of one of so many blocks, then of what is left, down to the last; and each child that is varied,
    once more for its states."""
    return blocks * (blocks + 3) // 2 if may_drop(space) else 0


METHODS: Mapping[BaselineName, Method] = {
    "uniform": Method(aimed=uniform, statistics=True, most_scored=_uniforms),
    "uniform-depth": Method(aimed=uniform_depth, most_scored=_wholes),
    "magnitude": Method(aimed=uniform, importance=_own("magnitude"), most_scored=_uniforms),
    "wanda-sp": Method(aimed=uniform, importance=_own("wanda-sp"), statistics=True, most_scored=_uniforms),
    "flap": Method(path=flap, importance=_own("flap"), finish=compensation, statistics=True, mixes=True),
    "shortgpt": Method(path=shortgpt, table_passes=1),
    "sleb": Method(path=sleb, greedy=True, most_scored=lambda space, draws: _removals(space, space.shape.layers)),
    "blockpruner": Method(
        path=blockpruner,
        greedy=True,
        most_scored=lambda space, draws: _removals(space, 2 * space.shape.layers),
        mixes=True,
    ),
    "bits": Method(aimed=bits, statistics=True, table_passes=3),
    "milp": Method(aimed=milp, statistics=True, table_passes=3),
    "random": Method(aimed=best_of_random, statistics=True, draws=True, most_scored=lambda space, draws: draws),
}


def check_methods(names: Iterable[BaselineName], parent: Parent, engine: EngineName, key: str) -> None:
    """Raises RecipeError, naming the recipe's `key`, if llama.cpp is to time children that no GGUF file holds."""
    mixing = [name for name in names if METHODS[name].mixes]
    if mixing and engine == "llamacpp" and not gguf_mixes(parent.model.config):
        raise RecipeError(
            f"{key} has {', '.join(mixing)}, whose children have layers that differ; workload.engine=llamacpp times "
            f"children of {parent.source} whose layers are all alike: name others, or time with engine torch"
        )


def own_libraries(names: Iterable[BaselineName], of_run: ImportanceRecipe) -> dict[str, ImportanceRecipe]:
    """By importance, the libraries that baselines need beside the run's."""
    wanted = [METHODS[name].importance for name in names]
    return {own.method: own for own in wanted if own and own.decisive() != of_run.decisive()}


def choose(method: Method, given: Given, speedup: float) -> Architecture | None:
    """The method's child at an estimated speed-up, not measured; None if it does not reach it."""
    architecture = method.aim(given)(speedup)
    return None if architecture is None or given.speedup(architecture) < 0.98 * speedup else architecture
