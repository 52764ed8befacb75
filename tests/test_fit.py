"""Whether a run fits a machine, and what would make it fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import Finished, Llmprune
from transformers import LlamaConfig, Qwen3Config

from llmprune.choices.architecture import ParentShape
from llmprune.choices.space import Space
from llmprune.cli.forecast_view import fit_lines
from llmprune.core.recipe import Recipe
from llmprune.core.recipe_inputs import ModelRecipe
from llmprune.core.recipe_text import parse_recipe
from llmprune.forecast.fit import Stages, fit_of, lacks_of
from llmprune.forecast.forecast import forecast
from llmprune.forecast.plan import Plan, StageCost
from llmprune.forecast.rates import Measured, Rates
from llmprune.measure import room as rooms
from llmprune.measure.room import Room, free_disk, host_memory, processors
from llmprune.measure.speed.throughput import Workload
from llmprune.models.parent import Parent, outline_parent
from llmprune.numerics import llamacpp_library
from llmprune.pipeline.fitting import _with, advise, asked_by, candidates_for, fit_plan, forecast_within, plan_under
from llmprune.pipeline.run_directory import RunDirectory

CPU, GB = torch.device("cpu"), 10**9
ROOM = Room(10, "this machine", 100, "runs/x")
RATES = Rates(1e-3, 1e-3, 1e-2, 1e-3, 1e9, 1e8, 2e9, 0.05, 0.1, 4.0)


def stage(name: str, memory: int, disk: int = 0) -> StageCost:
    return StageCost(name, peak_memory_bytes=memory, disk_bytes=disk)


def test_disk_is_taken_by_one_stage_after_the_other() -> None:
    stages = [stage("a", 10, 60), stage("b", 11), stage("c", 0, 60), stage("d", 0, 0)]
    found = [(lack.stage, lack.what, lack.needed_bytes, lack.free_bytes) for lack in lacks_of(stages, ROOM)]
    assert found == [("b", "memory", 11, 10), ("c", "disk", 120, 100)]


@dataclass
class Machine:
    """Stages whose sizes settings change: memory of one, disk of another."""

    asked: int = 0

    def __call__(self, settings: Sequence[str]) -> Stages | None:
        self.asked += 1
        if "forbidden=1" in settings:
            return None
        memory, disk = 16, 150
        for setting in settings:
            memory -= {"small=1": 4, "small=2": 7, "help=1": 3, "nothing=1": 0, "worse=1": -9}.get(setting, 0)
            disk -= {"disk=1": 60}.get(setting, 0)
        return [stage("a", memory), stage("b", 5, disk)]


def test_settings_are_found_that_make_everything_fit() -> None:
    settings = ["forbidden=1", "nothing=1", "worse=1", "small=1", "help=1", "disk=1"]
    fit = fit_of(ROOM, settings, Machine())
    assert not fit.fits and fit.can_fit and fit.settings == ("small=1", "help=1", "disk=1")
    assert [(lack.stage, lack.setting) for lack in fit.lacks] == [("a", None), ("b", "disk=1")]
    # A second value of a key takes the place of the first, and what is not needed then is left out.
    fit = fit_of(ROOM, ["help=1", "small=1", "small=2", "disk=1"], Machine())
    assert fit.settings == ("help=1", "small=1", "disk=1")
    fit = fit_of(ROOM, ["small=1", "small=2", "disk=1"], Machine())
    assert fit.settings == ("small=2", "disk=1")
    assert [lack.setting for lack in fit.lacks] == ["small=2", "disk=1"]


def test_where_nothing_helps_enough_it_says_what_comes_nearest() -> None:
    fit = fit_of(ROOM, ["help=1", "disk=1"], Machine())
    assert not fit.can_fit and fit.settings == ("help=1", "disk=1")
    data = fit.to_json()
    assert not data["fits_with_settings"] and data["peak_memory_bytes_with_settings"] == 13
    roomy = Room(100, "this machine", 1000, "runs/x")
    fit = fit_of(roomy, ["help=1"], machine := Machine())
    assert fit.fits and fit.can_fit and fit.settings == () and machine.asked <= 2


@pytest.fixture
def outline(tmp_path: Path) -> Parent:
    """Of a Llama of a milliard parameters, as a config."""
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=4096,
    )
    config.save_pretrained(tmp_path / "model")
    return outline_parent(ModelRecipe(path=str(tmp_path / "model"), device="cpu"))


def recipe_for(outline: Parent, **sections: Any) -> Recipe:
    data = {"sources": [{"name": "x", "path": "x"}]}
    return parse_recipe({"model": {"path": "x", "device": "cpu"}, "data": data, **sections}, origin="x")


@pytest.mark.parametrize("memory", [12 * GB, 16 * GB, 20 * GB, 24 * GB])
def test_what_it_recommends_does_fit(memory: int, outline: Parent) -> None:
    recipe = recipe_for(outline, space={"ffn_step": 1024})
    plan, room = plan_under(outline, recipe, CPU), Room(memory, "this machine", 30 * GB, "x")
    fit = fit_plan(plan, outline, CPU, room)
    assert fit.lacks and fit.can_fit and fit.settings
    better = forecast(plan_under(outline, _with(recipe, fit.settings), CPU))
    assert lacks_of(better, room) == []
    for lack in fit.lacks:
        if lack.setting:
            alone = forecast(plan_under(outline, _with(recipe, [lack.setting]), CPU))
            assert (lack.stage, lack.what) not in {(one.stage, one.what) for one in lacks_of(alone, room)}


def test_half_the_bytes_are_forecast_for_half_precision(outline: Parent) -> None:
    whole, half = (
        plan_under(outline, _with(recipe_for(outline), [f"model.dtype={d}"]), CPU) for d in ("float32", "bfloat16")
    )
    assert whole.parent_bytes == 2 * half.parent_bytes and (whole.dtype_bytes, half.dtype_bytes) == (4, 2)


def test_a_run_that_is_there_is_offered_only_what_it_may_change(finished_run: Finished) -> None:
    recipe = finished_run.recipe
    parent = outline_parent(recipe.model)
    plan, room = plan_under(parent, recipe, CPU), Room(1, "this machine", 1, "x")
    free = fit_plan(plan, parent, CPU, room)
    held = fit_plan(plan, parent, CPU, room, directory=RunDirectory(finished_run.path))
    assert "model.dtype=bfloat16" in free.settings
    assert held.settings and all(setting.startswith("front.") for setting in held.settings)


def advised(outline: Parent, device: torch.device = CPU, memory: int = 1000 * GB) -> dict[str, Any]:
    model = ModelRecipe(path="x", device="cpu")
    candidates = candidates_for(outline, model, CPU, Room(memory, "this machine", 1000 * GB, "x"))
    measured = {name: Measured(RATES, None) for name in asked_by(candidates)}
    return advise(candidates, measured, device)


def test_a_cpu_is_best_served_by_llamacpp_and_a_gpu_by_torch(outline: Parent) -> None:
    llamacpp_library.library()
    assert advised(outline)["use"] == "llamacpp"
    assert advised(outline, torch.device("cuda"))["use"] == "default"
    rows = {row["recipe"]: row for row in advised(outline)["recipes"]}
    assert all(row["seconds"] > 0 and row["fit"]["fits"] and row["settings"] == [] for row in rows.values())


def test_a_recipe_that_cannot_be_used_says_why(outline: Parent, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise llamacpp_library.ModelError("llama.cpp is needed and not there")

    monkeypatch.setattr("llmprune.measure.speed.llamacpp_engine.library", missing)
    found = advised(outline)
    assert found["use"] == "default"
    assert {row["recipe"]: row["problem"] for row in found["recipes"]} == {
        "default": None,
        "llamacpp": "llama.cpp is needed and not there",
    }


def test_a_family_whose_layers_llamacpp_has_alike_gets_the_setting(tmp_path: Path) -> None:
    llamacpp_library.library()
    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 8, "vocab_size": 32_000}
    Qwen3Config(**sizes, max_position_embeddings=4096, num_attention_heads=8, num_key_value_heads=4).save_pretrained(
        tmp_path
    )  # type: ignore[arg-type]
    found = advised(outline_parent(ModelRecipe(path=str(tmp_path), device="cpu")))
    assert found["use"] == "llamacpp"
    assert {row["recipe"]: row["settings"] for row in found["recipes"]} == {
        "default": [],
        "llamacpp": ["space.size=small"],
    }


def test_where_no_recipe_fits_none_is_named(outline: Parent) -> None:
    found = advised(outline, memory=GB)
    assert found["use"] is None
    # What cannot be used is not timed.
    assert all(row["fit"]["lacks"] and row["settings"] and row["seconds"] is None for row in found["recipes"])


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    ("own", "files"),
    [
        (
            "0::/job/1\n",
            {
                "job/1/memory.max": "max\n",
                "job/memory.max": "3000\n",
                "job/memory.current": "1500\n",
                "job/memory.stat": "anon 9\ninactive_file 500\n",
                "job/1/memory.current": "1",
            },
        ),
        # In a container, the name may be the host's.
        ("0::/docker/abc\n", {"memory.max": "3000", "memory.current": "1000", "memory.stat": ""}),
        (
            "4:memory:/job\n0::/\n",
            {
                "memory/job/memory.limit_in_bytes": "3000",
                "memory/job/memory.usage_in_bytes": "1200",
                "memory/job/memory.stat": "total_inactive_file 200",
                "memory/memory.limit_in_bytes": "9223372036854771712",
                "memory/memory.usage_in_bytes": "5",
            },
        ),
    ],
)
def test_a_containers_limit_is_read(own: str, files: dict[str, str], tmp_path: Path) -> None:
    write(tmp_path, {**{f"fs/{name}": text for name, text in files.items()}, "own": own})
    memory = host_memory(tmp_path / "fs", tmp_path / "own")
    assert (memory.total_bytes, memory.free_bytes, memory.limited) == (3000, 2000, True)


def test_without_a_limit_the_machines_memory_counts(tmp_path: Path) -> None:
    write(tmp_path, {"own": "0::/\n", "fs/memory.max": "max"})
    for own in ("own", "missing"):
        memory = host_memory(tmp_path / "fs", tmp_path / own)
        assert memory.total_bytes == psutil.virtual_memory().total and not memory.limited
        assert 0 < memory.free_bytes <= memory.total_bytes


def test_a_quota_of_processors_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms.os, "sched_getaffinity", lambda _: set(range(8)))
    write(tmp_path, {"own": "0::/a\n", "fs/a/cpu.max": "250000 100000\n", "fs/cpu.max": "max 100000"})
    assert processors(tmp_path / "fs", tmp_path / "own") == 3
    assert processors(tmp_path / "fs", tmp_path / "missing") == 8


def test_disk_is_that_of_the_nearest_directory(tmp_path: Path) -> None:
    assert 0 < free_disk(tmp_path / "not" / "there") == pytest.approx(free_disk(tmp_path), rel=0.1)


def test_a_dry_run_and_inspect_say_what_fits(
    finished_run: Finished, llmprune: Llmprune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = finished_run.recipe.model.path
    dry = ("search", finished_run.path, "--dry-run", "search.trials=9")
    fits = llmprune(*dry)
    assert fits.code == 0 and "\nfits: " in fits.out and "of memory free on this machine" in fits.out, fits.err
    assert "random weights in the model's shape (3 layers)" in " ".join(fits.out.split())
    # The recipe of a run that is under way is settled.
    assert "recipe default" not in fits.out and llmprune(*dry, "--json").json["recipes"] is None
    monkeypatch.setattr("llmprune.pipeline.inspection.Room.of", lambda *_: Room(10_000, "this machine", 10, "runs/x"))
    tight = llmprune(*dry)
    assert tight.code == 0 and "does not fit: 0 MB of memory free" in tight.out
    assert "search needs" in tight.out and "no setting that was tried" in tight.out
    quick = ("--prompt-tokens", 4, "--generated-tokens", 2, "--repeats", 1, "--device", "cpu")
    told = llmprune("inspect", model, *quick)
    # The texts of recipes have windows of 1,024 tokens.
    assert "recipe default: cannot be used, data.seq_len must be at most parent's 128 positions" in told.out, told.err
    assert "no recipe that comes along can be used here" in told.out
    found = llmprune("inspect", model, *quick, "--json").json["recipes"]
    assert found["use"] is None and [row["recipe"] for row in found["recipes"]] == ["default", "llamacpp"]


def test_a_parent_that_can_wait_does_so_where_it_has_to_and_nowhere_else() -> None:
    """Eight billion parameters in bfloat16: 16.4 GB, on cards of 24 and 80 GiB, and on a CPU."""
    space = Space.of(ParentShape(36, 4096, 8, 4, 128, 12_288), 1, 1536)
    recipe = parse_recipe(
        {"model": {"path": "x"}, "data": {"sources": [{"name": "x", "path": "x"}], "recovery_tokens": 65_536}},
        origin="x",
    )
    workload = Workload(1, 256, 64, "bfloat16", 1, "cuda:0")
    plan = Plan(recipe, space, workload, 151_936, 16_381_452_288, 2, walked=True, walking_bytes=2, can_wait=True)

    def within(gib: int, plan: Plan = plan) -> dict[str, StageCost]:
        room = Room(gib << 30, "cuda:0", 500 * GB, "x")
        return {stage.stage: stage for stage in forecast_within(room, plan)}

    at_home, waiting = within(80), within(24)
    assert list(at_home.values()) == forecast(plan), "the figures of before"
    assert not any(stage.parent_waits for stage in at_home.values())
    who_waits = {name for name, stage in waiting.items() if stage.parent_waits}
    assert who_waits == {name for name, stage in at_home.items() if stage.peak_memory_bytes > 24 << 30}
    assert who_waits >= {"estimate", "together", "probes", "search", "front", "repair", "checkpoints"}
    assert lacks_of(list(waiting.values()), Room(24 << 30, "cuda:0", 500 * GB, "x")) == []
    for name, stage in waiting.items():
        whole = at_home[name]
        assert replace(stage, peak_memory_bytes=whole.peak_memory_bytes, parent_waits=False) == whole
        if name == "estimate":
            assert stage.peak_memory_bytes < plan.parent_bytes, "one layer at a time"
        elif stage.parent_waits:
            # One whole model, and no longer two.
            assert plan.parent_bytes <= stage.peak_memory_bytes <= whole.peak_memory_bytes - plan.parent_bytes
    on_cpu = within(24, replace(plan, can_wait=False))
    assert not any(stage.parent_waits for stage in on_cpu.values())
    assert on_cpu["search"].peak_memory_bytes == at_home["search"].peak_memory_bytes
    said = fit_of(Room(24 << 30, "cuda:0", 500 * GB, "x"), [], lambda settings: list(waiting.values())).to_json()
    assert said["fits"] and "search" in said["parent_waits"]
    assert "  meanwhile the parent waits in CPU memory, in: estimate, " in "\n".join(fit_lines(said))


def test_who_can_wait(outline: Parent) -> None:
    def can_wait(device: str, named: str) -> bool:
        recipe = recipe_for(outline)
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"device": named})})
        return plan_under(outline, recipe, torch.device(device)).can_wait

    assert can_wait("cuda:0", "auto") and can_wait("cuda:1", "cuda:1")
    assert not can_wait("cpu", "auto"), "it is in CPU memory"
    assert not can_wait("cuda:0", "cuda:0,cuda:1"), "what is spread has no home"
