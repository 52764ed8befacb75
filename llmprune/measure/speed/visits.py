"""Models that are timed one at a time, where a GPU has no room for two: each is brought home for a visit, and waits in
CPU memory while the other is there.

In every repeat both are timed, and who came last in one goes first in the next, as passes do elsewhere (see
`throughput`): so a drift of the machine favours none, and there is one visit more than there are repeats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

from transformers import PreTrainedModel

from llmprune.models.waiting import at_home, wait


class Seconds(NamedTuple):
    """Of one model's passes, in the order in which they ran."""

    prefill: list[float]
    decode: list[float]


Visit = Callable[[PreTrainedModel, int], Seconds]
"""Times a model that is at home for so many repeats, and leaves nothing there."""


def in_visits(
    reference: PreTrainedModel,
    candidates: Sequence[PreTrainedModel],
    repeats: int,
    visit: Visit,
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[Seconds, Seconds]]:
    """Of every candidate the reference's seconds and its own, equally many. All of the models wait from now on.

    `progress(done, total)` counts repeats of a candidate.
    """
    for model in (reference, *candidates):
        wait(model)
    found: list[tuple[Seconds, Seconds]] = []
    for i, candidate in enumerate(candidates):
        pair, taken = (reference, candidate), (Seconds([], []), Seconds([], []))
        repeats_left = [repeats, repeats]
        for place, times in groupby(_order(repeats)):
            count = len(list(times))
            with at_home(pair[place]):
                seconds = visit(pair[place], count)
            taken[place].prefill.extend(seconds.prefill)
            taken[place].decode.extend(seconds.decode)
            repeats_left[place] -= count
            if progress is not None:
                progress((i + 1) * repeats - max(repeats_left), repeats * len(candidates))
        found.append(taken)
    return found


def _order(repeats: int) -> list[int]:
    """Who is timed, 0 the reference and 1 the candidate: 0 1, 1 0, 0 1, ..."""
    return [place for repeat in range(repeats) for place in ((1, 0) if repeat % 2 else (0, 1))]
