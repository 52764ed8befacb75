"""Samplers by name: Optuna's own, and those that know the tables."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.exceptions import ExperimentalWarning
from optuna.samplers.nsgaii import BaseMutation

from llmprune.core.recipe import SamplerName, SearchRecipe
from llmprune.search.samplers.evopress import EvoPressSampler
from llmprune.search.samplers.guide import Guide
from llmprune.search.samplers.guided import GuidedSampler
from llmprune.search.samplers.linas import LinasSampler
from llmprune.search.samplers.slp import SlpSampler

GUIDED: Mapping[SamplerName, Callable[..., GuidedSampler]] = {
    "slp": SlpSampler,
    "linas": LinasSampler,
    "evopress": EvoPressSampler,
}
"""Samplers that need a guide."""


class OneRung(BaseMutation):
    """Move a block one rung up or down its ladder. Optuna's own choice is any rung: with sixty blocks that soon drops
    one that the model cannot do without."""

    def mutation(
        self, param: float, rng: np.random.RandomState, study: optuna.Study, search_space_bounds: NDArray[np.float64]
    ) -> float:
        return float(np.clip(param + rng.choice((-1.0, 1.0)), *search_space_bounds))


def make_sampler(recipe: SearchRecipe, *, draws: int, guide: Guide | None) -> optuna.samplers.BaseSampler:
    """The recipe's sampler, ready for two objectives and constraints.

    `draws` sets Optuna's own samplers apart from those of other sessions and workers; the guided ones seed each trial
    by its number. Optuna's do without a guide.
    """
    if recipe.sampler in GUIDED:
        assert guide is not None, f"search.sampler={recipe.sampler} proposes from the tables: give a guide"
        return GUIDED[recipe.sampler](guide, seed=recipe.seed)
    seed = (recipe.seed + draws) % 2**32
    samplers = optuna.samplers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        match recipe.sampler:
            case "nsga2":
                return samplers.NSGAIISampler(population_size=recipe.population, mutation=OneRung(), seed=seed)
            case "nsga3":
                return samplers.NSGAIIISampler(population_size=recipe.population, mutation=OneRung(), seed=seed)
            case "tpe":
                # Off by default with several objectives, and layers do depend on each other.
                return samplers.TPESampler(multivariate=True, seed=seed)
            case "gp":
                return samplers.GPSampler(seed=seed)
            case _:
                return samplers.RandomSampler(seed=seed)
