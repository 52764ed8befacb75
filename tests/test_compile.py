"""Compiled workloads: the same logits from a static cache, two graphs a model, and an error where none can be made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from closeness import assert_close
from families import CASES, IDS, Slices, tiny_model, tiny_parent
from torch._inductor import config as inductor
from torch._inductor import cpp_builder
from transformers import PreTrainedModel

from llmprune.choices.architecture import Architecture
from llmprune.core.errors import RecipeError
from llmprune.measure.speed.graphs import StaticGeneration
from llmprune.measure.speed.throughput import Workload, check_compiler, measure_paired, token_ids
from llmprune.models.surgery import prune

PROMPT, GENERATED = 6, 4
COMPILED = Workload(2, PROMPT, GENERATED, "float32", 1, "cpu", compile=True)


@pytest.fixture(autouse=True)
def without_code_generation(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs are captured and run as they are: Inductor's C++ takes half a minute, and is torch's affair."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: compiled(model, dynamic=dynamic, backend="eager"))
    yield
    torch.compiler.reset()


def child_of(layers: list[tuple[int, int]]) -> PreTrainedModel:
    parent = tiny_parent(CASES[0])
    return prune(parent, Architecture.of(layers), Slices(parent))


@pytest.mark.parametrize("layers", [[(3, 40)] * 4, [(0, 40), (2, 7), (0, 0), (3, 0)]], ids=["whole", "mixed"])
def test_compiled_passes_compute_the_child(layers: list[tuple[int, int]]) -> None:
    child = child_of(layers)
    ids_BT, found = token_ids(child, COMPILED), []
    with torch.inference_mode():
        run = StaticGeneration(child, ids_BT, PROMPT, compiled=True)
        for one in (run.prefill, *[run.decode_step] * GENERATED):
            one()
            found.append(run.logits_BTV.clone())
        expected = child(ids_BT).logits[:, PROMPT - 1 :]
    assert_close(torch.cat(found, dim=1), expected)


def test_every_model_has_a_graph_for_prompts_and_one_for_tokens() -> None:
    # More graphs than dynamo makes of one piece of code, each of one layer.
    models = [child_of([(3, width), *[(0, 0)] * 3]) for width in (40, 24, 16, 8, 7, 6)]
    torch._dynamo.utils.counters.clear()
    measure_paired(models[0], models[1:], COMPILED, repeats=2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2 * len(models)


def test_a_window_that_slides_needs_no_graph_for_each_token() -> None:
    """transformers' static cache counts tokens in Python there, and every step was compiled anew."""
    case = CASES[IDS.index("mistral-sliding")]
    model = tiny_model(replace(case, values={**case.values, "num_hidden_layers": 1}))
    workload = replace(COMPILED, generated_tokens=12)
    torch._dynamo.utils.counters.clear()
    measure_paired(model, [model], workload, repeats=2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_without_a_compiler_a_compiled_workload_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    cpp_builder.cpp_compiler_search.cache_clear()
    with pytest.raises(RecipeError, match=r"workload\.compile needs a C\+\+ compiler"):
        check_compiler(torch.device("cpu"))
    check_compiler(torch.device("cuda"))
    cpp_builder.cpp_compiler_search.cache_clear()


def test_the_json_of_a_plain_workload_is_as_it_was() -> None:
    assert "compile" not in replace(COMPILED, compile=False).to_json()
    assert Workload(**COMPILED.to_json()) == COMPILED
