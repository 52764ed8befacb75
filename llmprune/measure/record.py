"""What was measured of a child: one typed value, from the trial to the model card.

Its attributes are the names of its JSON, which scripts rely on. What is stored by itself says its `schema` besides.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, InstanceOf, PlainSerializer

from llmprune.choices.architecture import Architecture
from llmprune.core.errors import BudgetError
from llmprune.core.recipe_inputs import SplitName
from llmprune.measure.quality.agreement import Agreement, Draft
from llmprune.measure.quality.likeness import Likeness
from llmprune.measure.quality.perplexity import Figure, Quality, SourceQuality
from llmprune.measure.resized import Resized
from llmprune.measure.speed.throughput import Spread
from llmprune.measure.value import Value

QUOTED: tuple[SplitName, ...] = ("test", "unseen")
"""The splits whose figures are quoted of what was chosen on others: nothing is ever chosen on them."""


def child_id(architecture_hash: str, library_hash: str, done: Sequence[str] = ()) -> str:
    """What names a child: 16 hex digits.

    The first of the SHA-256 of the JSON (no spaces) of three things: its architecture's hash, the hash of the block
    library that it was cut from, and the names of what was done to it since, in order; a one-shot child has none.
    """
    made_of = json.dumps([architecture_hash, library_hash, list(done)], separators=(",", ":"))
    return hashlib.sha256(made_of.encode()).hexdigest()[:16]


class Quoted(Value):
    """A child's figures on a split that nothing was chosen on, with what they must not be quoted without."""

    nats_per_token: Figure
    nats_per_byte: Figure
    ppl: Figure
    per_source: dict[str, SourceQuality]
    dataset: str
    seq_len: int
    tokens: int
    bos: bool
    ppl_ratio: Figure
    """Over the parent's, on the same tokens; `nats_lost` likewise."""
    nats_lost: Figure
    """Infinite also where the parent's own nats are."""
    likeness: Likeness | None = None
    """How a child behaves beside its parent; of the test split."""
    agreement: Agreement | None = None
    """Of text that the parent wrote."""

    @classmethod
    def beside(cls, quality: Quality, parent: Quality | Quoted, likeness: Likeness | None = None) -> Quoted:
        """Figures beside a parent's on the same tokens."""
        nats_lost = quality.nats_per_token - parent.nats_per_token
        return cls(
            nats_per_token=quality.nats_per_token,
            nats_per_byte=quality.nats_per_byte,
            ppl=quality.ppl,
            per_source=dict(quality.per_source),
            dataset=quality.dataset,
            seq_len=quality.seq_len,
            tokens=quality.tokens,
            bos=quality.bos,
            ppl_ratio=quality.ppl / parent.ppl if math.isfinite(quality.ppl) else math.inf,
            nats_lost=nats_lost if math.isfinite(nats_lost) else math.inf,
            likeness=likeness,
            agreement=quality.agreement if isinstance(quality, Quality) else None,
        )


def figures_of(quality: Quality, parents_ppl: float) -> dict[str, Any]:
    """What a record says of a quality beside its parent's perplexity."""
    return {
        "nats_per_token": quality.nats_per_token,
        "nats_per_byte": quality.nats_per_byte,
        "ppl": quality.ppl,
        "ppl_ratio": quality.ppl / parents_ppl,
        "per_source": dict(quality.per_source),
        "agreement": quality.agreement,
    }


class MeasuredOn(Value):
    """What the figures of a record are of: the text that they were chosen by, what was timed, and where."""

    dataset: str
    split: str
    seq_len: int
    tokens: int
    bos: bool
    workload: dict[str, Any]
    """As `Workload.to_json` has it."""
    repeats: int
    host: dict[str, str | int]
    verify: tuple[float, ...] | None = None
    """Of drafts: what a pass of the parent over 1, 2, ... tokens takes of one over a single token; medians."""


def text_of(name: str, on: Quoted | MeasuredOn) -> str:
    """What the figures of a split must not be quoted without."""
    return f"{name} ({on.dataset}, {on.tokens:,} tokens in windows of {on.seq_len}, {'with' if on.bos else 'no'} BOS)"


def engine_of(workload: Mapping[str, Any]) -> str:
    """What ran the models that were timed, and how it held them; from `Workload.to_json`."""
    if workload.get("engine", "torch") == "torch":
        return f"torch, {workload['dtype']}{how_run(workload)}"
    return f"llama.cpp, {workload['gguf_type']} weights, {cache_type_of(workload)} KV cache"


def how_run(workload: Mapping[str, Any]) -> str:
    """How torch ran them, if not as they are: to follow what else is said of the workload."""
    told = {"compile": ", compiled", "graphs": ", as CUDA graphs"}
    return "".join(word for key, word in told.items() if workload.get(key))


def cache_type_of(workload: Mapping[str, Any]) -> str:
    """How llama.cpp stored keys and values."""
    return str(workload.get("cache_type", "f16"))


def _architecture(data: Any) -> Architecture:
    return data if isinstance(data, Architecture) else Architecture.from_json(data)


class Record(Value):
    """What was measured of one child, or of the parent. Sizes are those of `Size`, speeds of `Speed`."""

    name: str
    """Who made it: "parent", "trial-7", or a baseline."""
    id: str
    """See `child_id`."""
    hash: str
    """Of the architecture, which children of several libraries may share."""
    architecture: Annotated[
        InstanceOf[Architecture], BeforeValidator(_architecture), PlainSerializer(lambda found: found.to_json())
    ]
    params: int
    bytes: int
    stored_as: str
    kv_bytes_per_token: int
    decode_bytes: int
    nats_per_token: Figure
    nats_per_byte: Figure
    ppl: Figure
    ppl_ratio: Figure
    """Over the parent's, on the same tokens."""
    per_source: dict[str, SourceQuality]
    prefill_tokens_per_s: Spread
    decode_tokens_per_s: Spread
    prefill_speedup: Spread
    decode_speedup: Spread
    measured_on: MeasuredOn
    agreement: Agreement | None = None
    """Of text that the parent wrote."""
    done: tuple[str, ...] = ()
    """What was done to it since it was cut."""
    library: str | None = None
    """Whose importance ordered a baseline's own library; None is the run's."""
    exportable: bool | None = None
    """Of a baseline: whether a checkpoint can hold it."""
    test: Quoted | None = None
    unseen: Quoted | None = None
    usable: bool | None = None
    """Of a front: whether its perplexity is near enough to its parent's."""

    def value(self, metric: str) -> float:
        """A figure by the name that budgets use; of a measured speed, its median. Raises BudgetError if it was not
        measured."""
        # All tokens run through all layers: none is dearer than another.
        found = getattr(self, "decode_speedup" if metric == "worst_token_speedup" else metric)
        if found is None:
            raise BudgetError(
                f"{metric} is measured of drafts alone, in a run with search.objective=draft; {self.id} has none"
            )
        return float(found.median if isinstance(found, Spread) else found)

    @property
    def disagreement(self) -> float | None:
        """Share of the tokens that the parent wrote before which it finds another one likeliest."""
        return None if self.agreement is None else 1 - self.agreement.share

    @property
    def draft(self) -> Draft | None:
        """What it is worth to its parent as a draft, by the text that it was chosen on."""
        return self.draft_on(self.agreement)

    @property
    def draft_speedup(self) -> float | None:
        """How much faster its parent decodes with it, 1 where it is faster alone."""
        return None if self.draft is None else self.draft.speedup

    def draft_on(self, agreement: Agreement | None) -> Draft | None:
        """The same by other text; None where it was not measured as a draft."""
        verify = self.measured_on.verify
        if agreement is None or verify is None:
            return None
        return agreement.draft(1 / self.decode_speedup.median, verify)

    @property
    def bits(self) -> float:
        """Bits that a weight takes on average, scales counted in, as `stored_as` says."""
        return 8 * self.bytes / self.params

    @property
    def is_finite(self) -> bool:
        """Whether the child computes numbers at all: a broken one is no candidate."""
        return math.isfinite(self.nats_per_token) and math.isfinite(self.ppl)

    @property
    def quoted(self) -> dict[SplitName, Quoted]:
        """By split, what is quoted of it."""
        found = {name: getattr(self, name) for name in QUOTED}
        return {name: figures for name, figures in found.items() if figures is not None}

    @property
    def made_of(self) -> str:
        """What tells it from other children of its architecture."""
        library = "the run's library" if self.library is None else f"its own library ({self.library})"
        return ", ".join((self.name, library, *self.done))


class Front(Value):
    """The parent, the measured front, slowest first, and the baselines beside it."""

    parent: Record
    children: tuple[Record, ...]
    baselines: tuple[Record, ...]
    one_shot: tuple[Record, ...] = ()
    """Of children and baselines that were repaired, what they were before."""
    lookup: Draft | None = None
    """Of drafts: what prompt lookup, which drafts without a model, is worth on the validation text."""
    resized: Resized | None = None
    """Where the recipe names vocabularies: what was measured of them. `parent` has the one that was taken."""

    @property
    def every(self) -> tuple[Record, ...]:
        """All records of it."""
        return (self.parent, *self.children, *self.baselines, *self.one_shot)

    def before_repair(self, record: Record) -> Record | None:
        """The one-shot form of a repaired record; None if it is one itself."""
        same = (one for one in self.one_shot if one.hash == record.hash and one.library == record.library)
        return next(same, None) if record.done else None
