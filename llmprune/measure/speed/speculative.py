"""Greedy speculative decoding, run and timed beside plain greedy decoding: a small model drafts for its parent.

A round: the draft writes k tokens, the parent reads them in one pass behind the last token that it has not read, keeps
those that are its own choice up to the first that is not, and adds its own next token; both take back what was not
kept (Stern et al., arXiv 1811.03115; Leviathan et al., arXiv 2211.17192). Whoever drafts, the text is the parent's.

But for rounding: a pass over k + 1 tokens may take other kernels than one over a single token, and where two tokens are
as good as equally likely, the other one may win. So texts are compared, and where they part it is said how near the
two tokens were, and how far rounding moves logits there.

A prompt is read but for its last token, which the first round reads: so each new token is a round's, and rounds are
those that `measure.quality.accepted` counts. Drafts are not cut short at the end of a text, which comes unforeseen.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from llmprune.core.errors import ModelError, RecipeError
from llmprune.measure.quality.accepted import PromptLookup, leading_matches
from llmprune.measure.speed.sessions import Session
from llmprune.measure.speed.throughput import (
    Spread,
    Workload,
    check_model,
    in_turns,
    measure_paired,
    sessions,
    steady_process,
)
from llmprune.measure.speed.verifying import verify_costs

_WARM_UP_ROUNDS = 2


@dataclass(frozen=True)
class Lookup:
    """A draft that costs next to nothing: what followed the last few tokens before (see `PromptLookup`)."""

    ngram: int = 2
    """The most tokens that are looked up; transformers' default."""


@dataclass(frozen=True)
class Written:
    """What was written behind one prompt, and how long it took."""

    ids: tuple[int, ...]
    """The new tokens; an end of text is the last of them."""
    drafted: tuple[int, ...]
    """Tokens that each round drafted; without a draft a round is a decode step, with 0."""
    accepted: tuple[int, ...]
    """Those of them that came into the text."""
    prefill_s: float
    """To read the prompt; the draft's reading of it included."""
    decode_s: float

    @property
    def s_per_token(self) -> float:
        """Without the prompt."""
        return self.decode_s / len(self.ids)


@dataclass(frozen=True)
class Divergence:
    """Where two texts part that should be one."""

    prompt: int
    position: int
    """Among the new tokens."""
    plain: int
    speculative: int
    """The tokens that stand there."""
    margin: float
    """Logit of the plain token less that of the other, in decode steps."""
    rounding: float
    """The farthest that any logit moves there if the text is read in longer passes."""

    @property
    def is_tie(self) -> bool:
        """Whether rounding explains it; else something is wrong."""
        return self.margin <= 2 * self.rounding


@dataclass(frozen=True)
class Speculated:
    """Prompts, each continued twice: plainly, and with a draft of `drafted` tokens a round."""

    drafted: int
    plain: tuple[Written, ...]
    speculative: tuple[Written, ...]
    divergences: tuple[Divergence, ...]

    @property
    def identical(self) -> bool:
        """Whether all texts are what plain decoding writes."""
        return not self.divergences

    @property
    def speedup(self) -> Spread:
        """Of the prompts: plain seconds a token by speculative ones, prefill apart."""
        pairs = zip(self.plain, self.speculative, strict=True)
        return Spread.of([plain.s_per_token / speculative.s_per_token for plain, speculative in pairs])


@torch.inference_mode()
def speculate(
    parent: PreTrainedModel,
    draft: PreTrainedModel | Lookup,
    workload: Workload,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    drafted: int,
    ends: Collection[int] = (),
) -> Speculated:
    """Continue each prompt plainly and with the draft, in turns, by `new_tokens` tokens or up to one of `ends`.

    With `drafted` 0 both are plain. Of the workload engine, types, threads and device count; prompts are token ids, at
    least two each. Raises RecipeError on a workload that has no such decoding here, ModelError on a draft with other
    tokens than its parent's, or on texts longer than a model can number.
    """
    assert prompts and all(len(prompt) >= 2 for prompt in prompts), "something is read before the first round"
    assert new_tokens >= 1 and drafted >= 0, f"{new_tokens} new tokens, {drafted} drafted"
    models = [parent] if isinstance(draft, Lookup) else [parent, draft]
    tokens = max(map(len, prompts)) + new_tokens + drafted
    _check(models, workload, tokens)
    with (
        # The parent alone keeps its cache as anyone's decoding does.
        sessions([parent], workload, tokens) as (alone,),
        sessions(models, workload, tokens, takes_back=True) as (verifying, *drafting),
        steady_process(workload.threads),
    ):
        drafts = _LookupDraft(draft.ngram) if isinstance(draft, Lookup) else _ModelDraft(drafting[0])
        ways = (_Way(alone, None, 0, ends), _Way(verifying, drafts if drafted else None, drafted, ends))
        for way in ways:
            way.write(prompts[0], _WARM_UP_ROUNDS * (1 + way.drafted))
        plain, speculative = (_Turns(way, prompts, new_tokens) for way in ways)
        in_turns(plain.next, speculative.next, pairs=len(prompts))
        divergences = [
            _divergence(ways[0], verifying, drafted, i, prompts[i], texts[0].ids, texts[1].ids)
            for i, texts in enumerate(zip(plain.written, speculative.written, strict=True))
            if texts[0].ids != texts[1].ids
        ]
    return Speculated(drafted, tuple(plain.written), tuple(speculative.written), tuple(divergences))


@dataclass(frozen=True)
class PassCosts:
    """Passes of parent and draft, in decode steps of the parent.

    To be measured beside the decoding that they foretell: a machine is not as fast at all times, and a draft that is
    bound by arithmetic not by as much as a parent that is bound by memory.
    """

    step: float
    """The draft's decode step; 0 for prompt lookup."""
    step_of_two: float
    """Its pass over two tokens, with which it begins behind a round that accepted all."""
    verify: tuple[float, ...]
    """The parent's passes over 1, 2, ... tokens with logits behind each; the first is 1."""

    def speedup(self, found: Speculated) -> float:
        """What the rounds that came about make of plain decoding."""
        spent = 0.0
        for written in found.speculative:
            spent += sum(drafted * self.step + self.verify[drafted] for drafted in written.drafted)
            full = zip(written.drafted[:-1], written.accepted[:-1], strict=True)
            spent += (self.step_of_two - self.step) * sum(drafted == accepted for drafted, accepted in full)
        return sum(len(written.ids) for written in found.speculative) / spent


def pass_costs(
    parent: PreTrainedModel, draft: PreTrainedModel, workload: Workload, drafted: int, looked_up: int, repeats: int
) -> tuple[PassCosts, PassCosts]:
    """Those of decoding with so many tokens of the draft a round, and of decoding with so many that are looked up."""
    _, (speed,) = measure_paired(parent, [draft], workload, repeats)
    verify = verify_costs(parent, workload, max(drafted, looked_up), repeats).medians
    step = 1 / speed.decode_speedup.median
    step_of_two = step * verify_costs(draft, workload, 1, repeats).medians[1]
    return PassCosts(step, step_of_two, verify[: drafted + 1]), PassCosts(0.0, 0.0, verify[: looked_up + 1])


class _Draft(Protocol):
    """Who guesses what the parent will write."""

    def begin(self, prompt: Sequence[int]) -> None:
        """Read all of a prompt but its last token."""
        ...

    def guess(self, text: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that may come behind the text, which goes on from that of the last call."""
        ...


class _ModelDraft:
    def __init__(self, session: Session) -> None:
        self._session = session

    def begin(self, prompt: Sequence[int]) -> None:
        self._session.clear()
        self._read = list(prompt[:-1])
        self._session.read([self._read])
        self._known = len(self._read)
        """Tokens that were read of a text, not guessed."""

    def guess(self, text: Sequence[int], most: int) -> list[int]:
        right = self._known + leading_matches(self._read[self._known :], text[self._known : -1])
        self._session.take_back(len(self._read) - right)
        del self._read[right:]
        self._known = len(text)
        guesses: list[int] = []
        unread = list(text[right:])
        while len(guesses) < most:
            self._session.read([unread])
            self._read += unread
            unread = [self._session.likeliest()[-1]]
            guesses += unread
        return guesses


class _LookupDraft:
    def __init__(self, ngram: int) -> None:
        self._ngram = ngram

    def begin(self, prompt: Sequence[int]) -> None:
        self._lookup, self._known = PromptLookup(prompt, self._ngram), len(prompt)

    def guess(self, text: Sequence[int], most: int) -> list[int]:
        self._lookup.read(text[self._known :])
        self._known = len(text)
        return self._lookup.draft(most)


@dataclass(frozen=True)
class _Way:
    """One way to decode greedily: a model, and who drafts for it, if anyone does."""

    session: Session
    draft: _Draft | None
    drafted: int
    ends: Collection[int]

    def write(self, prompt: Sequence[int], new_tokens: int) -> Written:
        """Continue a prompt."""
        started = time.perf_counter()
        self.session.clear()
        self.session.read([prompt[:-1]])
        if self.draft is not None:
            self.draft.begin(prompt)
        prefilled = time.perf_counter()
        text, goal, drafted, accepted = list(prompt), len(prompt) + new_tokens, list[int](), list[int]()
        while len(text) < goal and not (accepted and text[-1] in self.ends):
            guessed, right, new = self._round(text)
            new = self._within(new[: goal - len(text)])
            drafted.append(guessed)
            accepted.append(min(right, len(new)))
            text += new
        decoded = time.perf_counter()
        ids, seconds = tuple(text[len(prompt) :]), (prefilled - started, decoded - prefilled)
        return Written(ids, tuple(drafted), tuple(accepted), *seconds)

    def _round(self, text: Sequence[int]) -> tuple[int, int, list[int]]:
        """How many tokens were guessed, how many of them rightly, and the tokens that follow the text."""
        guesses = [] if self.draft is None else self.draft.guess(text, self.drafted)
        self.session.read([[text[-1], *guesses]], all_logits=True)
        own = self.session.likeliest()
        right = leading_matches(guesses, own)
        self.session.take_back(len(guesses) - right)
        return len(guesses), right, own[: right + 1]

    def _within(self, new: list[int]) -> list[int]:
        """New tokens up to an end of text."""
        return next((new[: i + 1] for i, token in enumerate(new) if token in self.ends), new)


class _Turns:
    """The prompts one after the other, each written one way when it is its turn."""

    def __init__(self, way: _Way, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
        self._way, self._prompts, self._new_tokens = way, prompts, new_tokens
        self.written: list[Written] = []

    def next(self) -> float:
        """Seconds that the next prompt takes, itself apart."""
        self.written.append(self._way.write(self._prompts[len(self.written)], self._new_tokens))
        return self.written[-1].decode_s


def _divergence(
    plainly: _Way,
    verifying: Session,
    drafted: int,
    prompt: int,
    prompt_ids: Sequence[int],
    plain: Sequence[int],
    speculative: Sequence[int],
) -> Divergence:
    """What is to be said of two texts that part, from reading them once more."""
    position = leading_matches(plain, speculative)
    plainly.write(prompt_ids, position + 1)
    in_steps_V = plainly.session.logits()
    text = [*prompt_ids, *plain[:position]]
    last = min(1 + drafted, len(text) - 1)
    verifying.clear()
    verifying.read([text[:-last]])
    verifying.read([text[-last:]], all_logits=True)
    tokens = plain[position], speculative[position]
    margin = float(in_steps_V[tokens[0]] - in_steps_V[tokens[1]])
    return Divergence(prompt, position, *tokens, margin, float(np.abs(verifying.logits() - in_steps_V).max()))


def _check(models: Sequence[PreTrainedModel], workload: Workload, tokens: int) -> None:
    if workload.batch != 1:
        raise RecipeError(
            "speculative decoding is measured on one text at a time, since those of a batch accept unequally many "
            f"tokens; got workload.batch={workload.batch}, use 1"
        )
    if workload.compile or workload.graphs:
        raise RecipeError(
            "speculative decoding is run in eager torch or llama.cpp, not compiled or as CUDA graphs; set "
            "workload.compile=false and workload.graphs=false"
        )
    words = [model.config.get_text_config().vocab_size for model in models]
    if len(set(words)) > 1:
        raise ModelError(f"a draft must have its parent's tokens, {words[0]}, got {words[1]}; keep the vocabulary")
    for model in models:
        check_model(model, workload)
        longest = model.config.get_text_config().max_position_embeddings
        if tokens > longest:
            raise ModelError(
                f"prompt, new and drafted tokens must be within max_position_embeddings={longest}, got {tokens}; use "
                "shorter prompts, or fewer new tokens"
            )
