"""Quality against the model's own loss; speed against models whose pace is known."""

from __future__ import annotations

import gc
import itertools
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from closeness import assert_close
from families import CASES, IDS, VOCAB, Case, tiny_model, tokens
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from llmprune.core.errors import ModelError
from llmprune.core.recipe import WorkloadRecipe
from llmprune.data.tokens import SourceTokens, Split
from llmprune.measure.quality import perplexity
from llmprune.measure.quality.perplexity import Quality, quality_from_windows, score, score_windows, window_nats
from llmprune.measure.speed.host import fingerprint
from llmprune.measure.speed.throughput import PREFILL_PAIRS, Speed, Spread, Workload, measure_paired

SEQ_LEN = 12
WORKLOAD = Workload(batch=2, prompt_tokens=6, generated_tokens=4, dtype="float32", threads=1, device="cpu")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model(CASES[0])


@pytest.fixture
def split() -> Split:
    """Two sources of unequal size and weight."""
    sources = {
        "news": SourceTokens(tokens(3, SEQ_LEN, seed=1), torch.tensor([40, 50, 60])),
        "code": SourceTokens(tokens(2, SEQ_LEN, seed=2), torch.tensor([20, 25])),
    }
    return Split("search", sources, {"news": 0.25, "code": 0.75}, SEQ_LEN, bos=False)


def with_logits(value: float) -> LlamaForCausalLM:
    """A model one of whose words has this logit, in the second half of each window."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = LlamaForCausalLM(config)
    model.eval()

    def spoil(module: Any, args: Any, output: Any) -> Any:
        output.logits[:, SEQ_LEN // 2 :, 7] = value
        return output

    model.register_forward_hook(spoil)
    return model


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_nats_are_the_models_own_loss(case: Case) -> None:
    model, windows = tiny_model(case), tokens(3, SEQ_LEN)
    with torch.inference_mode():
        losses = [model(input_ids=window[None], labels=window[None]).loss for window in windows]
    expected = torch.stack(losses).double() * (SEQ_LEN - 1)
    assert_close(window_nats(model, windows), expected)


@pytest.mark.parametrize("batch_tokens", [SEQ_LEN, 2 * SEQ_LEN + 1, 100])
def test_batching_changes_nothing(model: PreTrainedModel, batch_tokens: int) -> None:
    windows = tokens(5, SEQ_LEN)
    one_by_one = window_nats(model, windows, batch_tokens=1)
    assert_close(window_nats(model, windows, batch_tokens=batch_tokens), one_by_one)


def test_logits_of_a_batch_stay_under_the_limit(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "LOGITS_BYTES", 2 * SEQ_LEN * VOCAB * 4)
    sizes: list[int] = []
    handle = model.register_forward_hook(lambda module, args, output: sizes.append(output.logits.nbytes))
    try:
        assert window_nats(model, tokens(5, SEQ_LEN)).dtype == torch.float64
    finally:
        handle.remove()
    assert len(sizes) == 3 and max(sizes) <= perplexity.LOGITS_BYTES


def test_bfloat16_is_scored_in_float32() -> None:
    model, windows = tiny_model(CASES[0]).bfloat16(), tokens(2, SEQ_LEN)
    with torch.inference_mode():
        logits = model(input_ids=windows).logits[:, :-1].double()
    picked = logits.log_softmax(-1).gather(-1, windows[:, 1:, None])[..., 0]
    assert_close(window_nats(model, windows), -picked.sum(-1))


def test_dropout_is_not_scored() -> None:
    with pytest.raises(AssertionError, match="eval"):
        window_nats(tiny_model(CASES[0]).train(), tokens(1, SEQ_LEN))


def test_nan_is_an_error_that_names_it() -> None:
    with pytest.raises(ModelError, match=r"LlamaForCausalLM gives NaN in window 0, in torch.float32"):
        window_nats(with_logits(math.nan), tokens(1, SEQ_LEN))


def test_overflow_is_infinitely_bad_and_survives_json(split: Split) -> None:
    result = score(with_logits(math.inf), split)
    assert result.nats_per_token == result.ppl == result.per_source["code"].nats_per_byte == math.inf
    text = json.dumps(result.to_json(), allow_nan=False)
    assert Quality.from_json(json.loads(text)) == result


def test_perplexity_too_large_for_a_float_is_infinite(split: Split) -> None:
    nats = {name: torch.full((len(source.windows),), 1e5) for name, source in split.sources.items()}
    result = quality_from_windows(split, nats)
    assert result.ppl == math.inf and math.isfinite(result.nats_per_token)


def test_mixture_weighs_sources_not_tokens(split: Split) -> None:
    nats = {"news": torch.tensor([11.0, 22.0, 33.0]), "code": torch.tensor([44.0, 44.0])}
    result = quality_from_windows(split, nats)
    assert result.per_source["news"].nats_per_token == pytest.approx(2)
    assert result.per_source["news"].nats_per_byte == pytest.approx(66 / 150)
    assert result.per_source["code"].ppl == pytest.approx(math.exp(4))
    assert result.nats_per_token == pytest.approx(0.25 * 2 + 0.75 * 4)
    assert result.nats_per_byte == pytest.approx(0.25 * 66 / 150 + 0.75 * 88 / 45)
    assert result.ppl == pytest.approx(math.exp(3.5))
    assert (result.dataset, result.split, result.seq_len, result.bos) == ("news+code", "search", SEQ_LEN, False)
    assert (result.per_source["news"].tokens, result.tokens) == (33, 55)


def test_score_is_what_its_windows_amount_to(model: PreTrainedModel, split: Split) -> None:
    seen: list[tuple[int, int]] = []
    result = score(model, split, progress=lambda done, total: seen.append((done, total)))
    assert result == quality_from_windows(split, score_windows(model, split))
    assert seen[-1] == (5, 5) and seen == sorted(seen)
    assert Quality.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_windows_of_another_split_are_refused(split: Split) -> None:
    with pytest.raises(AssertionError, match="windows of code"):
        quality_from_windows(split, {"news": torch.zeros(3), "code": torch.zeros(3)})


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_every_family_can_be_timed(case: Case) -> None:
    reference, (speed,) = measure_paired(tiny_model(case), [tiny_model(case)], WORKLOAD, repeats=1)
    for measured in (reference, speed):
        for name, spread in measured.to_json().items():
            assert 0 < spread["low"] <= spread["median"] <= spread["high"] < math.inf, name
    assert reference.decode_speedup == reference.prefill_speedup == Spread(1.0, 1.0, 1.0)
    assert Speed.from_json(json.loads(json.dumps(speed.to_json()))) == speed


def calls_of(models: dict[str, PreTrainedModel]) -> list[tuple[str, tuple[int, ...]]]:
    """A list that fills with (name, shape of the tokens) as the models are called."""
    calls: list[tuple[str, tuple[int, ...]]] = []

    def recorder(name: str) -> Any:
        return lambda module, args, kwargs: calls.append((name, tuple(kwargs["input_ids"].shape)))

    for name, model in models.items():
        model.register_forward_pre_hook(recorder(name), with_kwargs=True)
    return calls


def test_models_take_turns_pass_by_pass() -> None:
    models = {name: tiny_model(CASES[0]) for name in "RAB"}
    calls = calls_of(models)
    seen: list[tuple[int, int]] = []
    measure_paired(
        models["R"], [models["A"], models["B"]], WORKLOAD, repeats=2, progress=lambda *done: seen.append(done)
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    a_repeat = 2 * (PREFILL_PAIRS + WORKLOAD.generated_tokens)
    passes = calls[-4 * a_repeat :]
    for i, candidate in enumerate("ABAB"):
        repeat = passes[i * a_repeat : (i + 1) * a_repeat]
        assert "".join(name for name, _ in repeat).replace(candidate, "c") == "RccRRccRRccR"
        assert [shape for _, shape in repeat] == [(2, 6)] * 2 * PREFILL_PAIRS + [(2, 1)] * 8
    warm_up = calls[: -4 * a_repeat]
    assert [name for name, shape in warm_up if shape == (2, 6)] == ["R", "A", "B"]


class _Clock:
    """A clock that models move by calling: seconds per token, and a burst of noise now and then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def drive(self, model: PreTrainedModel, token_s: float, noise: Iterator[float]) -> PreTrainedModel:
        def tick(module: Any, args: Any, kwargs: Any) -> None:
            self.now += kwargs["input_ids"].shape[1] * token_s * next(noise)

        model.register_forward_pre_hook(tick, with_kwargs=True)
        return model


def test_speed_is_tokens_by_seconds_and_bursts_do_not_move_a_speedup(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock(monkeypatch)
    draws = random.Random(0)
    bursts = (30.0 if draws.random() < 0.15 else 1.0 for _ in itertools.count())
    reference = clock.drive(tiny_model(CASES[0]), 0.25, bursts)
    candidate = clock.drive(tiny_model(CASES[0]), 0.125, bursts)
    workload = Workload(batch=2, prompt_tokens=6, generated_tokens=40, dtype="float32", threads=1, device="cpu")
    parent, (child,) = measure_paired(reference, [candidate], workload, repeats=3)
    assert child.decode_speedup.median == pytest.approx(2)
    assert parent.decode_tokens_per_s.median == pytest.approx(2 / 0.25)
    assert child.decode_tokens_per_s.median == pytest.approx(2 / 0.125)


def test_prefill_counts_the_tokens_of_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, steady = _Clock(monkeypatch), itertools.repeat(1.0)
    reference, candidate = (clock.drive(tiny_model(CASES[0]), token_s, steady) for token_s in (0.25, 0.125))
    parent, (child,) = measure_paired(reference, [candidate], WORKLOAD, repeats=1)
    assert parent.prefill_tokens_per_s.median == pytest.approx(2 * 6 / (6 * 0.25))
    assert child.prefill_speedup == Spread(*[pytest.approx(2)] * 3)


def test_a_model_is_as_fast_as_itself(model: PreTrainedModel) -> None:
    workload = Workload(batch=1, prompt_tokens=16, generated_tokens=24, dtype="float32", threads=1, device="cpu")
    _, (speed,) = measure_paired(model, [model], workload, repeats=3)
    assert 0.67 < speed.decode_speedup.median < 1.5


def test_threads_and_garbage_collection_come_back_after_an_error(model: PreTrainedModel) -> None:
    before, seen = torch.get_num_threads(), []
    workload = Workload(batch=1, prompt_tokens=4, generated_tokens=2, dtype="float32", threads=before + 1, device="cpu")

    def fail(*_: int) -> None:
        seen.extend([torch.get_num_threads(), gc.isenabled()])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_paired(model, [model], workload, repeats=1, progress=fail)
    assert seen == [before + 1, False]
    assert torch.get_num_threads() == before and gc.isenabled()


def test_a_model_of_another_dtype_is_not_timed(model: PreTrainedModel) -> None:
    other = tiny_model(CASES[0]).bfloat16()
    with pytest.raises(AssertionError, match=r"torch\.bfloat16 for a workload in float32"):
        measure_paired(model, [other], WORKLOAD, repeats=1)


def test_workload_from_a_recipe() -> None:
    workload = Workload.from_recipe(WorkloadRecipe(batch=3, prompt_tokens=9), "bfloat16", "cuda:1")
    assert workload == Workload(3, 9, 32, "bfloat16", torch.get_num_threads(), "cuda:1", graphs=True)
    assert Workload.from_recipe(WorkloadRecipe(threads=7), "float32", "cpu").threads == 7
    assert Workload(**json.loads(json.dumps(workload.to_json()))) == workload
    assert "compile" not in workload.to_json() and replace(workload, compile=True).to_json()["compile"] is True


@given(st.lists(st.floats(1e-6, 1e6), min_size=1))
def test_spread_is_ordered(values: list[float]) -> None:
    spread = Spread.of(values)
    assert min(values) <= spread.low <= spread.median <= spread.high <= max(values)


def test_fingerprint_names_the_machine_s_kind_and_not_the_machine() -> None:
    import getpass
    import platform

    facts = fingerprint()
    assert facts["cpu"] and facts["ram_gib"] and facts["torch_threads"] == torch.get_num_threads()
    assert not {platform.node(), getpass.getuser()} & {str(value) for value in facts.values()}
