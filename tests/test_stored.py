"""Types of weights as choices: offered where they fit, rounded as a file holds them, estimated, repaired and served."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args
from unittest.mock import patch

import gguf
import pytest
import torch
from closeness import assert_close, tolerance
from families import COMMON, Case, Slices, tiny_parent, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from test_run import changed
from test_sensitivity import estimate_by_hand
from tiny import spread, tiny_recipe
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llmprune.blocks.library import build_library
from llmprune.choices.architecture import DROPPED, Architecture, LayerChoice
from llmprune.choices.choice import Choice
from llmprune.choices.ffn import FfnChoice
from llmprune.choices.kinds import parse_choice
from llmprune.choices.kv_groups import AttentionChoice
from llmprune.choices.space import Space
from llmprune.choices.stored import StoredAttention, StoredFfn
from llmprune.cli.front_tables import front_table
from llmprune.core.budgets import parse_pick
from llmprune.core.errors import ArchitectureError, RecipeError
from llmprune.core.progress import silent
from llmprune.core.recipe import GgufType, ImportanceRecipe, Recipe
from llmprune.core.recipe_inputs import ModelRecipe
from llmprune.data.tokens import SourceTokens, Split
from llmprune.forecast.work import rounded_numbers
from llmprune.formats.gguf import tensor_bytes, write_gguf
from llmprune.formats.layers import layer_sizes
from llmprune.formats.served_size import served_size
from llmprune.measure.speed.throughput import Speed, Spread
from llmprune.models.parent import Parent
from llmprune.models.stored import stored_weights
from llmprune.models.surgery import prune
from llmprune.numerics.ggml import TYPES, from_blocks, to_blocks
from llmprune.pipeline.commands import export, front, search
from llmprune.pipeline.run import Run
from llmprune.pipeline.run_directory import RunDirectory
from llmprune.publish.conversion import convert
from llmprune.publish.gguf_proof import prove_gguf
from llmprune.recover import sequential
from llmprune.recover.repair import Repair
from llmprune.search import judging
from llmprune.tables import block_tables
from llmprune.tables.estimate import estimate_delta_nats
from llmprune.tables.watched import _bounded_second_order

SHAPE = {
    **COMMON,
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
}
BELOW_Q8: tuple[GgufType, ...] = tuple(name for name in get_args(GgufType) if TYPES[name].bits < TYPES["q8_0"].bits)


@cache
def parent() -> Parent:
    return tiny_parent(Case("llama", "stored", SHAPE))


def attention(groups: int, type_: GgufType) -> StoredAttention:
    return StoredAttention(AttentionChoice(groups), type_)


def ffn(width: int, type_: GgufType) -> StoredFfn:
    return StoredFfn(FfnChoice(width), type_)


def mixed(type_: GgufType) -> Architecture:
    """Whole and narrow blocks in the type, beside plain ones and holes."""
    groups = 4 if TYPES[type_].block > 128 else 2
    return Architecture(
        (
            LayerChoice(attention(groups, type_), ffn(512, type_)),
            LayerChoice(AttentionChoice(4), ffn(256, type_)),
            LayerChoice(attention(4, type_), DROPPED["ffn"]),
        )
    )


def test_types_are_offered_where_rows_fit() -> None:
    space = Space.of(parent().shape, 1, 128, precision=("q5_0", "q4_k"))
    stored = [choice for choice in (*space.attention, *space.ffn) if choice.stored]
    assert attention(1, "q5_0") in stored and attention(1, "q4_k") not in stored, "32 x 2 inputs are no 256"
    assert attention(4, "q4_k") in stored and ffn(256, "q4_k") in stored and ffn(128, "q4_k") not in stored
    assert all(choice.units for choice in stored)
    assert space.attention[-1] == AttentionChoice(4) and space.ffn[-1] == FfnChoice(512)
    assert Space.from_json(space.to_json()) == space
    with pytest.raises(ArchitectureError, match=r"space\.size=layer keeps layers"):
        Space.of(parent().shape, 1, 128, size="layer", precision=("q4_0",))


types = st.sampled_from(get_args(GgufType))
choices = st.one_of(st.builds(attention, st.integers(1, 9), types), st.builds(ffn, st.integers(1, 999), types))


@given(choices)
def test_a_choice_comes_back_from_its_text(choice: Choice) -> None:
    assert parse_choice(choice.to_json(), choice.kind) == choice
    assert choice != choice.plain and choice.label != choice.plain.label


@pytest.mark.parametrize(
    "text", [{"ffn_width": 32, "stored": "q7"}, {"stored": "q4_0"}, {"ffn_width": -1, "stored": "q4_0"}]
)
def test_texts_that_are_no_choice_are_refused(text: dict[str, Any]) -> None:
    with pytest.raises(ArchitectureError):
        parse_choice(text, "ffn")


@pytest.mark.parametrize("choice", [ffn(0, "q4_0"), ffn(100, "q4_0"), attention(3, "q4_k"), ffn(600, "q4_0")])
def test_what_no_block_can_store_is_refused(choice: Choice) -> None:
    architecture = parent().shape.architecture.with_choice(1, choice)
    with pytest.raises(ArchitectureError, match="layer 1"):
        prune(parent(), architecture, Slices(parent()))


@pytest.mark.parametrize("type_", BELOW_Q8)
def test_a_childs_numbers_are_those_of_its_file(type_: GgufType, tmp_path: Path) -> None:
    child, plain = (
        prune(parent(), architecture, Slices(parent()))
        for architecture in (
            mixed(type_),
            Architecture(tuple(LayerChoice(*(c.plain for c in layer.blocks)) for layer in mixed(type_).layers)),
        )
    )
    before, after = plain.state_dict(), child.state_dict()
    assert before.keys() == after.keys() and len(stored_weights(child)) == 4 + 3 + 3 + 4
    for name, value in after.items():
        stored = stored_weights(child).get(name)
        expected = before[name] if stored is None else from_blocks(to_blocks(before[name], type_), type_)
        assert torch.equal(value, expected), name
    path = tmp_path / "child.gguf"
    write_gguf(child, None, path, "q8_0")
    held = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert held["token_embd.weight"].tensor_type.name == held["blk.1.attn_v.weight"].tensor_type.name == "Q8_0"
    for name, module in {
        "ffn_down": "0.mlp.down_proj",
        "attn_output": "0.self_attn.o_proj",
        "attn_v": "0.self_attn.v_proj",
    }.items():
        tensor = held[f"blk.0.{name}.weight"]
        assert tensor.tensor_type.name.lower() == type_
        numbers = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        assert torch.equal(numbers, after[f"model.layers.{module}.weight"]), name
    proof = prove_gguf(child, path, "q8_0")
    assert proof.contents_kl < 1e-9


def test_a_smaller_type_weighs_less_and_nothing_else_changes() -> None:
    architecture = parent().shape.architecture.with_choice(1, ffn(512, "q4_0"))
    sizes = [
        served_size(prune(parent(), a, Slices(parent())), parent().shape, a, "q8_0")
        for a in (parent().shape.architecture, architecture)
    ]
    assert sizes[0].params == sizes[1].params and sizes[0].kv_bytes_per_token == sizes[1].kv_bytes_per_token
    assert sizes[0].bytes - sizes[1].bytes == 3 * 512 * 256 * (TYPES["q8_0"].bits - TYPES["q4_0"].bits) / 8
    assert [size.stored_as for size in sizes] == ["GGUF q8_0", "GGUF q8_0+q4_0"]


def split_of(windows_NT: Tensor) -> Split:
    return Split(
        "estimate",
        {"text": SourceTokens(windows_NT, torch.full((len(windows_NT),), 4 * windows_NT.shape[1]))},
        {"text": 1.0},
        windows_NT.shape[1],
        bos=False,
    )


@pytest.fixture(scope="module")
def split() -> Split:
    return split_of(torch.randint(128, (6, 24), generator=torch.Generator().manual_seed(0)))


def test_calibration_says_what_rounding_is_weighed_by(split: Split) -> None:
    space = Space.of(parent().shape, 1, 256, precision=("q4_0",))
    library = build_library(parent(), split, ImportanceRecipe(), space)
    seen: dict[str, list[Tensor]] = {"gate_proj": [], "down_proj": []}
    mlp = parent().block(1, "ffn")
    handles = [
        mlp.get_submodule(name).register_forward_pre_hook(lambda module, args, kept=kept: kept.append(args[0].detach()))
        for name, kept in seen.items()
    ]
    with torch.inference_mode():
        for source in split.sources.values():
            parent().model(source.windows, use_cache=False)
    for handle in handles:
        handle.remove()
    found = library.input_squares(1, "ffn")
    assert found is not None
    for squares, inputs in zip(found, seen.values(), strict=True):
        assert_close(squares, torch.cat(inputs).double().square().mean(dim=(0, 1)), terms=144)
    child = prune(parent(), parent().shape.architecture.with_choice(1, ffn(256, "q4_0")), library)
    down = stored_weights(child)["model.layers.1.mlp.down_proj.weight"].squares_C
    assert down is not None and torch.equal(down, found.output_I[library.kept(1, FfnChoice(256)).units_U])
    plain = build_library(parent(), split, ImportanceRecipe(), Space.of(parent().shape, 1, 256))
    assert plain.input_squares(1, "ffn") is None


@pytest.mark.parametrize("choice", [ffn(512, "q6_k"), attention(4, "q6_k")])
def test_rounding_a_whole_block_is_estimated_by_what_the_block_then_adds(choice: Choice, split: Split) -> None:
    """All its weights are rounded, not the last alone; and with rows left out both costs add up."""
    space = Space.of(parent().shape, 1, 256, precision=("q6_k",))
    library = build_library(parent(), split, ImportanceRecipe(), space)
    estimated = estimate_delta_nats(parent(), split, library, tokens=10**6)
    for layer in range(3):
        child = prune(parent(), parent().shape.architecture.with_choice(layer, choice), library)
        outputs: list[Tensor] = []
        projection = "self_attn.o_proj" if choice.kind == "attention" else "mlp.down_proj"
        handle = child.get_submodule(f"model.layers.{layer}.{projection}").register_forward_hook(
            lambda module, args, output, kept=outputs: kept.append(output.detach())
        )
        child(split.sources["text"].windows, use_cache=False)
        handle.remove()
        by_hand = estimate_by_hand(parent(), split, layer, lambda name, found=outputs: found[0], choice.kind)
        assert estimated[layer, choice] == pytest.approx(by_hand, rel=1e-3, abs=1e-6) and abs(by_hand) > 1e-5
    summed = estimated[1, FfnChoice(256)] + 0.5 * estimated[1, ffn(512, "q6_k")]
    assert estimated[1, ffn(256, "q6_k")] == pytest.approx(summed)


def test_what_a_rounding_does_to_a_token_is_not_believed_beyond_a_nat() -> None:
    change_N = torch.tensor([-40.0, -1.0, 0.0, 0.5, 3.0])
    assert torch.equal(_bounded_second_order(change_N), torch.tensor([39.5, 0.5, 0.0, 0.125, 2.5]))


def test_the_estimate_at_a_stored_child_runs_that_child(split: Split) -> None:
    space = Space.of(parent().shape, 1, 256, precision=("q4_0",))
    library = build_library(parent(), split, ImportanceRecipe(), space)
    at = mixed("q4_0")
    seen: list[Tensor] = []
    handle = parent().model.register_forward_hook(lambda module, args, output: seen.append(output.logits.detach()))
    estimated = estimate_delta_nats(parent(), split, library, tokens=10**6, at=at)
    handle.remove()
    child = prune(parent(), at, library)
    with torch.inference_mode():
        for logits, windows in zip(seen, split.sources["text"].windows.split(2), strict=True):
            assert_close(logits, child(windows).logits)
    assert all(estimated[key] == 0 for key in at.blocks())
    assert all(value != 0 for key, value in estimated.items() if key not in set(at.blocks()))


def test_a_repaired_child_is_rounded_again() -> None:
    child = prune(parent(), mixed("q4_0"), Slices(parent()))
    name = "model.layers.0.mlp.down_proj.weight"
    changed = child.state_dict()[name] * 1.01 + 0.001
    norm = child.state_dict()["model.layers.0.input_layernorm.weight"] * 1.5
    Repair.of("distil", {name: changed, "model.layers.0.input_layernorm.weight": norm}, {}).apply(child)
    assert torch.equal(child.state_dict()[name], from_blocks(to_blocks(changed, "q4_0"), "q4_0"))
    assert torch.equal(stored_weights(child)[name].numbers_like(changed), child.state_dict()[name])
    assert torch.equal(child.state_dict()["model.layers.0.input_layernorm.weight"], norm)
    assert (changed - child.state_dict()[name]).abs().max() > tolerance(1.0)


def test_how_far_a_refit_goes_is_judged_as_it_is_stored(split: Split) -> None:
    child = prune(parent(), mixed("q4_0"), Slices(parent()))
    name, free = "model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.o_proj.weight"
    before = {key: child.state_dict()[key].clone() for key in (name, free)}
    solved = {key: value + 0.02 * torch.randn_like(value) for key, value in before.items()}
    seen: list[dict[str, Tensor]] = []

    def scored(model: Any, judged_by: Split) -> Any:
        seen.append({key: model.state_dict()[key].clone() for key in solved})
        return SimpleNamespace(nats_per_token=1.0)

    with patch.object(sequential, "score", scored):
        nats = sequential.nats_on_the_way(child, solved, split, lambda done, total: None)
    assert len(seen) == len(nats) > 1
    for share, state in zip(nats, seen, strict=True):
        moved = {key: torch.lerp(before[key], solved[key], share) for key in solved}
        assert torch.equal(state[free], moved[free])
        expected = from_blocks(to_blocks(moved[name], "q4_0"), "q4_0") if share else before[name]
        assert torch.equal(state[name], expected)
    assert all(torch.equal(child.state_dict()[key], before[key]) for key in before)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_any_child_of_a_space_with_types_computes_what_its_file_does(data: st.DataObject) -> None:
    space = Space.of(parent().shape, 1, 256, precision=("q5_0", "q4_k"))
    indices = [data.draw(st.integers(0, len(decision.options) - 1)) for decision in space.decisions]
    architecture = space.architecture(indices)
    if not architecture.attends:
        return
    assert space.indices(architecture) == tuple(indices)
    assert Architecture.from_json(architecture.to_json()) == architecture
    child = prune(parent(), architecture, Slices(parent()))
    with torch.inference_mode():
        assert bool(child(tokens()).logits.isfinite().all())


def test_a_forecast_counts_what_is_rounded() -> None:
    space = Space.of(parent().shape, 1, 256, precision=("q5_0", "q4_0"))
    layer = parent().layer(0)
    matrices = sum(weight.numel() for weight in layer.parameters() if weight.ndim == 2)
    assert rounded_numbers(space) == 2 * matrices
    assert rounded_numbers(Space.of(parent().shape, 1, 256)) == 0


def types_recipe(root: Path, *changes: str) -> Recipe:
    """A run whose blocks may be stored in smaller types: llama.cpp reads its children."""
    recipe = changed(
        tiny_recipe(root),
        "workload.engine=llamacpp",
        "deploy.formats=[hf, gguf]",
        "deploy.gguf_type=q8_0",
        "space.precision=[q5_0, q4_0]",
        "space.ffn_step=32",
        "search.targets=[1.3]",
        *changes,
    )
    config = LlamaConfig.from_pretrained(recipe.model.path)
    for name, value in {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}.items():
        setattr(config, name, value)
    config.num_attention_heads, config.num_key_value_heads = 8, 4
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(recipe.model.path)
    return recipe


def by_bytes(reference: Any, candidates: Any, *rest: Any) -> Any:
    """Stands in for `measure_paired`: a model is as fast as its file is small, always."""

    def size(model: Any) -> int:
        return sum(tensor_bytes(model, "q8_0").values())

    speeds = [spread(size(reference) / size(model)) for model in candidates]
    return speed_of(spread(1.0)), [speed_of(one) for one in speeds]


def speed_of(ratio: Spread) -> Speed:
    return Speed(spread(100.0), spread(10.0), ratio, ratio)


def test_a_run_finds_exports_and_serves_children_of_several_types(tmp_path: Path) -> None:
    recipe = types_recipe(tmp_path)
    with (
        RunDirectory(tmp_path / "run").locked(),
        patch.object(judging, "measure_paired", by_bytes),
        patch.object(block_tables, "measure_paired", by_bytes),
    ):
        run = Run.start(tmp_path / "run", recipe)
        search(run)
        found = front(run)
        named = {record.name: record for record in found.baselines}
        for type_ in ("q5_0", "q4_0"):
            assert named[f"parent in {type_}"].stored_as == f"GGUF {type_}"
            assert named[f"parent in {type_}"].bytes < named[f"parent, blocks in {type_}"].bytes
            quantised = named[f"parent, blocks in {type_}"]
            assert {choice.stored for _, choice in quantised.architecture.blocks()} == {type_}
            assert quantised.params == found.parent.params and quantised.bytes < found.parent.bytes
            assert quantised.stored_as == f"GGUF q8_0+{type_}" and quantised.test is not None
        assert "(mixed: some blocks in a type of their own), scored in torch" in str(front_table(found).caption)
        fastest = max(found.children, key=lambda child: child.decode_speedup.median)
        assert {"q5_0", "q4_0"} & {choice.stored for _, choice in fastest.architecture.blocks()}
        assert fastest.stored_as.startswith("GGUF q") and fastest.bytes < found.parent.bytes / 1.25
        written = export(run, parse_pick(fastest.id), tmp_path / "child")
    path = tmp_path / "child" / "model-Q8_0-mixed.gguf"
    assert written["formats"][0]["proof"].startswith("run in llama.cpp")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "child", trust_remote_code=False)
    held = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for layer, sizes in enumerate(layer_sizes(loaded.config)):
        if sizes.ffn_width:
            tensor = held[f"blk.{layer}.ffn_down.weight"]
            assert tensor.tensor_type.name.lower() == sizes.types.get("ffn", "q8_0")
            if "ffn" in sizes.types:
                numbers = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
                assert torch.equal(numbers, loaded.get_submodule(f"model.layers.{layer}.mlp.down_proj").weight)
    # A checkpoint knows its types: the file can be written again from it.
    again = convert(ModelRecipe(path=str(tmp_path / "child")), recipe.deploy, None, silent, force=True)
    assert again["formats"][0]["proof"].startswith("run in llama.cpp")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("workload.engine=torch", r"needs workload\.engine=llamacpp"),
        ("space.precision=[q8_0]", r"q8_0, which is no smaller than deploy\.gguf_type=q8_0"),
        ("space.precision=[f16]", "which is no smaller"),
        ("space.precision=[q4_k]", r"blocks of 256, which rows of hidden_size 64 are not; use q5_1, q5_0, q4_1"),
        ("space.size=layer", r"space\.precision=\[\]"),
    ],
)
def test_types_that_are_no_choice_are_refused_before_anything_is_done(change: str, said: str, tmp_path: Path) -> None:
    recipe = types_recipe(tmp_path, change)
    with RunDirectory(tmp_path / "run").locked():
        run = Run.start(tmp_path / "run", recipe)
        with pytest.raises((RecipeError, ArchitectureError), match=said):
            search(run)
    assert not (tmp_path / "run" / "library").exists()
