"""What `make demo` does around the search: the engine that is there, and a child that is served."""

from __future__ import annotations

import sys
from pathlib import Path

import demo_settings
import pytest
import sample_text
from conftest import Finished

from llmprune.core.budgets import parse_pick
from llmprune.core.recipe import DeployRecipe
from llmprune.core.recipe_inputs import ModelRecipe
from llmprune.core.recipe_text import load_recipe
from llmprune.models.loading import load_model
from llmprune.publish.conversion import write_formats

RECIPE = Path(__file__).parent.parent / "recipes" / "smollm2-135m.yaml"


def test_the_demo_searches_for_what_it_serves() -> None:
    recipe = load_recipe(RECIPE)
    assert recipe.workload.engine == "llamacpp"
    assert recipe.deploy.formats == ("hf", "gguf") and recipe.deploy.gguf_type == "q8_0"
    assert min(recipe.search.targets) == recipe.front.baselines_at == parse_pick(recipe.export.pick).budgets[0].limit


def test_where_llama_cpp_loads_the_recipe_stands(capsys: pytest.CaptureFixture[str]) -> None:
    demo_settings.main()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import sys; sys.modules['xllamacpp'] = None" + demo_settings.LOAD, "llama.cpp is needed and not there"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "ends the process with signal 4"),
        ("import sys; sys.exit(3)", "exit code 3"),
    ],
)
def test_where_it_does_not_the_demo_times_torch_and_says_why(
    code: str, why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = demo_settings.problem(code)
    assert found is not None and why in found
    monkeypatch.setattr(demo_settings, "problem", lambda: found)
    demo_settings.main()
    out, err = capsys.readouterr()
    recipe = load_recipe(RECIPE, out.split())
    assert recipe.workload.engine == "torch" and recipe.deploy.formats == ("hf",) and recipe.space.precision == ()
    assert min(recipe.search.targets) == recipe.front.baselines_at == parse_pick(recipe.export.pick).budgets[0].limit
    assert err.startswith("the demo times torch") and why in err


def test_setup_does_not_need_a_wheel_of_llama_cpp() -> None:
    import tomllib

    extras = tomllib.loads((RECIPE.parent.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert not any("xllamacpp" in requirement for requirement in extras["dev"])
    assert any("xllamacpp" in requirement for requirement in extras["llamacpp"])


def test_a_served_child_continues_the_prompt_and_says_how(
    finished_run: Finished, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    place = tmp_path / "export"
    model, tokenizer = load_model(ModelRecipe(path=str(finished_run.export)))
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    write_formats(model, tokenizer, DeployRecipe(formats=("gguf",), gguf_type="f32"), place)
    monkeypatch.setattr(sys, "argv", ["sample_text.py", str(place), "--prompt", "ant1 ant2"])
    monkeypatch.setattr(sample_text, "NEW_TOKENS", 8)
    sample_text.main()
    lines = capsys.readouterr().out.splitlines()
    file = place / "model-F32.gguf"
    assert lines[0] == str(place)
    assert lines[2].startswith(f"{file} in llama.cpp, ") and lines[2].endswith(" tokens/s")
    # In f32 both engines say the same.
    assert lines[3] == lines[1]
    assert lines[4] == f"  llama-cli -m {file} -p 'ant1 ant2' -n 8" and lines[5].startswith("  llama-server -m")
