"""What the default recipe costs on published shapes, computed by the forecast's own functions: nothing is run.

    python scripts/forecast_shapes.py [--json]

Shapes in half precision are those of a GPU, where estimates are walked layer by layer.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

import yaml

from llmprune.blocks.statistics import statistics_bytes
from llmprune.choices.architecture import ParentShape
from llmprune.choices.space import Space
from llmprune.core.recipe import Recipe
from llmprune.core.recipe_files import DEFAULT_RECIPE, recipe_path
from llmprune.core.recipe_text import parse_recipe
from llmprune.forecast.forecast import forecast
from llmprune.forecast.plan import Plan
from llmprune.forecast.work import (
    estimate_flops_per_token,
    gram_flops_per_token,
    layer_library_bytes,
    layer_solver_flops,
    solving_bytes,
)
from llmprune.measure.speed.throughput import Workload

SHAPES = {
    "SmolLM2-135M": (ParentShape(30, 576, 3, 3, 64, 1536), 49_152, 4, True),
    "Qwen3-8B": (ParentShape(36, 4096, 8, 4, 128, 12_288), 151_936, 2, False),
    "Llama-3.1-8B": (ParentShape(32, 4096, 8, 4, 128, 14_336), 128_256, 2, False),
    "Llama-3.1-70B": (ParentShape(80, 8192, 8, 8, 128, 28_672), 128_256, 2, False),
}
"""Shape, vocabulary, bytes a parameter, whether the output is the embedding."""

WHILE_IT_WAITS = {
    "the library": "library",
    "an estimate": "estimate",
    "the search": "search",
    "the front": "front",
    "a repair": "repair",
}


def layer_parameters(shape: ParentShape) -> int:
    """A Llama layer: q, k, v, o; gate, up, down; two norms."""
    heads = shape.rows(shape.full("attention")) * shape.hidden_size
    return heads + 3 * shape.ffn_width * shape.hidden_size + 2 * shape.hidden_size


def figures(name: str, recipe: Recipe) -> dict[str, Any]:
    shape, vocabulary, dtype_bytes, tied = SHAPES[name]
    space = Space.under(shape, recipe.space)
    embeddings = vocabulary * shape.hidden_size * (1 if tied else 2)
    parameters = shape.layers * layer_parameters(shape) + embeddings + shape.hidden_size
    rules = recipe.workload
    workload = Workload(rules.batch, rules.prompt_tokens, rules.generated_tokens, "bfloat16", 1, "any")
    plan = Plan(
        recipe,
        space,
        workload,
        vocabulary,
        parameters * dtype_bytes,
        dtype_bytes,
        walked=dtype_bytes < 4,
        walking_bytes=dtype_bytes,
        can_wait=True,
    )
    stages = {stage.stage: stage for stage in forecast(plan)}
    unguided = recipe.model_copy(update={"search": recipe.search.model_copy(update={"sampler": "nsga2"})})
    by_nsga2 = {stage.stage: stage for stage in forecast(replace(plan, recipe=unguided))}["search"]
    layer_flops = 2 * layer_parameters(shape)
    solver = layer_solver_flops(space, recipe.importance)
    return {
        "parameters": parameters,
        "parent bytes": parameters * dtype_bytes,
        "choices a layer (KV groups + FFN widths)": len(space.attention) + len(space.ffn),
        "statistics bytes a layer (float64)": statistics_bytes(shape),
        "calibration passes": stages["library"].forward_tokens // plan.tokens("calibration"),
        "library forward tokens": stages["library"].forward_tokens,
        "Gram products / layer forward": gram_flops_per_token(shape) / layer_flops,
        "solving a layer, bytes": solving_bytes(space, recipe.importance, dtype_bytes),
        "solver float64 TFLOP a layer": solver.total / 1e12,
        "solver float64 TFLOP in all": shape.layers * solver.total / 1e12,
        "library bytes a layer": layer_library_bytes(space, dtype_bytes),
        "library bytes on disk": stages["library"].disk_bytes,
        "library / parent": stages["library"].disk_bytes / plan.parent_bytes,
        "bytes moved to the device in an estimate / parent": moved_bytes(plan) / plan.parent_bytes,
        **{
            f"device bytes of {what}, parent waiting": stages[stage].waiting_memory_bytes
            for what, stage in WHILE_IT_WAITS.items()
        },
        "device bytes of the search, parent at home": stages["search"].peak_memory_bytes,
        "estimate forward tokens": stages["estimate"].forward_tokens,
        "estimate backward tokens": stages["estimate"].backward_tokens,
        "estimate local / layer forward": estimate_flops_per_token(space) / layer_flops,
        "estimate peak bytes beside the parent": stages["estimate"].peak_memory_bytes - plan.parent_bytes,
        "logits bytes of one scored window": plan.logits_bytes(1),
        "probes timed tokens": stages["probes"].timing.tokens,
        "path forward tokens": stages["path"].forward_tokens,
        "path backward tokens": stages["path"].backward_tokens,
        "search forward tokens": stages["search"].forward_tokens,
        "the same with nsga2": by_nsga2.forward_tokens,
        "search backward tokens": stages["search"].backward_tokens,
        "search timed tokens": stages["search"].timing.tokens,
        "front forward tokens": stages["front"].forward_tokens,
        "checkpoints bytes on disk": stages["checkpoints"].disk_bytes,
        "forward equivalents in all": sum(stage.forward_equivalents for stage in stages.values()),
        "model PFLOP in all (2 x parameters x tokens)": 2e-15
        * parameters
        * sum(stage.forward_equivalents for stage in stages.values()),
    }


def moved_bytes(plan: Plan) -> int:
    """What an estimate at the parent brings to the device where that lies: the library once, and the stream to every
    layer, both ways, and its gradient."""
    stream = plan.estimated_tokens(plan.recipe.tables.tokens) * plan.space.shape.hidden_size * plan.walking_bytes
    library = plan.space.shape.layers * layer_library_bytes(plan.space, plan.dtype_bytes)
    return library + (3 * plan.space.shape.layers + 2) * stream


def shown(name: str, value: float) -> str:
    if "bytes" in name and "/" not in name:
        return f"{value / 1e9:,.2f} GB" if value >= 1e8 else f"{value / 1e6:,.1f} MB"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    data = yaml.safe_load(recipe_path(DEFAULT_RECIPE).read_text(encoding="utf-8"))
    recipe = parse_recipe(data, origin=DEFAULT_RECIPE)
    columns = {name: figures(name, recipe) for name in SHAPES}
    if arguments.json:
        print(json.dumps(columns, indent=2))
        return
    print(f"| | {' | '.join(columns)} |")
    print("|---|" + "---|" * len(columns))
    for row in next(iter(columns.values())):
        print(f"| {row} | {' | '.join(shown(row, column[row]) for column in columns.values())} |")


if __name__ == "__main__":
    main()
