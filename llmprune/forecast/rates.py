"""How fast this machine does the few things that a search is made of, measured in seconds to minutes on random weights
of the parent's shape."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from llmprune.blocks.importance import eliminate
from llmprune.choices.architecture import ParentShape
from llmprune.choices.space import Space
from llmprune.core.errors import ModelError
from llmprune.measure.quality.perplexity import batch_windows, window_nats
from llmprune.measure.room import device_memory
from llmprune.measure.speed.throughput import Workload, running, steady_process, token_ids
from llmprune.measure.speed.turns import timing
from llmprune.models.loading import dtype_of
from llmprune.models.parent import Parent
from llmprune.models.stand_in import drawn_to_whole, part_bytes, parts_of
from llmprune.models.surgery import prune
from llmprune.models.walk import Walk
from llmprune.tables.reach import PHASES, REPEATS, FirstUnits, PhaseReach, Reach, nearly_whole, time_ends

BUDGET_S = 0.5
"""A measurement that took longer than this is not taken again, nor with more tokens."""
LARGEST_SIDE = 4096
"""Wider FFNs are measured by a matrix of this side: float64 of 28,672 squared would be 6.6 GB."""
_COLUMNS = 32
_PASSES = 6
_OF_MODEL = ("forward_s_per_token", "walk_s_per_token", "prefill_s", "decode_step_s", "child_s", "comparison_s")
"""The rates that are a model's; the others are the machine's."""
_ENDS = ("smallest", "halved")
"""Children of a space, as `PhaseReach` has them."""

Batch = tuple[int, int]
"""The most windows that there are to score, and their tokens."""


@dataclass(frozen=True)
class Rates:
    """What a forecast multiplies its counts by."""

    forward_s_per_token: float
    """Scoring: layers, output and log-softmax, in batches as large as fit into BUDGET_S."""
    walk_s_per_token: float
    """The layers alone, computed one after another in the dtype of a walk (see `models/walk.py`)."""
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
    """Making a child that differs from the parent in one decision."""
    comparison_s: float
    """What a comparison takes besides its passes: garbage is collected first, which outweighs a tiny model, and
    llama.cpp reads the child from a file that is written for it."""
    process_s: float
    """Starting a process that imports torch and transformers, as the proof of a checkpoint does."""

    def to_json(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Asked:
    """What a recipe wants to know of a model's speed: scoring up to `windows` windows of `seq_len` tokens, the
    workload, and, if it aims at speed-ups, what its space can reach."""

    space: Space
    workload: Workload
    windows: int
    seq_len: int
    reach: bool = False


Named = tuple[str, str]
"""Who asks, and for what."""


class Measured(NamedTuple):
    """The answer."""

    rates: Rates
    reach: Reach | None


def measure_rates(outline: Parent, device: torch.device, asked: Mapping[str, Asked]) -> dict[str, Measured]:
    """Rates of a parent that is an outline, by what asks for them: of stand-ins with random weights on the device (see
    `models/stand_in.py`), which take the work of a run in the dtype and engine of a run, and of the linear algebra.

    Raises ModelError if the largest stand-in, and children of it, are more than the device has memory for.
    """
    _check_memory(outline, device)
    asked = {
        name: replace(one, windows=min(one.windows, batch_windows(outline.model, one.seq_len)))
        for name, one in asked.items()
    }
    windows: dict[Batch, int] = {}
    times = drawn_to_whole(outline, device, lambda parent: time_parent(parent, asked, windows))
    of_machine = {**_solver_rates(outline.shape, device), "process_s": process_seconds()}
    return {name: _measured(name, one, times, of_machine) for name, one in asked.items()}


def _check_memory(outline: Parent, device: torch.device) -> None:
    part, free = parts_of(outline)[0], device_memory(device).free_bytes
    needed = 2 * part_bytes(outline, part)
    if needed > free:
        raise ModelError(
            f"{part.layers} layers of {outline.source} and their children take {needed / 1e9:.1f} GB in "
            f"{dtype_of(outline.model)}, and {free / 1e9:.1f} GB of memory are free: nothing can be timed here; use "
            "model.dtype=bfloat16, or a machine with more memory"
        )


def _measured(name: str, asked: Asked, times: Mapping[Named, float], of_machine: Mapping[str, float]) -> Measured:
    rates = Rates(**{word: times[name, word] for word in _OF_MODEL}, **of_machine)
    if not asked.reach:
        return Measured(rates, None)
    reach = {
        phase: PhaseReach(*(times[name, f"{phase} of parent"] / times[name, f"{phase} of {end}"] for end in _ENDS))
        for phase in PHASES
    }
    return Measured(rates, reach)


def time_parent(parent: Parent, asked: Mapping[str, Asked], windows: dict[Batch, int]) -> dict[Named, float]:
    """Seconds of everything that is asked for, of a parent that is there.

    `windows` says how many windows of a length are scored together; what it lacks is found out and added, so that all
    stand-ins of one parent score as many.
    """
    found: dict[Named, float] = {}
    forward: dict[Batch, float] = {}
    walking: dict[Batch, float] = {}
    passes: dict[Workload, dict[str, float]] = {}
    for name, one in asked.items():
        workload, text = one.workload, (one.windows, one.seq_len)
        space = replace(one.space, shape=parent.shape)
        with torch.inference_mode(), timing(workload.device), steady_process(workload.threads):
            if text not in windows:
                windows[text], forward[text] = _largest_batch(parent, *text)
            if text not in forward:
                forward[text] = _forward_s_per_token(parent, windows[text], one.seq_len)
            if text not in walking:
                walking[text] = _walk_s_per_token(parent, windows[text], one.seq_len)
            if workload not in passes:
                passes[workload] = _passes_s(parent, space, workload)
            values = {"forward_s_per_token": forward[text], "walk_s_per_token": walking[text], **passes[workload]}
            if one.reach:
                values |= _reach_s(parent, space, workload, values)
        found |= {(name, word): seconds for word, seconds in values.items()}
    return found


def _passes_s(parent: Parent, space: Space, workload: Workload) -> dict[str, float]:
    """Seconds of what a comparison of a child takes."""
    prefill_s, decode_step_s = _workload_s(parent, workload)
    # One of the space, which its engine can run.
    make = partial(prune, parent, nearly_whole(space), FirstUnits(parent))
    child_s = _seconds(parent.device, make)
    comparison_s = _seconds(parent.device, partial(_prepare, parent, make(), workload))
    return {"prefill_s": prefill_s, "decode_step_s": decode_step_s, "child_s": child_s, "comparison_s": comparison_s}


def _reach_s(parent: Parent, space: Space, workload: Workload, passes: Mapping[str, float]) -> dict[str, float]:
    """Seconds of a pass of the parent and of the ends of its space, timed in turns, fewer of a slow model."""
    tokens = min(workload.generated_tokens, max(2, int(4 * BUDGET_S / passes["decode_step_s"])))
    repeats = REPEATS if passes["prefill_s"] < BUDGET_S else 1
    own, ends = time_ends(parent, space, replace(workload, generated_tokens=tokens), repeats)
    found = {}
    for phase in PHASES:
        per_s = own.decode_tokens_per_s if phase == "decode" else own.prefill_tokens_per_s
        found[f"{phase} of parent"] = 1 / per_s.median
        for end, speed in zip(_ENDS, ends, strict=True):
            ratio = speed.decode_speedup if phase == "decode" else speed.prefill_speedup
            found[f"{phase} of {end}"] = 1 / per_s.median / ratio.median
    return found


def process_seconds() -> float:
    """Seconds until a fresh process has imported what a proof needs."""
    started = time.perf_counter()
    # transformers imports what is asked for; the last two bring what every model stands on.
    imports = "from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin, PreTrainedModel"
    subprocess.run([sys.executable, "-c", imports], check=True, capture_output=True)
    return time.perf_counter() - started


def _largest_batch(parent: Parent, most: int, seq_len: int) -> tuple[int, float]:
    """As many windows as are scored within BUDGET_S, and the seconds a token of that: twice as many windows each time,
    since small batches are slower a token."""
    windows = 1
    while True:
        a_token = _forward_s_per_token(parent, windows, seq_len)
        if windows == most or a_token * windows * seq_len > BUDGET_S / 2:
            return windows, a_token
        windows = min(2 * windows, most)


def _forward_s_per_token(parent: Parent, windows: int, seq_len: int) -> float:
    vocabulary: int = parent.model.config.get_text_config().vocab_size
    ids = (torch.arange(windows * seq_len) * 7919 % vocabulary).reshape(windows, seq_len)
    # All in one pass, also where the vocabulary of a stand-in would let fewer rows ask for larger batches.
    scored = partial(window_nats, parent.model, ids, batch_tokens=windows * seq_len)
    return _seconds(parent.device, scored) / (windows * seq_len)


def _walk_s_per_token(parent: Parent, windows: int, seq_len: int) -> float:
    """What bringing or widening a layer takes is left out: the more tokens, the less it counts."""
    walk, taken = Walk(parent, seq_len), 0.0
    states = walk.embedded(torch.zeros(windows, seq_len, dtype=torch.int64))
    for layer in range(parent.shape.layers):
        with walk.layer(layer) as run:
            taken += _seconds(parent.device, partial(run, states))
    return taken / (windows * seq_len)


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


def _solver_rates(shape: ParentShape, device: torch.device) -> dict[str, float]:
    """Operations a second: float64 products, eliminations, float32 products."""
    side, outputs = min(shape.ffn_width, LARGEST_SIDE), shape.hidden_size
    square = torch.eye(side, dtype=torch.float64, device=device)
    tall = torch.ones(side, min(side, 8 * _COLUMNS), dtype=torch.float64, device=device)
    product_flops = 2 * side * side * tall.shape[1]
    float64 = product_flops / _seconds(device, lambda: square @ tall)
    weight_DI = torch.ones(outputs, side, dtype=torch.float64, device=device)
    leaving = min(_COLUMNS, side // 2)
    removed = torch.arange(leaving, device=device)
    kept = side - leaving
    elimination_flops = 2 * leaving * kept * (kept + outputs)
    elimination = elimination_flops / _seconds(device, lambda: eliminate(weight_DI, square, removed))
    single, tall32 = square.float(), tall.float()
    float32 = product_flops / _seconds(device, lambda: single @ tall32)
    return {
        "float64_flops_per_s": float64,
        "elimination_flops_per_s": elimination,
        "float32_flops_per_s": float32,
    }


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Median of three runs after one that warms up; of a slow one, the first alone counts."""
    taken: list[float] = []
    while len(taken) < 4 and sum(taken) < BUDGET_S:
        started = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        taken.append(time.perf_counter() - started)
    return median(taken[1:] or taken)
