"""How fast this machine does the few things that a search is made of, measured on the parent in a few seconds."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from statistics import median

import torch
from transformers import PreTrainedModel

from llmprune.blocks.importance import eliminate
from llmprune.blocks.library import BlockLibrary
from llmprune.choices.architecture import DROPPED
from llmprune.choices.space import Space
from llmprune.measure.quality.perplexity import batch_windows, window_nats
from llmprune.measure.speed.throughput import Workload, running, steady_process, token_ids
from llmprune.models.parent import Parent
from llmprune.models.surgery import prune

BUDGET_S = 0.5
"""A measurement that took longer than this is not taken again, nor with more tokens."""
LARGEST_SIDE = 4096
"""Wider FFNs are measured by a matrix of this side: float64 of 28,672 squared would be 6.6 GB."""
_COLUMNS = 32
_PASSES = 6


@dataclass(frozen=True)
class Rates:
    """What a forecast multiplies its counts by."""

    forward_s_per_token: float
    """Scoring: layers, output and log-softmax, in batches as large as fit into BUDGET_S."""
    prefill_s: float
    """One prompt of the workload, all rows of the batch."""
    decode_step_s: float
    """One decode step of the workload, all rows of the batch."""
    float64_flops_per_s: float
    """A matrix product of the FFN's width."""
    elimination_flops_per_s: float
    """A rank-32 update of such a matrix with its copies: bound by memory, not by arithmetic."""
    float32_flops_per_s: float
    child_s: float
    """Making a child that differs from the parent in one block."""
    comparison_s: float
    """What a comparison takes besides its passes: garbage is collected first, which outweighs a tiny model, and
    llama.cpp reads the child from a file that is written for it."""
    process_s: float = 0.0
    """Starting a process that imports torch and transformers, as the proof of a checkpoint does."""

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def measure_rates(parent: Parent, space: Space, workload: Workload, windows: int, seq_len: int) -> Rates:
    """Time the parent: scoring up to `windows` windows of `seq_len` tokens, the workload, and the linear algebra."""
    with torch.inference_mode(), steady_process(workload.threads):
        forward_s = _forward_s_per_token(parent, min(windows, batch_windows(parent.model, seq_len)), seq_len)
        prefill_s, step_s = _workload_s(parent, workload)
        float64, elimination, float32 = _solver_rates(parent)
        one_less = parent.shape.architecture.with_choice(0, DROPPED["ffn"])
        # A dropped block asks the library for nothing.
        child_s = _seconds(parent, lambda: prune(parent, one_less, BlockLibrary(space, ())))
        child = prune(parent, one_less, BlockLibrary(space, ()))
        comparison_s = _seconds(parent, lambda: _prepare(parent, child, workload))
    return Rates(forward_s, prefill_s, step_s, float64, elimination, float32, child_s, comparison_s)


def process_seconds() -> float:
    """Seconds until a fresh process has imported what a proof needs."""
    started = time.perf_counter()
    # transformers imports what is asked for; the last two bring what every model stands on.
    imports = "from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin, PreTrainedModel"
    subprocess.run([sys.executable, "-c", imports], check=True, capture_output=True)
    return time.perf_counter() - started


def _forward_s_per_token(parent: Parent, most: int, seq_len: int) -> float:
    """Twice as many windows each time, since small batches are slower a token; the last measurement counts."""
    vocabulary: int = parent.model.config.get_text_config().vocab_size
    windows = 1
    while True:
        ids = (torch.arange(windows * seq_len) * 7919 % vocabulary).reshape(windows, seq_len)
        seconds = _seconds(parent, lambda ids=ids: window_nats(parent.model, ids))  # type: ignore[misc]
        if windows == most or seconds > BUDGET_S / 2:
            return seconds / (windows * seq_len)
        windows = min(2 * windows, most)


def _prepare(parent: Parent, child: PreTrainedModel, workload: Workload) -> None:
    """All of a comparison but its passes: llama.cpp's children are written to files first."""
    ids_BT = token_ids(parent.model, workload)
    with steady_process(workload.threads), running([parent.model, child], ids_BT, replace(workload, compile=False)):
        pass


def _workload_s(parent: Parent, workload: Workload) -> tuple[float, float]:
    # Compiling would take longer than the forecast may.
    ids_BT, plain = token_ids(parent.model, workload), replace(workload, compile=False)
    steps = min(_PASSES, workload.generated_tokens)
    prefills: list[float] = []
    decodes: list[float] = []
    with running([parent.model], ids_BT, plain) as (run,):
        while len(prefills) < 3 and sum(prefills[1:]) < BUDGET_S:
            prefills.append(run.prefill())
            decodes += [run.decode_step() for _ in range(steps)]
    return median(prefills[1:] or prefills), median(decodes)


def _solver_rates(parent: Parent) -> tuple[float, float, float]:
    """Operations a second: float64 products, eliminations, float32 products."""
    side, outputs = min(parent.shape.ffn_width, LARGEST_SIDE), parent.shape.hidden_size
    device = parent.output_weight(0, "ffn").device
    square = torch.eye(side, dtype=torch.float64, device=device)
    tall = torch.ones(side, min(side, 8 * _COLUMNS), dtype=torch.float64, device=device)
    product_flops = 2 * side * side * tall.shape[1]
    float64 = product_flops / _seconds(parent, lambda: square @ tall)
    weight_DI = torch.ones(outputs, side, dtype=torch.float64, device=device)
    leaving = min(_COLUMNS, side // 2)
    removed = torch.arange(leaving, device=device)
    kept = side - leaving
    elimination_flops = 2 * leaving * kept * (kept + outputs)
    elimination = elimination_flops / _seconds(parent, lambda: eliminate(weight_DI, square, removed))
    single, tall32 = square.float(), tall.float()
    return float64, elimination, product_flops / _seconds(parent, lambda: single @ tall32)


def _seconds(parent: Parent, work: Callable[[], object]) -> float:
    """Median of three runs after one that warms up; of a slow one, the first alone counts."""
    taken: list[float] = []
    while len(taken) < 4 and sum(taken) < BUDGET_S:
        started = time.perf_counter()
        work()
        if parent.device.type != "cpu":
            torch.accelerator.synchronize(parent.device)
        taken.append(time.perf_counter() - started)
    return median(taken[1:] or taken)
