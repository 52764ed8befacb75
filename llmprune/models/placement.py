"""Where a model lies: on one device or, where one GPU is too small, spread over several by accelerate."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmprune.core.errors import ModelError, quoted, shortened

ROOM_FOR_CHILDREN = 2.5
"""A GPU holds a run if its free memory is so many times the parent's weights: a child of its size lies beside it, and
what both compute."""


def named_devices(text: str, key: str = "model.device") -> list[torch.device]:
    """The devices in a list with commas, such as "cuda:0,cuda:1". Raises ModelError, which names the `key`, unless all
    are of one kind, GPUs are numbered and named once, and torch can use each."""
    names = [name.strip() for name in text.split(",")]
    devices = [_parsed(name, key) for name in names]
    kinds = sorted({device.type for device in devices})
    if len(kinds) > 1:
        raise ModelError(
            f"{key} must name devices of one kind, whose speeds compare; got {quoted(text)}, {' and '.join(kinds)}"
        )
    for i, (name, device) in enumerate(zip(names, devices, strict=True)):
        if kinds != ["cpu"] and len(names) > 1 and device.index is None:
            raise ModelError(f"{key} numbers each of several GPUs, as in cuda:0,cuda:1; got {quoted(name)}")
        if kinds != ["cpu"] and device in devices[:i]:
            raise ModelError(f"{key} names {name} twice; name each GPU once")
    for name, device in zip(names, devices, strict=True):
        _check_usable(name, device, key)
    return devices


def resolve_device(name: str) -> torch.device:
    """The device a recipe names; of several the first, where inputs go. Raises ModelError if torch cannot use it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    devices = named_devices(name)
    if len(devices) > 1 and devices[0].type == "cpu":
        raise ModelError(f"model.device spreads a model over GPUs, got {quoted(name)}; use cpu")
    return devices[0]


def gpus_to_spread_over(device: str, config: Any, dtype: torch.dtype | str) -> list[int]:
    """Numbers of the GPUs that a model of this config is spread over; none where one device is to hold it.

    Those that `device` names; of "auto" all, if there are several and a run does not fit on the first.
    """
    if "," in device:
        return [one.index for one in named_devices(device)]
    gpus = list(range(torch.cuda.device_count())) if device == "auto" else []
    if len(gpus) < 2 or ROOM_FOR_CHILDREN * _weight_bytes(config, dtype) <= _free_bytes(0):
        return []
    return gpus


def room_on(gpus: list[int]) -> dict[int | str, int]:
    """The memory, in bytes, that accelerate may use of each, and of nothing else."""
    return {gpu: _free_bytes(gpu) for gpu in gpus}


def device_map_of(model: PreTrainedModel) -> dict[str, Any]:
    """Where accelerate has put each module, by its name; empty if it did not put them."""
    return getattr(model, "hf_device_map", {})


def is_spread(model: PreTrainedModel) -> bool:
    """Whether a model lies on several devices, with hooks that move its activations."""
    return len(set(device_map_of(model).values())) > 1


def check_spread(model: PreTrainedModel, path: str) -> None:
    """Raises ModelError if accelerate put a part of a model where no GPU computes."""
    elsewhere = {str(place) for place in device_map_of(model).values()} & {"cpu", "disk"}
    if elsewhere:
        raise ModelError(
            f"{shortened(path)} does not fit into the free memory of its GPUs ({' and '.join(sorted(elsewhere))} would "
            "hold a part); name more of them in model.device, or a smaller model.dtype"
        )


def _parsed(name: str, key: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise _unusable(name, error, key) from None
    # A CPU has one number or none.
    return torch.device("cpu") if device.type == "cpu" else device


def _check_usable(name: str, device: torch.device, key: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise _unusable(name, error, key) from None


def _unusable(name: str, error: Exception, key: str) -> ModelError:
    first_line = str(error).partition("\n")[0]
    return ModelError(f"{key} {quoted(name)} cannot be used here ({shortened(first_line)}); use another, such as cpu")


def _weight_bytes(config: Any, dtype: torch.dtype | str) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    if isinstance(dtype, str):
        dtype = config.dtype or config.get_text_config().dtype or torch.float32
    assert isinstance(dtype, torch.dtype)
    numbers: int = sum(parameter.numel() for parameter in model.parameters())
    return dtype.itemsize * numbers


def _free_bytes(gpu: int) -> int:
    free: int = torch.cuda.mem_get_info(gpu)[0]
    return free
