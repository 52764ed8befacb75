"""Hold the rates of random weights to those of a parent: time both in turns, and parts of the model drawn out to all.

    python scripts/check_rates.py RECIPE [SETTING ...] [--rounds 3] [--megabytes 128] [--json]

Medians over the rounds of every figure that a dry run measures of a model, in seconds: of the parent itself, of random
weights in its whole shape, and of random weights in so many megabytes of it. On a busy machine, --cpu-time counts the
seconds of this process alone; one thread is then all there may be (OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import nullcontext
from statistics import median
from unittest.mock import patch

from llmprune.core.recipe_text import load_recipe
from llmprune.forecast.rates import time_parent
from llmprune.measure.quality.perplexity import batch_windows
from llmprune.models import stand_in
from llmprune.models.parent import Parent, load_parent
from llmprune.pipeline.fitting import asked_of, plan_under


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("settings", nargs="*", help="overrides such as workload.engine=torch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=128)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe, arguments.settings)
    parent = load_parent(recipe.model)
    device = parent.device
    asked = {"it": asked_of(plan_under(parent, recipe, device), reach=True)}
    # As many windows for all: what is drawn must be of one kind of work.
    windows = {(asked["it"].windows, recipe.data.seq_len): min(2, batch_windows(parent.model, recipe.data.seq_len))}

    def timed(one: Parent) -> dict[str, float]:
        return {word: seconds for (_, word), seconds in time_parent(one, asked, windows).items()}

    whole = stand_in.stand_in(parent, stand_in.whole_of(parent), device)
    clock = patch.object(time, "perf_counter", time.process_time) if arguments.cpu_time else nullcontext()
    with patch.object(stand_in, "STAND_IN_BYTES", arguments.megabytes * 2**20), clock:
        parts = stand_in.parts_of(parent)
        rounds = [
            {"parent": timed(parent), "whole": timed(whole), "parts": stand_in.drawn_to_whole(parent, device, timed)}
            for _ in range(arguments.rounds)
        ]
    columns = ("parent", "whole", "parts")
    rows = {name: {c: median(one[c][name] for one in rounds) for c in columns} for name in rounds[0]["parent"]}
    if arguments.json:
        print(json.dumps({"parts": parts, "seconds": rows}, indent=2))
        return
    print(f"parts: {', '.join(f'{part.layers} layers and {part.rows} rows' for part in parts)}")
    print(f"{'seconds':<22}{'parent':>12}{'random, all':>14}{'ratio':>8}{'random, parts':>16}{'ratio':>8}")
    for name, row in rows.items():
        parent_s, whole_s, parts_s = (row[column] for column in columns)
        ratios = whole_s / parent_s, parts_s / parent_s
        print(f"{name:<22}{parent_s:>12.4g}{whole_s:>14.4g}{ratios[0]:>8.2f}{parts_s:>16.4g}{ratios[1]:>8.2f}")


if __name__ == "__main__":
    main()
