"""Choose a size for every block at once: the multiple-choice knapsack of Puzzle (arXiv 2411.19146), solved by HiGHS."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from llmprune.architecture import BLOCK_KINDS, Architecture, BlockKind
from llmprune.search.costs import CostTable


def allocate(
    delta_nats: Mapping[tuple[int, BlockKind, int], float], costs: CostTable, phase: str, speedup: float
) -> Architecture | None:
    """The architecture with the least summed estimated `delta_nats` whose estimated speed-up is at least `speedup`.

    One binary variable a choice; one choice a block; at least one layer keeps attention. None if no architecture
    of the space is that fast. The constraint is checked again on the solution: the solver's holds up to a tolerance of
    1e-6 of the parent's time, and estimated speed-ups end at 100.
    """
    space = costs.space
    choices = [
        (layer, kind, units)
        for layer in range(space.shape.layers)
        for kind in BLOCK_KINDS
        for units in space.ladder(kind)
    ]
    score = np.array([delta_nats[choice] for choice in choices])
    saving = np.array([costs.block_saving(phase, kind, units) for _, kind, units in choices])
    blocks = {block: i for i, block in enumerate(dict.fromkeys((layer, kind) for layer, kind, _ in choices))}
    one_each = csr_array(
        (np.ones(len(choices)), ([blocks[layer, kind] for layer, kind, _ in choices], range(len(choices))))
    )
    attends = np.array([float(kind == "attention" and units > 0) for _, kind, units in choices])
    needed = 1.0 - 1.0 / speedup
    solution = milp(
        score,
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(saving[None, :], needed, np.inf),
            LinearConstraint(attends[None, :], 1, np.inf),
        ],
        options={"time_limit": 20.0, "mip_rel_gap": 1e-4},
    )
    if solution.x is None:
        return None
    architecture = space.shape.architecture
    for (layer, kind, units), chosen in zip(choices, solution.x, strict=True):
        if chosen > 0.5:
            architecture = architecture.with_units(layer, kind, units)
    return architecture if costs.speedup(architecture, phase) >= speedup * (1 - 1e-4) else None
