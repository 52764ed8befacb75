"""What a search will cost, stage by stage, before anything is run: pure arithmetic on shapes and a recipe.

Counts are exact where the recipe decides them (tokens of statistics, of estimates, of exact scores), and the most there
can be where the search does, so totals err high:

* Children are as large and as slow as the parent, and each is scored by a whole pass. Really a scorer starts at the
  first layer that it has no states for, and what is in the store is not scored again.
* Where a device is too small, the parent waits in CPU memory. How long it takes to bring models home is not counted,
  nor is the CPU memory that the parent waits in, and the child while both are timed.
* The path reaches every target. slp races a full pool in every trial but the parent's, and each time around a new
  incumbent, which takes an estimate; evopress races all its children. No race drops anybody before its end: with 16
  windows, a quarter of them is scored before it could, so a race of many costs a quarter of this at the least.
* The front's children are as many as `front.size` allows. Every baseline reaches its speed; uniform width finds all
  widths near it, greedy removal goes on to the last block, every random draw fits.

Left out: fetching, reading and hashing the parent, timing what the space can reach (seconds), tokenising text, Python
and torch themselves (about half a gigabyte), copying the weights of children, knapsacks, predictors and Optuna
(milliseconds to seconds a trial), reading the library back, the stores of trials and scores, and trials that fail or
repeat an earlier architecture. Finished layers of the library are mapped files: they count towards a process's resident
memory while the kernel has room, and are not counted here; nor are llama.cpp's caches and buffers, nor its files in the
temporary directory, a parent's and a child's at most. A base-model pass of the statistics is counted as a whole scoring
pass, though it has no output layer; an exact score by the layers that it runs, though it runs the output layer whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from llmprune.baselines.methods import METHODS, own_libraries
from llmprune.blocks.solve import gathered_choices, own_input_choices
from llmprune.blocks.statistics import BATCH_TOKENS, statistics_bytes
from llmprune.core.recipe import SamplerName
from llmprune.core.recipe_inputs import AS_IT_IS, SplitName
from llmprune.forecast.plan import Done, Plan, StageCost, Timing
from llmprune.forecast.repairs import distillation, refits
from llmprune.forecast.work import (
    SolverFlops,
    choices_numbers,
    estimate_flops_per_token,
    gram_flops_per_token,
    graph_bytes_per_token,
    layer_library_bytes,
    layer_solver_flops,
    rounded_numbers,
    solving_bytes,
)
from llmprune.measure.quality.perplexity import LOGITS_BYTES
from llmprune.measure.quality.prefix import CHILDREN_BYTES
from llmprune.measure.quality.prefix_states import common_steps, last_start, spread, steps_of
from llmprune.measure.record import QUOTED
from llmprune.measure.speed.throughput import passes_of
from llmprune.search.samplers import evopress, slp
from llmprune.search.warm_starts import MARGIN
from llmprune.tables.block_tables import CALIBRATE_AT
from llmprune.tables.costs import probe_architectures
from llmprune.tables.estimate import WINDOWS_A_BATCH
from llmprune.tables.together import together_architectures
from llmprune.tables.walk import estimates_of

RACED: Mapping[SamplerName, int] = {"slp": slp.POOL, "evopress": evopress.CHILDREN}
"""Children that a sampler races for one proposal; the winner is the trial, and not scored again."""

Until = Literal["search", "export"]


def forecast(plan: Plan, done: Done | None = None, *, until: Until = "export") -> list[StageCost]:
    """Every stage of `llmprune search` or, until "export", of `llmprune compress`, in order."""
    done = done or Done()
    stages = [
        *([_sizes(plan)] if plan.whole_sizes else []),
        StageCost("tokens", disk_bytes=0 if done.tokens else _tokens_bytes(plan), done=done.tokens),
        *([_own_text(plan, done)] if plan.recipe.data.own_text_after is not None else []),
        _library(plan, done),
        StageCost("estimate", done=True) if done.tables else _estimate(plan),
        *([StageCost("exact", done=True) if done.tables else _exact(plan)] if plan.exact_choices else []),
        StageCost("together", done=True) if done.tables else _together(plan),
        StageCost("probes", done=True) if done.tables else _probes(plan),
        StageCost("path", done=True) if done.path else _path(plan),
        _search(plan, done),
    ]
    if until == "export":
        stages += [StageCost("front", done=True) if done.front else _front(plan, done)]
        if plan.recipe.recover.refit:
            stages.append(StageCost("repair", done=True) if done.front else refits(plan, done))
        if plan.recipe.recover.distils:
            stages.append(distillation(plan))
        stages.append(_checkpoints(plan, done))
    return stages


def _sizes(plan: Plan) -> StageCost:
    """Every size of the whole model on the validation text, the one that is taken on what is quoted too; as many tokens
    as the parent's, and none of a narrower stream's solving."""
    quoted = sum(plan.tokens(split) for split in QUOTED if split in plan.recipe.data.splits)
    narrower = len(plan.recipe.space.hidden_size) * plan.tokens("calibration")
    return StageCost(
        "sizes",
        forward_tokens=(1 + plan.whole_sizes) * plan.tokens("validation") + 2 * quoted + narrower,
        timing=_timing(plan, plan.whole_sizes, plan.recipe.workload.repeats),
        processes=1,
        peak_memory_bytes=_timing_bytes(plan),
        disk_bytes=plan.parent_bytes,
    )


def _own_text(plan: Plan, done: Done) -> StageCost:
    """What the parent writes, many windows at a time."""
    if done.tokens:
        return StageCost("own text", done=True)
    data = plan.recipe.data
    prompt_tokens = data.own_text_after or 0
    written = [split for split in data.splits if split != AS_IT_IS]
    tokens = sum(sum(plan.windows(split).values()) * (data.seq_len_of(split) - prompt_tokens) for split in written)
    # Steps of some dozens of rows, behind caches that grow: a token took as long as two of a pass that scores
    # (SmolLM2-135M on 2 cores, 198 tokens/s for 398).
    return StageCost("own text", forward_tokens=2 * tokens, peak_memory_bytes=plan.parent_bytes)


def _tokens_bytes(plan: Plan) -> int:
    """Token ids in int32, and an int32 a window."""
    data = plan.recipe.data
    return sum(4 * sum(plan.windows(split).values()) * (data.seq_len_of(split) + 1) for split in data.splits)


def _library(plan: Plan, done: Done) -> StageCost:
    shape, rules = plan.space.shape, plan.recipe.importance
    missing = shape.layers - done.layers
    if missing == 0:
        return StageCost("library", done=True)
    tokens = plan.tokens("calibration")
    return StageCost(
        "library",
        forward_tokens=tokens,
        walked_forward_tokens=tokens,
        solver=layer_solver_flops(plan.space, rules).times(missing),
        float32_flops=missing * tokens * gram_flops_per_token(shape, gathered_choices(plan.space, rules)),
        peak_memory_bytes=plan.parent_bytes + solving_peak_bytes(plan),
        waiting_memory_bytes=_if_it_waits(plan, solving_device_bytes(plan)),
        disk_bytes=missing * layer_library_bytes(plan.space, plan.dtype_bytes, plan.biased, rules.method),
    )


def _if_it_waits(plan: Plan, device_bytes: int) -> int | None:
    """What a stage takes of the device while the parent waits, if it can."""
    return device_bytes if plan.can_wait else None


def solving_peak_bytes(plan: Plan) -> int:
    """The stream of all tokens, which lies on the CPU, and what is on the device."""
    stream = plan.tokens("calibration") * plan.space.shape.hidden_size * plan.walking_bytes
    return stream + solving_device_bytes(plan)


def solving_device_bytes(plan: Plan) -> int:
    """The statistics of a layer, and beside them what a batch, or solving it, takes."""
    shape = plan.space.shape
    statistics = statistics_bytes(shape, gathered_choices(plan.space, plan.recipe.importance))
    batch = max(BATCH_TOKENS, plan.recipe.data.seq_len)
    activations = batch * (3 * shape.ffn_width + 4 * shape.hidden_size) * max(4, plan.walking_bytes)
    gram = 4 * max(shape.ffn_width, shape.inputs(shape.full("attention"))) ** 2
    solving = solving_bytes(plan.space, plan.recipe.importance, plan.walking_bytes)
    return plan.brought_bytes + statistics + max(activations + gram, solving)


def estimating_peak_bytes(plan: Plan, tokens: int) -> int:
    """What is on the device, and where layers are walked the stream of all tokens at every border, on the CPU."""
    shape = plan.space.shape
    borders = (shape.layers + 2) * tokens * shape.hidden_size * plan.walking_bytes if plan.walked else 0
    return borders + estimating_device_bytes(plan)


def estimating_device_bytes(plan: Plan) -> int:
    """Graph and logits of a batch, and every block as each type of weights has it. Where layers are walked, the graph
    and the blocks of one; its weights and its choices, or the head's."""
    batch = WINDOWS_A_BATCH * plan.recipe.data.seq_len
    # The logits, then in float32 their copy, the log-softmax and its gradient, and the gradient of the logits.
    logits = batch * plan.vocabulary * (2 * plan.walking_bytes + 3 * 4)
    own, shape = own_input_choices(plan.space), plan.space.shape
    graph = batch * graph_bytes_per_token(shape, plan.walking_bytes, own)
    rounded = shape.layers * rounded_numbers(plan.space) * plan.walking_bytes
    if not plan.walked:
        return logits + graph + rounded
    head = plan.vocabulary * shape.hidden_size * plan.walking_bytes
    # Of the widest choice two copies more while it is made, and one that is promoted.
    widest = 3 * 4 * shape.hidden_size * max(shape.ffn_width, shape.inputs(shape.full("attention")))
    choices = choices_numbers(plan.space) * plan.walking_bytes
    a_layer = (graph + rounded) // shape.layers + plan.brought_bytes + choices + widest
    return max(head + logits, a_layer)


def _estimate(plan: Plan) -> StageCost:
    """One forward and one backward pass; where layers are walked, one forward pass more on the way back."""
    tokens = plan.estimated_tokens(plan.recipe.tables.tokens)
    return StageCost(
        "estimate",
        forward_tokens=(2 if plan.walked else 1) * tokens,
        backward_tokens=tokens,
        walked_forward_tokens=2 * tokens if plan.walked else 0,
        walked_backward_tokens=tokens if plan.walked else 0,
        float32_flops=tokens * plan.space.shape.layers * estimate_flops_per_token(plan.space),
        peak_memory_bytes=plan.parent_bytes + estimating_peak_bytes(plan, tokens),
        waiting_memory_bytes=_if_it_waits(plan, estimating_device_bytes(plan)),
    )


def _exact(plan: Plan) -> StageCost:
    """The parent's pass, and for each choice the layers from the last kept state before its own on."""
    whole, tokens = plan.space.shape.architecture, plan.exact_tokens
    layers = ran = len(whole.layers)
    kept = spread(1, layers - 1, plan.kept_states(tokens))
    for layer, choice in plan.exact_choices:
        steps = steps_of(whole.with_choice(layer, choice))
        shared = min(last_start(steps), common_steps(steps, steps_of(whole)))
        ran += len(steps) - max((start for start in kept if start <= shared), default=0)
    states = len(kept) * plan.state_bytes(tokens)
    return StageCost(
        "exact",
        forward_tokens=-(-ran * tokens // layers),
        children=len(plan.exact_choices),
        peak_memory_bytes=_judged_bytes(plan, "estimate") + states,
        waiting_memory_bytes=_if_it_waits(plan, _judged_bytes(plan, "estimate", models=1) + states),
    )


def _together(plan: Plan) -> StageCost:
    """The parent's pass, and one for each child that makes one choice in all layers."""
    children = len(together_architectures(plan.space, plan.recipe.tables.together))
    return StageCost(
        "together",
        forward_tokens=(1 + children) * plan.exact_tokens if children else 0,
        children=children,
        peak_memory_bytes=_judged_bytes(plan, "estimate"),
        waiting_memory_bytes=_if_it_waits(plan, _judged_bytes(plan, "estimate", models=1)),
    )


def _path(plan: Plan) -> StageCost:
    """An estimate at every stop on the way to the targets, but at the parent."""
    aims = [target * MARGIN for target in plan.recipe.search.targets]
    rules = plan.recipe.tables
    of_one = plan.estimated_tokens(rules.path_tokens)
    tokens = estimates_of(aims, rules.path_step) * of_one
    return StageCost(
        "path",
        forward_tokens=(2 if plan.walked else 1) * tokens,
        backward_tokens=tokens,
        walked_forward_tokens=2 * tokens if plan.walked else 0,
        walked_backward_tokens=tokens if plan.walked else 0,
        float32_flops=tokens * plan.space.shape.layers * estimate_flops_per_token(plan.space, anywhere=True),
        peak_memory_bytes=plan.parent_bytes + plan.timed_file_bytes + estimating_peak_bytes(plan, of_one),
        waiting_memory_bytes=_if_it_waits(plan, plan.timed_file_bytes + estimating_device_bytes(plan)),
    )


def _timing(plan: Plan, comparisons: int, repeats: int) -> Timing:
    """Passes and tokens of so many comparisons of a child with the parent."""
    workload = plan.workload
    prefills, steps = (comparisons * passes for passes in passes_of(workload, repeats))
    return Timing(comparisons, prefills, steps, workload.batch * (workload.prompt_tokens * prefills + steps))


def _probes(plan: Plan) -> StageCost:
    children = len(probe_architectures(plan.space)) + len(CALIBRATE_AT)
    timing = _timing(plan, children, plan.recipe.workload.repeats)
    return StageCost(
        "probes",
        timing=timing,
        children=children,
        peak_memory_bytes=_timing_bytes(plan),
        waiting_memory_bytes=_if_it_waits(plan, _timing_bytes(plan, models=1)),
    )


def _timing_bytes(plan: Plan, models: int = 2) -> int:
    """Parent and child, or the one of them that is there, and what llama.cpp maps of both."""
    return models * plan.parent_bytes + 2 * plan.timed_file_bytes


def _judged_bytes(plan: Plan, split: SplitName, models: int = 2) -> int:
    """Parent and child, or the one of them that is there, and the logits of as many windows as go through a pass
    together."""
    together = max(1, LOGITS_BYTES // (4 * plan.vocabulary) // plan.recipe.data.seq_len)
    return (
        models * plan.parent_bytes
        + plan.rounded_vocabulary_bytes
        + plan.logits_bytes(min(together, max(plan.windows(split).values())))
    )


def _search(plan: Plan, done: Done) -> StageCost:
    """The parent's pass, which is the first trial as well, and trials; for guided samplers also what they race, and
    for slp an estimate each."""
    rules = plan.recipe.search
    trials = max(0, rules.trials - done.trials)
    if trials == 0:
        return StageCost("search", done=True)
    proposals = trials if done.trials else trials - 1
    raced = RACED.get(rules.sampler, 1)
    estimates = proposals if rules.sampler == "slp" else 0
    of_one = plan.estimated_tokens(plan.recipe.tables.path_tokens)
    estimated = estimates * of_one
    states = plan.kept_states(plan.tokens("search")) * plan.state_bytes(plan.tokens("search"))
    estimating = plan.parent_bytes + estimating_peak_bytes(plan, of_one) if estimates else 0
    return StageCost(
        "search",
        forward_tokens=(proposals * raced + 1) * plan.tokens("search") + (2 if plan.walked else 1) * estimated,
        backward_tokens=estimated,
        walked_forward_tokens=2 * estimated if plan.walked else 0,
        walked_backward_tokens=estimated if plan.walked else 0,
        timing=_timing(plan, trials, plan.recipe.workload.repeats),
        float32_flops=estimated * plan.space.shape.layers * estimate_flops_per_token(plan.space, anywhere=True),
        # One to be timed; and one to be scored, once for all slices of a race.
        children=trials + proposals * raced,
        peak_memory_bytes=states
        + (CHILDREN_BYTES if raced > 1 else 0)
        + max(plan.timed_file_bytes + max(_judged_bytes(plan, "search"), estimating), _timing_bytes(plan)),
        # No child of a race is kept then.
        waiting_memory_bytes=_if_it_waits(
            plan,
            states
            + max(
                plan.timed_file_bytes + max(_judged_bytes(plan, "search", models=1), estimating - plan.parent_bytes),
                _timing_bytes(plan, models=1),
            ),
        ),
        most_seconds=None if rules.minutes is None else 60 * rules.minutes,
    )


def _front(plan: Plan, done: Done) -> StageCost:
    """Baselines chosen on search tokens; then the parent, the front and the baselines on validation tokens, and on
    those of the splits that are quoted.

    Libraries that baselines have of their own share their passes. Each has a scorer of its own, which scores the parent
    too; the run's does so again, since the search may have been in another process.
    """
    rules, space = plan.recipe.front, plan.space
    trials = max(plan.recipe.search.trials, done.trials)
    draws = trials if rules.random_draws is None else rules.random_draws
    names = list(dict.fromkeys(rules.baselines))
    scored = {name: METHODS[name].most_scored(space, draws) for name in names}
    greedy = plan.first_tokens("search", plan.recipe.baselines.greedy_tokens)
    search = plan.tokens("search")
    choosing = sum(count * (greedy if METHODS[name].greedy else search) for name, count in scored.items())
    # A greedy method keeps the states of the child that it varies beside the parent's.
    kept = plan.kept_states(search) * (2 if any(METHODS[name].greedy for name in names) else 1)
    # The parent is the first trial, and no candidate.
    measured = min(rules.size, trials - 1) + len(names)
    own = own_libraries(names, plan.recipe.importance)
    missing = {method: space.shape.layers - done.baseline_layers.get(method, 0) for method in own}
    most = max(missing.values(), default=0)
    calibration = plan.tokens("calibration")
    parents = len(own) + 1
    quoted = [name for name in QUOTED if name in plan.recipe.data.splits]
    states = kept * plan.state_bytes(search)
    solving, solving_at_home = (solving_peak_bytes(plan), solving_device_bytes(plan)) if most else (0, 0)

    def measuring(models: int) -> int:
        # llama.cpp keeps the parent's file mapped, whatever else is done.
        judged = max(_judged_bytes(plan, "validation", models), _judged_bytes(plan, "search", models) + states)
        return max(plan.timed_file_bytes + judged, _timing_bytes(plan, models) + states)

    return StageCost(
        "front",
        walked_forward_tokens=calibration if most else 0,
        forward_tokens=(calibration if most else 0)
        + choosing
        + parents * search
        + (measured + parents) * (plan.tokens("validation") + sum(map(plan.tokens, quoted)))
        # How alike they are to the parent, whose logits are kept.
        + (measured + 1) * plan.tokens("test"),
        timing=_timing(plan, measured + 1, rules.repeats),
        solver=sum((layer_solver_flops(space, own[m]).times(missing[m]) for m in own), SolverFlops()),
        float32_flops=most * calibration * gram_flops_per_token(space.shape),
        children=sum(scored.values()) + (3 + len(quoted)) * measured,
        peak_memory_bytes=max(measuring(2), plan.timed_file_bytes + plan.parent_bytes + solving),
        waiting_memory_bytes=_if_it_waits(plan, max(measuring(1), plan.timed_file_bytes + solving_at_home)),
        disk_bytes=sum(
            missing[m] * layer_library_bytes(space, plan.dtype_bytes, plan.biased, own[m].method) for m in own
        ),
    )


def _checkpoints(plan: Plan, done: Done) -> StageCost:
    """The front's checkpoints and the export, each loaded again by a fresh process; the export in every format."""
    rules = plan.recipe.front
    count = 1 + (min(rules.size, plan.recipe.search.trials) if rules.checkpoints == "all" else 0)
    if done.checkpoints_left is not None:
        count = done.checkpoints_left
    if count == 0:
        return StageCost("checkpoints", done=True)
    exported = plan.gguf_bytes if "gguf" in plan.recipe.deploy.formats else 0
    return StageCost(
        "checkpoints",
        children=count,
        processes=count,
        # The process of the proof maps the child's files, as this one does by then; llama.cpp maps its own.
        peak_memory_bytes=2 * plan.parent_bytes + plan.timed_file_bytes + exported,
        waiting_memory_bytes=_if_it_waits(plan, plan.parent_bytes + plan.timed_file_bytes + exported),
        disk_bytes=count * plan.parent_bytes + exported,
    )
