"""Passes over tensors that never move: the logits of a growing cache, as they are and replayed as graphs."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import miniature_cuda
import pytest
import torch
from closeness import assert_close
from families import CASES, IDS, Case, tiny_model, tokens
from stepwise import child_of, grown, static, with_dynamic_rope
from transformers import PreTrainedModel

from llmprune.core.errors import ModelError, RecipeError
from llmprune.core.recipe import WorkloadRecipe
from llmprune.core.recipe_text import parse_section
from llmprune.measure.record import engine_of
from llmprune.measure.speed.graphs import WARM_UPS, StaticGeneration, as_it_is, cuda_graphs
from llmprune.measure.speed.throughput import Workload, measure_paired, passes_of, running, steady_process, token_ids

CPU = torch.device("cpu")
LENGTH = 18
PROMPTS = {"one token": 1, "into the window": 6, "beyond the window": 11}
GRAPHS = Workload(2, 6, 4, "float32", 1, "cpu", graphs=True)


@pytest.mark.parametrize(
    ("of", "prompt"),
    [
        *((tiny_model, prompt) for prompt in PROMPTS),
        # A whole text one by one is the parent's: a child lacks layers and is narrower, whatever the prompt.
        *((child_of, prompt) for prompt in ("into the window", "beyond the window")),
    ],
    ids=lambda one: {tiny_model: "parent", child_of: "child"}.get(one, one),
)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_every_step_computes_what_it_does_with_a_growing_cache(
    case: Case, of: Callable[[Case], PreTrainedModel], prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sliding windows of these families are 8 tokens wide, and phi3's longrope changes its frequencies after 16."""
    model, ids_BT = of(case), tokens(2, LENGTH)
    expected = grown(model, ids_BT, PROMPTS[prompt])
    miniature_cuda.install(monkeypatch)
    for record in (as_it_is, cuda_graphs(CPU)):
        for found_BV, expected_BV in zip(static(model, ids_BT, PROMPTS[prompt], record), expected, strict=True):
            assert_close(found_BV, expected_BV)


def test_a_window_s_cache_holds_no_more_than_the_window() -> None:
    model = tiny_model(CASES[IDS.index("gemma2-gqa")])
    with torch.inference_mode():
        run = StaticGeneration(model, tokens(2, LENGTH), 6)
    slots = [layer.keys.shape[2] for layer in run._passes._cache.layers]
    assert set(slots) == {8, LENGTH}, "every other layer of Gemma 2 slides"


def test_replays_run_no_python_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = miniature_cuda.install(monkeypatch)
    models = [tiny_model(CASES[0]) for _ in range(3)]
    calls: list[int] = []
    for model in models:
        model.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
    _, speeds = measure_paired(models[0], models[1:], GRAPHS, repeats=3)
    assert len(speeds) == 2 and all(speed.decode_speedup.median > 0 for speed in speeds)
    assert len(graphs) == 2 * len(models), "one for prompts, one for tokens"
    # The cache is laid out by a pass of its own.
    assert calls.count(6) == (1 + WARM_UPS + 1) * len(models) and calls.count(1) == (WARM_UPS + 1) * len(models)


def test_forecasts_count_what_is_run_to_make_a_graph() -> None:
    plain, captured = (passes_of(replace(GRAPHS, graphs=graphs), repeats=3) for graphs in (False, True))
    assert captured == tuple(2 * (WARM_UPS + 1) + passes for passes in plain)


@pytest.mark.parametrize("changes", [{}, {"graphs": False, "compile": True}], ids=["graphs", "compiled"])
def test_what_was_timed_is_let_go_at_once(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is collected while models are timed: what held itself would fill the GPU."""
    miniature_cuda.install(monkeypatch)
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: model)
    model, workload = tiny_model(CASES[0]), replace(GRAPHS, **changes)
    with steady_process(1), torch.inference_mode():
        with running([model], token_ids(model, workload), workload) as (run,):
            run.prefill()
            run.decode_step()
        cache = weakref.ref(run._passes._cache)  # type: ignore[attr-defined]
        assert cache() is not None and not gc.isenabled()
        del run
        assert cache() is None


def test_what_cannot_be_captured_is_an_error_that_names_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    miniature_cuda.install(monkeypatch)
    model = with_dynamic_rope()
    with pytest.raises(ModelError, match=r"not wait for numbers .*not permitted.*workload\.graphs=false"):
        measure_paired(model, [model], GRAPHS, repeats=1)
    measure_paired(model, [model], replace(GRAPHS, graphs=False), repeats=1)


def test_want_of_memory_is_told_as_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    miniature_cuda.install(monkeypatch)

    def run() -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.zeros(1)

    with pytest.raises(torch.OutOfMemoryError):
        cuda_graphs(CPU)(run)


def test_graphs_are_what_a_gpu_is_timed_by_unless_told_otherwise() -> None:
    def timed(device: str, **rules: Any) -> Workload:
        return Workload.from_recipe(WorkloadRecipe(**rules), "bfloat16", device)

    assert timed("cuda:1").graphs and timed("cuda", graphs=True).graphs
    assert not timed("cuda:1", graphs=False).graphs
    assert not any(timed(device).graphs for device in ("cpu", "mps", "xpu:0"))
    with pytest.raises(RecipeError, match=r"workload\.graphs=true needs a CUDA device, and the model is on cpu"):
        timed("cpu", graphs=True)
    both = timed("cuda", compile=True)
    assert both.graphs and both.compile and engine_of(both.to_json()) == "torch, bfloat16, compiled, as CUDA graphs"
    assert not Workload.from_recipe(WorkloadRecipe(engine="llamacpp"), "float32", "cuda").graphs
    with pytest.raises(RecipeError, match="graphs=true is torch's"):
        parse_section(WorkloadRecipe, {"engine": "llamacpp", "graphs": True})


def test_the_json_of_a_workload_without_graphs_is_as_it_was() -> None:
    assert "graphs" not in replace(GRAPHS, graphs=False).to_json()
    assert Workload(**GRAPHS.to_json()) == GRAPHS and GRAPHS.to_json()["graphs"] is True
