"""Fresh interpreters for the scripts that prove checkpoints, forked from one that has imported torch and transformers
and nothing of ours: importing them takes seconds, and a hundred proofs would spend half of the suite's time on it.

What a proof is about stays: another process, without llmprune, that has never seen the checkpoint. That the command
itself starts one is tested by itself (test_checkpoint.py).
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn


class Interpreters:
    """Runs scripts in forks of one process, which is started when it is first needed."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None

    def run_script(
        self, script: str, arguments: Sequence[str], environment: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """As llmprune.models.fresh_process.run_script does it."""
        if self._server is None:
            command = [sys.executable, "-P", __file__]
            self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._server.stdin is not None and self._server.stdout is not None
        with tempfile.TemporaryDirectory() as directory:
            out, err = (Path(directory) / name for name in ("stdout", "stderr"))
            job = {"argv": [script, *arguments], "environment": dict(environment), "out": str(out), "err": str(err)}
            print(json.dumps(job), file=self._server.stdin, flush=True)
            code = int(self._server.stdout.readline())
            return subprocess.CompletedProcess([script, *arguments], code, out.read_text(), err.read_text())

    def stop(self) -> None:
        if self._server is not None:
            self._server.communicate()


def serve() -> None:
    """Run a job a line of stdin, each in a fork; its exit code is a line of stdout."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils

    assert AutoModelForCausalLM and AutoTokenizer, "these import the rest"
    gc.freeze()  # what is imported stays shared with every fork
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            _become(json.loads(line), dynamic_module_utils)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


def _become(job: dict[str, Any], modules: Any) -> NoReturn:
    for stream, file, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, job["out"], os.O_WRONLY),
        (2, job["err"], os.O_WRONLY),
    ):
        os.dup2(os.open(file, flags | os.O_CREAT), stream)
    os.environ.clear()
    os.environ.update(job["environment"])
    # Read when transformers was imported.
    modules.HF_MODULES_CACHE = os.environ["HF_MODULES_CACHE"]
    warnings.simplefilter("ignore")
    sys.argv = job["argv"]
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:  # noqa: BLE001 - as an interpreter ends, whatever was raised
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
