"""Judge one architecture: prune a real child, score it, time it beside the parent, weigh it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import NamedTuple, Protocol, TypeVar

import torch
from transformers import PreTrainedModel

from llmprune.blocks.library import BlockLibrary
from llmprune.choices.architecture import Architecture
from llmprune.data.tokens import Split
from llmprune.formats.served_size import served_size
from llmprune.measure.quality.agreement import score_hits
from llmprune.measure.quality.likeness import ParentsLogits
from llmprune.measure.quality.perplexity import Quality, quality_from_windows, score_windows
from llmprune.measure.quality.scores import SplitScorer, WindowScores
from llmprune.measure.record import MeasuredOn, Quoted, Record, child_id, figures_of
from llmprune.measure.speed.host import fingerprint
from llmprune.measure.speed.throughput import Speed, Workload, measure_paired
from llmprune.measure.speed.turns import scoring, timing
from llmprune.measure.speed.verifying import VerifyCosts
from llmprune.models.parent import Parent
from llmprune.models.sizes import Size
from llmprune.models.surgery import prune
from llmprune.models.waiting import with_children

Result = TypeVar("Result")


class Scorer(SplitScorer, Protocol):
    """Scores whole splits (see `measure.prefix` and `measure.score_store`): faster, what begins like what it is told to
    remember."""

    def remember(self, architecture: Architecture) -> None: ...


class Finish(NamedTuple):
    """What is done to a pruned child before it is judged: a repair, or for comparison's sake what no checkpoint
    holds."""

    name: str
    complete: Callable[[PreTrainedModel, Architecture], None]
    is_due: Callable[[Architecture], bool]
    """Whether a child of this architecture is another one for it."""


@dataclass(frozen=True)
class Judge:
    """What every candidate of one stage is judged by; parent and children see the same tokens and workload."""

    parent: Parent
    library: BlockLibrary
    split: Split
    workload: Workload
    repeats: int
    scorer: Scorer
    """Scores architectures of `library` on `split`, however cleverly."""
    finish: Finish | None = None
    parents_logits: ParentsLogits | None = None
    """Of the split, where what is quoted says how alike parent and child are."""
    verify: VerifyCosts | None = None
    """Of the parent, where children are judged as its drafts."""

    @cached_property
    def parent_quality(self) -> Quality:
        """The parent's own, on the same tokens."""
        with scoring(self.workload.device):
            return self._quality(self.scorer.score(self.parent.shape.architecture))

    def child(self, architecture: Architecture) -> PreTrainedModel:
        """The child that is judged."""
        child = prune(self.parent, architecture, self.library)
        if self.finish:
            self.finish.complete(child, architecture)
        return child

    def score(self, architecture: Architecture) -> Mapping[str, torch.Tensor]:
        """Each source's (N,) nats a window: quality alone, for methods that score many children."""
        return self._scores(architecture).nats

    def _scores(self, architecture: Architecture) -> WindowScores:
        with scoring(self.workload.device):
            if self.finish is None:
                return self.scorer.score(architecture)
            # A child that no checkpoint holds is no slice of the parent, so nothing of the parent's can be reused.
            return self._with_children(lambda: self._of_child(self.child(architecture)))

    def _of_child(self, child: PreTrainedModel) -> WindowScores:
        hits = None if self.split.own_after is None else score_hits(child, self.split)
        return WindowScores(score_windows(child, self.split), hits=hits)

    def _quality(self, scores: WindowScores) -> Quality:
        return quality_from_windows(self.split, scores.nats, scores.hits)

    def quality(self, architecture: Architecture) -> Quality:
        """The figures of a child on all of the split."""
        return self._quality(self._scores(architecture))

    def _with_children(self, work: Callable[[], Result]) -> Result:
        """Work with children, for which the parent waits if it has to."""
        return with_children(self.parent.model, work)

    def _quality_and_child(self, architecture: Architecture) -> tuple[Quality, PreTrainedModel]:
        """The figures of a child and the child itself, which is made once if all of it is what is scored."""
        with scoring(self.workload.device):
            if self.finish is None:
                scores, child = self.scorer.score(architecture), self.child(architecture)
            else:
                child = self.child(architecture)
                scores = self._of_child(child)
        return self._quality(scores), child

    def quoted(self, architecture: Architecture) -> Quoted:
        """A child's figures on the split beside the parent's, with what they must not be quoted without.

        Raises ModelError if a logit is NaN.
        """
        parent = self.parent_quality
        if architecture == self.parent.shape.architecture:
            return Quoted.beside(parent, parent)
        if (logits := self.parents_logits) is None:
            return Quoted.beside(self.quality(architecture), parent)
        with scoring(self.workload.device):
            logits.read()

        def beside() -> Quoted:
            quality, child = self._quality_and_child(architecture)
            with scoring(self.workload.device):
                return Quoted.beside(quality, parent, logits.beside(child))

        return self._with_children(beside)

    def judge(self, architecture: Architecture, name: str) -> Record:
        """The whole record of a child: quality, speed paired with the parent, size."""

        def judged() -> tuple[Quality, Speed, Size]:
            quality, child = self._quality_and_child(architecture)
            with timing(self.workload.device):
                _, (speed,) = measure_paired(self.parent.model, [child], self.workload, self.repeats)
            return quality, speed, self._size(child, architecture)

        return self._record(name, architecture, *self._with_children(judged))

    def again(self, record: Record) -> Record:
        """The record of a judged child that is finished since: size and speed are those of its shape, and stay."""
        assert self.finish is not None, "something was done to it"
        quality = self.quality(record.architecture)
        done = (*record.done, self.finish.name)
        return record.model_copy(
            update={
                "id": child_id(record.hash, self.library.hash, done),
                "done": done,
                **figures_of(quality, self.parent_quality.ppl),
                "measured_on": self._measured_on(quality),
            }
        )

    def parent_record(self) -> Record:
        """The parent's own record; its speed-ups are 1 by definition, its tokens per second measured."""
        architecture = self.parent.shape.architecture
        parent = self.parent.model
        with timing(self.workload.device):
            speed, _ = self._with_children(lambda: measure_paired(parent, [parent], self.workload, self.repeats))
        size = self._size(self.parent.model, architecture)
        return self._record("parent", architecture, self.parent_quality, speed, size)

    def _size(self, model: PreTrainedModel, architecture: Architecture) -> Size:
        timed = self.workload
        return served_size(model, self.parent.shape, architecture, timed.gguf_type, timed.cache_type)

    def _record(self, name: str, architecture: Architecture, quality: Quality, speed: Speed, size: Size) -> Record:
        done = (self.finish.name,) if self.finish and self.finish.is_due(architecture) else ()
        return Record(
            name=name,
            id=child_id(architecture.hash, self.library.hash, done),
            hash=architecture.hash,
            architecture=architecture,
            **asdict(size),
            **figures_of(quality, self.parent_quality.ppl),
            prefill_tokens_per_s=speed.prefill_tokens_per_s,
            decode_tokens_per_s=speed.decode_tokens_per_s,
            prefill_speedup=speed.prefill_speedup,
            decode_speedup=speed.decode_speedup,
            measured_on=self._measured_on(quality),
            done=done,
        )

    def _measured_on(self, quality: Quality) -> MeasuredOn:
        return MeasuredOn(
            dataset=quality.dataset,
            split=quality.split,
            seq_len=quality.seq_len,
            tokens=quality.tokens,
            bos=quality.bos,
            workload=self.workload.to_json(),
            repeats=self.repeats,
            host=fingerprint(),
            verify=self.verify.medians if self.verify else None,
        )


def quote(record: Record, judges: Iterable[Judge]) -> Record:
    """The record with what is quoted of its child, under each judge's split; its own figures, which it was chosen by,
    stay. What it has already is not measured again. Raises ModelError if a logit is NaN."""
    missing = [judge for judge in judges if judge.split.name not in record.quoted]
    return record.model_copy(update={judge.split.name: judge.quoted(record.architecture) for judge in missing})
