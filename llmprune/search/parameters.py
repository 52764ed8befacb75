"""The search space as Optuna sees it: one integer a decision, an index into its options, in order of size."""

from __future__ import annotations

from optuna import Trial

from llmprune.choices.architecture import Architecture
from llmprune.choices.space import Space


def suggest(trial: Trial, space: Space) -> Architecture:
    """Ask Optuna for one index a decision; the space is static, so every sampler sees all of it in every trial."""
    return space.architecture([trial.suggest_int(d.name, 0, len(d.options) - 1) for d in space.decisions])


def to_params(architecture: Architecture, space: Space) -> dict[str, int]:
    """The parameters that `suggest` would read `architecture` from, for `study.enqueue_trial`."""
    return {d.name: index for d, index in zip(space.decisions, space.indices(architecture), strict=True)}
