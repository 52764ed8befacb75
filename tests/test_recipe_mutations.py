"""Recipes broken in every way that a seed finds: each is refused in few words and little time, or is a valid recipe."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Llmprune

from llmprune.core.budgets import parse_budget, parse_pick
from llmprune.core.errors import MAX_MESSAGE, LlmpruneError, RecipeError
from llmprune.core.recipe_files import recipe_names, recipe_path
from llmprune.core.recipe_text import load_recipe, to_yaml, with_absolute_paths
from llmprune.core.yaml_text import MAX_BYTES, MAX_DEPTH, MAX_NODES
from llmprune.pipeline.run_directory import RunDirectory

CASES = int(os.environ.get("LLMPRUNE_MUTATIONS", "200"))
SECONDS = 2.0

# As YAML, since some of these no dump would write.
VALUES = (
    *("null", "true", "-1", "0", "1.5", ".nan", ".inf", "-.inf", "1e400", "''", "{}", "[]", "[[]]", "[null]", "~", "="),
    *("2001-13-45", "2001-01-01", "1:2:3:4", "0x" + "f" * 9_000, "9" * 9_000, "-" + "7" * 4_400, "0o17", "1_0", "no"),
    *("!!int ''", "!!int x", "!!float ''", "!!bool maybe", "!!timestamp x", "!!binary '@'", "!!set {a, b}", "!!null x"),
    *("!!omap [a: 1]", "!!pairs [a: 1]", "!!python/object:os.system x", "!unknown x", "!!str 1", "!" + "t" * 5_000),
    *(
        '"\\0"',
        '"\\ud800"',
        '"\\e[31m"',
        '"' + "a" * 60_000 + '"',
        "~nobody-at-all/x",
        "'" + "é" * 9_000 + "'",
        "*gone",
    ),
    *("[" * 40 + "]" * 40, "[" * 5_000, "{a: " * 200, "[" + "1," * 3_000 + "]", "{" + "a: 1, " * 50 + "}", "&a [*a]"),
    *(
        "{? [1]: 2}",
        "{? {a: 1}: 2}",
        "{1: 2}",
        "{null: 1}",
        "{<<: 1}",
        "{<<: [{a: 1}]}",
        "- a",
        "a: b: c",
        "|\n  x",
        "@",
    ),
    *("[" + "{a: b}, " * 900 + "]", "{" + ", ".join(f"k{i}: 1" for i in range(900)) + "}", "'" + "/x" * 9_000 + "'"),
)
BYTES = (
    b"\xff",
    b"\x00",
    b"\xfe\xff",
    b"\xef\xbb\xbf",
    b"\x1b[2J",
    b"\t",
    b"\r",
    b"\x80\x80",
    b"---\n",
    b"...\n",
    b"%YAML 9\n",
)


def bomb(levels: int = 9, width: int = 9) -> str:
    lines = [f"a0: &a0 [{', '.join(['lol'] * width)}]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, levels)]
    return "\n".join(lines)


def other_value(rng: random.Random, lines: list[str]) -> None:
    places = [i for i, line in enumerate(lines) if ":" in line]
    i = rng.choice(places)
    lines[i] = f"{lines[i].partition(':')[0]}: {rng.choice(VALUES)}"


def other_key(rng: random.Random, lines: list[str]) -> None:
    i = rng.randrange(len(lines))
    lines[i] = lines[i].replace(
        lines[i].strip().partition(":")[0] or "x", rng.choice(("k" * 9_000, "1", "? x", "trails"))
    )


def twice(rng: random.Random, lines: list[str]) -> None:
    lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))


def without(rng: random.Random, lines: list[str]) -> None:
    del lines[rng.randrange(len(lines))]


def indented(rng: random.Random, lines: list[str]) -> None:
    i = rng.randrange(len(lines))
    lines[i] = rng.choice(("", " ", "   ", "\t", "- ", "? ")) + lines[i].lstrip()


def many(rng: random.Random, lines: list[str]) -> None:
    lines += [f"{rng.choice(('k', '- ', 'search: &s'))}{i}: {rng.choice(VALUES)}" for i in range(rng.choice((5, 500)))]


def aliased(rng: random.Random, lines: list[str]) -> None:
    lines += [bomb(rng.randint(2, 12), rng.randint(2, 12)), f"search: {{budgets: *a{rng.randint(0, 3)}}}"]


MUTATIONS: tuple[Callable[[random.Random, list[str]], None], ...] = (
    *(other_value, other_value, other_value, other_key, twice, without, indented, many, aliased),
)


def mutated(rng: random.Random) -> bytes:
    lines = recipe_path(rng.choice(recipe_names())).read_text(encoding="utf-8").splitlines()
    for _ in range(rng.randint(0, 3)):
        rng.choice(MUTATIONS)(rng, lines)
    content = "\n".join(lines).encode(rng.choice(("utf-8",) * 8 + ("utf-16", "latin-1", "utf-32")), errors="replace")
    for _ in range(rng.choice((0, 0, 0, 1, 5))):
        at = rng.randrange(len(content) + 1)
        content = content[:at] + rng.choice((*BYTES, rng.randbytes(9))) + content[at:]
    match rng.randrange(33):
        case 0:
            return rng.randbytes(3_000)
        case 1:
            return content * 200
        case 2:
            return b""
    return content


def overrides(rng: random.Random) -> list[str]:
    keys = (
        "search.trials",
        "search.targets",
        "data.sources",
        "model.path",
        "front",
        "a.b.c",
        "",
        "k" * 9_000,
        "search.k",
    )
    made = (
        f"{rng.choice(keys)}{rng.choice(('=', '=', '=', ''))}{rng.choice(VALUES)}" for _ in range(rng.randint(0, 2))
    )
    return rng.choice(([], list(made)))


def checked(path: Path, changes: list[str]) -> None:
    """What every command does with a recipe before it loads a model."""
    recipe = with_absolute_paths(load_recipe(path, changes))
    parse_pick(recipe.export.pick)
    for budget in recipe.search.budgets:
        parse_budget(budget)


def assert_bounded(message: str) -> None:
    assert 10 < len(message) <= MAX_MESSAGE
    assert message.isprintable(), "what a file holds does not write on a terminal"


def test_mutated_recipes_are_valid_or_refused_in_few_words_and_little_time(tmp_path: Path) -> None:
    rng, path, refused = random.Random(0), tmp_path / "mine.yaml", 0
    for case in range(CASES):
        content, changes = mutated(rng), overrides(rng)
        path.write_bytes(content)
        began = time.process_time()
        try:
            checked(path, changes)
        except LlmpruneError as error:
            refused += 1
            assert_bounded(str(error))
        took = time.process_time() - began
        assert took < SECONDS, f"case {case} took {took:.1f} s: {content[:300]!r} {changes}"
    assert CASES / 2 < refused < CASES


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("key", ["search.trials", "search.minutes", "search.targets", "data.sources", "model.path"])
def test_every_odd_value_in_every_kind_of_place(key: str, value: str) -> None:
    try:
        checked(recipe_path("default"), [f"{key}={value}"])
    except LlmpruneError as error:
        assert_bounded(str(error))


@pytest.mark.parametrize("start", ["", "model: {path: *a8}\n", "data: {sources: *a8}\n"])
def test_an_alias_bomb_is_refused_before_it_goes_off(start: str, llmprune: Llmprune, tmp_path: Path) -> None:
    path = tmp_path / "bomb.yaml"
    path.write_text(bomb() + "\n" + start)
    began = time.process_time()
    result = llmprune("validate", path)
    assert time.process_time() - began < SECONDS
    assert (result.code, result.out) == (2, "") and len(result.err) <= MAX_MESSAGE
    assert f"it has more than {MAX_NODES:,} values, aliases written out" in result.err


def test_a_run_s_own_recipe_is_read_within_the_same_bounds(llmprune: Llmprune, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(bomb())
    result = llmprune("search", tmp_path, "--quiet")
    assert result.code == 2 and "the run's recipe is damaged" in result.err and len(result.err) <= MAX_MESSAGE
    assert RunDirectory(tmp_path).recipe.read_text() == bomb()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), f"values are nested more than {MAX_DEPTH} deep"),
        ("search: &a {budgets: *a}", "line 1, column 22: an alias stands inside of what it names"),
        ("model: {path: a}\nmodel: {path: b}", "line 2, column 1: the key 'model' is there twice"),
        ("# " + "x" * MAX_BYTES, f"is longer than {MAX_BYTES:,} bytes"),
        ("[" + "1," * MAX_NODES + "]", f"it has more than {MAX_NODES:,} values"),
    ],
)
def test_what_is_beyond_the_bounds_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert message in str(caught.value) and "mine.yaml" in str(caught.value)


def test_aliases_within_the_bounds_are_what_they_name(tmp_path: Path) -> None:
    data: dict[str, Any] = yaml.safe_load(recipe_path("default").read_text(encoding="utf-8"))
    sources = data["data"]["sources"]
    data["data"]["sources"] = [sources[0], {**sources[0], "name": "again"}]
    data["search"] = {"targets": [1.2, 1.5]}
    data["baselines"] = {"at": data["search"]["targets"]}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    assert "*id001" in path.read_text()
    recipe = load_recipe(path)
    assert recipe.baselines.at == recipe.search.targets == (1.2, 1.5)
    assert "*" not in to_yaml(recipe)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("search.trials=true", "search.trials: Input should be a valid integer, got True"),
        ("search.trials='7'", "search.trials: Input should be a valid integer, got '7'"),
        ("search.trials=7.0", "search.trials: Input should be a valid integer, got 7.0"),
        ("search.minutes=true", "search.minutes: Input should be a valid number, got True"),
        ("search.targets=[true]", "search.targets.0: Input should be a valid number, got True"),
        ("model.trust_remote_code='yes'", "model.trust_remote_code: Input should be a valid boolean, got 'yes'"),
        ("model.trust_remote_code=1", "model.trust_remote_code: Input should be a valid boolean, got 1"),
        ("model.revision=1234567", "model.revision: Input should be a valid string, got 1234567"),
        ("search.trials=null", "search.trials: Input should be a valid integer, got None"),
        ('model.path="a\\0b"', "a path holds no NUL character"),
        ("export.pick=" + "x" * 5_000, "a budget is METRIC>=NUMBER"),
    ],
)
def test_types_are_taken_at_their_word(override: str, message: str) -> None:
    with pytest.raises(LlmpruneError) as caught:
        checked(recipe_path("default"), [override])
    assert message in str(caught.value) and len(str(caught.value)) < 500


def test_integers_do_for_floats_and_null_for_what_is_optional() -> None:
    changes = ["search.minutes=3", "search.targets=[2, 3]", "model.revision=null", "front.random_draws=null"]
    recipe = load_recipe(recipe_path("default"), changes)
    assert recipe.search.minutes == 3.0 and recipe.search.targets == (2.0, 3.0)
