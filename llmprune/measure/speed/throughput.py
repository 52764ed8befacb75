"""How fast a model is: prefill and decode in tokens per second, and both paired with a reference model.

Prefill reads the whole prompt in one pass and is bound by arithmetic; decode reads every weight for each token and,
at a small batch, is bound by memory. Pruning speeds them up differently, so they are never merged into one figure.

On a machine that others use too, a pass may take ten times as long as the one before. So reference and candidate
take turns pass by pass - decode token by token, each with a live cache of its own - and a speed-up is the median of
the ratios of such pairs: both halves of a pair meet the same load, and a burst that hits one half spoils one ratio
of many. Turns of several tokens gave the same median within 0.3%, and two to three times the scatter; sums and means
of times are at the mercy of single bursts.

Where a GPU has room for one of them at a time, whole models take turns (see `visits`), and each pass is paired with the
same pass of the other one, seconds apart.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from llmprune.core.errors import RecipeError
from llmprune.core.recipe import CacheType, EngineName, GgufType, WorkloadRecipe
from llmprune.measure.speed.graphs import WARM_UPS, StaticGeneration, as_it_is, cuda_graphs
from llmprune.measure.speed.sessions import Generation, Session, Timed, TorchSession
from llmprune.measure.speed.visits import Seconds, in_visits
from llmprune.models.waiting import home_of, waits

PREFILL_PAIRS = 2
"""Prompts that each model reads in one repeat; the last one's cache is what decode continues."""

_WARM_UP_STEPS = 2
_ID_STRIDE = 7919
"""A prime: token ids spread over the vocabulary, so that no row of the embeddings stays in a cache."""


@dataclass(frozen=True)
class Workload:
    """What is timed."""

    batch: int
    prompt_tokens: int
    generated_tokens: int
    dtype: str
    threads: int
    device: str
    compile: bool = False
    engine: EngineName = "torch"
    gguf_type: GgufType | None = None
    """How llama.cpp's weights are stored, which then says more of the speed than the dtype; None for torch."""
    cache_type: CacheType = "f16"
    """Of llama.cpp's KV cache; torch's has the dtype."""
    graphs: bool = False
    """Whether torch's passes are captured as CUDA graphs, and replays are timed."""

    @classmethod
    def from_recipe(cls, recipe: WorkloadRecipe, dtype: str, device: str, gguf_type: GgufType = "f16") -> Workload:
        """The recipe's workload on a device such as "cpu" or "cuda:1" (llama.cpp's is the CPU, always).

        Threads default to torch's own choice, and graphs to CUDA devices. Raises RecipeError on graphs elsewhere.
        """
        threads = torch.get_num_threads() if recipe.threads is None else recipe.threads
        lengths = recipe.batch, recipe.prompt_tokens, recipe.generated_tokens
        if recipe.engine == "torch":
            on_cuda = torch.device(device).type == "cuda"
            if recipe.graphs is True and not on_cuda:
                raise RecipeError(
                    f"workload.graphs=true needs a CUDA device, and the model is on {device}; leave it out (auto: "
                    "on CUDA alone), or set model.device=cuda"
                )
            graphs = on_cuda if recipe.graphs == "auto" else recipe.graphs
            return cls(*lengths, dtype, threads, device, recipe.compile, graphs=graphs)
        engine, cache_type = recipe.engine, recipe.cache_type
        return cls(*lengths, dtype, threads, "cpu", engine=engine, gguf_type=gguf_type, cache_type=cache_type)

    def to_json(self) -> dict[str, Any]:
        """Without what is as it always was, so that hashes of plain workloads stay."""
        plain = {"compile": False, "engine": "torch", "gguf_type": None, "cache_type": "f16", "graphs": False}
        return {key: value for key, value in asdict(self).items() if key not in plain or value != plain[key]}


@dataclass(frozen=True)
class Spread:
    """Median, 10th and 90th percentile of single passes: how they scatter, not how well the median is known.

    Not minimum and maximum, which on a shared machine tell of the worst burst alone.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        low, median, high = np.percentile(values, (10, 50, 90))
        return cls(float(median), float(low), float(high))


@dataclass(frozen=True)
class Speed:
    """A measured speed. Speed-ups are medians of paired ratios, reference seconds by candidate seconds, and so need
    not equal the quotient of two medians of tokens per second; those of the reference itself are 1."""

    prefill_tokens_per_s: Spread
    decode_tokens_per_s: Spread
    prefill_speedup: Spread
    decode_speedup: Spread

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Speed:
        """Inverse of `to_json`."""
        return cls(**{name: Spread(**spread) for name, spread in data.items()})


Pair = tuple[float, float]
"""Seconds of one pass of the reference, and of the same pass of a candidate."""
Pairs = tuple[list[list[Pair]], list[list[Pair]]]
"""Of prefill and of decode, by candidate."""
Progress = Callable[[int, int], None]


def measure_paired(
    reference: PreTrainedModel,
    candidates: Sequence[PreTrainedModel],
    workload: Workload,
    repeats: int,
    progress: Progress | None = None,
) -> tuple[Speed, list[Speed]]:
    """Time the reference against each candidate in turn, `repeats` times: the reference's speed and the candidates'.

    A repeat is PREFILL_PAIRS prompts and then `generated_tokens` decode steps of one token (per row of the batch),
    each a pass that waits for its result, as sampling does. The tokens fed are fixed, so all models do the same work.
    `progress(done, total)` counts repeats of a candidate. Models must have the workload's dtype and device. A
    compiled workload compiles them here: their graphs are dropped with the next call, or torch would run out of its
    limit of graphs for one function and time the later ones uncompiled.

    Where one of the models waits (see `models/waiting.py`) there is no room for two, and they are timed in `visits`; in
    llama.cpp, which has its own memory, as ever.
    """
    assert candidates and repeats >= 1, "there is something to time"
    for model in (reference, *candidates):
        check_model(model, workload)
    ids_BT = token_ids(min((reference, *candidates), key=_rows), workload)
    alone = workload.engine == "torch" and any(map(waits, (reference, *candidates)))
    paired = _whole_by_whole if alone else _pass_by_pass
    prefill, decode = paired(reference, candidates, ids_BT, workload, repeats, progress)
    speeds = [_speed(*pairs, workload) for pairs in zip(prefill, decode, strict=True)]
    return _speed(_of_reference(prefill), _of_reference(decode), workload), speeds


def _pass_by_pass(
    reference: PreTrainedModel,
    candidates: Sequence[PreTrainedModel],
    ids_BT: torch.Tensor,
    workload: Workload,
    repeats: int,
    progress: Progress | None,
) -> Pairs:
    prefill: list[list[Pair]] = [[] for _ in candidates]
    decode: list[list[Pair]] = [[] for _ in candidates]
    with (
        running((reference, *candidates), ids_BT, workload) as (of_reference, *of_candidates),
        torch.inference_mode(),
        steady_process(workload.threads),
        compiled_passes(workload, 2 * (1 + len(candidates))),
    ):
        for run in (of_reference, *of_candidates):
            _warm_up(run, workload)
        for repeat in range(repeats):
            for i, run in enumerate(of_candidates):
                runs = (of_reference, run)
                prefill[i] += in_turns(*(run.prefill for run in runs), pairs=PREFILL_PAIRS)
                decode[i] += in_turns(*(run.decode_step for run in runs), pairs=workload.generated_tokens)
                if progress is not None:
                    progress(repeat * len(candidates) + i + 1, repeats * len(candidates))
    return prefill, decode


def _whole_by_whole(
    reference: PreTrainedModel,
    candidates: Sequence[PreTrainedModel],
    ids_BT: torch.Tensor,
    workload: Workload,
    repeats: int,
    progress: Progress | None,
) -> Pairs:
    def visit(model: PreTrainedModel, repeats: int) -> Seconds:
        # What was compiled or captured of an earlier visit was of weights at other addresses.
        with compiled_passes(workload, 2), running([model], ids_BT, workload) as (run,):
            _warm_up(run, workload)
            seconds = Seconds([], [])
            for _ in range(repeats):
                seconds.prefill.extend(run.prefill() for _ in range(PREFILL_PAIRS))
                seconds.decode.extend(run.decode_step() for _ in range(workload.generated_tokens))
            return seconds

    with torch.inference_mode(), steady_process(workload.threads):
        found = in_visits(reference, candidates, repeats, visit, progress)
    prefill, decode = ([list(zip(one[phase], other[phase], strict=True)) for one, other in found] for phase in range(2))
    return prefill, decode


def standard_errors(speed: Speed, workload: Workload, repeats: int) -> dict[str, float]:
    """How far the median speed-up of each phase may be off, from how single pairs scatter: a normal distribution has
    2.563 standard deviations between its 10th and 90th percentile, and a median of n an error of 1.253 / sqrt(n)."""
    pairs = {"decode": repeats * workload.generated_tokens, "prefill": repeats * PREFILL_PAIRS}
    spreads = {"decode": speed.decode_speedup, "prefill": speed.prefill_speedup}
    return {
        phase: 1.253 * (spread.high - spread.low) / (2.563 * math.sqrt(pairs[phase]))
        for phase, spread in spreads.items()
    }


@contextmanager
def running(
    models: Sequence[PreTrainedModel], ids_BT: torch.Tensor, workload: Workload, *, takes_back: bool = False
) -> Iterator[list[Timed]]:
    """Models in the workload's engine, each with a cache of its own; one model may stand there twice.

    The first is the reference, which an engine may keep for the next call. With `takes_back`, tokens can be.
    """
    if workload.compile or workload.graphs:
        yield [_over_fixed_tensors(model, ids_BT, workload, takes_back=takes_back) for model in models]
        return
    with sessions(models, workload, ids_BT.shape[1], takes_back=takes_back) as opened:
        yield [Generation(session, ids_BT, workload.prompt_tokens) for session in opened]


def _over_fixed_tensors(
    model: PreTrainedModel, ids_BT: torch.Tensor, workload: Workload, *, takes_back: bool
) -> StaticGeneration:
    record = cuda_graphs(ids_BT.device) if workload.graphs else as_it_is
    return StaticGeneration(
        model, ids_BT, workload.prompt_tokens, record, compiled=workload.compile, takes_back=takes_back
    )


@contextmanager
def sessions(
    models: Sequence[PreTrainedModel], workload: Workload, tokens: int, *, takes_back: bool = False
) -> Iterator[list[Session]]:
    """A session of each model in the workload's engine, for texts of so many tokens; torch's passes are eager."""
    if workload.engine == "torch":
        yield [TorchSession(model, takes_back=takes_back) for model in models]
        return
    from llmprune.measure.speed.llamacpp_engine import loaded_sessions  # imported late: it is not always there

    assert workload.gguf_type is not None, "llama.cpp reads weights of some type"
    with loaded_sessions(
        models, workload.batch, tokens, workload.gguf_type, workload.threads, workload.cache_type
    ) as opened:
        yield list(opened)


def in_turns(reference: Callable[[], float], candidate: Callable[[], float], *, pairs: int) -> list[Pair]:
    """Seconds of both; who goes first changes from pair to pair, lest a drift of the machine favours one."""
    taken: list[Pair] = []
    for pair in range(pairs):
        if pair % 2 == 0:
            reference_s = reference()
            candidate_s = candidate()
        else:
            candidate_s = candidate()
            reference_s = reference()
        taken.append((reference_s, candidate_s))
    return taken


def _warm_up(run: Timed, workload: Workload) -> None:
    run.prefill()
    for _ in range(min(_WARM_UP_STEPS, workload.generated_tokens)):
        run.decode_step()


def passes_of(workload: Workload, repeats: int) -> tuple[int, int]:
    """Prompts read and decode steps taken by `measure_paired` with one candidate: both models, warm-up included, and
    what is run before a graph stands, and to make it."""
    warm_up, captured = min(_WARM_UP_STEPS, workload.generated_tokens), WARM_UPS + 1 if workload.graphs else 0
    prompts, steps = 1 + repeats * PREFILL_PAIRS, warm_up + repeats * workload.generated_tokens
    return 2 * (captured + prompts), 2 * (captured + steps)


def token_ids(model: PreTrainedModel, workload: Workload) -> torch.Tensor:
    """(batch, prompt and generated tokens) int64: the same for every model of a vocabulary, run and machine."""
    shape = (workload.batch, workload.prompt_tokens + workload.generated_tokens)
    vocabulary = _rows(model)
    return (torch.arange(shape[0] * shape[1]) * _ID_STRIDE % vocabulary).reshape(shape).to(workload.device)


def _rows(model: PreTrainedModel) -> int:
    rows: int = model.config.get_text_config().vocab_size
    return rows


def _speed(prefill: Sequence[Pair], decode: Sequence[Pair], workload: Workload) -> Speed:
    """What pairs of seconds amount to, for the model that is second in them."""
    prompt_tokens = workload.batch * workload.prompt_tokens
    return Speed(
        prefill_tokens_per_s=Spread.of([prompt_tokens / seconds for _, seconds in prefill]),
        decode_tokens_per_s=Spread.of([workload.batch / seconds for _, seconds in decode]),
        prefill_speedup=Spread.of([reference_s / seconds for reference_s, seconds in prefill]),
        decode_speedup=Spread.of([reference_s / seconds for reference_s, seconds in decode]),
    )


def _of_reference(pairs_by_candidate: Sequence[Sequence[Pair]]) -> list[Pair]:
    """All passes of the reference, each paired with itself."""
    return [(reference_s, reference_s) for pairs in pairs_by_candidate for reference_s, _ in pairs]


def check_model(model: PreTrainedModel, workload: Workload) -> None:
    """Asserts that a model is what the workload says is timed."""
    assert not model.training, "dropout would be timed: call model.eval() first"
    if workload.engine != "torch":
        return
    assert str(model.dtype) == f"torch.{workload.dtype}", f"a model in {model.dtype} for a workload in {workload.dtype}"
    home = home_of(model)
    assert home.type == torch.device(workload.device).type, f"a model on {home} for {workload.device}"


def check_compiler(device: torch.device) -> None:
    """Raises RecipeError unless torch.compile can make code for a device of this kind."""
    if device.type != "cpu":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler  # imported late: it takes seconds
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise RecipeError(
            "workload.compile needs a C++ compiler on a CPU, and torch finds none; install g++ or clang, or set CXX"
        ) from None


@contextmanager
def compiled_passes(workload: Workload, shapes: int) -> Iterator[None]:
    """For a compiled workload, as many compiled graphs of one function as there are shapes of passes, over all models;
    one more is an error, since torch would go on uncompiled and the figure would be another workload's."""
    if not workload.compile:
        yield
        return
    import torch._dynamo.config as dynamo  # imported late: it takes a second

    torch.compiler.reset()
    with dynamo.patch(recompile_limit=max(8, shapes), fail_on_recompile_limit_hit=True):
        yield


@contextmanager
def steady_process(threads: int) -> Iterator[None]:
    """As many torch threads as the workload says, and no garbage collection; both restored afterwards."""
    threads_before, collected_before = torch.get_num_threads(), gc.isenabled()
    gc.collect()
    gc.disable()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads_before)
        if collected_before:
            gc.enable()
