"""A draft changes how fast a text is written, and not the text."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from families import CASES, COMMON, GROUPED, IDS, Case, tiny_model, tokens
from stepwise import child_of
from transformers import PreTrainedModel

from llmprune.core.errors import ModelError, RecipeError
from llmprune.measure.quality.accepted import lookup_passes, rounds_of
from llmprune.measure.speed.sessions import TorchSession
from llmprune.measure.speed.speculative import (
    Divergence,
    Lookup,
    PassCosts,
    Speculated,
    Written,
    pass_costs,
    speculate,
)
from llmprune.measure.speed.throughput import Workload

PROMPT, NEW, DRAFTED = 6, 16, 3
"""Texts go far beyond sliding windows of 8 tokens."""
EAGER = Workload(batch=1, prompt_tokens=PROMPT, generated_tokens=4, dtype="float32", threads=1, device="cpu")
LLAMACPP = replace(EAGER, engine="llamacpp", gguf_type="f32")
LLAMA = Case("llama", "gqa", {**COMMON, **GROUPED})
PROMPTS = tokens(2, PROMPT, seed=3).tolist()


def shaken(model: PreTrainedModel, by: float = 0.02) -> PreTrainedModel:
    """A copy that is right now and then."""
    copied, generator = copy.deepcopy(model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * by)
    return copied


def greedy(model: PreTrainedModel, prompt: Sequence[int]) -> list[int]:
    """What transformers writes."""
    prompt_1T = torch.tensor([prompt])
    written = model.generate(  # type: ignore[operator]
        prompt_1T,
        attention_mask=torch.ones_like(prompt_1T),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
    )
    ids: list[int] = written[0, len(prompt) :].tolist()
    return ids


@torch.inference_mode()
def hits(draft: PreTrainedModel, prompt: Sequence[int], ids: Sequence[int]) -> list[bool]:
    """Where the draft's likeliest token behind the parent's own text is the parent's."""
    likeliest_T = draft(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].argmax(-1)
    found: list[bool] = (likeliest_T == torch.tensor(ids)).tolist()
    return found


def rounds(found: Speculated) -> list[int]:
    return [len(written.accepted) for written in found.speculative]


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_the_text_is_the_parents_and_rounds_are_those_that_were_counted(case: Case) -> None:
    parent = tiny_model(case)
    texts = [greedy(parent, prompt) for prompt in PROMPTS]
    for draft in (shaken(parent), child_of(case)):
        expected_NK = rounds_of(
            np.array([hits(draft, prompt, ids) for prompt, ids in zip(PROMPTS, texts, strict=True)]), DRAFTED
        )
        found = speculate(parent, draft, EAGER, PROMPTS, NEW, DRAFTED)
        assert found.identical and found.divergences == ()
        assert [list(written.ids) for written in found.plain] == texts
        assert [list(written.ids) for written in found.speculative] == texts
        assert rounds(found) == expected_NK[:, DRAFTED].tolist()
        assert all(written.accepted == (0,) * NEW for written in found.plain)


def test_drafts_that_are_right_now_and_then_are_among_those_tested() -> None:
    """Else nothing would be taken back in part."""
    accepted = {
        count
        for model in map(tiny_model, CASES[:3])
        for written in speculate(model, shaken(model), EAGER, PROMPTS, NEW, DRAFTED).speculative
        for count in written.accepted[:-1]
    }
    assert accepted == {0, 1, 2, 3}


@pytest.mark.parametrize("workload", [EAGER, LLAMACPP], ids=["torch", "llamacpp"])
@pytest.mark.parametrize("name", ["llama-gqa", "olmo2-gqa", "gemma3_text-gqa"])
def test_a_parent_that_drafts_for_itself_accepts_everything(name: str, workload: Workload) -> None:
    parent = tiny_model(CASES[IDS.index(name)])
    found = speculate(parent, parent, workload, PROMPTS, NEW, DRAFTED)
    # llama.cpp's cache is f16, and other kernels read several tokens.
    assert all(divergence.is_tie and workload is LLAMACPP for divergence in found.divergences)
    apart = {divergence.prompt for divergence in found.divergences}
    accepted = [written.accepted for i, written in enumerate(found.speculative) if i not in apart]
    assert accepted == [(3, 3, 3, 3)] * (len(PROMPTS) - len(apart))
    assert {written.drafted for i, written in enumerate(found.speculative) if i not in apart} == {(3, 3, 3, 3)}


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3_text-full", "gpt_neox-parallel"])
def test_what_stands_in_the_text_already_is_looked_up(name: str) -> None:
    parent = tiny_model(CASES[IDS.index(name)])
    # A prompt that holds what the parent would write.
    prompts = [[*prompt, *greedy(parent, prompt)[:9], *prompt] for prompt in PROMPTS]
    for drafted, ngram in ((2, 1), (4, 3)):
        found = speculate(parent, Lookup(ngram), EAGER, prompts, NEW, drafted)
        assert found.identical and [list(written.ids) for written in found.plain] == [
            greedy(parent, p) for p in prompts
        ]
        for prompt, written in zip(prompts, found.speculative, strict=True):
            passes_KK = lookup_passes([*prompt, *written.ids], len(prompt), drafted, ngram)
            assert [written.drafted.count(n) for n in range(drafted + 1)] == passes_KK[drafted].tolist()


@pytest.mark.parametrize("drafts", ["shaken", "child", "lookup"])
def test_llama_cpp_writes_the_same_text_with_a_draft(drafts: str) -> None:
    parent = tiny_model(LLAMA)
    draft = {"shaken": shaken(parent), "child": child_of(LLAMA), "lookup": Lookup()}[drafts]
    for drafted in (0, 3):
        found = speculate(parent, draft, LLAMACPP, PROMPTS, NEW, drafted)
        assert found.identical and all(len(written.ids) == NEW for written in found.plain)
        if not isinstance(draft, Lookup):
            told = np.array([hits(draft, prompt, text.ids) for prompt, text in zip(PROMPTS, found.plain, strict=True)])
            assert rounds(found) == rounds_of(told, 3)[:, drafted].tolist()


def test_a_text_ends_where_the_parent_ends_it() -> None:
    parent = tiny_model(LLAMA)
    text = greedy(parent, PROMPTS[0])
    for end in text[1:6]:
        expected = text[: text.index(end) + 1]
        found = speculate(parent, parent, EAGER, PROMPTS[:1], NEW, 3, ends={end})
        assert [list(way[0].ids) for way in (found.plain, found.speculative)] == [expected] * 2
        accepted = found.speculative[0].accepted
        assert len(accepted) == -(-len(expected) // 4) and sum(accepted) + len(accepted) >= len(expected)
        assert found.identical and found.speedup.median > 0


def test_an_end_in_the_prompt_is_none() -> None:
    parent = tiny_model(LLAMA)
    found = speculate(parent, Lookup(), EAGER, PROMPTS[:1], 4, 2, ends={PROMPTS[0][-1]})
    assert len(found.plain[0].ids) == 4


def test_turns_change_and_prefill_is_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes by passes: 10 a prompt, 1 a pass of the parent and a quarter one of the draft."""
    parent, draft = tiny_model(LLAMA), shaken(tiny_model(LLAMA))
    now, order = [0.0], list[str]()
    stock = TorchSession.read

    def read(self: TorchSession, ids_BT: Any, *, all_logits: bool = False) -> float:
        if len(ids_BT[0]) == PROMPT - 1:
            now[0] += 10
            order.append("draft" if self._model is draft else "parent" if self._takes_back else "plain")
        else:
            now[0] += 0.25 if self._model is draft else 1
        return stock(self, ids_BT, all_logits=all_logits)

    monkeypatch.setattr(TorchSession, "read", read)
    monkeypatch.setattr("llmprune.measure.speed.speculative.time.perf_counter", lambda: now[0])
    found = speculate(parent, draft, EAGER, PROMPTS, NEW, 2)
    pair = ["parent", "draft"]
    # The first turn warms up.
    assert order == ["plain", *pair, "plain", *pair, *pair, "plain"]
    assert {written.prefill_s for written in found.plain} == {10}
    assert {written.prefill_s for written in found.speculative} == {20}
    assert [written.decode_s for written in found.plain] == [NEW] * 2
    assert [written.decode_s for written in found.speculative] == [1.5 * count for count in rounds(found)]
    assert found.speedup.median == np.median([NEW / (1.5 * count) for count in rounds(found)])


@pytest.mark.parametrize("twins", [True, False], ids=["a tie", "a fault"])
def test_texts_that_part_are_told_with_how_near_the_tokens_were(twins: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verification that takes another token, as rounding would do it: one that is as likely, or one that is not."""
    parent = tiny_model(LLAMA)
    text = greedy(parent, PROMPTS[0])
    position = next(i for i in range(3, NEW) if text[i] not in text[:i])
    right, wrong = text[position], min(set(range(5, 300)) - {*text})
    if twins:
        head: Any = parent.get_output_embeddings()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            head.weight[wrong] = head.weight[right]
    stock = TorchSession.likeliest

    def likeliest(self: TorchSession) -> list[int]:
        taken = wrong if self._takes_back else right
        return [taken if token in (right, wrong) else token for token in stock(self)]

    monkeypatch.setattr(TorchSession, "likeliest", likeliest)
    found = speculate(parent, Lookup(), EAGER, PROMPTS[:1], NEW, 2)
    (divergence,) = found.divergences
    assert not found.identical and divergence.is_tie == twins
    assert (divergence.prompt, divergence.position) == (0, position)
    assert (divergence.plain, divergence.speculative) == (right, wrong)
    with torch.inference_mode():
        logits_V = parent(torch.tensor([[*PROMPTS[0], *text[:position]]])).logits[0, -1]
    assert divergence.margin == pytest.approx(float(logits_V[right] - logits_V[wrong]), abs=1e-4)
    assert 0 <= divergence.rounding < 1e-4


def test_a_tie_is_what_rounding_can_turn() -> None:
    assert Divergence(0, 0, 1, 2, margin=0.02, rounding=0.01).is_tie
    assert not Divergence(0, 0, 1, 2, margin=0.03, rounding=0.01).is_tie


def test_what_cannot_be_measured_is_refused() -> None:
    parent = tiny_model(LLAMA)
    with pytest.raises(RecipeError, match=r"one text at a time, .*got workload\.batch=2, use 1"):
        speculate(parent, parent, replace(EAGER, batch=2), PROMPTS, 4, 2)
    for changes in ({"compile": True}, {"graphs": True}):
        with pytest.raises(RecipeError, match=r"workload\.compile=false and workload\.graphs=false"):
            speculate(parent, parent, replace(EAGER, **changes), PROMPTS, 4, 2)
    smaller = tiny_model(Case("llama", "few", {**COMMON, **GROUPED, "vocab_size": 200}))
    with pytest.raises(ModelError, match="a draft must have its parent's tokens, 300, got 200"):
        speculate(parent, smaller, EAGER, PROMPTS, 4, 2)
    with pytest.raises(ModelError, match="within max_position_embeddings=128, got 129"):
        speculate(parent, parent, EAGER, PROMPTS, 120, 3)


def test_costs_of_passes_foretell_what_rounds_make_of_the_parent() -> None:
    plain = Written((1, 2, 3, 4, 5, 6), (0,) * 6, (0,) * 6, 0.0, 6.0)
    # Two of two right, one of two, and one more that ends the text; the second round's draft reads two tokens first.
    written = Written((1, 2, 3, 4, 5, 6), (2, 2, 2), (2, 1, 0), 0.0, 4.0)
    costs = PassCosts(step=0.25, step_of_two=0.4, verify=(1.0, 1.2, 1.5))
    found = Speculated(2, (plain,), (written,), ())
    assert costs.speedup(found) == pytest.approx(6 / (3 * (2 * 0.25 + 1.5) + 0.15))
    # What looks up drafts in no time, and nothing where it finds nothing.
    looked_up = replace(written, drafted=(2, 0, 2), accepted=(2, 0, 1))
    free = PassCosts(0.0, 0.0, costs.verify)
    assert free.speedup(Speculated(2, (plain,), (looked_up,), ())) == pytest.approx(6 / (2 * 1.5 + 1.0))


def test_what_is_foretold_beside_decoding_is_near_what_it_takes() -> None:
    parent, child = tiny_model(LLAMA), child_of(LLAMA)
    of_draft, of_lookup = pass_costs(parent, child, EAGER, DRAFTED, 2, 1)
    assert len(of_draft.verify) == DRAFTED + 1 and len(of_lookup.verify) == 3
    assert of_draft.verify[0] == of_lookup.verify[0] == 1 and of_draft.step > 0 and of_draft.step_of_two > 0
    found = speculate(parent, child, EAGER, PROMPTS, NEW, DRAFTED)
    assert 0 < of_draft.speedup(found) <= (DRAFTED + 1) / min(of_draft.verify)
