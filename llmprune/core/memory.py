"""Out of memory, as an error of the user's: at which step, what was asked for, what is there, and what takes less.

Libraries raise it under many names, and a process that the kernel killed raises nothing: what they say is read here.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from llmprune.core.errors import LlmpruneError, OutOfMemoryError, shortened
from llmprune.core.progress import step_of

_SIGNS = re.compile(
    r"out ?of ?memory|MemoryError|can('t|not) allocate memory|not enough memory|unable to allocate|ALLOC_FAILED", re.I
)
_ASKED = re.compile(r"(?:tried|unable) to allocate ([\d.]+) ?(bytes|[KMGTPE]iB)", re.I)
_OF_DEVICE = re.compile(r"GPU \d+ has a total capacity of [\d.]+ \wiB of which [\d.]+ \wiB is free")
_CONTAINER = Path("/sys/fs/cgroup")
"""Where Linux says what this process and its neighbours in a container may take together."""

_LESS: Mapping[str, str] = {
    "load|prov|writ|export": "",
    "order": "a lower data.calibration_tokens, importance.method=flap, ",
    "estimat|walk|scoring (choices|what)": "a lower tables.tokens or data.seq_len, ",
    "saves|tim|a second": "a lower workload.batch or workload.prompt_tokens, ",
    "solv|how far": "a lower recover.memory_gb or data.seq_len, ",
    "distil|learn": "recover.gradient_checkpointing=true, recover.lora_rank, a lower data.seq_len, ",
}
"""Settings of what takes memory beside the models, by words of the step."""
_LESS_ANYWHERE = "a lower data.seq_len or workload.batch, "


def tells_of_memory(text: str) -> bool:
    """Whether a library's message says that memory ran out."""
    return _SIGNS.search(text) is not None


def out_of_memory(error: BaseException) -> OutOfMemoryError | None:
    """What to tell the user, if that is what an error is about; one that is the user's already is not looked at."""
    said = f"{type(error).__name__}: {error}"
    if isinstance(error, LlmpruneError) or not tells_of_memory(said):
        return None
    return exhausted(said, step_of(error))


def exhausted(said: str, step: str) -> OutOfMemoryError:
    """The error, from what a library or the kernel said and the step that it happened in ("": in none)."""
    asked, device = _ASKED.search(said), _OF_DEVICE.search(said)
    what = f"{_gib(*asked.groups())} more were asked for" if asked else shortened(" ".join(said.split()).rstrip(": "))
    there = device.group() if device else _of_host()
    return OutOfMemoryError(
        f"out of memory{f' ({step})' if step else ''}: {what}; {there}; {what_takes_less(said, step)}. What was "
        "finished is kept, and the same command goes on from there; what figures depend on is changed in another --out"
    )


def what_takes_less(said: str, step: str) -> str:
    """Settings that make a step smaller."""
    settings = next((names for words, names in _LESS.items() if re.search(words, step)), _LESS_ANYWHERE)
    elsewhere = "model.device=cpu, " if re.search("CUDA|HIP|XPU|MPS", said) else ""
    return f"it takes less with {settings}{elsewhere}model.dtype=bfloat16 or a smaller model"


def return_freed() -> None:
    """Give the kernel back what was freed: glibc keeps most of it for itself where single tensors are below 32 MB."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _gib(number: str, unit: str) -> str:
    return f"{float(number) / 2**30:,.1f} GiB" if unit.lower() == "bytes" else f"{number} {unit}"


def _of_host() -> str:
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    # Outside of a container, and without a limit, there are no such numbers.
    with suppress(OSError, ValueError):
        total = min(total, int((_CONTAINER / "memory.max").read_text()))
        free = min(free, total - int((_CONTAINER / "memory.current").read_text()))
    return f"{free / 2**30:,.1f} GiB of {total / 2**30:,.1f} GiB are free on this machine now"
