"""What a run gives its guided samplers: estimates that are remembered, seeds along a path, races."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from conftest import Finished

from llmprune.choices.architecture import Architecture
from llmprune.pipeline.judges import Judges
from llmprune.pipeline.prepare import prepare
from llmprune.pipeline.run import Run
from llmprune.pipeline.searching import estimates_for, guide_for
from llmprune.search import guidance
from llmprune.search.guidance import ESTIMATES_KEPT
from llmprune.search.warm_starts import MARGIN


def test_the_last_few_estimates_are_remembered(finished_run: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    run, asked = Run.open(finished_run.path), list[Architecture]()
    prepared = prepare(run)
    space, estimates = prepared.space, estimates_for(run, prepared)

    def estimated(*args: Any, at: Architecture, **kwargs: Any) -> Any:
        asked.append(at)
        return {}

    monkeypatch.setattr(guidance, "estimate_delta_nats", estimated)
    whole = space.shape.architecture
    places = [space.architecture([i % 3, i // 3, 1, 1, 1, 1]) for i in range(ESTIMATES_KEPT + 1)]
    assert whole not in places and len(set(places)) == len(places)
    for at in [*places[:-1], *places[:-1]]:
        estimates.at(at)
    assert asked == places[:-1]
    # One more, and the oldest is forgotten, no other.
    for at in [places[-1], *places[1:], places[0]]:
        estimates.at(at)
    assert asked == [*places, places[0]]
    # What the tables hold is not estimated again.
    assert estimates.at(whole) == prepared.scores
    assert asked == [*places, places[0]]


def test_a_target_that_the_pick_demands_is_aimed_at_from_above(finished_run: Finished) -> None:
    run = Run.open(finished_run.path)
    search = run.recipe.search.model_copy(update={"targets": (1.2, 1.5)})
    prepared = prepare(run)
    for pick, aims in (("decode_speedup>=1.5", (1.2, 1.5 * MARGIN)), ("ppl_ratio<=2", (1.2, 1.5))):
        export = run.recipe.export.model_copy(update={"pick": pick})
        changed = replace(run, recipe=run.recipe.model_copy(update={"search": search, "export": export}))
        guide = guide_for(changed, prepared, Judges(changed, prepared), estimates_for(changed, prepared))
        assert guide is not None and guide.targets == aims
