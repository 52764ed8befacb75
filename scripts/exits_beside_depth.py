"""A model with exits beside static children of equal training: each learns for the same minutes on the same text, then
all are scored on the same test tokens and timed beside the parent.

    python scripts/exits_beside_depth.py recipes/smollm2-135m.yaml [KEY=VALUE]... [--minutes 6] [--gone 1 2] [--json F]

Static children lack the layers of least block influence (ShortGPT, arXiv 2403.03853), and are distilled from the
parent. Exits are trained on the parent, rules for leaving are searched on the search split. Nothing but F is written.
On a machine that others use, minutes of training are worth what the others leave; speed-ups are ratios of turns.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from llmprune.core.recipe import Recipe
from llmprune.core.recipe_text import load_recipe
from llmprune.data.tokens import Split, build_token_splits
from llmprune.exits.costs import measure_costs
from llmprune.exits.measuring import score_exits, time_exits, worst_token_speedup
from llmprune.exits.search import Trunk, baselines, beyond, non_dominated, search_rules, worth_measuring
from llmprune.exits.statistics import gather_statistics
from llmprune.exits.training import states_of, train_exits
from llmprune.measure.quality.perplexity import score
from llmprune.measure.speed.throughput import Workload, measure_paired
from llmprune.models.exits import with_exits
from llmprune.models.modeling_pruned import ExitRules
from llmprune.models.parent import Parent, load_parent
from llmprune.models.surgery import prune
from llmprune.pipeline.exits import AUTO, prompts_of
from llmprune.recover.distillation import Settings, distil, seconds_of_window
from llmprune.recover.held_out import windows_of
from llmprune.recover.repair import with_own_tensors
from llmprune.recover.teacher import LiveTeacher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--gone", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    recipe = load_recipe(asked.recipe, asked.overrides)
    parent = load_parent(recipe.model)
    tokens = build_token_splits(recipe.data, parent.tokenizer)  # type: ignore[arg-type]
    workload = Workload.from_recipe(recipe.workload, "float32", "cpu")
    windows_WT, _, fitted_W = windows_of(tokens["recovery"])
    learnt_WT, held_out_T = windows_WT[fitted_W], windows_WT[~fitted_W][0]
    nats = {name: score(parent.model, tokens[name]).nats_per_token for name in ("search", "test")}
    found: dict[str, Any] = {"minutes": asked.minutes, "workload": workload.to_json(), "parent": nats, "rows": []}

    def tell(name: str, row: dict[str, Any]) -> None:
        found["rows"].append({**row, "name": name})
        print(name, json.dumps(row), flush=True)
        if asked.json:
            asked.json.write_text(json.dumps(found, indent=1), encoding="utf-8")

    exits(parent, recipe, tokens.splits, workload, (learnt_WT, held_out_T), asked.minutes, nats, tell)  # type: ignore[arg-type]
    order = influence(parent, tokens["calibration"])
    for gone in asked.gone:
        architecture = parent.shape.architecture.without_layers(order[:gone])
        child = with_own_tensors(prune(parent, architecture, None))  # type: ignore[arg-type]
        before = score(child, tokens["test"]).nats_per_token
        learnt = distilled(parent, child, learnt_WT, tokens["search"], asked.minutes)
        after = score(child, tokens["test"]).nats_per_token
        _, (speed,) = measure_paired(parent.model, [child], workload, recipe.exits.repeats)
        row = {"lost_before": before - nats["test"], "lost": after - nats["test"], "learnt": learnt}
        tell(f"{gone} layers gone", {**row, "decode_speedup": asdict(speed.decode_speedup)})


def exits(
    parent: Parent,
    recipe: Recipe,
    splits: dict[str, Split],
    workload: Workload,
    text: tuple[Tensor, Tensor],
    minutes: float,
    nats: dict[str, float],
    tell: Any,
) -> None:
    model, rules = parent.model, recipe.exits
    layers = sorted({round(share * parent.shape.layers) for share in AUTO}) if rules.layers == "auto" else rules.layers
    trained = train_exits(model, list(layers), *text, minutes, rules.seed)
    facts = {name: value for name, value in asdict(trained).items() if name != "tensors"}
    statistics = gather_statistics(model, trained.tensors, list(layers), splits["search"])
    costs = measure_costs(model, trained.tensors, list(layers), workload, rules.repeats)
    agreement = dict(zip(layers, statistics.agreement.tolist(), strict=True))
    tell("exits", {**facts, "agreement": agreement, "costs": costs.to_json()})
    trunk = Trunk("parent", 1.0, statistics, costs)
    tried = search_rules([trunk], rules, [], nats["search"])
    for one in (*non_dominated(beyond(tried, [trunk])), *non_dominated(baselines(trunk))):
        tell(f"estimated {one.name}", {"lost": one.nats_per_token - nats["search"], **one.to_json()})
    prompts = prompts_of(splits["test"], workload.prompt_tokens + workload.generated_tokens, rules.repeats)
    for one in worth_measuring(tried, [trunk], rules.size):
        own = with_exits(model, ExitRules.from_json(one.rules), trained.tensors)
        speed = time_exits(model, own, prompts, workload, one.mode)
        row: dict[str, Any] = {"mode": one.mode, "rules": one.rules, "decode_speedup": asdict(speed.decode_speedup)}
        row["worst_token_speedup"] = worst_token_speedup(model, own, prompts[:1], workload, one.mode, rules.repeats)
        row["timed_depths"], row["lost"] = speed.depths, 0.0
        if one.mode == "early":
            scored = score_exits(own, splits["test"])
            row["lost"], row["depths"] = scored.quality.nats_per_token - nats["test"], scored.depths
        tell(f"measured {one.name}", {**row, "estimated_speedup": one.decode_speedup})


def influence(parent: Parent, split: Split) -> list[int]:
    """Layers, least block influence first: 1 minus the cosine of what enters and leaves them."""
    layers, sums = parent.shape.layers, torch.zeros(parent.shape.layers)
    for source in split.sources.values():
        states, _ = states_of(parent.model, list(range(layers)), source.windows[:1])
        for i in range(layers - 1):
            sums[i] += 1 - functional.cosine_similarity(states[i], states[i + 1], dim=-1).mean()
    # What leaves the last layer is not seen before the final norm; as the literature has it, that layer stays.
    sums[layers - 1] = torch.inf
    return [int(i) for i in sums.argsort()]


def distilled(parent: Parent, child: Any, windows_WT: Tensor, judged_by: Split, minutes: float) -> dict[str, Any]:
    """Train a child for so many minutes; what it learnt from."""
    child.requires_grad_(True)
    teacher, began = LiveTeacher(parent.model), time.monotonic()
    seconds = seconds_of_window(teacher, child, windows_WT[0], "float32")
    length = windows_WT.shape[1]
    left = max(1, round((60 * minutes - (time.monotonic() - began)) / seconds))
    few = judged_by.head(dict.fromkeys(judged_by.sources, 1))
    settings = Settings(tokens=left * length, precision="float32", windows_a_step=1, checks=2)
    with tempfile.TemporaryDirectory() as scratch:
        course = distil(teacher, child, windows_WT, few, settings, Path(scratch) / "state.safetensors", "")
    return {"tokens": course.tokens, "seconds": course.seconds, "checks": course.checks}


if __name__ == "__main__":
    main()
