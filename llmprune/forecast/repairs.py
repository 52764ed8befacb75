"""What repairing children will cost: pure arithmetic, as in `forecast`."""

from __future__ import annotations

from llmprune.choices.architecture import ParentShape
from llmprune.choices.dimensions import BLOCK_KINDS
from llmprune.forecast.plan import Done, Plan, StageCost
from llmprune.forecast.work import SolverFlops, graph_bytes_per_token, inputs_of
from llmprune.measure.record import QUOTED
from llmprune.recover.held_out import HELD_OUT
from llmprune.recover.least_squares import RIDGES
from llmprune.recover.teacher import CHUNK


def refits(plan: Plan, done: Done) -> StageCost:
    """A sequential refit of every child of the front and, if asked for, of the baselines; each is then scored again."""
    rules, data, shape = plan.recipe.recover, plan.recipe.data, plan.space.shape
    trials = max(plan.recipe.search.trials, done.trials)
    children = min(plan.recipe.front.size, trials - 1)
    children += len(dict.fromkeys(plan.recipe.front.baselines)) if rules.baselines else 0
    tokens = plan.first_tokens("recovery" if data.recovery_tokens else "calibration", rules.refit_tokens)
    scored = ["validation", *(name for name in QUOTED if name in data.splits)]
    inputs = [shape.inputs(shape.full(kind)) for kind in BLOCK_KINDS]
    states = plan.dtype_bytes * tokens * (5 * shape.hidden_size + max(inputs))
    # Moments, a factor for every ridge, and weights, in float64.
    solving = 8 * max(3 * width**2 + 3 * width * shape.hidden_size for width in inputs)
    solved = sum(len(RIDGES) * (width**3 // 3 + 4 * shape.hidden_size * width**2) for width in inputs)
    return StageCost(
        "repair",
        # The parent and the child once each, and both forms on what is held out.
        forward_tokens=children
        * (2 * tokens + 2 * tokens // HELD_OUT + sum(plan.tokens(name) for name in [*scored, "test"])),
        solver=SolverFlops(refits=children * shape.layers * solved),
        float32_flops=children * shape.layers * tokens * sum(2 * w * (w + 2 * shape.hidden_size) for w in inputs),
        children=children * (3 + len(scored)),
        peak_memory_bytes=2 * plan.parent_bytes + plan.timed_file_bytes + min(states, rules.memory_bytes) + solving,
        # The states are on the CPU; of the parent what is outside of its layers comes home, and then a layer at a time.
        waiting_memory_bytes=plan.parent_bytes
        + plan.timed_file_bytes
        + max(2 * plan.vocabulary * shape.hidden_size * plan.dtype_bytes, plan.brought_bytes + solving)
        if plan.can_wait
        else None,
        disk_bytes=children * plan.dtype_bytes * shape.layers * shape.hidden_size * sum(inputs)
        + max(0, states - rules.memory_bytes),
    )


def distillation(plan: Plan) -> StageCost:
    """Of one child: its own forward and backward pass, twice as long as for frozen weights, and the parent's; or the
    minutes that it is given."""
    rules = plan.recipe.recover
    tokens = rules.tokens or 0
    weights = 4 * plan.parent_bytes // plan.dtype_bytes
    trained = weights if rules.lora_rank is None else min(weights, 4 * rules.lora_rank * _map_ends(plan.space.shape))
    # Of a chunk of positions: both models' logits and log-softmaxes, and gradients of the child's.
    logits = 6 * 4 * CHUNK * plan.vocabulary
    graph = plan.recipe.data.seq_len * graph_bytes_per_token(plan.space.shape, 4)
    if rules.gradient_checkpointing:
        # What enters every layer, and one layer's own.
        kept = 4 * plan.recipe.data.seq_len * plan.space.shape.layers * plan.space.shape.hidden_size
        graph = kept + graph // plan.space.shape.layers
    if rules.precision != "float32":
        # A copy of the child, and of a parent in float32, in half precision: the graph takes half by that.
        copies = weights // 2 * (2 if plan.dtype_bytes == 4 else 1)
        graph = max(graph, graph // 2 + copies)
    # Of each stored token its number and its log-probability.
    stored = 6 * rules.stored_logits * plan.tokens("recovery") if rules.stored_logits else 0
    return StageCost(
        "recover",
        forward_tokens=(5 if rules.gradient_checkpointing else 4) * tokens,
        fixed_seconds=60 * (rules.minutes or 0.0),
        # Beside the parent: the child's weights, and of what is trained gradients and two moments, which are kept in a
        # file together with the best.
        peak_memory_bytes=plan.parent_bytes + plan.timed_file_bytes + weights + 3 * trained + graph + logits,
        disk_bytes=weights + 4 * trained + stored,
    )


def _map_ends(shape: ParentShape) -> int:
    """Inputs and outputs of all linear maps, at the most: a gated FFN has three."""
    attention = inputs_of(shape, "attention") + shape.hidden_size
    return shape.layers * (4 * attention + 3 * (shape.ffn_width + shape.hidden_size))
