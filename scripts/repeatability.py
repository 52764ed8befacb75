"""Measure the speed-up of one child several times, to see how far the figure itself can be trusted.

    python scripts/repeatability.py PARENT CHILD [--times 5] [--repeats 9]

Prints each measurement, the spread (max - min) / median, and the median decode speed-up as a share of the ratio of
bytes that parent and child read per token.
"""

from __future__ import annotations

import argparse
from statistics import median

from llmprune.core.recipe import WorkloadRecipe
from llmprune.core.recipe_inputs import ModelRecipe
from llmprune.measure.speed.throughput import Workload, measure_paired
from llmprune.models.loading import load_model
from llmprune.models.sizes import decode_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parent")
    parser.add_argument("child")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    parent, child = (load_model(ModelRecipe(path=path))[0] for path in (arguments.parent, arguments.child))
    workload = Workload.from_recipe(WorkloadRecipe(), "float32", str(parent.device))
    decode, prefill = [], []
    for i in range(arguments.times):
        _, (speed,) = measure_paired(parent, [child], workload, arguments.repeats)
        decode.append(speed.decode_speedup.median)
        prefill.append(speed.prefill_speedup.median)
        print(f"{i + 1}: decode {decode[-1]:.3f}x  prefill {prefill[-1]:.3f}x")
    for name, values in (("decode", decode), ("prefill", prefill)):
        spread = (max(values) - min(values)) / median(values)
        print(f"{name}: median {median(values):.3f}x, (max - min) / median {100 * spread:.1f}%")
    ratio = decode_bytes(parent) / decode_bytes(child)
    print(f"bytes read per token: parent / child = {ratio:.3f}; decode speed-up is {100 * median(decode) / ratio:.0f}%")


if __name__ == "__main__":
    main()
