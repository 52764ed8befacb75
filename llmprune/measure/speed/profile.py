"""Which block takes which share of the time: clocks around every block, and the output head, of a running model."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import torch
from torch import nn

from llmprune.choices.dimensions import BLOCK_KINDS, WHOLE_MODEL, BlockKind
from llmprune.measure.speed.sessions import Generation, TorchSession
from llmprune.measure.speed.throughput import Workload, steady_process, token_ids
from llmprune.models.parent import Parent

Block = tuple[int, BlockKind | Literal["vocabulary"]]
HEAD: Block = (WHOLE_MODEL, "vocabulary")
"""The output head, which multiplies hidden states by a row a token; an embedding is a row lookup."""


@dataclass(frozen=True)
class TimeShares:
    """Share of one pass's time that each block takes (norms and residuals excluded), and HEAD, by phase."""

    prefill: Mapping[Block, float]
    decode: Mapping[Block, float]


def time_shares(parent: Parent, workload: Workload, repeats: int) -> TimeShares:
    """Median share over `repeats` prompts and their decode steps. The clocks cost some microseconds a block."""
    shares: dict[str, dict[Block, list[float]]] = {"prefill": {}, "decode": {}}
    # Eager: in a compiled model, or a graph, no block can be told from the next.
    ids_BT = token_ids(parent.model, workload)
    with torch.inference_mode(), steady_process(workload.threads), _clocks(parent) as taken:
        for _ in range(repeats):
            run = Generation(TorchSession(parent.model), ids_BT, workload.prompt_tokens)
            for phase, passes in (("prefill", 1), ("decode", workload.generated_tokens)):
                for _ in range(passes):
                    seconds = run.prefill() if phase == "prefill" else run.decode_step()
                    for block, block_seconds in taken.items():
                        shares[phase].setdefault(block, []).append(block_seconds / seconds)
    return TimeShares(
        *({block: median(values) for block, values in shares[phase].items()} for phase in ("prefill", "decode"))
    )


@contextmanager
def _clocks(parent: Parent) -> Iterator[dict[Block, float]]:
    """Seconds that each block took in the pass that ended last: from its first projection's input to its output."""
    taken: dict[Block, float] = {}
    started: dict[Block, float] = {}
    handles = []

    def now() -> float:
        if parent.device.type != "cpu":
            torch.accelerator.synchronize(parent.device)
        return time.perf_counter()

    def start(block: Block) -> Any:
        def hook(_: nn.Module, args: Any) -> None:
            started[block] = now()

        return hook

    def stop(block: Block) -> Any:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            taken[block] = now() - started[block]

        return hook

    for layer in range(parent.shape.layers):
        for kind in BLOCK_KINDS:
            first = parent.block(layer, kind).get_submodule(next(iter(parent.names(kind).rows)))
            handles.append(first.register_forward_pre_hook(start((layer, kind))))
            handles.append(parent.output_projection(layer, kind).register_forward_hook(stop((layer, kind))))
    head: Any = parent.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    handles += [head.register_forward_pre_hook(start(HEAD)), head.register_forward_hook(stop(HEAD))]
    try:
        yield taken
    finally:
        for handle in handles:
            handle.remove()
