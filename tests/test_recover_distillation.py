"""Distillation, held to the plain loss; and a training that was killed to one that was not."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from families import CASES, IDS, Case, Slices, tiny_model, tiny_parent, tokens
from test_recover_sequential import cut, text
from torch.nn import functional
from transformers import PreTrainedModel

from llmprune.core.errors import RunDirectoryError
from llmprune.data.tokens import Split
from llmprune.measure.quality.perplexity import score
from llmprune.models.parent import Parent
from llmprune.models.surgery import prune
from llmprune.recover import student, teacher
from llmprune.recover.adapters import trainable
from llmprune.recover.distillation import Course, Settings, distil, precision_for, seconds_of_window
from llmprune.recover.step_memory import last_states, logits_of, recomputed
from llmprune.recover.student import Student, in_precision, kl_backward
from llmprune.recover.teacher import LiveTeacher, StoredTeacher, Teacher

SETTINGS = Settings(tokens=400, precision="float32", learning_rate=3e-3, checks=5)


def own_copy(child: PreTrainedModel) -> PreTrainedModel:
    """A child whose tensors are its own, all of them to be trained."""
    return copy.deepcopy(child).requires_grad_(True)


def parent_and_child(case: Case = CASES[0], name: str = "heterogeneous") -> tuple[Parent, PreTrainedModel]:
    parent = tiny_parent(case)
    return parent, own_copy(prune(parent, cut(parent, name), Slices(parent)))


def windows(split: Split) -> torch.Tensor:
    return torch.cat([source.windows for source in split.sources.values()])


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_chunks_give_the_models_own_logits(case: Case) -> None:
    model, ids = tiny_model(case), tokens()
    with torch.inference_mode():
        states = last_states(model, ids).flatten(0, 1)
        found = torch.cat([logits_of(model, part) for part in states.split(7)])
        assert_close(found.view(*ids.shape, -1), model(ids).logits)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_the_gradient_is_that_of_the_plain_loss(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(student, "CHUNK", 7)
    monkeypatch.setattr(teacher, "CHUNK", 7)
    parent, child = parent_and_child(case)
    ids, plain = tokens(), own_copy(child)
    loss = kl_backward(LiveTeacher(parent.model), child, 0, ids, ids[:, 1:].numel())
    with torch.no_grad():
        wanted = functional.log_softmax(parent.model(ids).logits[:, :-1].double(), dim=-1)
    found = functional.log_softmax(plain(ids).logits[:, :-1].double(), dim=-1)
    expected = functional.kl_div(found, wanted, reduction="sum", log_target=True) / ids[:, 1:].numel()
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    largest = max(float(p.grad.abs().max()) for p in plain.parameters() if p.grad is not None)
    for (name, own), other in zip(child.named_parameters(), plain.parameters(), strict=True):
        if other.grad is not None:
            assert own.grad is not None
            assert_close(own.grad, other.grad, scale=10 * largest, msg=name)


def test_a_child_learns_and_ends_as_its_best_state(tmp_path: Path) -> None:
    parent, child = parent_and_child()
    before = copy.deepcopy(parent.model.state_dict())
    split = text()
    course = distil(
        LiveTeacher(parent.model), child, windows(split), split, SETTINGS, tmp_path / "state.safetensors", "key"
    )
    assert course.tokens >= SETTINGS.tokens and len(course.checks) == 1 + SETTINGS.checks
    assert course.best[1] < course.checks[0][1]
    assert score(child, split).nats_per_token == pytest.approx(course.best[1], rel=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in parent.model.state_dict().items())


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [0, 100, 250])
def test_a_killed_training_goes_on_as_if_it_had_not_been(tmp_path: Path, at: int) -> None:
    parent, child = parent_and_child()
    whole, killed = own_copy(child), own_copy(child)
    split = text()
    expected = distil(
        LiveTeacher(parent.model), whole, windows(split), split, SETTINGS, tmp_path / "whole.safetensors", "key"
    )

    def kill(done: int, total: int, told: str) -> None:
        if done > at:
            raise Killed

    state = tmp_path / "killed.safetensors"
    with pytest.raises(Killed):
        distil(LiveTeacher(parent.model), killed, windows(split), split, SETTINGS, state, "key", kill)
    course = distil(LiveTeacher(parent.model), own_copy(child), windows(split), split, SETTINGS, state, "key")
    assert course.losses == expected.losses and course.checks == expected.checks
    again = own_copy(child)
    distil(LiveTeacher(parent.model), again, windows(split), split, SETTINGS, state, "key")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())
    other = distil(LiveTeacher(parent.model), own_copy(child), windows(split), split, SETTINGS, state, "another key")
    assert other.losses == expected.losses, "what was made from other inputs is not gone on with"


def test_a_loss_that_is_no_number_ends_the_training_at_the_best_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, child = parent_and_child()
    split, plain = text(), student.kl_backward
    count = 0

    def broken(*arguments: Any) -> float:
        nonlocal count
        count += 1
        return math.nan if count > 12 else plain(*arguments)

    monkeypatch.setattr(student, "kl_backward", broken)
    course = distil(
        LiveTeacher(parent.model), child, windows(split), split, SETTINGS, tmp_path / "state.safetensors", "key"
    )
    assert "the loss is nan" in course.ended and course.tokens < SETTINGS.tokens
    assert score(child, split).nats_per_token == pytest.approx(course.best[1], rel=1e-6)


def test_a_training_that_gets_worse_is_ended() -> None:
    course = Course(checks=[(0, 3.0), (10, 2.0), (20, 2.1), (30, 2.2)])
    assert not course.is_worsening and course.best == (10, 2.0)
    course.checks.append((40, 2.05))
    assert course.is_worsening


def test_the_rate_rises_and_falls() -> None:
    rates = [SETTINGS.rate(tokens) for tokens in range(0, SETTINGS.tokens + 1, 5)]
    peak = rates.index(max(rates))
    assert 0 < peak <= 0.06 * len(rates) and rates == [*sorted(rates[:peak]), *sorted(rates[peak:], reverse=True)]
    assert rates[-1] == pytest.approx(SETTINGS.final_share * SETTINGS.learning_rate)


def test_a_damaged_state_is_an_error_with_its_file(tmp_path: Path) -> None:
    parent, child = parent_and_child()
    split, state = text(), tmp_path / "state.safetensors"
    distil(LiveTeacher(parent.model), own_copy(child), windows(split), split, SETTINGS, state, "key")
    state.write_bytes(state.read_bytes()[:200])
    with pytest.raises(RunDirectoryError, match=r"state\.safetensors is damaged .*delete it"):
        distil(LiveTeacher(parent.model), child, windows(split), split, SETTINGS, state, "key")


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_activations_that_are_computed_again_give_the_same_gradient(case: Case) -> None:
    parent, child = parent_and_child(case)
    ids, plain = tokens(), own_copy(child)
    expected = kl_backward(LiveTeacher(parent.model), plain, 0, ids, ids[:, 1:].numel())
    kept = {id(layer): layer.__dict__.get("forward") for layer in child.modules()}
    with recomputed(child), saved_bytes() as frugal:
        assert kl_backward(LiveTeacher(parent.model), child, 0, ids, ids[:, 1:].numel()) == expected
    with saved_bytes() as lavish:
        kl_backward(LiveTeacher(parent.model), own_copy(plain), 0, ids, ids[:, 1:].numel())
    assert sum(frugal) < 0.7 * sum(lavish)
    assert {id(layer): layer.__dict__.get("forward") for layer in child.modules()} == kept
    for (name, own), other in zip(child.named_parameters(), plain.parameters(), strict=True):
        assert (own.grad is None) == (other.grad is None)
        if own.grad is not None:
            assert other.grad is not None
            assert_close(own.grad, other.grad, msg=name)


@contextmanager
def saved_bytes() -> Iterator[list[int]]:
    """Of what is kept for a backward pass."""
    kept: list[int] = []

    def pack(value: torch.Tensor) -> torch.Tensor:
        kept.append(value.nbytes)
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        yield kept


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_adapters_are_trained_and_merged(case: Case, tmp_path: Path) -> None:
    parent, child = parent_and_child(case)
    child.requires_grad_(False)
    names, modules = list(child.state_dict()), [type(module) for module in child.modules()]
    split, ids, rules = text(), tokens(), replace(SETTINGS, learning_rate=2e-3)
    with trainable(child, 4):
        free = {name: weight for name, weight in child.named_parameters() if weight.requires_grad}
        assert free and all("lora_" in name for name in free)
        # The same windows every step: the loss falls, or nothing is learnt.
        course = distil(
            LiveTeacher(parent.model), child, windows(split)[:2], split, rules, tmp_path / "state.safetensors", "key"
        )
        with torch.no_grad():
            for name, weight in free.items():
                if "lora_B" in name:
                    weight.normal_(std=0.1)
            beside = child(ids).logits
    assert course.losses[-1] < 0.99 * course.losses[0]
    assert [type(module) for module in child.modules()] == modules and list(child.state_dict()) == names
    assert not any(weight.requires_grad for weight in child.parameters())
    with torch.inference_mode():
        assert_close(child(ids).logits, beside)


def test_adapters_begin_alike_whenever_they_begin() -> None:
    found = []
    for _ in range(2):
        torch.rand(3)
        _, child = parent_and_child()
        with trainable(child, 2):
            found.append({name: value.clone() for name, value in child.state_dict().items() if "lora_A" in name})
    first, second = found
    assert first and all(torch.equal(value, second[name]) for name, value in first.items())


def test_precision_is_measured() -> None:
    parent, child = parent_and_child()
    assert precision_for(parent.model, child, tokens()[0]) in ("float32", "bfloat16")
    assert seconds_of_window(LiveTeacher(parent.model), child, tokens()[0], "float32") > 0
    assert all(parameter.grad is None for parameter in child.parameters())


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_half_precision_is_of_products_alone(case: Case) -> None:
    parent, child = parent_and_child(case)
    ids = tokens()
    exact = Student(child, "float32").learn(LiveTeacher(parent.model), 0, ids, ids[:, 1:].numel())
    wanted = {name: p.grad.clone() for name, p in child.named_parameters() if p.grad is not None}
    child.zero_grad()
    half = in_precision(parent.model, "bfloat16")
    assert half.dtype == torch.bfloat16 and parent.model.dtype == torch.float32
    assert [buffer.dtype for buffer in half.buffers()] == [buffer.dtype for buffer in parent.model.buffers()]
    assert len(list(half.parameters())) == len(list(parent.model.parameters())), "what was tied is tied"
    largest = max(float(gradient.norm()) for gradient in wanted.values())
    found = Student(child, "bfloat16").learn(LiveTeacher(half), 0, ids, ids[:, 1:].numel())
    assert found == pytest.approx(exact, rel=0.05)
    for name, parameter in child.named_parameters():
        assert parameter.dtype == torch.float32
        if parameter.grad is not None:
            assert parameter.grad.dtype == torch.float32
            # A key's bias changes no attention: its gradient is rounding alone.
            if float(wanted[name].norm()) < 1e-4 * largest:
                continue
            cosine = functional.cosine_similarity(parameter.grad.flatten(), wanted[name].flatten(), dim=0)
            assert float(cosine) > 0.98, name


def kl_of(teaching: Teacher, child: PreTrainedModel, row: int, ids: torch.Tensor) -> float:
    child.zero_grad()
    return kl_backward(teaching, child, row, ids, ids[:, 1:].numel())


def test_with_every_token_kept_nothing_is_left_out(tmp_path: Path) -> None:
    parent, child = parent_and_child()
    ids, vocabulary = tokens()[:1], parent.model.config.vocab_size
    stored = StoredTeacher(parent.model, 3, ids.shape[1] - 1, vocabulary, tmp_path / "logits")
    expected, plain = kl_of(LiveTeacher(parent.model), child, 0, ids), gradients(child)
    # Log-probabilities are stored in 16 bits.
    assert kl_of(stored, child, 1, ids) == pytest.approx(expected, rel=0.01)
    for name, gradient in gradients(child).items():
        assert float(functional.cosine_similarity(gradient.flatten(), plain[name].flatten(), dim=0)) > 0.999, name


def gradients(child: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: weight.grad.clone() for name, weight in child.named_parameters() if weight.grad is not None}


def test_a_tail_stands_for_what_is_not_kept(tmp_path: Path) -> None:
    """Tokens taken as one can only hide differences: the fewer are kept, the smaller the loss."""
    parent, child = parent_and_child()
    ids = tokens()[:1]
    found = [
        kl_of(StoredTeacher(parent.model, 1, ids.shape[1] - 1, kept, tmp_path / str(kept)), child, 0, ids)
        for kept in (1, 4, 16, 48)
    ]
    assert found[0] > 0 and found == sorted(found)
    assert found[-1] <= kl_of(LiveTeacher(parent.model), child, 0, ids) * 1.01


def test_the_parent_runs_once_for_a_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent, child = parent_and_child()
    ids, file = tokens()[:1], tmp_path / "logits"
    shape = (2, ids.shape[1] - 1, 8, file)
    first = kl_of(StoredTeacher(parent.model, *shape), child, 1, ids)
    whole = file.read_bytes()
    runs = count_runs(monkeypatch)
    again = StoredTeacher(parent.model, *shape)
    assert kl_of(again, child, 1, ids) == first and not runs
    kl_of(again, child, 0, ids)
    assert len(runs) == 1, "another window is new"
    # What a machine that stopped left half-written is made again.
    for place in (len(whole) - 4, 2 * 8 + 4 * (ids.shape[1] - 1) * 8 + 3, 8):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        assert kl_of(StoredTeacher(parent.model, *shape), child, 1, ids) == first
        assert file.read_bytes() == whole
    assert len(runs) == 4


def count_runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    runs, plain = [], teacher.log_probabilities

    def counted(model: PreTrainedModel, ids: torch.Tensor) -> Iterator[torch.Tensor]:
        runs.append("run")
        return plain(model, ids)

    monkeypatch.setattr(teacher, "log_probabilities", counted)
    return runs
