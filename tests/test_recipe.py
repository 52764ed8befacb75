"""Recipes: what they refuse, and in which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmprune.core.errors import RecipeError
from llmprune.core.recipe import Recipe
from llmprune.core.recipe_files import copy_recipe, recipe_names, recipe_path
from llmprune.core.recipe_inputs import SPLIT_NAMES, ModelRecipe
from llmprune.core.recipe_text import (
    apply_overrides,
    load_recipe,
    parse_recipe,
    parse_section,
    to_yaml,
    with_absolute_paths,
)

SMALLEST: dict[str, Any] = {"model": {"path": "org/name"}, "data": {"sources": [{"name": "a", "path": "a.txt"}]}}


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(SMALLEST), encoding="utf-8")
    return path


def refused(*overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(apply_overrides(SMALLEST, list(overrides)), origin="mine.yaml")
    return str(caught.value)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_that_comes_along_is_valid_and_survives_yaml(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_path(name))
    copy = tmp_path / "copy.yaml"
    copy.write_text(to_yaml(recipe), encoding="utf-8")
    assert load_recipe(copy) == recipe


def test_the_default_and_the_demo_come_along() -> None:
    assert {"default", "smollm2-135m"} <= set(recipe_names())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("searhc.trials=3", "mine.yaml: searhc: unknown key. `llmprune schema` lists every key"),
        ("search.trails=3", "mine.yaml: search.trails: unknown key"),
        ("search.trials=many", "search.trials: Input should be a valid integer"),
        ("search.trials=0", "search.trials: Input should be greater than or equal to 1, got 0"),
        ("search.trials=1.5", "search.trials: Input should be a valid integer"),
        ("search.minutes=.inf", "search.minutes: Input should be a finite number"),
        ("search.sampler=annealing", "search.sampler: Input should be 'slp', 'evopress', 'linas', 'nsga2'"),
        ("search.targets=[1.2, 0.9]", "search.targets.1: Input should be greater than 1, got 0.9"),
        ("search.budgets=params<=5", "search.budgets: Input should be a valid tuple"),
        ("importance.damp=.nan", "importance.damp: Input should be"),
        ("space.ffn_step=1.5", "space.ffn_step: Value error, give a count from 1 on, or a share"),
        ("space.kv_groups_step=0", "space.kv_groups_step: Value error, give a count from 1 on, or a share"),
        ("workload.generated_tokens=1", "workload.generated_tokens: Input should be greater than or equal to 2"),
        ("model.dtype=int8", "model.dtype: Input should be 'auto', 'float32', 'bfloat16' or 'float16', got 'int8'"),
        ("data.sources=[]", "data.sources: Tuple should have at least 1 item"),
        ("data.sources=[{name: a b, path: x}]", "data.sources.0.name: String should match pattern"),
        ("data.sources=[{name: a}]", "give exactly one of `dataset` (Hub) and `path` (local file)"),
        ("data.sources=[{name: a, path: x, dataset: y}]", "give exactly one of `dataset`"),
        ("data.sources=[{name: a, path: x, weight: .inf}]", "data.sources.0.weight: Input should be a finite number"),
        ("data.sources=[{name: a, path: x}, {name: a, path: y}]", "every source needs a name of its own"),
        ("data.unseen=[{name: a, path: y}]", "every source needs a name of its own, in sources and unseen together"),
        ("data.sources=[{name: a, path: x.txt, messages_field: m}]", "x.txt holds plain text"),
        ("data.bos=yesterday", "data.bos"),
        ("data={}", "an override names section.key, such as search.trials; got 'data'"),
        ("front.size.more=1", "an override names section.key, such as search.trials; got 'front.size.more'"),
        ("search.trials", "an override is key.sub=value, such as search.trials=100; got 'search.trials'"),
        ("=3", "an override is key.sub=value"),
        ("search.trials=[1", "the value of search.trials is not YAML"),
    ],
)
def test_a_bad_override_says_where_and_why(override: str, message: str) -> None:
    assert message in refused(override)


def test_all_problems_are_told_at_once() -> None:
    message = refused("search.trails=3", "front.size=0", "model.dtype=int8")
    assert all(key in message for key in ("search.trails", "front.size", "model.dtype"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "model: missing; data: missing"),
        ({**SMALLEST, "model": {}}, "model.path: missing"),
        ({**SMALLEST, "data": {}}, "data.sources: missing"),
        ({**SMALLEST, "search": None}, "search: Input should be a valid dictionary"),
        ({**SMALLEST, "search": [1]}, "search: Input should be a valid dictionary"),
        ([], "recipe: Input should be a valid dictionary"),
    ],
)
def test_a_bad_recipe_says_where_and_why(data: Any, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(data, origin="mine.yaml")
    assert message in str(caught.value)


def test_a_value_is_not_a_section() -> None:
    with pytest.raises(RecipeError, match=r"search is not a section of a recipe; got 'search\.trials=3'"):
        apply_overrides({**SMALLEST, "search": 5}, ["search.trials=3"])


def test_overrides_are_yaml_and_the_last_one_counts(recipe_file: Path) -> None:
    overrides = [
        "search.trials=7",
        "search.trials=8",
        "search.targets=[1.1, 2]",
        "search.budgets=['params<=1e8']",
        "front.random_draws=null",
        "importance.refit=false",
        "data.sources=[{name: b, dataset: org/set, weight: 3}, {name: c, path: c.txt}]",
        'export.pick="decode_speedup>=1.5"',
    ]
    recipe = load_recipe(recipe_file, overrides)
    assert (recipe.search.trials, recipe.search.targets) == (8, (1.1, 2.0))
    assert recipe.search.budgets == ("params<=1e8",)
    assert recipe.front.random_draws is None and not recipe.importance.refit
    assert [(source.name, source.weight) for source in recipe.data.sources] == [("b", 3.0), ("c", 1.0)]
    assert recipe.export.pick == "decode_speedup>=1.5"


def test_overrides_leave_their_input_alone() -> None:
    data = {**SMALLEST, "search": {"trials": 1}}
    apply_overrides(data, ["search.trials=2", "model.path=other"])
    assert data == {**SMALLEST, "search": {"trials": 1}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: [1", "is not YAML"),
        (b"\xff\xfe", "is not YAML"),
        (b"- 1\n", "a recipe is a mapping of sections"),
        (b"", "a recipe is a mapping of sections"),
        (None, "cannot read recipe .*: No such file"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(path)
    assert "mine.yaml" in str(caught.value)


def test_a_directory_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot read recipe .*: Is a directory"):
        load_recipe(tmp_path)


def test_the_schema_names_every_key() -> None:
    schema = json.loads(json.dumps(Recipe.model_json_schema(), allow_nan=False))
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert schema["required"] == ["model", "data"]
    search = schema["$defs"]["SearchRecipe"]
    assert "trials" in search["properties"] and search["additionalProperties"] is False


def test_splits_have_sizes_of_their_own() -> None:
    data = parse_recipe(apply_overrides(SMALLEST, ["data.unseen=[{name: b, path: b.txt}]"]), origin="").data
    assert (parse_recipe(SMALLEST, origin="").data.splits, data.splits) == (
        SPLIT_NAMES[:5],
        (*SPLIT_NAMES[:5], "unseen"),
    )
    recovering = data.model_copy(update={"recovery_tokens": 512})
    assert recovering.splits == SPLIT_NAMES and recovering.identity() != data.identity()
    short = data.model_copy(update={"seq_len": 64})
    assert {short.seq_len_of(name) for name in SPLIT_NAMES[:5]} == {64} and short.seq_len_of("unseen") == 1024
    assert {name: data.tokens_of(name) for name in SPLIT_NAMES} == {
        "calibration": data.calibration_tokens,
        "estimate": data.estimate_tokens,
        "search": data.search_tokens,
        "validation": data.validation_tokens,
        "test": data.test_tokens,
        "recovery": 0,
        "unseen": data.unseen_tokens,
    }


def test_local_files_are_made_absolute_and_hub_ids_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").touch()
    sources = "data.sources=[{name: a, path: a.txt}, {name: b, dataset: org/set}]"
    unseen = "data.unseen=[{name: c, path: a.txt}]"
    recipe = with_absolute_paths(parse_recipe(apply_overrides(SMALLEST, [sources, unseen]), origin=""))
    assert [source.path for source in recipe.data.unseen] == [str(tmp_path / "a.txt")]
    assert recipe.model.path == "org/name"
    assert [source.path for source in recipe.data.sources] == [str(tmp_path / "a.txt"), None]
    assert with_absolute_paths(recipe) == recipe


def test_a_section_from_elsewhere_is_held_to_the_same_rules() -> None:
    assert parse_section(ModelRecipe, {"path": "a"}).dtype == "auto"
    with pytest.raises(RecipeError, match=r"^dtype: Input should be"):
        parse_section(ModelRecipe, {"path": "a", "dtype": "int4"})


def test_a_recipe_is_copied_but_never_over_another_file(tmp_path: Path) -> None:
    copied = copy_recipe("default", tmp_path)
    assert copied == tmp_path / "default.yaml" and copied.read_bytes() == recipe_path("default").read_bytes()
    assert copy_recipe("default.yaml", tmp_path / "other.yaml").is_file()
    copied.write_text("mine")
    with pytest.raises(RecipeError, match=r"default\.yaml exists; name another file"):
        copy_recipe("default", tmp_path)
    assert copied.read_text() == "mine"
    with pytest.raises(RecipeError, match=r"cannot write .*: No such file"):
        copy_recipe("default", tmp_path / "missing" / "x.yaml")
    with pytest.raises(RecipeError, match=r"no recipe is called 'best'; there are: .*default"):
        copy_recipe("best", tmp_path)
