"""Score candidates from their first changed layer on: what comes before it, the parent or a sibling has computed.

A candidate that leaves the parent's first l layers alone sees the parent's hidden states at layer l. The scorer keeps
those, prunes a child of the candidate's other layers only, and puts the kept states where that child's first layer
expects its input. The child's embedding and position code run too, so masks and rotary embeddings are the family's
own. Windows go through in the same batches as in `quality.score_windows`, and figures are bit for bit the same on a
CPU.

    scorer = PrefixScorer(parent, library, split, top_k=512)
    scores = scorer.score(architecture)                    # from the first layer that the parent does not share
    quality = quality_from_windows(split, scores.nats)
    scorer.remember(architecture)                          # the new incumbent: keep its states ...
    scorer.score(architecture)                             # ... from this pass, for its mutants
    scorer.work.saved                                      # the share of all layer passes that was not run

Replace-one-block scores with a cached prefix are Puzzle's (arXiv 2411.19146).

Shapes: B windows of a batch, S tokens of a window, V words of the vocabulary, D the hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from llmprune.choices.architecture import Architecture
from llmprune.data.tokens import Split
from llmprune.measure.quality.agreement import hits_of
from llmprune.measure.quality.held_children import HeldChildren
from llmprune.measure.quality.perplexity import batch_windows, nats_of_logits
from llmprune.measure.quality.prefix_states import (
    PrefixStates,
    Steps,
    common_steps,
    last_start,
    spread,
    states_at,
    steps_of,
    without_first_layers,
)
from llmprune.measure.quality.scores import Counts, WindowScores
from llmprune.measure.quality.top_logits import TopLogits, check_top_logits_fit, kl_windows
from llmprune.models.parent import Parent
from llmprune.models.placement import is_spread
from llmprune.models.surgery import Repairs, prune
from llmprune.models.waiting import at_home, with_children

STATES_BYTES = 2**30
"""What the parent's hidden states may take by default; those of remembered candidates may take as much again."""

CHILDREN_BYTES = 2**30
"""What children that are held may take by default, beside the parent's storage that they share."""


@dataclass
class Work:
    """What was run, in layer tokens: one layer, of any width, over one token. Embedding and output are not counted."""

    candidates: int = 0
    """Layer tokens that candidates ran."""
    parent: int = 0
    """Layer tokens that the parent ran, once, to have its states and logits."""
    plain: int = 0
    """Layer tokens that full forward passes of the same candidates would have run."""

    @property
    def saved(self) -> float:
        """Share of the plain work that was not run; below 0 if there were too few candidates to pay for the parent."""
        return 1 - (self.candidates + self.parent) / self.plain if self.plain else 0.0


@dataclass(frozen=True, eq=False)
class _Batch:
    source: str
    start: int
    """Number of its first window within the source."""
    windows_BS: torch.Tensor

    @property
    def stop(self) -> int:
        return self.start + len(self.windows_BS)


@dataclass(frozen=True, eq=False)
class _Figures:
    """Of one batch: (B,) float64 on the CPU."""

    nats: torch.Tensor
    kl: torch.Tensor | None
    hits: torch.Tensor | None
    """(B, S - 1) bool."""


@dataclass(frozen=True, eq=False)
class _ParentBatch:
    """What the parent computed of one batch."""

    states: Mapping[int, torch.Tensor]
    """Hidden states by the layer that reads them."""
    nats: torch.Tensor
    top: TopLogits | None
    hits: torch.Tensor | None


@dataclass(frozen=True)
class _Start:
    """Where a candidate starts, with the states that it starts from, by batch; step 0 needs none."""

    step: int = 0
    from_parent: bool = False
    states: Mapping[int, torch.Tensor] = field(default_factory=dict)


class PrefixScorer:
    """Scores architectures on the windows of one split, each from its first layer that no kept state covers.

    `parent_bytes` and `candidate_bytes` limit the hidden states that are kept, on the device that computed them: of
    the parent at all layers, or at as many as fit, evenly spread; and of the architectures that `remember` names.
    `children_bytes` limits the children that are kept of those that `hold` names.
    With `top_k`, KL to the parent over its `top_k` likeliest tokens comes out of the same passes; `top_k_bytes` limits
    what is kept for it. Of text that the parent wrote, so do hits. `batch_tokens` is that of `quality.window_nats`. A
    parent that is spread over several devices is scored by full passes; one that has no room beside its children waits
    (see `models/waiting.py`). Raises ValueError if `top_k` does not fit into `top_k_bytes`.
    """

    def __init__(
        self,
        parent: Parent,
        library: Repairs,
        split: Split,
        *,
        parent_bytes: int = STATES_BYTES,
        candidate_bytes: int = STATES_BYTES,
        children_bytes: int = CHILDREN_BYTES,
        top_k: int | None = None,
        top_k_bytes: int = STATES_BYTES,
        batch_tokens: int | None = None,
    ) -> None:
        self.parent, self.library, self.split = parent, library, split
        self.work = Work()
        self.batch_windows = batch_windows(parent.model, split.seq_len, batch_tokens)
        self._batches = [
            _Batch(name, i * self.batch_windows, windows)
            for name, source in split.sources.items()
            for i, windows in enumerate(torch.split(source.windows, self.batch_windows))
        ]
        element_bytes = parent.model.dtype.itemsize
        self._wants_hits = split.own_after is not None
        self._top_k = None if top_k is None else min(top_k, parent.model.config.get_text_config().vocab_size)
        if self._top_k is not None:
            positions = sum(batch.windows_BS[:, 1:].numel() for batch in self._batches)
            check_top_logits_fit(self._top_k, positions, element_bytes, top_k_bytes)
        # On several devices a state would have to travel; plain passes are right everywhere.
        spread_out = is_spread(parent.model)
        one_layer = max(1, split.tokens * parent.shape.hidden_size * element_bytes)
        layers = 0 if spread_out else parent_bytes // one_layer
        self._parent_steps = steps_of(parent.shape.architecture)
        self._parent_layers = spread(1, parent.shape.layers - 1, layers)
        self._parent_batches: dict[int, _ParentBatch] = {}
        self._states = PrefixStates(0 if spread_out else candidate_bytes // one_layer)
        self._remembered: set[Architecture] = set()
        self._children = HeldChildren(parent, children_bytes)

    def remember(self, architecture: Architecture) -> None:
        """Keep this candidate's states whenever it is scored from now on, for candidates that begin like it.

        Nothing is computed here. As many of its layers are kept as fit; what was not used for longest makes room.
        """
        self._remembered.add(architecture)

    def forget(self, architecture: Architecture) -> None:
        """Keep no more of its states; those that are there go when others need the room."""
        self._remembered.discard(architecture)

    def hold(self, architecture: Architecture) -> None:
        """Cut its child once, if there is room to keep it, until `let_go`: it will be asked for again."""
        self._children.hold(architecture)

    def let_go(self, architecture: Architecture) -> None:
        """Keep its child no longer."""
        self._children.let_go(architecture)

    @property
    def children_bytes(self) -> int:
        """What the children that are held take now."""
        return self._children.nbytes

    @property
    def states_bytes(self) -> int:
        """What the kept hidden states of parent and candidates take now."""
        parents = (state for batch in self._parent_batches.values() for state in batch.states.values())
        return sum(state.nbytes for state in parents) + self._states.nbytes

    def score(self, architecture: Architecture) -> WindowScores:
        """All windows of the split. Raises as `score_range` does."""
        counts = {name: len(source.windows) for name, source in self.split.sources.items()}
        return self.score_range(architecture, dict.fromkeys(counts, 0), counts)

    @torch.inference_mode()
    def score_range(self, architecture: Architecture, start: Counts, stop: Counts) -> WindowScores:
        """The windows from `start[name]` up to `stop[name]` of each source.

        Batches always run whole, so a range that does not end where a batch does costs a little more, and gives the
        same bits. Raises ArchitectureError if this is no sub-network of the parent, ModelError if a logit is NaN.
        """
        self.parent.shape.check(architecture)
        numbers = [
            i
            for i, batch in enumerate(self._batches)
            if batch.start < stop[batch.source] and start[batch.source] < batch.stop
        ]
        steps = steps_of(architecture)
        windows = sum(max(0, stop[name] - start[name]) for name in stop)
        self.work.plain += len(steps) * windows * self.split.seq_len
        figures = with_children(self.parent.model, lambda: self._run(architecture, steps, numbers)) if numbers else []
        return self._assembled(dict(zip(numbers, figures, strict=True)), start, stop)

    def _run(self, architecture: Architecture, steps: Steps, numbers: Sequence[int]) -> list[_Figures]:
        self._children.make_room()
        if steps == self._parent_steps:
            return [self._parents_own(batch) for batch in self._parents(numbers)]
        start = self._start_of(steps, numbers)
        captures = self._captures(architecture, steps, start)
        # Before there is a child: the parent may have to come home for it.
        tops = [None] * len(numbers) if self._top_k is None else [batch.top for batch in self._parents(numbers)]
        first = steps[start.step].layer
        child = self._children.child(
            architecture, first, lambda: prune(self.parent, without_first_layers(architecture, first), self.library)
        )
        layers = list(child.get_submodule(self.parent.family.layers).children())
        figures = []
        for i, top in zip(numbers, tops, strict=True):
            with states_at(layers, start.states.get(i), [step - start.step for step in captures]) as seen:
                figures.append(self._figures(child, i, top))
            for step, states in captures.items():
                states[i] = seen[step - start.step]
            self.work.candidates += len(layers) * self._batches[i].windows_BS.numel()
        return figures

    def _figures(self, child: PreTrainedModel, number: int, top: TopLogits | None) -> _Figures:
        logits_BSV = self._logits(child, number)
        kl = None if top is None else kl_windows(top, logits_BSV).cpu()
        return _Figures(self._nats(child, logits_BSV, number), kl, self._hits(logits_BSV, number))

    def _start_of(self, steps: Steps, numbers: Sequence[int]) -> _Start:
        """The last step of a candidate whose input is known for all these batches."""
        last = last_start(steps)
        shared = min(last, common_steps(steps, self._parent_steps))
        from_parent = max((layer for layer in self._parent_layers if layer <= shared), default=0)
        from_candidate = self._states.deepest(steps, last, numbers)
        if from_candidate > from_parent:
            return _Start(from_candidate, False, self._states.use(steps[:from_candidate]))
        if from_parent:
            states = [batch.states[from_parent] for batch in self._parents(numbers)]
            return _Start(from_parent, True, dict(zip(numbers, states, strict=True)))
        return _Start()

    def _captures(self, architecture: Architecture, steps: Steps, start: _Start) -> dict[int, dict[int, torch.Tensor]]:
        """The steps whose input is kept in this pass, in order, each with the place for it."""
        if architecture not in self._remembered:
            return {}
        in_use = [steps[: start.step]] if start.step and not start.from_parent else []
        captured = spread(start.step + 1, last_start(steps), self._states.limit - len(in_use))
        self._states.make_room([*(steps[:step] for step in captured), *in_use])
        return {step: self._states.use(steps[:step]) for step in captured}

    def _parents_own(self, batch: _ParentBatch) -> _Figures:
        return _Figures(batch.nats, None if self._top_k is None else torch.zeros_like(batch.nats), batch.hits)

    def _parents(self, numbers: Sequence[int]) -> list[_ParentBatch]:
        """What the parent computes of these batches: once, when they are first needed, and no child is there yet."""
        if missing := [number for number in numbers if number not in self._parent_batches]:
            with at_home(self.parent.model):
                for number in missing:
                    self._parent_batches[number] = self._parent_batch(number)
        return [self._parent_batches[number] for number in numbers]

    def _parent_batch(self, number: int) -> _ParentBatch:
        model = self.parent.model
        layers = list(model.get_submodule(self.parent.family.layers).children())
        with states_at(layers, None, self._parent_layers) as seen:
            logits_BSV = self._logits(model, number)
        top = None if self._top_k is None else TopLogits.of(logits_BSV, self._top_k)
        self.work.parent += len(layers) * self._batches[number].windows_BS.numel()
        return _ParentBatch(seen, self._nats(model, logits_BSV, number), top, self._hits(logits_BSV, number))

    def _logits(self, model: PreTrainedModel, number: int) -> torch.Tensor:
        windows_BS = self._batches[number].windows_BS.to(model.device)
        return model(input_ids=windows_BS, use_cache=False).logits  # type: ignore[no-any-return]

    def _nats(self, model: PreTrainedModel, logits_BSV: torch.Tensor, number: int) -> torch.Tensor:
        batch = self._batches[number]
        pairs = zip(batch.windows_BS.to(model.device), logits_BSV, strict=True)
        nats = [nats_of_logits(model, tokens, logits, batch.start + i) for i, (tokens, logits) in enumerate(pairs)]
        return torch.stack(nats).cpu()

    def _hits(self, logits_BSV: torch.Tensor, number: int) -> torch.Tensor | None:
        pairs = zip(self._batches[number].windows_BS, logits_BSV, strict=True)
        return torch.stack([hits_of(tokens, logits) for tokens, logits in pairs]).cpu() if self._wants_hits else None

    def _assembled(self, figures: Mapping[int, _Figures], start: Counts, stop: Counts) -> WindowScores:
        """Batches put together source by source, without the windows that were not asked for."""
        nats: dict[str, list[torch.Tensor]] = {name: [] for name in self.split.sources}
        kl: dict[str, list[torch.Tensor]] = {name: [] for name in self.split.sources}
        hits: dict[str, list[torch.Tensor]] = {name: [] for name in self.split.sources}
        for number, found in figures.items():
            batch = self._batches[number]
            asked = slice(max(0, start[batch.source] - batch.start), stop[batch.source] - batch.start)
            nats[batch.source].append(found.nats[asked])
            if found.kl is not None:
                kl[batch.source].append(found.kl[asked])
            if found.hits is not None:
                hits[batch.source].append(found.hits[asked])
        nothing, no_hits = torch.zeros(0, dtype=torch.float64), torch.zeros(0, self.split.seq_len - 1, dtype=torch.bool)
        return WindowScores(
            _joined(nats, nothing),
            None if self._top_k is None else _joined(kl, nothing),
            _joined(hits, no_hits) if self._wants_hits else None,
        )


def _joined(parts: Mapping[str, list[torch.Tensor]], nothing: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: torch.cat([nothing, *tensors]) for name, tensors in parts.items()}
