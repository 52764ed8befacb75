"""Run a script of ours on a checkpoint as a stranger's interpreter would: nothing of this process is there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmprune.core.errors import ExportError
from llmprune.core.memory import exhausted, tells_of_memory


def in_fresh_process(script: str, checkpoint: Path, *arguments: object) -> dict[str, Any]:
    """What a script prints of a checkpoint as its last line: JSON.

    Raises ExportError if it fails, OutOfMemoryError if it has no room.
    """
    with tempfile.TemporaryDirectory() as modules:
        environment = {
            **os.environ,
            # A module cache of its own: neither reads nor leaves code in the user's.
            "HF_MODULES_CACHE": modules,
            "HF_HUB_OFFLINE": "1",
            "PYTHONWARNINGS": "ignore",
        }
        finished = run_script(script, [str(checkpoint), *map(str, arguments)], environment)
    last = (finished.stderr.strip().splitlines() or ["no output"])[-1]
    killed = finished.returncode == -signal.SIGKILL
    if killed or (finished.returncode != 0 and tells_of_memory(last)):
        weights = sum(file.stat().st_size for file in checkpoint.rglob("*.safetensors"))
        said = f"the process that loads its {weights / 2**30:,.2f} GiB of weights was killed" if killed else last
        raise exhausted(said, "proving a checkpoint in a fresh process")
    if finished.returncode != 0:
        raise ExportError(f"the checkpoint does not load in a fresh process: {last}")
    found: dict[str, Any] = json.loads(finished.stdout.strip().splitlines()[-1])
    return found


def run_script(
    script: str, arguments: Sequence[str], environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a script in an interpreter of its own, which finds no module beside it."""
    return subprocess.run(
        [sys.executable, "-P", script, *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
