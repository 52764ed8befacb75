"""Distillation, held to the plain loss; and a training that was killed to one that was not."""

from __future__ import annotations

import copy
import math
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
from llmprune.recover import distillation
from llmprune.recover.chunks import last_states, logits_of
from llmprune.recover.distillation import Course, Settings, distil, kl_backward, precision_for

SETTINGS = Settings(tokens=400, precision="float32", learning_rate=3e-3, checks=5)


def own_copy(child: PreTrainedModel) -> PreTrainedModel:
    """A child whose tensors are its own."""
    return copy.deepcopy(child)


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
    monkeypatch.setattr(distillation, "CHUNK", 7)
    parent, child = parent_and_child(case)
    ids, plain = tokens(), own_copy(child).requires_grad_(True)
    child.requires_grad_(True)
    loss = kl_backward(parent.model, child, ids, ids[:, 1:].numel(), "float32")
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
    course = distil(parent.model, child, windows(split), split, SETTINGS, tmp_path / "state.safetensors", "key")
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
    expected = distil(parent.model, whole, windows(split), split, SETTINGS, tmp_path / "whole.safetensors", "key")

    def kill(done: int, total: int, told: str) -> None:
        if done > at:
            raise Killed

    state = tmp_path / "killed.safetensors"
    with pytest.raises(Killed):
        distil(parent.model, killed, windows(split), split, SETTINGS, state, "key", kill)
    course = distil(parent.model, own_copy(child), windows(split), split, SETTINGS, state, "key")
    assert course.losses == expected.losses and course.checks == expected.checks
    again = own_copy(child)
    distil(parent.model, again, windows(split), split, SETTINGS, state, "key")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())
    other = distil(parent.model, own_copy(child), windows(split), split, SETTINGS, state, "another key")
    assert other.losses == expected.losses, "what was made from other inputs is not gone on with"


def test_a_loss_that_is_no_number_ends_the_training_at_the_best_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, child = parent_and_child()
    split, plain = text(), distillation.kl_backward
    count = 0

    def broken(*arguments: Any) -> float:
        nonlocal count
        count += 1
        return math.nan if count > 12 else plain(*arguments)

    monkeypatch.setattr(distillation, "kl_backward", broken)
    course = distil(parent.model, child, windows(split), split, SETTINGS, tmp_path / "state.safetensors", "key")
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
    distil(parent.model, child, windows(split), split, SETTINGS, state, "key")
    state.write_bytes(state.read_bytes()[:200])
    with pytest.raises(RunDirectoryError, match=r"state\.safetensors is damaged .*delete it"):
        distil(parent.model, child, windows(split), split, SETTINGS, state, "key")


def test_precision_is_measured() -> None:
    parent, child = parent_and_child()
    child.requires_grad_(True)
    precision, seconds = precision_for(parent.model, child, tokens()[0])
    assert precision in ("float32", "bfloat16") and seconds > 0
    assert all(parameter.grad is None for parameter in child.parameters())


def test_half_precision_is_of_products_alone() -> None:
    parent, child = parent_and_child()
    child.requires_grad_(True)
    ids = tokens()
    exact = kl_backward(parent.model, child, ids, ids[:, 1:].numel(), "float32")
    wanted = {name: p.grad.clone() for name, p in child.named_parameters() if p.grad is not None}
    child.zero_grad()
    found = kl_backward(parent.model, child, ids, ids[:, 1:].numel(), "bfloat16")
    assert found == pytest.approx(exact, rel=0.05)
    for name, parameter in child.named_parameters():
        assert parameter.dtype == torch.float32
        if parameter.grad is not None:
            assert parameter.grad.dtype == torch.float32
            cosine = functional.cosine_similarity(parameter.grad.flatten(), wanted[name].flatten(), dim=0)
            assert float(cosine) > 0.98, name
