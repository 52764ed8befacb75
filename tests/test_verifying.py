"""Passes over several tokens that are taken back: the numbers of a growing text, and what they cost."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import miniature_cuda
import pytest
import torch
from closeness import assert_close
from families import CASES, COMMON, GROUPED, IDS, Case, tiny_model, tokens
from stepwise import child_of, grown
from transformers import PreTrainedModel

from llmprune.measure.speed import verifying
from llmprune.measure.speed.graphs import StaticGeneration, as_it_is, cuda_graphs
from llmprune.measure.speed.sessions import TorchSession
from llmprune.measure.speed.throughput import Workload, sessions
from llmprune.measure.speed.verifying import PAIRS, VerifyCosts, verify_costs

LENGTH, PROMPT = 22, 6
READ_AND_KEPT = [(1, 1), (4, 2), (3, 0), (5, 5), (2, 1), (1, 0), (5, 1), (4, 4), (1, 1)]
"""Tokens of a pass, and how many of them stay: across the end of a window of 8, and of the text."""
WORKLOAD = Workload(batch=2, prompt_tokens=PROMPT, generated_tokens=4, dtype="float32", threads=1, device="cpu")
LLAMA = Case("llama", "gqa", {**COMMON, **GROUPED})


def passes() -> Iterator[tuple[int, int, int]]:
    """Where each pass begins, what it reads and what of it stays."""
    position = PROMPT
    for read, kept in READ_AND_KEPT:
        yield position, read, kept
        position += kept


@pytest.mark.parametrize("of", [tiny_model, child_of], ids=["parent", "child"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_what_is_taken_back_was_never_read(case: Case, of: Callable[[Case], PreTrainedModel]) -> None:
    model, ids_BT = of(case), tokens(1, LENGTH)
    expected = grown(model, ids_BT, PROMPT)
    session = TorchSession(model, takes_back=True)
    with torch.inference_mode():
        for _ in range(2):
            session.clear()
            session.read(ids_BT[:, :PROMPT].tolist())
            for start, read, kept in passes():
                assert session.read(ids_BT[:, start : start + read].tolist(), all_logits=True) > 0
                found = [torch.from_numpy(session.logits(index)) for index in range(-read, 0)]
                for found_V, expected_BV in zip(found, expected[start - PROMPT + 1 :], strict=False):
                    assert_close(found_V, expected_BV[0])
                assert session.likeliest() == [int(logits_V.argmax()) for logits_V in found]
                session.take_back(read - kept)


@pytest.mark.parametrize("of", [tiny_model, child_of], ids=["parent", "child"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_tensors_that_never_move_take_tokens_back_too(
    case: Case, of: Callable[[Case], PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids_BT = of(case), tokens(2, LENGTH)
    expected = grown(model, ids_BT, PROMPT)
    miniature_cuda.install(monkeypatch)
    for record in (as_it_is, cuda_graphs(torch.device("cpu"))):
        run = StaticGeneration(model, ids_BT, PROMPT, record, takes_back=True)
        with torch.inference_mode():
            run.prefill()
            for start, read, kept in passes():
                assert run.read(read) > 0
                for i, expected_BV in enumerate(expected[start - PROMPT + 1 :][:read]):
                    assert_close(run.logits_BTV[:, i], expected_BV)
                run.take_back(read - kept)


def test_a_ring_refuses_what_it_cannot_hold() -> None:
    with torch.inference_mode():
        run = StaticGeneration(tiny_model(CASES[IDS.index("gemma2-gqa")]), tokens(2, LENGTH), PROMPT)
        run.prefill()
        with pytest.raises(AssertionError, match="in a ring"):
            run.read(2)


def test_a_session_that_keeps_nothing_takes_nothing_back() -> None:
    session = TorchSession(tiny_model(LLAMA))
    with torch.inference_mode():
        session.read([[5, 6, 7]])
    session.take_back(0)
    with pytest.raises(AssertionError, match="not made to take tokens back"):
        session.take_back(1)


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3_text-gqa"])
def test_llama_cpp_takes_tokens_back(name: str) -> None:
    model, ids_BT = tiny_model(CASES[IDS.index(name)]), tokens(2, LENGTH)
    expected = grown(model, ids_BT, PROMPT)
    with (
        torch.inference_mode(),
        sessions([model], replace(WORKLOAD, engine="llamacpp", gguf_type="f32"), LENGTH) as (session,),
    ):
        session.read(ids_BT[:, :PROMPT].tolist())
        for start, read, kept in passes():
            session.read(ids_BT[:, start : start + read].tolist(), all_logits=True)
            for row, i in itertools.product(range(2), range(min(read, LENGTH - start))):
                found_V = torch.from_numpy(session.logits(row * read + i))
                # The cache is f16, as it is for llama.cpp's users.
                torch.testing.assert_close(found_V, expected[start - PROMPT + 1 + i][row], rtol=0, atol=0.01)
            session.take_back(read - kept)


@pytest.mark.parametrize(
    "changes",
    [{}, {"graphs": True}, {"engine": "llamacpp", "gguf_type": "f32"}],
    ids=["eager", "graphs", "llamacpp"],
)
def test_costs_are_measured_in_every_engine(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    miniature_cuda.install(monkeypatch)
    costs = verify_costs(tiny_model(LLAMA), replace(WORKLOAD, **changes), most=5, repeats=2)
    assert costs.most == 5 and costs.medians[0] == 1 and len(costs.medians) == 6
    assert all(0 < ratio.low <= ratio.median <= ratio.high for ratio in costs.ratios)
    assert VerifyCosts.from_json(json.loads(json.dumps(costs.to_json()))) == costs


def test_ratios_are_those_of_passes_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass over n tokens of this run takes 10 + n seconds, whatever else the machine does."""
    read: list[int] = []

    class Paced:
        behind_prompt = 0

        def prefill(self) -> float:
            self.behind_prompt = 0
            return 1.0

        def read(self, count: int) -> float:
            assert self.behind_prompt == 0, "every pass stands behind the prompt alone"
            self.behind_prompt = count
            read.append(count)
            return 10.0 + count

        def take_back(self, count: int) -> None:
            self.behind_prompt -= count

    @contextmanager
    def paced(*_: Any, takes_back: bool) -> Iterator[list[Paced]]:
        assert takes_back
        yield [Paced()]

    monkeypatch.setattr(verifying, "running", paced)
    costs = verify_costs(tiny_model(LLAMA), WORKLOAD, most=2, repeats=1)
    assert costs.medians == (1.0, 12 / 11, 13 / 11)
    warm_up, timed = read[:3], read[3:]
    assert warm_up == [1, 2, 3] and timed == [1, 2, 2, 1] * (PAIRS // 2) + [1, 3, 3, 1] * (PAIRS // 2)
    # Lengths that are not timed lie on the line between their neighbours.
    read.clear()
    costs = verify_costs(tiny_model(LLAMA), WORKLOAD, most=10, repeats=1)
    assert costs.medians == pytest.approx(tuple((10 + n) / 11 for n in range(1, 12)))
    assert set(read) == {1, 2, 3, 4, 5, 7, 9, 11}
