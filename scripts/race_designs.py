"""What other rules of stopping a race would save: replayed on the windows that a run has scored whole children on.

    python scripts/race_designs.py RUN [--within 0.15]

For every pair of children of one slice of tokens whose figures differ by less than `--within` (relative), one is raced
against the other: the share of the windows that would have been scored before the verdict, and how often the verdict
is not that of all windows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file
from scipy.stats import ttest_1samp

from llmprune.measure.quality.racing import ALPHA, p_value_of_worse

LEAST_WINDOWS = 8
Test = Callable[[Any, Any], float]


def stored(run: Path) -> list[np.ndarray[Any, Any]]:
    """Per slice of tokens the nats of its fully scored children: (children, sources, windows)."""
    slices = []
    for directory in sorted((run / "scores").iterdir()):
        files = [load_file(path) for path in sorted(directory.glob("*.safetensors"))]
        found = [[f[name] for name in sorted(f) if name.startswith("nats:")] for f in files]
        most = max((len(nats) for child in found for nats in child), default=0)
        whole = [child for child in found if all(len(nats) == most for nats in child)]
        if most >= LEAST_WINDOWS and len(whole) > 1:
            slices.append(np.array(whole))
    return slices


def t_test(candidate: Any, reference: Any) -> float:
    difference = candidate - reference
    return float(ttest_1samp(difference, 0, alternative="greater").pvalue) if np.ptp(difference) > 0 else 1.0


def replay(slices: list[np.ndarray[Any, Any]], within: float, looks: Callable[[int], list[int]], test: Test) -> Any:
    shares, wrong = [], 0
    for children in slices:
        windows, figures = children.shape[2], children.sum(axis=(1, 2))
        for i, j in permutations(range(len(children)), 2):
            if abs(figures[i] - figures[j]) >= within * figures.min():
                continue
            kept, scored = True, windows
            for count in looks(windows):
                candidate, reference = (children[k][:, :count].ravel() for k in (i, j))
                if candidate.sum() > reference.sum() and test(candidate, reference) <= ALPHA:
                    kept, scored = False, count
                    break
            shares.append(scored / windows)
            wrong += (kept and figures[i] < figures[j]) != (figures[i] < figures[j])
    return len(shares), float(np.mean(shares)), wrong / len(shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--within", type=float, default=0.15)
    arguments = parser.parse_args()
    slices = stored(arguments.run)
    doubling: Callable[[int], list[int]] = lambda n: [n // 8, n // 4, n // 2, n]  # noqa: E731
    every: Callable[[int], list[int]] = lambda n: list(range(2, n + 1))  # noqa: E731
    for name, looks, test in (
        ("signed ranks, at 1/8, 1/4, 1/2 and all", doubling, p_value_of_worse),
        ("signed ranks, after every window", every, p_value_of_worse),
        ("t-test, at 1/8, 1/4, 1/2 and all", doubling, t_test),
        ("t-test, after every window", every, t_test),
    ):
        pairs, share, wrong = replay(slices, arguments.within, looks, test)
        print(f"{name}: {100 * share:.0f}% of the windows scored, {100 * wrong:.1f}% of {pairs} verdicts wrong")


if __name__ == "__main__":
    main()
