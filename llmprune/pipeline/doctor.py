"""Whether a machine is ready for llmprune: what is installed, what torch and llama.cpp can do here, how much memory and
disk there is. Nothing is fetched and no secret is read out: of a token it is said that there is one."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from huggingface_hub import constants, get_token
from transformers.utils.versions import require_version

from llmprune.core.errors import ModelError
from llmprune.measure.room import device_memory, existing, free_disk, processors
from llmprune.measure.speed.host import cpu_model
from llmprune.numerics.llamacpp_library import VERSION as LLAMACPP
from llmprune.numerics.llamacpp_library import library
from llmprune.search.workers.storage import masked

State = Literal["ok", "note", "problem"]
"""A note is worth knowing; with a problem, llmprune cannot be used."""

PACKAGES = ("torch", "transformers", "optuna", "lm-eval", "datasets", "accelerate")
LITTLE_MEMORY = 4e9
LITTLE_DISK = 10e9
STORAGE = "LLMPRUNE_STORAGE"
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
NVIDIA = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it is, and what to do about it."""

    name: str
    state: State
    told: str
    todo: str | None = None


def examine() -> list[Finding]:
    """Look at everything, in the order of the screen."""
    return [
        _llmprune(),
        *map(_package, PACKAGES),
        *_devices(),
        _processor(),
        _threads(),
        _memory(),
        *_disks(),
        _llamacpp(),
        _optional("torchao", "pip install 'llmprune[torchao]' to write that format"),
        _optional("vllm", "only needed to serve what is exported for it"),
        _token(),
        _network(),
        _storage(),
    ]


def examined(findings: list[Finding]) -> dict[str, Any]:
    """As JSON; `usable` if there is no problem."""
    usable = all(one.state != "problem" for one in findings)
    return {"usable": usable, "findings": [asdict(one) for one in findings]}


def _llmprune() -> Finding:
    system = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    return Finding("llmprune", "ok", f"{version('llmprune')}, {system}")


def _package(name: str) -> Finding:
    """Held to what llmprune itself asks of it."""
    stated = (text for text in requires("llmprune") or () if re.split(r"[^\w.-]", text)[0] == name)
    wanted = next(stated, name)
    try:
        require_version(wanted)
    except PackageNotFoundError:
        return Finding(name, "problem", "not installed", f"pip install '{wanted}'")
    except ImportError:
        return Finding(name, "problem", f"{version(name)}, and {wanted} is needed", f"pip install '{wanted}'")
    return Finding(name, "ok", version(name))


def _devices() -> Iterator[Finding]:
    """The CPU as torch has it, and each GPU: a device counts once a product was formed there."""
    cuda = torch.version.cuda
    build = f"a build for CUDA {cuda}" if cuda else "a build for CPUs"
    broken = _broken(torch.device("cpu"))
    if broken:
        yield Finding("torch on cpu", "problem", f"{build}, cannot compute: {broken}", "install torch anew")
    elif NVIDIA.exists() and not torch.cuda.is_available():
        why = "install a build for CUDA" if cuda is None else "its driver may be too old for it: see nvidia-smi"
        yield Finding("torch on cpu", "note", f"{build}, which does not see this machine's NVIDIA GPU", why)
    else:
        yield Finding("torch on cpu", "ok", build)
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.device("cuda", index)
        if broken := _broken(device):
            yield Finding(
                f"torch on {device}", "problem", f"cannot compute: {broken}", "use model.device=cpu, or mend it"
            )
            continue
        memory = device_memory(device)
        told = f"{torch.cuda.get_device_name(device)}, {_gb(memory.free_bytes)} of {_gb(memory.total_bytes)} free"
        yield Finding(f"torch on {device}", "ok", told)


def _broken(device: torch.device) -> str | None:
    """Why torch cannot compute on a device; None if it can."""
    try:
        ones = torch.ones(8, 8, device=device)
        right = float((ones @ ones).sum()) == 512.0
    except (RuntimeError, AssertionError) as error:
        return str(error).partition("\n")[0]
    return None if right else "a product of ones is wrong"


def _processor() -> Finding:
    cores, logical = psutil.cpu_count(logical=False) or 0, psutil.cpu_count() or 0
    return Finding("processor", "ok", f"{cpu_model()}, {cores} cores, {logical} logical")


def _threads() -> Finding:
    asked, used, free = os.environ.get("OMP_NUM_THREADS"), torch.get_num_threads(), processors()
    told = f"torch {used}, OMP_NUM_THREADS {asked or 'not set'}, {free} processors for this process"
    if used > free:
        return Finding("threads", "note", told, f"set OMP_NUM_THREADS={free}: more threads than processors are slow")
    return Finding("threads", "ok", told)


def _memory() -> Finding:
    memory = device_memory(torch.device("cpu"))
    told = f"{_gb(memory.free_bytes)} of {_gb(memory.total_bytes)} free"
    told += " (the limit of this process's control group)" if memory.limited else ""
    if memory.free_bytes < LITTLE_MEMORY:
        return Finding("memory", "note", told, "ask llmprune compress MODEL --dry-run what fits")
    return Finding("memory", "ok", told)


def _disks() -> Iterator[Finding]:
    yield _disk("disk here", Path(), "note", "name a run directory elsewhere with --out")
    # Proofs and llama.cpp's files are made there.
    try:
        temporary = Path(tempfile.gettempdir())
        yield _disk("disk, temporary", temporary, "problem", "set TMPDIR to a directory that you can write to")
    except FileNotFoundError as error:
        yield Finding("disk, temporary", "problem", error.strerror or str(error), "set TMPDIR to a directory")
    yield _disk("disk, HF cache", Path(constants.HF_HUB_CACHE), "note", "set HF_HOME to fetch models and texts")


def _disk(name: str, path: Path, refused: State, todo: str) -> Finding:
    where, free = _at_home(path.absolute()), free_disk(path)
    if not os.access(existing(path), os.W_OK):
        return Finding(name, refused, f"{where} cannot be written to", todo)
    if free < LITTLE_DISK:
        return Finding(name, "note", f"{_gb(free)} free at {where}", "models and libraries of blocks take gigabytes")
    return Finding(name, "ok", f"{_gb(free)} free at {where}")


def _llamacpp() -> Finding:
    try:
        library()
    except ModelError as error:
        return Finding("llama.cpp", "note", "cannot be used", str(error))
    except OSError as error:
        # What the package brings may want libraries that are not there.
        return Finding("llama.cpp", "note", f"does not load: {error}", "use workload.engine=torch")
    return Finding("llama.cpp", "ok", f"loads, xllamacpp {LLAMACPP}")


def _optional(name: str, todo: str) -> Finding:
    if importlib.util.find_spec(name) is None:
        return Finding(name, "note", "not installed", todo)
    return Finding(name, "ok", version(name))


def _token() -> Finding:
    if get_token():
        return Finding("Hub token", "ok", "there is one (whose it is, hf auth whoami asks the network)")
    return Finding("Hub token", "note", "none", "for gated models and for llmprune push: hf auth login")


def _network() -> Finding:
    offline = [name for name in OFFLINE if os.environ.get(name, "").upper() in constants.ENV_VARS_TRUE_VALUES]
    if offline:
        return Finding(
            "network", "note", f"not tried; {', '.join(offline)} keeps to what is cached", "unset it to fetch"
        )
    return Finding("network", "ok", "not tried; no variable keeps from it")


def _storage() -> Finding:
    url = os.environ.get(STORAGE)
    told = f"{masked(url)} ({STORAGE}), not tried" if url else f"a file in each run ({STORAGE} is not set)"
    return Finding("trials", "ok", told)


def _at_home(path: Path) -> str:
    """A path that does not say whose home it is in."""
    try:
        return str(Path("~") / path.relative_to(Path.home()))
    except (ValueError, RuntimeError):
        return str(path)


def _gb(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"
