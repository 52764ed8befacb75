"""The lower bounds that pyproject.toml declares, as a constraints file: what `make test-oldest` installs.

    python scripts/oldest.py [NAME=VERSION]...

A NAME=VERSION stands in for a bound, where a package index does not have that version any more.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
_BOUND = re.compile(r"([A-Za-z0-9._-]+)>=([0-9.]+)")


def lower_bounds(dependencies: list[str]) -> dict[str, str]:
    """By name; every dependency must declare one."""
    found = {}
    for dependency in dependencies:
        bound = _BOUND.match(dependency)
        if bound is None:
            raise SystemExit(f"every dependency has a lower bound, NAME>=VERSION; got {dependency!r}")
        found[bound[1]] = bound[2]
    return found


def main() -> None:
    bounds = lower_bounds(tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["dependencies"])
    bounds |= dict(argument.split("=", 1) for argument in sys.argv[1:])
    print("\n".join(f"{name}=={version}" for name, version in bounds.items()))


if __name__ == "__main__":
    main()
