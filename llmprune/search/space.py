"""The search space as Optuna sees it: one integer a block, an index into its ladder, in order of size."""

from __future__ import annotations

from collections.abc import Mapping

from optuna import Trial

from llmprune.architecture import BLOCK_KINDS, Architecture, BlockKind, Space


def parameter_name(layer: int, kind: BlockKind) -> str:
    return f"layer_{layer:03d}.{kind}"


def suggest(trial: Trial, space: Space) -> Architecture:
    """Ask Optuna for one index a block; the space is static, so every sampler sees all of it in every trial."""
    return Architecture.of(
        (
            space.kv_groups[trial.suggest_int(parameter_name(layer, "attention"), 0, len(space.kv_groups) - 1)],
            space.ffn_width[trial.suggest_int(parameter_name(layer, "ffn"), 0, len(space.ffn_width) - 1)],
        )
        for layer in range(space.shape.layers)
    )


def to_params(architecture: Architecture, space: Space) -> dict[str, int]:
    """The parameters that `suggest` would read `architecture` from, for `study.enqueue_trial`."""
    return {
        parameter_name(layer, kind): space.ladder(kind).index(choice.units)
        for layer, kind, choice in architecture.blocks()
    }


def from_params(params: Mapping[str, int], space: Space) -> Architecture:
    """Inverse of `to_params`."""
    return Architecture.of(
        tuple(space.ladder(kind)[params[parameter_name(layer, kind)]] for kind in BLOCK_KINDS)  # type: ignore[misc]
        for layer in range(space.shape.layers)
    )
