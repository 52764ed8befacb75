"""Count what the stages of a search run, on tiny random Llamas that grow: by hooks, not by formulas.

    python scripts/count_work.py [--json] [--layers 8 16 32 64] [--choices 4 8 16 32]

A layer token is one decoder layer over one token; those of parent and children count alike. Floating point operations
are those of the matrix products, factors and triangular solves that really ran, from the shapes they ran with. Last
come the exponents: the slope of log cost over log layers, or log choices.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from counting import Flops, counted
from transformers import LlamaConfig, LlamaForCausalLM

from llmprune.blocks import library as library_module
from llmprune.blocks.library import BlockLibrary, build_library
from llmprune.blocks.statistics import BlockStatistics
from llmprune.choices.architecture import Architecture
from llmprune.choices.dimensions import BLOCK_KINDS, BlockKind
from llmprune.choices.ffn import FfnChoice
from llmprune.choices.space import Space
from llmprune.core.recipe import ImportanceRecipe
from llmprune.data.tokens import SourceTokens, Split
from llmprune.measure.quality.prefix import PrefixScorer
from llmprune.measure.speed.throughput import Workload
from llmprune.models.parent import Parent, make_parent
from llmprune.search.judging import Judge
from llmprune.tables.allocate import Allocator
from llmprune.tables.costs import CostTable
from llmprune.tables.estimate import DeltaNats, estimate_delta_nats
from llmprune.tables.walk import walk

VOCABULARY, FFN_WIDTH, SEQ_LEN, WINDOWS = 128, 64, 16, 8
SPEEDUP = 1.05
"""One step of the path."""


def tiny_llama(layers: int, ffn_width: int = FFN_WIDTH) -> Parent:
    """A random Llama with two KV groups of two query heads, head dim 8."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=ffn_width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
    )
    return make_parent(LlamaForCausalLM(config), None)


def tiny_split(windows: int = WINDOWS) -> Split:
    ids = torch.randint(3, VOCABULARY, (windows, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    source = SourceTokens(ids, torch.full((windows,), SEQ_LEN))
    return Split("calibration", {"random": source}, {"random": 1.0}, SEQ_LEN, bos=False)


def tiny_space(parent: Parent, choices: int) -> Space:
    """`choices` FFN widths besides the parent's own, of which one is 0; KV groups 0, 1 and 2."""
    return Space.of(parent.shape, 1, parent.shape.ffn_width // choices)


def even_costs(space: Space) -> CostTable:
    """Savings in proportion to rows: in all 0.4 of the time for attention, 0.5 for the FFNs."""
    whole = {"attention": 0.4 / space.shape.layers, "ffn": 0.5 / space.shape.layers}
    saving = {
        choice: whole[kind] * (1 - space.shape.rows(choice) / space.shape.rows(space.shape.full(kind)))
        for kind in BLOCK_KINDS
        for choice in space.ladder(kind)
    }
    return CostTable(space, {"decode": saving})


def local_flops(parent: Parent, split: Split, library: BlockLibrary) -> int:
    """Products of an estimate of the whole library, less those of one that has no choice to estimate."""

    def products(of: BlockLibrary) -> int:
        with Flops() as flops:
            estimate_delta_nats(parent, split, of, tokens=split.tokens)
        return flops.by_dtype[torch.float32]

    space = library.space
    parent_alone = Space(space.shape, space.size, space.attention[-1:], space.ffn[-1:])
    return products(library) - products(BlockLibrary(parent_alone, ()))


def measure_library(parent: Parent, split: Split, space: Space) -> tuple[BlockLibrary, dict[str, int]]:
    """A library written to disk and read into memory again, and what it took."""
    peak = 0
    walk = library_module.layer_statistics

    def watched(*args: Any, **kwargs: Any) -> Iterator[tuple[int, dict[BlockKind, BlockStatistics]]]:
        nonlocal peak
        for layer, blocks in walk(*args, **kwargs):
            peak = max(peak, sum(block.gram_II.nbytes + block.mean_I.nbytes for block in blocks.values()))
            yield layer, blocks

    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        stack.enter_context(patch.object(library_module, "layer_statistics", watched))
        work, flops = stack.enter_context(counted()), stack.enter_context(Flops())
        build_library(parent, split, ImportanceRecipe(), space, Path(scratch), input_hash="counted")
        stored = sum(file.stat().st_size for file in Path(scratch).iterdir())
    in_memory = build_library(parent, split, ImportanceRecipe(), space)
    return in_memory, {
        "forward_layer_tokens": work.forward_layer_tokens,
        "float64_flops": flops.by_dtype[torch.float64],
        "bytes_on_disk": stored,
        "peak_statistics_bytes": peak,
    }


def measure_estimate(parent: Parent, split: Split, library: BlockLibrary) -> tuple[DeltaNats, dict[str, float]]:
    with counted() as work:
        started = time.perf_counter()
        delta_nats = estimate_delta_nats(parent, split, library, tokens=split.tokens)
        seconds = time.perf_counter() - started
    return delta_nats, {**asdict(work), "local_flops": local_flops(parent, split, library), "seconds": seconds}


def measure_exact(parent: Parent, split: Split, library: BlockLibrary) -> dict[str, float]:
    """Replace-one-block scores of one FFN choice a layer, from the parent's kept states."""
    half = library.space.ffn[len(library.space.ffn) // 2]
    scorer = PrefixScorer(parent, library, split)
    with counted() as work:
        for layer in range(parent.shape.layers):
            scorer.score(parent.shape.architecture.with_choice(layer, half))
    scores = parent.shape.layers
    return {
        "scores": scores,
        "forward_layer_tokens": work.forward_layer_tokens,
        "layer_tokens_a_score": work.forward_layer_tokens / scores,
    }


def measure_trial(parent: Parent, split: Split, library: BlockLibrary) -> dict[str, int]:
    """One trial: a child with half of every FFN scored on the split, and timed beside the parent.

    It shares no layer with the parent, so this is the most that a trial takes: a scorer starts others further on.
    """
    workload = Workload(1, 8, 4, "float32", torch.get_num_threads(), "cpu")
    judge = Judge(parent, library, split, workload, 1, PrefixScorer(parent, library, split))
    assert judge.parent_quality, "scored once for all trials"
    half = library.space.ffn[len(library.space.ffn) // 2]
    with counted() as work:
        judge.judge(
            parent.shape.architecture.with_choices((layer, half) for layer in range(parent.shape.layers)), "counted"
        )
    return {"forward_layer_tokens": work.forward_layer_tokens}


def measure_path_step(parent: Parent, split: Split, library: BlockLibrary, delta_nats: DeltaNats) -> dict[str, float]:
    """One estimate and one knapsack; and the knapsack alone, solved from the same estimate."""
    costs = even_costs(library.space)

    def estimate(at: Architecture) -> DeltaNats:
        return estimate_delta_nats(parent, split, library, tokens=split.tokens, at=at)

    with counted() as work:
        ((_, found),) = walk(estimate, costs, "decode", [SPEEDUP], step=2 * SPEEDUP, progress=lambda done, total: None)
    assert costs.speedup(found, "decode") >= SPEEDUP * 0.999, "the step reaches its speed"
    started = time.perf_counter()
    Allocator(delta_nats, costs).best({"decode": SPEEDUP})
    seconds = time.perf_counter() - started
    variables = sum(len(decision.options) for decision in library.space.decisions)
    return {**asdict(work), "knapsack_variables": variables, "knapsack_seconds": seconds}


def measure(layers: int, choices: int) -> dict[str, Any]:
    """Everything, for one depth and number of FFN choices."""
    parent, split = tiny_llama(layers), tiny_split()
    space = tiny_space(parent, choices)
    assert FfnChoice(0) in space.ffn and len(space.ffn) == choices + 1
    library, built = measure_library(parent, split, space)
    delta_nats, estimated = measure_estimate(parent, split, library)
    return {
        "layers": layers,
        "ffn_choices": choices,
        "library": built,
        "estimate": estimated,
        "exact": measure_exact(parent, split, library),
        "trial": measure_trial(parent, split, library),
        "path_step": measure_path_step(parent, split, library, delta_nats),
    }


FIGURES = (
    "library.forward_layer_tokens",
    "library.float64_flops",
    "library.bytes_on_disk",
    "library.peak_statistics_bytes",
    "estimate.forward_layer_tokens",
    "estimate.backward_layer_tokens",
    "estimate.local_flops",
    "exact.layer_tokens_a_score",
    "exact.forward_layer_tokens",
    "trial.forward_layer_tokens",
    "path_step.forward_layer_tokens",
    "path_step.backward_layer_tokens",
    "path_step.knapsack_variables",
    "path_step.knapsack_seconds",
)


def figure(row: dict[str, Any], name: str) -> float:
    stage, _, key = name.partition(".")
    return float(row[stage][key])


def exponents(rows: Sequence[dict[str, Any]], over: str) -> dict[str, float]:
    """Slope of log cost over log `over` ("layers" or "ffn_choices"): 1 is linear, 0 is flat."""
    x = np.log([row[over] for row in rows])
    return {name: float(np.polyfit(x, np.log([figure(row, name) for row in rows]), 1)[0]) for name in FIGURES}


def print_table(rows: Sequence[dict[str, Any]], over: str) -> None:
    slopes = exponents(rows, over)
    print(f"| {over} | {' | '.join(str(row[over]) for row in rows)} | exponent |")
    print("|" + "---|" * (len(rows) + 2))
    for name in FIGURES:
        values = [figure(row, name) for row in rows]
        shown = [f"{value:.3f}" if name.endswith("seconds") else f"{value:,.0f}" for value in values]
        print(f"| {name} | {' | '.join(shown)} | {slopes[name]:.2f} |")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--choices", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--depth", type=int, default=8, help="layers while the choices grow")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    by_layers = [measure(layers, arguments.choices[0]) for layers in arguments.layers]
    by_choices = [measure(arguments.depth, choices) for choices in arguments.choices]
    if arguments.json:
        grown = {"layers": by_layers, "ffn_choices": by_choices}
        print(json.dumps({over: {"rows": r, "exponents": exponents(r, over)} for over, r in grown.items()}, indent=2))
        return
    print_table(by_layers, "layers")
    print_table(by_choices, "ffn_choices")


if __name__ == "__main__":
    main()
