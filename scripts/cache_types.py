"""What a KV cache in q8_0 changes in llama.cpp, beside its default of f16: logits, bytes and speed.

    python scripts/cache_types.py MODEL --text assets/demo/wikipedia.jsonl [--weights q8_0] [--depths 128 2048] [--json]

Both caches read the same windows of text: nats a token of KL from the f16 cache's logits to the q8_0 cache's, nats
lost, and how often both find the same token likeliest. Then both decode in turns, token by token, behind prompts of
several lengths: the median of paired ratios, f16 seconds by q8_0 seconds, above 1 where q8_0 is faster.

Shapes: N windows, T tokens of each, V words of the vocabulary.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import fmean, median
from typing import Any, get_args

import torch
from check_gguf import text_ids
from torch.nn import functional

from llmprune.core.recipe import CacheType, GgufType
from llmprune.core.recipe_inputs import ModelRecipe
from llmprune.formats.gguf import cached_numbers, write_gguf
from llmprune.measure.speed.llamacpp import GgufModel, logits_of
from llmprune.measure.speed.llamacpp_engine import cache_problem
from llmprune.models.loading import load_model
from llmprune.models.surgery import register_pruned_classes
from llmprune.numerics.divergence import kl_nats
from llmprune.numerics.ggml import TYPES

STEPS = 48
"""Tokens that are decoded at each depth."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint directory or GGUF file")
    parser.add_argument("--text", type=Path, required=True, help="a .jsonl file with documents under 'text'")
    parser.add_argument("--weights", choices=get_args(GgufType), default="q8_0")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="of a window")
    parser.add_argument("--depths", type=int, nargs="+", default=[128, 2048], help="tokens that the cache holds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    register_pruned_classes()
    model, tokenizer = load_model(ModelRecipe(path=arguments.model, device="cpu"))
    if problem := cache_problem(model.config, "q8_0"):
        raise SystemExit(problem)
    windows_NT = text_ids(arguments.text, tokenizer, arguments.windows * arguments.tokens).reshape(
        arguments.windows, arguments.tokens
    )
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.gguf"
        write_gguf(model, None, path, arguments.weights)
        with GgufModel(path) as loaded:
            rows = {
                **{
                    f"kv_bytes_per_token, {type_}": int(cached_numbers(model.config) * TYPES[type_].bits / 8)
                    for type_ in get_args(CacheType)
                },
                **likeness(loaded, windows_NT, arguments.threads),
                **{
                    f"decode_speedup at {depth}": speedup(loaded, depth, arguments.threads)
                    for depth in arguments.depths
                },
            }
    print(json.dumps(rows, indent=2) if arguments.json else table(rows))


def likeness(model: GgufModel, windows_NT: torch.Tensor, threads: int) -> dict[str, float]:
    """How far logits with one cache are from those with the other."""
    kl, lost, same = [], [], []
    for ids_T in windows_NT:
        f16_TV, q8_TV = (
            logits_of(model, ids_T[None], threads, type_)[0, :-1].double().log_softmax(-1)
            for type_ in get_args(CacheType)
        )
        kl.append(kl_nats(f16_TV, q8_TV))
        lost.append(float(functional.nll_loss(q8_TV - f16_TV, ids_T[1:])))
        same.append(float((f16_TV.argmax(-1) == q8_TV.argmax(-1)).double().mean()))
    return {"kl_nats": fmean(kl), "nats_lost": fmean(lost), "same_top": fmean(same)}


def speedup(model: GgufModel, depth: int, threads: int) -> float:
    """Of the q8_0 cache over the f16 cache, in decoding behind so many tokens."""
    ids = [7919 * i % model.vocab_size for i in range(depth + STEPS)]
    with (
        model.session(1, len(ids), threads, cache_type="f16") as f16,
        model.session(1, len(ids), threads, cache_type="q8_0") as q8,
    ):
        for session in (f16, q8):
            session.read([ids[:depth]])
        ratios = []
        for i, token in enumerate(ids[depth:]):
            # Who goes first changes, lest a drift of the machine favours one.
            order = (f16, q8) if i % 2 else (q8, f16)
            seconds = {session: session.read([[token]]) for session in order}
            ratios.append(seconds[f16] / seconds[q8])
    return median(ratios)


def table(rows: dict[str, Any]) -> str:
    """One line a figure."""
    return "\n".join(f"{name:>26}  {value:.6g}" for name, value in rows.items())


if __name__ == "__main__":
    main()
