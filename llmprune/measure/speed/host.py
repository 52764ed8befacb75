"""What a machine is, as far as its speed goes: tokens per second of two machines do not compare."""

from __future__ import annotations

import platform
from pathlib import Path

import psutil
import torch


def fingerprint() -> dict[str, str | int]:
    """Processor, cores, memory, torch and GPUs; nothing that names the machine or its user.

    The cores and the memory are the machine's, also where a container may use fewer of them; `torch_threads` are
    those that torch would use now.
    """
    facts: dict[str, str | int] = {
        "cpu": cpu_model(),
        "logical_cores": psutil.cpu_count(logical=True) or 0,
        "physical_cores": psutil.cpu_count(logical=False) or 0,
        "ram_gib": round(psutil.virtual_memory().total / 2**30),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        facts["cuda_devices"] = ", ".join(names)
    return facts


def cpu_model() -> str:
    """The processor's name, as the system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()
