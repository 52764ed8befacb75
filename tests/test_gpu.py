"""What only a CUDA device can show: captured graphs, their times, and the paths on which numbers change devices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from closeness import assert_close
from families import CASES, IDS, Case, Slices, tiny_model, tiny_parent, tokens
from stepwise import child_of, grown, static, with_dynamic_rope
from tiny import save_tiny_llama
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from llmprune.blocks.library import build_library
from llmprune.choices.architecture import Architecture
from llmprune.choices.space import Space
from llmprune.core.errors import ModelError
from llmprune.core.recipe import ImportanceRecipe, WorkloadRecipe
from llmprune.core.recipe_inputs import ModelRecipe
from llmprune.data.tokens import SourceTokens, Split
from llmprune.measure.quality.perplexity import score
from llmprune.measure.speed.graphs import cuda_graphs
from llmprune.measure.speed.throughput import Workload, measure_paired, running, token_ids
from llmprune.models.loading import dtype_of, load_model
from llmprune.models.parent import make_parent
from llmprune.models.surgery import prune
from llmprune.models.waiting import at_home, wait, waits
from llmprune.tables.estimate import estimate_delta_nats

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch finds none here"),
    # What a driver or a library warns of is none of these tests' affair.
    pytest.mark.filterwarnings("default"),
]

DEVICE = "cuda"
LENGTH = 22


@pytest.mark.parametrize("prompt", [6, 11], ids=["into the window", "beyond the window"])
@pytest.mark.parametrize("of", [tiny_model, child_of], ids=["parent", "child"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_replayed_graphs_compute_what_eager_torch_does(
    case: Case, of: Callable[[Case], PreTrainedModel], prompt: int
) -> None:
    model, ids_BT = of(case).to(DEVICE), tokens(2, LENGTH).to(DEVICE)
    replayed = static(model, ids_BT, prompt, cuda_graphs(ids_BT.device))
    for found_BV, expected_BV in zip(replayed, grown(model, ids_BT, prompt), strict=True):
        assert_close(found_BV, expected_BV)


def test_what_cannot_be_captured_is_refused_and_timed_without_graphs() -> None:
    model = with_dynamic_rope().to(DEVICE)
    rules = {"prompt_tokens": 8, "generated_tokens": 4}
    with pytest.raises(ModelError, match=r"workload\.graphs=false"):
        measure_paired(model, [model], Workload.from_recipe(WorkloadRecipe(**rules), "float32", DEVICE), repeats=1)
    eager = Workload.from_recipe(WorkloadRecipe(**rules, graphs=False), "float32", DEVICE)
    _, (speed,) = measure_paired(model, [model], eager, repeats=1)
    assert speed.decode_speedup.median > 0


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
def test_a_pass_is_timed_until_the_device_is_done(graphs: bool) -> None:
    model = tiny_model(CASES[0]).to(DEVICE)
    # Some tenth of a second, of which the host sees nothing unless it waits.
    model.lm_head.register_forward_hook(lambda *_: torch.cuda._sleep(200_000_000))
    workload = Workload.from_recipe(
        WorkloadRecipe(prompt_tokens=8, generated_tokens=4, graphs=graphs), "float32", DEVICE
    )
    with torch.inference_mode(), running([model], token_ids(model, workload), workload) as (run,):
        run.prefill()
        run.decode_step()
        assert run.prefill() > 0.02 and run.decode_step() > 0.02


def test_narrower_and_fewer_blocks_are_each_faster_in_graphs() -> None:
    """What eager torch at batch 1 hides: halved FFNs save time. Large enough that weights are what decode waits for."""
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=6,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=1024,
    )
    torch.manual_seed(0)
    parent = make_parent(LlamaForCausalLM(config).to(DEVICE, torch.bfloat16).eval(), None, source="random")
    library = Slices(parent)
    narrow, short = ([(4, 4096)] * 6, [(4, 8192)] * 3 + [(0, 0)] * 3)
    children = [prune(parent, Architecture.of(layers), library) for layers in (narrow, short)]
    workload = Workload.from_recipe(WorkloadRecipe(prompt_tokens=512), "bfloat16", DEVICE)
    assert workload.graphs
    _, (same, narrower, shorter) = measure_paired(parent.model, [parent.model, *children], workload, repeats=5)
    assert same.decode_speedup.median == pytest.approx(1, abs=0.1)
    for phase in ("decode_speedup", "prefill_speedup"):
        assert 1.05 < getattr(narrower, phase).median < 1.8, phase
        assert 1.3 < getattr(shorter, phase).median < 2.2, phase


def test_a_checkpoint_is_loaded_on_the_device_in_its_own_dtype(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "parent", ["a text"] * 64)
    model, _ = load_model(ModelRecipe(path=str(tmp_path / "parent"), device=DEVICE))
    assert model.device.type == DEVICE and dtype_of(model) == "float32" and not model.training
    assert {parameter.device.type for parameter in model.parameters()} == {DEVICE}


class Found(NamedTuple):
    delta_nats: dict[Any, float]
    nats_per_token: float


def pruned_on(device: str, case: Case) -> Found:
    """A library, the estimates that it leads to, and a child's score, all made on one device."""
    model = tiny_model(case).to(device)
    parent = make_parent(model, None, source=case.model_type)
    windows = SourceTokens(tokens(32, 16), torch.ones(32))
    split = Split("calibration", {"a": windows}, {"a": 1.0}, 16, bos=False)
    space = Space.of(parent.shape, 1, 10)
    library = build_library(parent, split, ImportanceRecipe(), space)
    estimates = dict(estimate_delta_nats(parent, split, library, tokens=256))
    layers = [(parent.shape.kv_groups, 20), (1, 30), (0, 40), (parent.shape.kv_groups, 0)]
    child = prune(parent, Architecture.of(layers), library)
    assert child.device.type == device
    return Found(estimates, score(child, split).nats_per_token)


@pytest.mark.parametrize("case_id", ["llama-gqa", "gemma2-gqa", "gpt2-n_inner"])
def test_library_estimates_and_child_are_those_of_the_cpu(case_id: str) -> None:
    case = CASES[IDS.index(case_id)]
    found, expected = (pruned_on(device, case) for device in (DEVICE, "cpu"))
    assert found.delta_nats == pytest.approx(expected.delta_nats, rel=0.01, abs=1e-4)
    assert found.nats_per_token == pytest.approx(expected.nats_per_token, rel=1e-4)


def test_every_family_is_timed_in_graphs() -> None:
    for case in CASES:
        parent = tiny_parent(case)
        parent.model.to(DEVICE)
        workload = Workload.from_recipe(WorkloadRecipe(prompt_tokens=8, generated_tokens=4), "float32", DEVICE)
        _, (speed,) = measure_paired(parent.model, [child_of(case).to(DEVICE)], workload, repeats=1)
        assert speed.prefill_speedup.median > 0 and speed.decode_speedup.median > 0


@pytest.mark.parametrize("case_id", ["llama-gqa", "gemma2-gqa", "phi3-longrope"])
def test_a_parent_that_waits_is_scored_cut_and_timed_at_home(case_id: str) -> None:
    """As it is beside its child, to the last bit; and its graphs are of weights that are there."""
    parent = tiny_parent(CASES[IDS.index(case_id)])
    parent.model.to(DEVICE)
    split = Split("search", {"a": SourceTokens(tokens(8, 16), torch.ones(8))}, {"a": 1.0}, 16, bos=False)
    layers = [(parent.shape.kv_groups, 20), (1, 30), (0, 40), (parent.shape.kv_groups, 0)]
    expected, child = score(parent.model, split), prune(parent, Architecture.of(layers), Slices(parent))
    of_child = score(child, split)
    wait(parent.model)
    with at_home(parent.model):
        assert parent.model.device.type == DEVICE and score(parent.model, split) == expected
    child = prune(parent, Architecture.of(layers), Slices(parent))
    assert parent.model.device.type == "cpu" and child.device.type == DEVICE and score(child, split) == of_child
    workload = Workload.from_recipe(WorkloadRecipe(prompt_tokens=8, generated_tokens=4), "float32", DEVICE)
    assert workload.graphs
    _, (speed,) = measure_paired(parent.model, [child], workload, repeats=3)
    assert speed.decode_speedup.median > 0 and waits(child)
