"""What a run gives its guided samplers: estimates that are remembered, seeds along a path, races."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import Finished

from llmprune import guidance
from llmprune.architecture import Architecture
from llmprune.guidance import ESTIMATES_KEPT
from llmprune.workspace import Run


def test_the_last_few_estimates_are_remembered(finished_run: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    run, asked = Run.open(finished_run.path), list[Architecture]()

    def estimated(*args: Any, at: Architecture, **kwargs: Any) -> Any:
        asked.append(at)
        return {}

    monkeypatch.setattr(guidance, "estimate_delta_nats", estimated)
    places = [run.space.shape.architecture, *(run.space.architecture([i % 3] * 5 + [i // 3]) for i in range(9))]
    places = list(dict.fromkeys(places))[: ESTIMATES_KEPT + 1]
    for at in [*places[:-1], *places[:-1]]:
        run.estimates.at(at)
    assert asked == places[:-1]
    # One more, and the oldest is forgotten, no other.
    for at in [places[-1], *places[1:], places[0]]:
        run.estimates.at(at)
    assert asked == [*places, places[0]]
