"""How often a draft would write what its parent writes, and in how many rounds the parent's text is written with it.

Scored in one pass over text that the parent wrote (see `accepted`).

Shapes: N windows, T tokens of a window, K+1 draft lengths k = 0..K.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from llmprune.data.tokens import SourceTokens, Split
from llmprune.measure.quality.accepted import Counts, catch_ups_of, draft_speedup, lookup_passes, rounds_of
from llmprune.measure.value import Value

MOST_DRAFTED = 16
"""The longest draft that is looked at."""
NGRAM = 2
"""Of prompt lookup: transformers' own."""


class Draft(Value):
    """What a draft is worth to its parent."""

    drafted: int
    """Tokens a round, k; 0 where the parent is faster alone."""
    speedup: float
    """Of the parent's decoding, by counted rounds and measured passes; 1 where k is 0."""


class Agreement(Value):
    """Means over the tokens that the parent wrote, its sources weighed as they are in the split."""

    share: float
    """Share of tokens that the draft finds likeliest too."""
    rounds: tuple[float, ...]
    """Rounds a token, for each draft length (K+1)."""
    catch_ups: tuple[float, ...]
    """Those of them that the draft begins with a pass over two tokens."""
    tokens: int

    def draft(self, draft_s_over_parent_s: float, verify_ratios: Sequence[float]) -> Draft:
        """The best draft length and what it gives, where the draft's decode step takes so much of the parent's, and a
        pass of the parent over n + 1 tokens so much of one over a single one."""
        rounds_K, catch_ups_K = np.array(self.rounds), np.array(self.catch_ups)
        found = draft_speedup(rounds_K, 1, draft_s_over_parent_s, verify_ratios, catch_ups_K)
        return Draft(drafted=found.drafted, speedup=float(found.speedups_K[found.drafted]))


def hits_of(tokens_T: torch.Tensor, logits_TV: torch.Tensor) -> torch.Tensor:
    """Before which tokens of a window, but its first, the model finds that token likeliest: (T - 1,) bool."""
    likeliest_T = logits_TV[:-1].argmax(-1)
    return likeliest_T == tokens_T[1:].to(likeliest_T.device)


@torch.inference_mode()
def score_hits(model: PreTrainedModel, split: Split) -> dict[str, torch.Tensor]:
    """Each source's (N, T - 1) hits."""
    return {
        name: torch.stack([_hits(model, ids_T) for ids_T in source.windows]) for name, source in split.sources.items()
    }


def _hits(model: PreTrainedModel, ids_T: torch.Tensor) -> torch.Tensor:
    logits_BTV = model(input_ids=ids_T[None].to(model.device), use_cache=False).logits
    return hits_of(ids_T, logits_BTV[0]).cpu()


def agreement_of(split: Split, hits: Mapping[str, torch.Tensor]) -> Agreement:
    """What each source's (N, T - 1) hits amount to, on the tokens of a split that the parent wrote."""
    share, tokens = 0.0, 0
    rounds_K, catch_ups_K = np.zeros(MOST_DRAFTED + 1), np.zeros(MOST_DRAFTED + 1)
    for name, _, start, own_N in _written(split):
        hits_NT = hits[name][:, start - 1 :].numpy()
        counted_NT = np.arange(hits_NT.shape[1]) < own_N[:, None]
        weight = split.weights[name] / own_N.sum()
        share += weight * (hits_NT & counted_NT).sum()
        rounds_K += weight * rounds_of(hits_NT, MOST_DRAFTED, own_N).sum(0)
        catch_ups_K += weight * catch_ups_of(hits_NT, MOST_DRAFTED, own_N).sum(0)
        tokens += int(own_N.sum())
    # Without a draft a token is a round, and weights sum to 1 but for rounding.
    return Agreement(
        share=float(share),
        rounds=(1.0, *rounds_K[1:].tolist()),
        catch_ups=(0.0, *catch_ups_K[1:].tolist()),
        tokens=tokens,
    )


def lookup_draft(split: Split, verify_ratios: Sequence[float]) -> Draft:
    """What prompt lookup is worth on a split's text: it drafts what followed the last few tokens before, in no time."""
    passes_KK = np.zeros((MOST_DRAFTED + 1, MOST_DRAFTED + 1))
    for name, source, start, own_N in _written(split):
        texts = [ids_T[: start + own].tolist() for ids_T, own in zip(source.windows, own_N, strict=True)]
        found_KK = sum(lookup_passes(ids, start, MOST_DRAFTED, NGRAM) for ids in texts)
        passes_KK += split.weights[name] / own_N.sum() * found_KK
    # Without a draft a token is a decode step, and weights sum to 1 but for rounding.
    passes_KK[0, 0] = 1.0
    speedups_K = 1 / (passes_KK @ np.array(verify_ratios))
    return Draft(drafted=int(speedups_K.argmax()), speedup=float(speedups_K.max()))


def needed_agreement(draft_s_over_parent_s: float, verify_ratios: Sequence[float]) -> float | None:
    """The share of tokens on which a draft must agree for its parent to gain anything, at its best length; None if none
    would do.

    An estimate that takes tokens for independent: a round of k then writes 1 + a + ... + a^k tokens on average
    (Leviathan et al., arXiv 2211.17192, equation 1), and is wholly accepted a^k of the time, which is when the next
    round's draft reads two. In a search rounds are counted on real text.
    """
    share_A = np.linspace(0, 1, 1001)[1:]
    k_K = np.arange(1, len(verify_ratios))
    powers_KA = share_A ** k_K[:, None]
    tokens_KA = 1 + np.cumsum(powers_KA, axis=0)
    steps_KA = k_K[:, None] + powers_KA * (verify_ratios[1] - 1)
    spent_KA = draft_s_over_parent_s * steps_KA + np.array(verify_ratios[1:])[:, None]
    pays_A = (tokens_KA > spent_KA).any(axis=0)
    return float(share_A[pays_A.argmax()]) if pays_A.any() else None


def worth_of_drafts(verify_ratios: Sequence[float], halved: float, fastest: float) -> list[str]:
    """What drafts of a space would have to be like, whose half-sized and smallest child have these speed-ups: said
    before one is made."""
    passes = ", ".join(f"{n} in {verify_ratios[n - 1]:.2f}" for n in (2, 3, 5, 9, 17) if n <= len(verify_ratios))
    needed = [needed_agreement(1 / speedup, verify_ratios) for speedup in (halved, fastest)]
    half, smallest = ("more than all" if share is None else f"about {share:.0%}" for share in needed)
    lines = [
        f"verifying, measured: the parent reads {passes} of the time of one token; a draft pays from so much "
        f"agreement on: {half} of tokens with every block halved ({1 / halved:.2f} of the parent's time), {smallest} "
        f"of them with the smallest child ({1 / fastest:.2f})"
    ]
    if needed == [None, None]:
        lines.append("so no draft of this space can pay here: verification alone takes as long as what it saves")
    return lines


def _written(split: Split) -> Iterator[tuple[str, SourceTokens, int, Counts]]:
    """Each source by name, where in its windows the parent began to write, and how many tokens it wrote in each."""
    assert split.own_after is not None, "the parent wrote it"
    for name, source in split.sources.items():
        assert source.own is not None, "how much the parent wrote is noted"
        yield name, source, split.own_after, source.own.numpy()
