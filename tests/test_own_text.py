"""Text that a parent writes itself, and how its children agree with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from families import CASES, IDS, VOCAB, tiny_model, tokens
from pytest import approx
from transformers import GenerationConfig

from llmprune.data.store import load_token_splits, save_token_splits
from llmprune.data.tokens import SourceTokens, Split, TokenSplits
from llmprune.measure.quality.agreement import (
    MOST_DRAFTED,
    agreement_of,
    lookup_draft,
    needed_agreement,
    score_hits,
    worth_of_drafts,
)
from llmprune.models.own_text import ends_of, own_windows

PROMPT, LENGTH = 6, 20
FREE = tuple(1.0 for _ in range(MOST_DRAFTED + 1))
"""What passes over several tokens take where verification costs nothing."""


def own_split(windows: dict[str, torch.Tensor], weights: dict[str, float], own: dict[str, list[int]]) -> Split:
    sources = {
        name: SourceTokens(ids, torch.ones(len(ids), dtype=torch.int64), torch.tensor(own[name]))
        for name, ids in windows.items()
    }
    return Split("search", sources, weights, LENGTH, bos=False, own_after=PROMPT)


@pytest.mark.parametrize("name", ["llama-gqa", "olmo2-gqa", "gpt_neox-parallel", "gemma3_text-gqa", "opt-projected"])
def test_a_model_agrees_with_what_it_wrote_itself(name: str) -> None:
    model = tiny_model(CASES[IDS.index(name)])
    windows = own_windows(model, tokens(3, LENGTH), PROMPT)
    assert torch.equal(windows[:, :PROMPT], tokens(3, LENGTH)[:, :PROMPT])
    split = own_split({"a": windows}, {"a": 1.0}, {"a": [LENGTH - PROMPT] * 3})
    found = agreement_of(split, score_hits(model, split))
    assert found.share == 1 and found.tokens == 3 * (LENGTH - PROMPT)
    # 14 tokens in rounds of k + 1.
    assert found.rounds == approx(tuple(-(-14 // (k + 1)) / 14 for k in range(MOST_DRAFTED + 1)))


def test_own_text_is_what_greedy_decoding_gives_and_goes_on_past_an_end() -> None:
    model = tiny_model(CASES[0])
    prompts = tokens(2, LENGTH)[:, :PROMPT]
    rules = GenerationConfig(max_new_tokens=LENGTH - PROMPT, do_sample=False, pad_token_id=0, eos_token_id=VOCAB + 1)  # type: ignore[no-untyped-call]
    expected = model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=rules)  # type: ignore[operator]
    found = own_windows(model, tokens(2, LENGTH), PROMPT)
    assert torch.equal(found, expected)
    # The same where one of its tokens ends a text, and where there is a penalty for saying things twice.
    model.generation_config.eos_token_id = int(found[0, PROMPT + 2])
    model.generation_config.repetition_penalty = 3.0
    assert torch.equal(own_windows(model, tokens(2, LENGTH), PROMPT), expected)
    assert ends_of(model) == {int(found[0, PROMPT + 2])}


def test_agreement_weighs_sources_and_stops_at_the_end_of_a_text() -> None:
    ids = tokens(2, LENGTH)
    split = own_split({"a": ids, "b": ids[:1]}, {"a": 0.25, "b": 0.75}, {"a": [2, 14], "b": [4]})
    never, always = torch.zeros(2, LENGTH - 1, dtype=torch.bool), torch.ones(1, LENGTH - 1, dtype=torch.bool)
    found = agreement_of(split, {"a": never, "b": always})
    assert found.share == approx(0.75) and found.tokens == 20
    # A token a round in the first source, four tokens in two rounds with k = 1 in the other.
    assert found.rounds[:2] == approx((1.0, 0.25 + 0.75 * 0.5))
    late = never.clone()
    late[0, PROMPT + 1 :] = True
    # Behind the end of the first text nothing counts, nor does the prompt.
    late[:, : PROMPT - 1] = True
    assert agreement_of(split, {"a": late, "b": always}).share == approx(0.75)


def test_the_best_draft_length_follows_from_rounds_and_passes() -> None:
    ids = tokens(1, LENGTH)
    split = own_split({"a": ids}, {"a": 1.0}, {"a": [14]})
    found = agreement_of(split, {"a": torch.ones(1, LENGTH - 1, dtype=torch.bool)})
    best = found.draft(0.25, FREE)
    # 14 tokens in one round of 13 drafted ones; or in two of 6, which cost 2 (6 / 4 + 1).
    assert best.drafted in range(1, MOST_DRAFTED + 1)
    # Nothing is dearer over two tokens than over one.
    expected = [1 / (rounds * (k * 0.25 + 1)) for k, rounds in enumerate(found.rounds)]
    assert best.speedup == approx(max(expected)) and best.drafted == int(np.argmax(expected))
    dear = (1.0, *(1.0 + 2 * k for k in range(1, MOST_DRAFTED + 1)))
    alone = found.draft(0.25, dear)
    assert alone.drafted == 0 and alone.speedup == 1


def test_prompt_lookup_finds_what_repeats() -> None:
    turns = torch.tensor([[7, 8, 9, 10] * 5])
    split = own_split({"a": turns}, {"a": 1.0}, {"a": [14]})
    # Two rounds: it drafts as far as the text went, four tokens behind the prompt's six, and then the rest.
    assert lookup_draft(split, FREE).speedup == approx(7.0)
    alone = own_split({"a": torch.arange(LENGTH)[None]}, {"a": 1.0}, {"a": [14]})
    assert lookup_draft(alone, FREE).speedup == 1


def test_what_a_draft_needs_is_said_before_there_is_one() -> None:
    verify = (1.0, 1.1, *(1.2 for _ in range(MOST_DRAFTED - 1)))
    (line,) = worth_of_drafts(verify, halved=2.0, fastest=5.0)
    # With k = 1: (1 + a) tokens for 0.5 + 1.1, and a times 0.05 for the draft's pass over two.
    assert "63% of tokens with every block halved" in line and "31% of them" in line
    # Where a second token is dear and more are not, longer drafts pay first: k = 16 writes 6.3 tokens a round at 85%.
    jump = (1.0, *(2.0 for _ in range(MOST_DRAFTED)))
    found = needed_agreement(0.1, jump)
    assert found is not None and found < 0.75 < 0.1 + 2 - 1
    *_, hopeless = worth_of_drafts(tuple(1.0 + k for k in range(MOST_DRAFTED + 1)), halved=2.0, fastest=5.0)
    assert "no draft of this space can pay" in hopeless


def test_own_text_is_stored_with_how_far_it_goes(tmp_path: Path) -> None:
    split = own_split({"a": tokens(2, LENGTH)}, {"a": 1.0}, {"a": [3, 14]})
    plain = replace(split, own_after=None, sources={"a": replace(split.sources["a"], own=None)})
    assert plain.hash != split.hash
    splits = TokenSplits({"search": split, "calibration": replace(plain, name="calibration")}, {})
    save_token_splits(splits, tmp_path / "tokens.safetensors")
    found = load_token_splits(tmp_path / "tokens.safetensors")
    assert found["search"].own_after == PROMPT and found["search"].sources["a"].own.tolist() == [3, 14]  # type: ignore[union-attr]
    assert found["search"].hash == split.hash
    assert found["calibration"].own_after is None and found["calibration"].sources["a"].own is None
    head = found["search"].head({"a": 1})
    assert head.sources["a"].own.tolist() == [3]  # type: ignore[union-attr]
