"""GGUF files of one model side by side in llama.cpp: bytes, nats of text, and speed in turns.

    python scripts/gguf_files.py REFERENCE.gguf FILE.gguf... --run RUN [--splits validation test] [--rounds 12] [--json]

Files may come from anywhere: from an export, or from llama.cpp's own `llama-quantize`. All read the same windows, those
of a run's token splits, in llama.cpp, so activations are rounded as its users' are. Then every file reads a prompt and
decodes in turns with the reference: the median of paired ratios, with the least and the largest, above 1 where the
file is faster.
"""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table

from llmprune.cli.terminal import console
from llmprune.data.store import load_token_splits
from llmprune.data.tokens import Split
from llmprune.measure.speed.llamacpp import GgufModel, LlamaCppSession, window_nats
from llmprune.pipeline.run_directory import RunDirectory

PROMPT_TOKENS, STEPS = 128, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.gguf", help="the first is the reference")
    parser.add_argument("--run", type=Path, required=True, help="run directory with the token splits that are read")
    parser.add_argument("--splits", nargs="+", default=["validation", "test"])
    parser.add_argument("--rounds", type=int, default=12, help="of timing; each is a prompt and its continuation")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    splits = load_token_splits(RunDirectory(arguments.run).tokens)
    texts = [splits[name] for name in arguments.splits]
    with ExitStack() as stack:
        models = [stack.enter_context(GgufModel(path)) for path in arguments.files]
        rows = compared(models, texts, arguments.rounds, arguments.threads)
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        console().print(table(rows, texts, arguments.rounds))


def compared(models: list[GgufModel], texts: list[Split], rounds: int, threads: int) -> list[dict[str, Any]]:
    """A row a file: what it says of each split beside the reference, and its speed-up over it."""
    nats = [[nats_per_token(model, split, threads) for split in texts] for model in models]
    ratios = speedups(models, rounds, threads)
    return [
        {
            "file": model.path.name,
            "bytes": model.bytes,
            **{f"{split.name}_nats": value for split, value in zip(texts, own, strict=True)},
            **{
                f"{split.name}_nats_over_reference": value - of_reference
                for split, value, of_reference in zip(texts, own, nats[0], strict=True)
            },
            **{f"{phase}_speedup": spread for phase, spread in ratio.items()},
        }
        for model, own, ratio in zip(models, nats, ratios, strict=True)
    ]


def nats_per_token(model: GgufModel, split: Split, threads: int) -> float:
    """Of the split's mixture of sources."""
    return sum(
        split.weights[name]
        * float(window_nats(model, source.windows, threads).sum())
        / (len(source.windows) * (split.seq_len - 1))
        for name, source in split.sources.items()
    )


def speedups(models: list[GgufModel], rounds: int, threads: int) -> list[dict[str, tuple[float, float, float]]]:
    """(median, least, largest) of each file's paired ratios to the reference, by phase."""
    seconds: list[dict[str, list[float]]] = [{"prefill": [], "decode": []} for _ in models]
    ids = [7919 * i % models[0].vocab_size for i in range(PROMPT_TOKENS + STEPS)]
    with ExitStack() as stack:
        sessions = [stack.enter_context(model.session(1, len(ids), threads)) for model in models]
        for session in sessions:
            _timed(session, ids)
        for i in range(rounds):
            # Who goes first changes, lest a drift of the machine favours one.
            for j in range(len(models)):
                k = (i + j) % len(models)
                prefill_s, decode_s = _timed(sessions[k], ids)
                seconds[k]["prefill"].append(prefill_s)
                seconds[k]["decode"].append(decode_s)
    return [{phase: _paired(seconds[0][phase], own[phase]) for phase in own} for own in seconds]


def _timed(session: LlamaCppSession, ids: list[int]) -> tuple[float, float]:
    session.clear()
    prefill_s = session.read([ids[:PROMPT_TOKENS]])
    return prefill_s, sum(session.read([[token]]) for token in ids[PROMPT_TOKENS:])


def _paired(reference: list[float], own: list[float]) -> tuple[float, float, float]:
    ratios = [theirs / mine for theirs, mine in zip(reference, own, strict=True)]
    return median(ratios), min(ratios), max(ratios)


def table(rows: list[dict[str, Any]], texts: list[Split], rounds: int) -> Table:
    """A row a file."""
    read = "; ".join(f"{s.name}: {s.dataset}, {s.tokens:,} tokens in windows of {s.seq_len}" for s in texts)
    drawn = Table(
        title="GGUF files in llama.cpp",
        caption=f"Nats a token over the first file's; {read}. Speed-ups over the first file, {rounds} rounds in turns.",
        caption_justify="left",
    )
    drawn.add_column("file", overflow="fold")
    for column in ("MB", *(f"{s.name},\nnats" for s in texts), *(f"over the\nfirst, {s.name}" for s in texts)):
        drawn.add_column(column, justify="right", no_wrap=True)
    for phase in ("decode", "prefill"):
        drawn.add_column(phase, justify="right", no_wrap=True)
    for row in rows:
        drawn.add_row(
            row["file"],
            f"{row['bytes'] / 1e6:.1f}",
            *(f"{row[f'{s.name}_nats']:.3f}" for s in texts),
            *(f"{row[f'{s.name}_nats_over_reference']:+.3f}" for s in texts),
            *("{:.2f}x ({:.2f}-{:.2f})".format(*row[f"{phase}_speedup"]) for phase in ("decode", "prefill")),
        )
    return drawn


if __name__ == "__main__":
    main()
