"""Settings that the demo's recipe needs on this machine: none where llama.cpp runs, else those of torch.

    python scripts/demo_settings.py

Prints the settings on one line for `llmprune compress`, and says why on stderr.
"""

from __future__ import annotations

import subprocess
import sys

LOAD = """
import sys
from llmprune.core.errors import ModelError
from llmprune.numerics.llamacpp_library import library
try:
    library()
except ModelError as error:
    sys.exit(str(error))
"""
IN_TORCH = (
    "workload.engine=torch",
    "deploy.formats=[hf]",
    # It reads no such weights, and for widths alone a speed costs more.
    "space.precision=[]",
    "search.targets=[1.36,1.3]",
    "front.baselines_at=1.3",
    "export.pick=decode_speedup>=1.3",
)


def problem(code: str = LOAD) -> str | None:
    """Why llama.cpp cannot be used here; None if it can. Loaded in a process of its own: on a CPU that lacks an
    instruction of the wheel's, the process dies."""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if finished.returncode < 0:
        return f"loading llama.cpp ends the process with signal {-finished.returncode}"
    if finished.returncode:
        lines = finished.stderr.strip().splitlines()
        return lines[-1] if lines else f"loading llama.cpp fails with exit code {finished.returncode}"
    return None


def main() -> None:
    why = problem()
    if why is None:
        return
    print(f"the demo times torch in place of llama.cpp, and exports no gguf: {why}", file=sys.stderr)
    print(*IN_TORCH)


if __name__ == "__main__":
    main()
