"""What a space can reach, said before hours are spent; and targets beyond it, refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Llmprune
from tiny import paired_by_bytes, spread, tiny_recipe, tiny_space
from transformers import PreTrainedModel

from llmprune.choices.kv_groups import AttentionChoice
from llmprune.choices.space import Space
from llmprune.core.errors import RecipeError
from llmprune.core.recipe import Recipe, SpaceSize
from llmprune.core.recipe_text import apply_overrides, parse_recipe
from llmprune.measure.speed.throughput import Workload
from llmprune.models.parent import load_parent
from llmprune.pipeline.commands import search
from llmprune.pipeline.run import Run
from llmprune.pipeline.run_directory import RunDirectory
from llmprune.tables import reach
from llmprune.tables.reach import PhaseReach, check_reach, described, halved, measure_reach, smallest

REACH = {"decode": PhaseReach(1.6, 1.3), "prefill": PhaseReach(4.0, 1.8)}


def changed(recipe: Recipe, *overrides: str) -> Recipe:
    return parse_recipe(apply_overrides(recipe.model_dump(mode="json"), list(overrides)), origin="changed")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return tiny_recipe(tmp_path_factory.mktemp("reach"))


@pytest.mark.parametrize("size", ["small", "layer", "medium", "large"])
def test_the_smallest_child_of_a_space_is_in_it_and_runs(size: SpaceSize, recipe: Recipe) -> None:
    parent = load_parent(recipe.model)
    space = Space.of(parent.shape, 1, 8, size=size, merge_kv=size == "large")
    least, half = smallest(space), halved(space)
    assert least in space and half in space
    parent.shape.check(least)
    parent.shape.check(half)
    rows = space.shape.rows

    def work(architecture: Any) -> int:
        return sum(rows(choice) for _, choice in architecture.blocks())

    assert work(least) < work(half) < work(space.shape.architecture)
    workload = Workload(1, 4, 2, "float32", 1, "cpu")
    found = measure_reach(parent, space, workload)
    assert found.keys() == {"decode", "prefill"} and all(one.fastest > 0 for one in found.values())


def test_one_attention_stays_and_nothing_else() -> None:
    assert smallest(tiny_space()).layers[0].attention == AttentionChoice(1)
    assert [choice.units for _, choice in smallest(tiny_space()).blocks()] == [1, 0, 0, 0, 0, 0]
    assert [choice.units for _, choice in smallest(tiny_space(size="layer")).blocks()] == [2, 32, 0, 0, 0, 0]
    assert [choice.units for _, choice in halved(tiny_space()).blocks()] == [1, 16] * 3


def test_what_is_untouched_is_what_the_smallest_child_still_takes() -> None:
    assert REACH["decode"].untouched_share == pytest.approx(0.625)
    assert PhaseReach(0.9, 0.8).untouched_share == 1.0
    told = "decode up to 1.60x (1.30x with every block halved), since no choice touches 62% of its time; prefill up to"
    assert told in described(REACH)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["search.targets=[1.2,1.9,1.5]"],
            r"search\.targets asks for 1\.9x in decode, .* at 1\.60x: .*62%.*\[1\.2,1\.5\]",
        ),
        (["search.targets=[1.9]"], r"Set search\.targets=\[1\.15\]"),
        (["search.targets=[4.5]", "search.objective=prefill"], r"asks for 4\.5x in prefill, .* 25% of its time"),
        (["export.pick='decode_speedup>=2'"], r"export\.pick asks for 2x in decode.* Lower export\.pick"),
        (["search.budgets=[prefill_speedup>=9]"], r"search\.budgets asks for 9x in prefill"),
    ],
)
def test_a_target_out_of_reach_is_refused(overrides: list[str], message: str, recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match=message):
        check_reach(REACH, changed(recipe, *overrides))


def test_what_timing_cannot_tell_is_a_warning(recipe: Recipe) -> None:
    barely = changed(recipe, "search.targets=[1.2,1.7]", "export.pick='decode_speedup>=1.75,ppl_ratio<=3'")
    targets, pick = check_reach(REACH, barely)
    assert targets.startswith("search.targets asks for 1.7x") and targets.endswith("so it may not be reached")
    assert pick.startswith("export.pick asks for 1.75x")
    assert check_reach(REACH, changed(recipe, "export.pick='decode_speedup<=9'")) == []


def slow_outside(reference: PreTrainedModel, candidates: Sequence[PreTrainedModel], *rest: Any) -> Any:
    """As of a model whose embedding and head take most of the time."""
    own, others = paired_by_bytes(reference, candidates)
    return own, [replace(other, decode_speedup=spread(1.3), prefill_speedup=spread(1.4)) for other in others]


def test_a_search_ends_before_its_library_and_says_what_would_do(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reach, "measure_paired", slow_outside)
    directory, said = RunDirectory(tmp_path / "run"), list[str]()
    with directory.locked():
        run = Run.start(directory.path, changed(recipe, "search.targets=[1.2,2.0]"))
        with pytest.raises(RecipeError, match=r"timed at 1\.30x: no choice touches 77%.*Set search\.targets=\[1\.2\]"):
            search(run)
        assert not directory.library.exists() and not directory.tokens.exists()
        monkeypatch.setattr(reach, "measure_paired", lambda *_: pytest.fail("what was timed is not timed again"))
        run = Run.start(directory.path, changed(recipe, "search.targets=[1.2,1.4]", "search.trials=1"))
        run.say = said.append
        search(run)
    assert said[0].startswith("within reach of this space, measured: decode up to 1.30x")
    assert said[1].startswith("search.targets asks for 1.4x") and len(said) == 2


def test_every_command_says_what_can_be_reached(
    recipe: Recipe, tmp_path: Path, llmprune: Llmprune, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reach, "measure_paired", slow_outside)
    file, run = tmp_path / "recipe.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    told = "within reach of this space, measured: decode up to 1.30x"
    quick = ("--prompt-tokens", 4, "--generated-tokens", 2, "--repeats", 1)
    inspected = llmprune("inspect", recipe.model.path, *quick)
    assert inspected.code == 0 and told in inspected.out
    assert "are outside of all blocks" in " ".join(inspected.out.split())
    result = llmprune("inspect", recipe.model.path, *quick, "--json").json
    assert result["reach"]["decode"]["fastest"] == 1.3 and 0 < result["outside_blocks"]["decode"] < 1
    dry = llmprune("search", run, "--recipe", file, "--dry-run")
    assert dry.code == 0 and told in dry.out, dry.err
    for command in (("compress", file, "--out", run), ("search", run, "--recipe", file)):
        refused = llmprune(*command, "--dry-run", "search.targets=[2]")
        assert refused.code == 2 and "search.targets asks for 2x in decode" in refused.err
        refused = llmprune(*command, "search.targets=[2]")
        assert refused.code == 2 and "search.targets asks for 2x in decode" in refused.err
        assert not (run / "library").exists()
    warned = llmprune("compress", file, "--out", tmp_path / "other", "--dry-run", "search.targets=[1.35]")
    assert warned.code == 0 and "so it may not be reached" in warned.out and not (tmp_path / "other").exists()
    assert json.loads((run / "reach.json").read_text())["decode"]["untouched_share"] == pytest.approx(1 / 1.3)
