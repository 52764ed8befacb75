"""Where a model is put: devices by name, one GPU or several, and what does not fit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from families import CASES, IDS, tiny_model

from llmprune.core.errors import ModelError
from llmprune.models import placement
from llmprune.models.placement import check_spread, gpus_to_spread_over, named_devices, resolve_device, room_on

LLAMA = CASES[IDS.index("llama-gqa")]


@pytest.fixture
def three_gpus(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Three that torch speaks of; free bytes of each."""
    free = {0: 10**9, 1: 2 * 10**9, 2: 3 * 10**9}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (free[gpu], 10**10))
    monkeypatch.setattr(placement, "_check_usable", lambda name, device, key: None)
    return free


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("cpu,cuda:0", "--workers must name devices of one kind, whose speeds compare; got 'cpu,cuda:0', cpu and cuda"),
        ("cuda:0,cuda", "--workers numbers each of several GPUs, as in cuda:0,cuda:1; got 'cuda'"),
        ("cuda:1,cuda:0,cuda:1", "--workers names cuda:1 twice; name each GPU once"),
        ("cuda:98,cuda:99", "--workers 'cuda:98' cannot be used here"),
        ("cpu,", "--workers '' cannot be used here"),
        ("gpu7", "--workers 'gpu7' cannot be used here .*; use another, such as cpu"),
    ],
)
def test_devices_that_cannot_work_together_are_refused(names: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        named_devices(names, "--workers")


def test_a_cpu_may_be_named_more_than_once() -> None:
    assert named_devices("cpu, cpu:0,cpu") == [torch.device("cpu")] * 3


def test_one_gpu_holds_what_fits_with_room_for_children(three_gpus: dict[int, int]) -> None:
    config = tiny_model(LLAMA).config
    weights = 4 * sum(weight.numel() for weight in tiny_model(LLAMA).parameters())
    three_gpus[0] = int(placement.ROOM_FOR_CHILDREN * weights) + 1
    assert gpus_to_spread_over("auto", config, torch.float32) == []
    assert gpus_to_spread_over("auto", config, "auto") == []
    three_gpus[0] -= 2
    assert gpus_to_spread_over("auto", config, torch.float32) == [0, 1, 2]
    assert gpus_to_spread_over("auto", config, torch.bfloat16) == []
    assert gpus_to_spread_over("cuda:1", config, torch.float32) == gpus_to_spread_over("cpu", config, "auto") == []


def test_named_gpus_are_spread_over_and_no_others(three_gpus: dict[int, int]) -> None:
    assert gpus_to_spread_over("cuda:2,cuda:1", None, "auto") == [2, 1]
    assert room_on([2, 1]) == {2: three_gpus[2], 1: three_gpus[1]}
    assert resolve_device("cuda:2,cuda:1") == torch.device("cuda:2")


def test_a_model_is_not_spread_over_a_cpu() -> None:
    with pytest.raises(ModelError, match=r"model\.device spreads a model over GPUs, got 'cpu,cpu'; use cpu"):
        resolve_device("cpu,cpu")


def test_a_part_that_no_gpu_holds_is_an_error() -> None:
    model = SimpleNamespace(hf_device_map={"model.layers.0": 0, "model.layers.1": "cpu", "lm_head": "disk"})
    with pytest.raises(ModelError, match=r"big does not fit .* GPUs \(cpu and disk would hold a part\); name more"):
        check_spread(model, "big")  # type: ignore[arg-type]
    check_spread(SimpleNamespace(hf_device_map={"a": 0, "b": 1}), "big")  # type: ignore[arg-type]
