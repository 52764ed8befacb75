"""What merging a layer's KV heads loses, with and without the refit, beside keeping one KV group or no attention.

    python scripts/merged_heads.py RECIPE [--layers 0 6 12] [--calibration-tokens 8192] [--tokens 2048] [--json FILE]

One layer is changed at a time. Nats are of whole children (exact), and from one backward pass (estimated), both on the
first `--tokens` search tokens of the recipe; moments are of calibration tokens.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from llmprune.blocks.layer_files import LayerRepairs
from llmprune.blocks.library import BlockLibrary
from llmprune.blocks.solve import solve_block
from llmprune.blocks.statistics import layer_statistics
from llmprune.choices.kv_groups import AttentionChoice
from llmprune.choices.merged import MergedChoice
from llmprune.choices.space import Space
from llmprune.core.recipe import ImportanceRecipe
from llmprune.core.recipe_text import load_recipe
from llmprune.data.tokens import build_token_splits
from llmprune.measure.quality.prefix import PrefixScorer
from llmprune.models.parent import load_parent
from llmprune.tables.estimate import estimate_delta_nats
from llmprune.tables.exact import exact_delta_nats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 5, 10, 15, 20, 25])
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe)
    parent = load_parent(recipe.model)
    assert parent.tokenizer is not None
    shape = parent.shape
    splits = build_token_splits(recipe.data, parent.tokenizer)
    calibration, search = (
        splits[name].head(splits[name].first_windows(min(1.0, tokens / splits[name].tokens)))
        for name, tokens in (("calibration", arguments.calibration_tokens), ("search", arguments.tokens))
    )
    one_group, merged = AttentionChoice(1), MergedChoice.of(shape)
    ladder = (AttentionChoice(0), one_group, *merged, shape.full("attention"))
    # FFNs stay whole here, and need no order.
    space = Space(shape, "medium", tuple(sorted(ladder, key=shape.rows)), (shape.full("ffn"),))
    statistics = dict(layer_statistics(parent, calibration, own=merged))
    rows = []
    for refit in (True, False):
        rules = ImportanceRecipe(refit=refit)
        layers = []
        for layer in range(shape.layers):
            weight_DI, bias_D = parent.output_weight(layer, "attention"), parent.output_bias(layer, "attention")
            moments = statistics[layer]["attention"]
            solved = solve_block(weight_DI, bias_D, moments, shape, rules, [one_group, *merged], "attention")
            layers.append(LayerRepairs({f"attention/{name}": tensor for name, tensor in solved.items()}))
        library = BlockLibrary(space, tuple(layers))
        estimated = estimate_delta_nats(parent, search, library, tokens=search.tokens)
        # A drop is the same with and without a refit.
        wanted = [(i, c) for i in arguments.layers for c in space.attention[:-1] if refit or c.units]
        exact = exact_delta_nats(PrefixScorer(parent, library, search), search, space, wanted, lambda done, total: None)
        rows += [
            {"layer": i, **c.to_json(), "refit": refit, "exact_nats": exact[i, c], "estimated_nats": estimated[i, c]}
            for i, c in wanted
        ]
    for row in rows:
        print(
            "  ".join(
                f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
            )
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
