"""The command: exit codes, one line for an error, one object for --json, silence for --quiet."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import Finished, Llmprune, Result
from tiny import contents

from llmprune.cli.options import recipe_from
from llmprune.core.recipe import Recipe
from llmprune.core.recipe_files import recipe_names
from llmprune.core.recipe_text import to_yaml
from llmprune.pipeline.run_directory import RunDirectory
from llmprune.publish.contents import PICTURES

QUICK = ("--prompt-tokens", "8", "--generated-tokens", "4", "--repeats", "1", "--device", "cpu")


@pytest.fixture
def recipe_file(finished_run: Finished, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(to_yaml(finished_run.recipe), encoding="utf-8")
    return path


def assert_one_error(result: Result, message: str) -> None:
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: ") and result.err.count("\n") == 1, result.err
    assert message in result.err


def test_a_model_is_compressed_by_a_recipe_that_comes_along() -> None:
    recipe = recipe_from("a/model", ["search.trials=3"], "llamacpp")
    assert (recipe.model.path, recipe.search.trials, recipe.workload.engine) == ("a/model", 3, "llamacpp")
    assert recipe.space.precision and recipe_from("a/model", None).space.precision == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("compress missing.yaml --out {tmp}/run", "cannot read recipe missing.yaml: No such file"),
        ("compress {recipe} --out {tmp}/run search.trails=3", "search.trails: unknown key"),
        ("compress {recipe} --out {tmp}/run trials", "an override is key.sub=value"),
        ("compress {recipe} --out {tmp}/run export.pick=fast", "a budget is METRIC>=NUMBER"),
        ("compress {recipe} --out {tmp} --quiet", "exists and is not a run directory"),
        ("compress {recipe} --out {recipe} --quiet", "cannot use"),
        ("compress {recipe} --out {tmp}/run model.path={tmp}/nothing --quiet", "is not a directory"),
        ("compress {recipe} --out {tmp}/run space.ffn_step=64 --quiet", "space.ffn_step must be from 1 to"),
        ("compress {recipe} --out {tmp}/run space.merge_kv=true space.size=layer --quiet", "space.merge_kv changes"),
        ("compress {recipe} --out {run} data.seq_len=32 --quiet", "was made with another data.seq_len"),
        ("compress {tmp}/broken.yaml --out {tmp}/run", "is not YAML"),
        ("compress {recipe} --recipe llamacpp --out {tmp}/run", "tiny.yaml is a recipe itself"),
        (
            "compress a/model --recipe llama --out {tmp}/run",
            "no recipe is called 'llama'; there are: bench-smollm2-135m",
        ),
        ("compress {recipe} --out {tmp}/run space.precision=[q4_0] --quiet", "needs workload.engine=llamacpp"),
        (
            "compress {recipe} --out {tmp}/run space.precision=[q4_9] --quiet",
            "space.precision.0: Input should be 'f32'",
        ),
        ("search {tmp}/run", "is not a run directory yet; name a recipe or model with --recipe"),
        ("search {run} search.sampler=best --quiet", "search.sampler: Input should be"),
        ("front {tmp}/run", "is not a run directory yet"),
        ("export {tmp}/run", "is not a run directory yet"),
        ("export {run} --pick decode_speedup>=99 --to {tmp}/child --quiet", "no child on the front holds"),
        ("export {run} --pick 0123456789abcdef --to {tmp}/child --quiet", "no child has id or hash 0123456789abcdef"),
        ("export {run} --pick fast --to {tmp}/child --quiet", "a budget is METRIC>=NUMBER"),
        ("export {run} --to {child} --quiet", "exists and is not empty; use --force"),
        ("export {run} --to {tmp} --force --quiet", "does not look like a checkpoint"),
        ("inspect {tmp}/nothing --quiet", "is not a directory"),
        ("inspect {tmp} --quiet", "holds no config.json"),
        ("inspect {child} --quiet", "is a pruned model already"),
        ("inspect {parent} --dtype int4 --quiet", "dtype: Input should be"),
        ("inspect {parent} --device tpu --quiet", "model.device 'tpu' cannot be used here"),
        ("bench {parent} {tmp}/nothing --quiet", "is not a directory"),
        ("bench {parent} --batch 0", "batch: Input should be greater than or equal to 1"),
        ("eval {parent} --quiet", "does not say what text to evaluate on"),
        (
            "eval {parent} --split best",
            "test, recovery, unseen; got 'best'",
        ),
        ("eval {parent} --data {tmp} --quiet", "holds no tokens.safetensors"),
        ("eval {parent} --data {tmp}/nothing.yaml --quiet", "cannot read recipe"),
        ("push {child} child --licence mit --quiet", "a repository is user/name"),
        ("push {tmp} user/name --licence mit --quiet", "holds no llmprune.json"),
        ("push {run} user/name --licence mit --quiet", "export is not a directory; llmprune export writes one"),
        ("push {child} user/name --dry-run --quiet", "acknowledged the licence of parent"),
        ("validate {tmp}/broken.yaml", "is not YAML"),
        ("validate {recipe} export.pick=fast", "a budget is METRIC>=NUMBER"),
        ("validate {recipe} search.budgets=[params>=x]", "a budget is METRIC>=NUMBER"),
        ("recipes cp best {tmp}", "no recipe is called 'best'; there are:"),
        ("recipes cp default {recipe}", "exists; name another file"),
    ],
)
def test_an_error_of_the_user_is_one_line(
    arguments: str, message: str, llmprune: Llmprune, finished_run: Finished, recipe_file: Path
) -> None:
    tmp = recipe_file.parent
    (tmp / "broken.yaml").write_text("model: [1\n\n  2")
    places = {
        "tmp": tmp,
        "recipe": recipe_file,
        "run": finished_run.path,
        "child": finished_run.export,
        "parent": finished_run.recipe.model.path,
    }
    before = contents(finished_run.path.parent), contents(tmp)
    assert_one_error(llmprune(*(part.format(**places) for part in arguments.split())), message)
    after = contents(finished_run.path.parent), contents(tmp)
    assert after[0] == before[0]
    assert {name: after[1].get(name) for name in before[1]} == before[1]
    assert not (tmp / "child").exists()


def test_a_dry_push_shows_the_files_and_the_card(llmprune: Llmprune, finished_run: Finished) -> None:
    command = ("push", finished_run.export, "user/name", "--licence", "mit", "--dry-run", "--quiet")
    shown = llmprune(*command, "--json").json
    sizes = {file["name"]: file["bytes"] for file in shown["files"]}
    card = shown["card"].encode()
    local = {name: len(content) for name, content in contents(finished_run.export).items()}
    push_list = sizes.pop("llmprune-push.json")
    assert sizes == {**local, "README.md": len(card)} and push_list > 64 * len(sizes)
    sizes["llmprune-push.json"] = push_list
    told = llmprune(*command)
    assert told.code == 0 and told.err == ""
    assert told.out.startswith(f"{len(sizes)} files, {sum(sizes.values()):,} bytes would go to user/name\n")
    assert told.out.endswith(f"\n\n{shown['card']}\n"), "lines of the card are not broken"


@pytest.mark.parametrize("arguments", [["fly"], ["bench"], ["inspect", "--fast"], ["search"], ["recipes", "rm"]])
def test_a_misspelt_command_is_the_users_error(arguments: list[str], llmprune: Llmprune) -> None:
    result = llmprune(*arguments)
    assert (result.code, result.out) == (2, "")
    assert "Usage: " in result.err and "Traceback" not in result.err


def test_a_run_in_use_is_refused(llmprune: Llmprune, copied: Path) -> None:
    with RunDirectory(copied).locked():
        assert_one_error(llmprune("search", copied, "--quiet"), "is in use by another llmprune process")
    assert llmprune("search", copied, "--quiet").code == 0


def test_our_own_faults_are_not_dressed_up(llmprune: Llmprune, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault() -> list[str]:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("llmprune.cli.recipes.recipe_names", fault)
    with pytest.raises(ZeroDivisionError):
        llmprune("recipes", "ls")


def test_a_hub_model_needs_the_network_and_says_so(llmprune: Llmprune, tmp_path: Path) -> None:
    result = llmprune("compress", "org/name-that-is-not-there", "--out", tmp_path / "run", "--quiet")
    assert_one_error(result, "cannot load model org/name-that-is-not-there")


@pytest.mark.parametrize("name", ["1234", "null", "[a", "model: b", "#1"])
def test_a_models_name_is_taken_as_it_stands(name: str, llmprune: Llmprune, tmp_path: Path) -> None:
    assert_one_error(llmprune("compress", name, "--out", tmp_path / "run", "--quiet"), f"cannot load model {name}")


def test_recipes_are_listed_and_copied(llmprune: Llmprune, tmp_path: Path) -> None:
    assert llmprune("recipes", "ls").out.split() == recipe_names()
    assert llmprune("recipes", "ls", "--json").json == {"recipes": recipe_names()}
    copied = llmprune("recipes", "cp", "default", tmp_path)
    assert copied == (0, f"{tmp_path / 'default.yaml'}\n", "")
    assert llmprune("validate", tmp_path / "default.yaml").code == 0


def test_validate_prints_the_complete_recipe(llmprune: Llmprune, finished_run: Finished, recipe_file: Path) -> None:
    printed = llmprune("validate", recipe_file, "search.trials=9")
    checked = llmprune("validate", recipe_file, "search.trials=9", "--json")
    assert printed.err == checked.err == ""
    expected = finished_run.recipe.model_dump(mode="json")
    expected["search"]["trials"] = 9
    assert yaml.safe_load(printed.out) == checked.json == expected


def test_the_schema_is_one_object(llmprune: Llmprune) -> None:
    assert llmprune("schema").json == Recipe.model_json_schema()


def test_inspect_tells_what_each_block_holds(llmprune: Llmprune, finished_run: Finished) -> None:
    result = llmprune("inspect", finished_run.recipe.model.path, *QUICK, "--json", "--quiet")
    assert (result.code, result.err) == (0, "")
    data = result.json
    assert data["shape"]["kv_groups"] == 2 and [layer["layer"] for layer in data["layers"]] == [0, 1, 2]
    for layer in data["layers"]:
        assert layer["attention"]["params"] == 24 * 24 * 2 + 24 * 12 * 2
        assert layer["ffn"]["params"] == 3 * 24 * 32 and layer["ffn"]["bytes"] == 4 * layer["ffn"]["params"]
    for share in ("prefill_share", "decode_share"):
        blocks = [layer[kind][share] for layer in data["layers"] for kind in ("attention", "ffn")]
        assert all(value > 0 for value in blocks) and sum(blocks) < 1
    table = llmprune("inspect", finished_run.recipe.model.path, *QUICK)
    assert table.code == 0 and "KV groups" in table.out and "loading" in table.err


def test_bench_times_against_its_first_directory(llmprune: Llmprune, finished_run: Finished) -> None:
    models = (finished_run.recipe.model.path, finished_run.export)
    result = llmprune("bench", *models, *QUICK, "--json", "--quiet")
    assert (result.code, result.err) == (0, "")
    reference, child = result.json["models"]
    assert [reference["model"], child["model"]] == [str(model) for model in models]
    for phase in ("prefill", "decode"):
        assert reference[f"{phase}_speedup"] == {"median": 1.0, "low": 1.0, "high": 1.0}
        assert child[f"{phase}_speedup"]["median"] > 0 and child[f"{phase}_tokens_per_s"]["median"] > 0
    assert child["params"] < reference["params"]
    assert result.json["measured_on"]["workload"]["prompt_tokens"] == 8
    assert llmprune("bench", finished_run.export, *QUICK, "--quiet").out.count("1.00x") >= 2


@pytest.mark.parametrize("where", ["beside the run", "in the run", "from its recipe"])
def test_eval_gives_the_figures_of_the_front(
    where: str, llmprune: Llmprune, finished_run: Finished, copied: Path, recipe_file: Path, tmp_path: Path
) -> None:
    child, data = Path(shutil.copytree(finished_run.export, tmp_path / "child")), ["--data", copied]
    if where == "in the run":
        child, data = Path(shutil.copytree(child, copied / "export")), []
    elif where == "from its recipe":
        data = ["--data", recipe_file]
    result = llmprune("eval", child, *data, "--split", "validation", *QUICK, "--json", "--quiet")
    assert (result.code, result.err) == (0, "")
    figures = json.loads((finished_run.export / "llmprune.json").read_text())["figures"]
    judged = result.json["models"][-1]
    for key in ("nats_per_token", "nats_per_byte", "ppl"):
        assert judged["quality"][key] == pytest.approx(figures[key], rel=1e-4)
    assert judged["params"] == figures["params"]
    assert set(judged["quality"]["per_source"]) == {"ant", "bee"}
    assert judged["quality"]["measured_on"]["tokens"] == figures["measured_on"]["tokens"]
    assert len(result.json["models"]) == (2 if where == "in the run" else 1), "a run knows the parent's place"


def test_eval_prints_a_row_a_source(llmprune: Llmprune, finished_run: Finished, tmp_path: Path) -> None:
    parent = shutil.copytree(finished_run.recipe.model.path, tmp_path / "parent")
    result = llmprune("eval", parent, "--data", finished_run.path, *QUICK)
    assert result.code == 0
    assert all(name in result.out for name in ("ant", "bee", "mixture", "test split"))


def test_every_stage_of_a_run_reports(
    llmprune: Llmprune, finished_run: Finished, copied: Path, recipe_file: Path
) -> None:
    """All stages are done already: each command finds that out, and reports what is there."""
    shutil.copytree(finished_run.export, copied / "export")
    found = {
        name: llmprune(*arguments, "--json", "--quiet")
        for name, arguments in {
            "search": ["search", copied],
            "front": ["front", copied],
            "compress": ["compress", recipe_file, "--out", copied],
        }.items()
    }
    assert all((result.code, result.err) == (0, "") for result in found.values())
    assert found["search"].json["finished_trials"] == 5 and found["search"].json["new_trials"] == 0
    measured = json.loads((finished_run.path / "front.json").read_text())
    assert found["front"].json == measured
    assert found["compress"].json == {**measured, "exported": found["compress"].json["exported"]}
    printed = {name: llmprune(name, copied) for name in ("search", "front")}
    last = llmprune("compress", recipe_file, "--out", copied).out.splitlines()[-2:]
    exported = found["compress"].json["exported"]["id"]
    lost = next(child["test"]["nats_lost"] for child in measured["children"] if child["id"] == exported)
    assert last[0] == f"exported {exported} to {copied / 'export'}"
    assert last[1].startswith(f"  test (ant+bee, 60 tokens in windows of 16, no BOS): {lost:+.3f} nats a token lost")
    assert "5 trials (0 new)" in printed["search"].out and "stopped by trials" in printed["search"].out
    for record in (measured["parent"], *measured["children"], *measured["baselines"]):
        assert record["id"] in printed["front"].out
        assert f"{record['test']['ppl']:.2f}" in printed["front"].out, "no figure is cut off"
    assert "loading the parent" in printed["front"].err
    pictures = {name: (copied / "export" / name).read_text() for name in PICTURES}
    assert all(text.startswith("<svg") for text in pictures.values())
    assert exported[:8] in pictures["front.svg"] and exported[:8] in pictures["architecture.svg"]
    pushed = llmprune("push", copied, "user/name", "--licence", "mit", "--dry-run", "--json").json
    assert set(PICTURES) <= {file["name"] for file in pushed["files"]} and "](front.svg)" in pushed["card"]


def test_search_begins_a_run_and_tells_of_its_trials(llmprune: Llmprune, recipe_file: Path, tmp_path: Path) -> None:
    result = llmprune("search", tmp_path / "run", "--recipe", recipe_file, "search.trials=2")
    assert result.code == 0 and result.out.startswith("2 trials (2 new)")
    trials = [line for line in result.err.splitlines() if line.strip().startswith("trial")]
    assert len(trials) == 2 and all(line.endswith("x parent PPL)") for line in trials), "a line a trial"
    again = llmprune("search", tmp_path / "run", "search.trials=3", "--json", "--quiet")
    assert (again.json["finished_trials"], again.json["new_trials"], again.err) == (3, 1, "")


def test_a_stranger_s_shell_runs_a_pruned_child(finished_run: Finished) -> None:
    """In a process of its own: registered classes, no trust in remote code, nothing on stderr, an exit code."""
    command = "import sys; sys.argv[0] = 'llmprune'; from llmprune.cli.main import main; main()"
    finished = subprocess.run(
        [sys.executable, "-c", command, "bench", str(finished_run.export), *QUICK, "--json", "--quiet"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (finished.returncode, finished.stderr) == (0, "")
    assert json.loads(finished.stdout)["models"][0]["decode_speedup"]["median"] == 1.0
    config = json.loads((finished_run.export / "config.json").read_text())
    assert config["model_type"].startswith("llmprune_"), "the child is one that stock transformers does not know"
