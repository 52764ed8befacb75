"""What fewer rows of embedding and output head save in time, on random weights: no text, so no quality.

    python scripts/vocabulary_speed.py [CONFIG] --rows 32000 [--engine torch llamacpp] [--repeats 8] [--json]

CONFIG is a directory or Hub id with a config.json; by default the shape of Gemma 3 270M: 18 layers, hidden size 640,
262,144 rows. Tokens a second of the model with fewer rows over the whole one, in turns: batch 1, 128 prompt and 32
generated tokens. Text a second is that, divided by how many more tokens the text is.
"""

from __future__ import annotations

import argparse
import copy
import json
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3TextConfig

from llmprune.measure.speed.throughput import Speed, Workload, measure_paired

GEMMA_3_270M: dict[str, Any] = {
    "vocab_size": 262_144,
    "hidden_size": 640,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "intermediate_size": 2048,
    "max_position_embeddings": 2048,
    "sliding_window": 512,
    "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", help="directory or Hub id; default: the shape of Gemma 3 270M")
    parser.add_argument("--rows", type=int, default=32_000, help="that are left")
    parser.add_argument("--engine", nargs="+", choices=("torch", "llamacpp"), default=["torch", "llamacpp"])
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    config = AutoConfig.from_pretrained(arguments.config) if arguments.config else Gemma3TextConfig(**GEMMA_3_270M)
    found = {
        engine: speed.to_json()
        for engine, speed in speeds(config, arguments.rows, arguments.engine, arguments.repeats, arguments.threads)
    }
    if arguments.json:
        print(json.dumps(found, indent=2))
    for engine, speed in found.items() if not arguments.json else ():
        decode, prefill = (speed[f"{phase}_speedup"] for phase in ("decode", "prefill"))
        print(f"{engine}: decode {shown(decode)}, prefill {shown(prefill)}")


def speeds(config: Any, rows: int, engines: list[str], repeats: int, threads: int) -> list[tuple[str, Speed]]:
    """Of the model with so many rows over the whole one, in each engine; torch in float32, llama.cpp in q8_0."""
    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    if not 0 < rows < config.vocab_size:
        raise SystemExit(f"--rows must be below the config's {config.vocab_size:,}, got {rows:,}")
    fewer = copy.deepcopy(whole)
    fewer.resize_token_embeddings(rows, mean_resizing=False)
    found = []
    for engine in engines:
        stored = {"engine": "llamacpp", "gguf_type": "q8_0"} if engine == "llamacpp" else {}
        workload = Workload(1, 128, 32, "float32", threads, "cpu", **stored)  # type: ignore[arg-type]
        _, (speed,) = measure_paired(whole, [fewer.eval()], workload, repeats)
        found.append((engine, speed))
    return found


def shown(spread: dict[str, float]) -> str:
    """A median with its spread."""
    return "{median:.2f}x ({low:.2f}-{high:.2f})".format(**spread)


if __name__ == "__main__":
    main()
