"""What a forecast speaks of: all that decides what a run costs, what is done of it, and what a stage takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from llmprune.choices.choice import Assignment
from llmprune.choices.dimensions import BlockKind
from llmprune.choices.space import Space
from llmprune.core.recipe import Recipe
from llmprune.core.recipe_inputs import SplitName
from llmprune.data.tokens import divide_windows, first_windows
from llmprune.forecast.rates import Rates
from llmprune.forecast.work import SolverFlops, layer_numbers
from llmprune.measure.quality.prefix import STATES_BYTES
from llmprune.measure.speed.throughput import Workload
from llmprune.tables.exact import is_exact

BACKWARD_FORWARDS = 1.5
"""Time of a backward pass in forward passes: weights are frozen, so the products are as many as the forward's, but
attention is computed again."""


@dataclass(frozen=True)
class Plan:
    """All that decides what a run costs, but for the machine."""

    recipe: Recipe
    space: Space
    workload: Workload
    vocabulary: int
    parent_bytes: int
    """All parameters, tied ones once."""
    dtype_bytes: int
    biased: frozenset[BlockKind] = frozenset()
    """Kinds of block whose output projection has a bias."""
    gguf_bytes: int = 0
    """Weights of the parent's GGUF file, where llama.cpp times models or children are exported as gguf."""

    whole_sizes: int = 0
    """Sizes of the whole model that are measured beside the parent's own."""
    walked: bool = False
    """Whether estimates go through the parent layer by layer (see `tables.estimate.is_walked`)."""
    walking_bytes: int = 4
    """Of a number where layers are walked."""
    can_wait: bool = False
    """Whether the parent can wait in CPU memory, out of the way of what is done with it on its device."""

    @property
    def rounded_vocabulary_bytes(self) -> int:
        """Embedding and output head, apart, as each type of weights has them: they are kept from child to child."""
        one = self.vocabulary * self.space.shape.hidden_size * self.dtype_bytes
        return 2 * one * len(self.space.vocabulary[:-1])

    @property
    def timed_file_bytes(self) -> int:
        """What llama.cpp maps of one model that it times; 0 for torch, which times models where they are."""
        return self.gguf_bytes if self.workload.engine == "llamacpp" else 0

    def windows(self, split: SplitName) -> Mapping[str, int]:
        """Windows of each source, as the token splits will have them."""
        return divide_windows(self.recipe.data, split, self.recipe.data.weights_of(split))

    def tokens(self, split: SplitName) -> int:
        return sum(self.windows(split).values()) * self.recipe.data.seq_len_of(split)

    def estimated_tokens(self, tokens: int) -> int:
        """Tokens of a one-backward estimate that asks for `tokens`, in whole windows a source."""
        seq_len, windows = self.recipe.data.seq_len, self.windows("estimate")
        weights = self.recipe.data.weights_of("estimate")
        wanted = {name: max(1, round(tokens * weight / seq_len)) for name, weight in weights.items()}
        return sum(min(wanted[name], windows[name]) for name in windows) * seq_len

    def first_tokens(self, split: SplitName, tokens: int | None) -> int:
        """About so many of a split's tokens, in whole windows of each source; all without a number."""
        share = 1.0 if tokens is None else min(1.0, tokens / self.tokens(split))
        data = self.recipe.data
        windows = first_windows(self.windows(split), data.weights_of(split), share)
        return sum(windows.values()) * data.seq_len_of(split)

    @property
    def exact_tokens(self) -> int:
        """Tokens of one exact score."""
        return self.first_tokens("estimate", self.recipe.tables.tokens)

    @cached_property
    def exact_choices(self) -> list[Assignment]:
        """The choices that are scored exactly."""
        space, rules = self.space, self.recipe.tables
        return [(i, c) for i, c in space.assignments() if is_exact(c, space, rules)]

    @property
    def brought_bytes(self) -> int:
        """Weights of one layer where they are walked, beside the parent's own; 0 where those serve."""
        return layer_numbers(self.space.shape) * self.walking_bytes if self.walked else 0

    def kept_states(self, tokens: int) -> int:
        """How many layers' hidden states of so many tokens a scorer keeps of the parent."""
        return min(self.space.shape.layers - 1, STATES_BYTES // self.state_bytes(tokens))

    def state_bytes(self, tokens: int) -> int:
        """Hidden states of one layer."""
        return tokens * self.space.shape.hidden_size * self.dtype_bytes

    def logits_bytes(self, windows: int) -> int:
        """Logits of one pass in the model's dtype, and float32 copies of one window."""
        one = self.recipe.data.seq_len * self.vocabulary
        return windows * one * self.dtype_bytes + 3 * 4 * one


@dataclass(frozen=True)
class Done:
    """What a run directory holds already."""

    tokens: bool = False
    layers: int = 0
    """Finished layers of the library."""
    tables: bool = False
    path: bool = False
    trials: int = 0
    baseline_layers: Mapping[str, int] = field(default_factory=dict)
    """Finished layers of the baselines' own libraries, by importance."""
    front: bool = False
    checkpoints_left: int | None = None
    """Of the front's and the export; None: all, as many as there can be."""


@dataclass(frozen=True)
class Timing:
    """Passes of the workload, of parent and children together, and their tokens, all rows of the batch."""

    comparisons: int = 0
    prefills: int = 0
    decode_steps: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class StageCost:
    """One stage. Tokens are of whole models, parent or child; `seconds` turns all counts into time."""

    stage: str
    forward_tokens: int = 0
    """Outside of timing."""
    backward_tokens: int = 0
    walked_forward_tokens: int = 0
    walked_backward_tokens: int = 0
    """Of these, such as go through one layer after another."""
    timing: Timing = field(default_factory=Timing)
    solver: SolverFlops = field(default_factory=SolverFlops)
    float32_flops: int = 0
    """Local products beside the model's own."""
    children: int = 0
    processes: int = 0
    peak_memory_bytes: int = 0
    waiting_memory_bytes: int | None = None
    """The peak on the device while the parent waits in CPU memory, where it can."""
    parent_waits: bool = False
    disk_bytes: int = 0
    done: bool = False
    most_seconds: float | None = None
    fixed_seconds: float = 0.0
    """What a recipe gives a stage, whatever it gets done."""

    def within(self, memory_bytes: int) -> StageCost:
        """The stage on a device with so much memory: where that is too little, the parent waits if it can."""
        if self.waiting_memory_bytes is None or self.peak_memory_bytes <= memory_bytes:
            return self
        return replace(self, peak_memory_bytes=self.waiting_memory_bytes, parent_waits=True)

    @property
    def forward_equivalents(self) -> float:
        """Tokens: every pass, a backward one as BACKWARD_FORWARDS."""
        return self.forward_tokens + BACKWARD_FORWARDS * self.backward_tokens + self.timing.tokens

    def seconds(self, rates: Rates) -> float:
        """Time of the stage; children count as slow as the parent."""
        forward = self.forward_tokens - self.walked_forward_tokens
        backward = self.backward_tokens - self.walked_backward_tokens
        total = (
            (forward + BACKWARD_FORWARDS * backward) * rates.forward_s_per_token
            + (self.walked_forward_tokens + BACKWARD_FORWARDS * self.walked_backward_tokens) * rates.walk_s_per_token
            + self.timing.comparisons * rates.comparison_s
            + self.timing.prefills * rates.prefill_s
            + self.timing.decode_steps * rates.decode_step_s
            + (self.solver.inverses + self.solver.refits) / rates.float64_flops_per_s
            + self.solver.eliminations / rates.elimination_flops_per_s
            + self.float32_flops / rates.float32_flops_per_s
            + self.children * rates.child_s
            + self.processes * rates.process_s
            + self.fixed_seconds
        )
        return total if self.most_seconds is None else min(total, self.most_seconds)

    def to_json(self, rates: Rates) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "done": self.done,
            "forward_tokens": self.forward_tokens,
            "backward_tokens": self.backward_tokens,
            "timed_tokens": self.timing.tokens,
            "forward_equivalents": self.forward_equivalents,
            "float64_flops": self.solver.total,
            "float32_flops": self.float32_flops,
            "seconds": self.seconds(rates),
            "peak_memory_bytes": self.peak_memory_bytes,
            "parent_waits": self.parent_waits,
            "disk_bytes": self.disk_bytes,
        }
