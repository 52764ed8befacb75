"""A tiny run with every sampler: the exact number of trials, none of them twice, and on it goes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import optuna
import pytest
from conftest import Finished
from contract import RECORD_KEYS
from test_run import changed, strict_json
from tiny import paired_by_bytes

from llmprune.choices.architecture import Architecture
from llmprune.core.recipe import Recipe, SamplerName
from llmprune.measure.record import child_id
from llmprune.pipeline.commands import front, search
from llmprune.pipeline.prepare import prepare, stock_up
from llmprune.pipeline.run import Run
from llmprune.pipeline.run_directory import RunDirectory
from llmprune.pipeline.searching import estimates_for, study_name, walk_path
from llmprune.search import guidance, judging
from llmprune.search.judging import Judge
from llmprune.search.reward import values_of
from llmprune.search.samplers.make import GUIDED
from llmprune.search.study import finished_trials
from llmprune.search.trial_records import record_of
from llmprune.search.workers.storage import open_journal


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fills with the hash of every architecture that is judged. Models are as fast as they are small."""
    monkeypatch.setattr(judging, "measure_paired", paired_by_bytes)
    hashes: list[str] = []
    judge = Judge.judge

    def counted(self: Judge, architecture: Architecture, name: str) -> Any:
        hashes.append(architecture.hash)
        return judge(self, architecture, name)

    monkeypatch.setattr(Judge, "judge", counted)
    return hashes


@pytest.fixture
def unsearched(copied: Path) -> Path:
    """A run with its library and tables, and no trials."""
    for name in ("study.journal", "front.json"):
        (copied / name).unlink()
    return copied


def study_of(run: Run) -> optuna.Study:
    return optuna.load_study(storage=open_journal(run.directory.journal), study_name=study_name(run, stock_up(run)))


def refuse(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("walked the path again")


def two_sessions(recipe: Recipe, path: Path, judged: list[str]) -> optuna.Study:
    """Six trials, and then three more; checks what holds for every sampler."""
    for trials, new in ((6, 6), (9, 3)):
        run = Run.start(path, changed(recipe, f"search.trials={trials}"))
        outcome = search(run)
        assert (outcome.finished_trials, outcome.new_trials, outcome.stopped_by) == (trials, new, "trials")
    study, stock = study_of(run), stock_up(run)
    finished = finished_trials(study)
    assert len(finished) == len(judged) == len(set(judged)) == 9
    for trial in finished:
        record = record_of(trial)
        architecture = Architecture.from_json(trial.user_attrs["architecture"])
        assert trial.user_attrs["record"].keys() == RECORD_KEYS | {"schema"} and architecture in stock.space
        assert trial.user_attrs["hash"] == record.hash == architecture.hash and record.architecture == architecture
        assert record.id == child_id(record.hash, stock.library.hash)
        assert trial.values == values_of(record, run.recipe.search)
    assert {trial.user_attrs["hash"] for trial in finished} == set(judged)
    return study


@pytest.mark.parametrize("sampler", get_args(SamplerName))
def test_every_sampler_searches_and_goes_on(
    sampler: SamplerName, finished_run: Finished, unsearched: Path, judged: list[str]
) -> None:
    recipe = changed(finished_run.recipe, f"search.sampler={sampler}", "search.targets=[1.1, 1.2]")
    study = two_sessions(recipe, unsearched, judged)
    labels = [label for trial in finished_trials(study) if (label := trial.user_attrs.get("warm_start"))]
    seeds = [seed["label"] for seed in strict_json(unsearched / "seeds.json")]
    assert labels[:2] == ["parent", "path-1.1x"] and seeds == ["path-1.1x", "path-1.2x"]
    # Guided samplers start from the parent, the path, the knapsack and uniform width alone.
    plainest = {label for label in labels if label.startswith("uniform-")}
    assert plainest and (not any(label.startswith("depth-") for label in labels)) == (sampler in GUIDED)


@pytest.mark.parametrize("reward", ["mnas-soft", "mnas-hard"])
def test_a_search_for_a_reward_goes_on_and_has_a_front(
    reward: str, finished_run: Finished, unsearched: Path, judged: list[str]
) -> None:
    recipe = changed(finished_run.recipe, f"search.reward={reward}", "search.sampler=tpe")
    study = two_sessions(recipe, unsearched, judged)
    assert len(study.directions) == 1
    assert front(Run.open(unsearched)).children


def test_the_default_sampler_leaves_its_seeds_and_does_not_walk_again(
    finished_run: Finished, copied: Path, judged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert finished_run.recipe.search.sampler == "slp"
    seeds = (copied / "seeds.json").read_bytes()
    assert [seed["label"] for seed in strict_json(copied / "seeds.json")] == ["path-1.2x"]
    monkeypatch.setattr(guidance, "walk", refuse)
    outcome = search(Run.start(copied, changed(finished_run.recipe, "search.trials=7")))
    assert (outcome.finished_trials, outcome.new_trials) == (7, 2)
    assert (copied / "seeds.json").read_bytes() == seeds


@pytest.mark.parametrize(
    ("change", "again"),
    [("search.trials=6", False), ("search.seed=3", False), ("search.targets=[1.3]", True), (None, True)],
)
def test_a_path_is_walked_again_only_for_other_targets_or_if_it_is_gone(
    change: str | None, again: bool, finished_run: Finished, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walked: list[Any] = []
    walk: Callable[..., Any] = guidance.walk

    def counted(*args: Any, **kwargs: Any) -> Any:
        walked.append(args)
        return walk(*args, **kwargs)

    monkeypatch.setattr(guidance, "walk", counted)
    if change is None:
        RunDirectory(copied).seeds.unlink()
    recipe = changed(finished_run.recipe, change) if change else finished_run.recipe

    def seeds() -> Any:
        run = Run.start(copied, recipe)
        prepared = prepare(run)
        return walk_path(run, prepared, estimates_for(run, prepared))

    first, second = seeds(), seeds()
    assert first == second and len(walked) == int(again)
