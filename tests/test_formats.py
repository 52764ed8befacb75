"""What each format can hold: the space is cut to it, impossible exports are refused, and files compute the child."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from closeness import assert_close
from decilm import decilm_logits
from families import CASES, IDS, Slices, tiny_model, tiny_parent, tokens
from tiny import contents, tiny_tokenizer
from transformers import LlamaConfig

from llmprune.choices.architecture import Architecture, LayerChoice
from llmprune.choices.ffn import FfnChoice
from llmprune.choices.kv_groups import AttentionChoice
from llmprune.choices.merged import MergedChoice
from llmprune.choices.space import Space
from llmprune.core.errors import ExportError, RecipeError, UnsupportedModelError
from llmprune.core.progress import silent
from llmprune.core.recipe import FORMAT_NAMES, DeployRecipe, FormatName
from llmprune.core.recipe_inputs import ModelRecipe
from llmprune.formats.gguf import write_gguf
from llmprune.formats.layers import LayerSizes, layer_sizes
from llmprune.formats.limits import FORMATS, check_child, check_parent, cut, merging_helps
from llmprune.formats.vllm import write_vllm
from llmprune.models.parent import Parent, make_parent
from llmprune.models.surgery import prune
from llmprune.publish import conversion
from llmprune.publish.contents import VLLM_DIRECTORY
from llmprune.publish.conversion import convert, gguf_name, write_formats

DECILM_IDS = [name for name in IDS if name.startswith("llama-")]
# (KV groups, FFN width) by layer, of a parent with g groups and FFN width f; every attention that stays is whole.
WHOLE_HEADS: dict[str, Callable[[int, int], list[tuple[int, int]]]] = {
    "whole": lambda g, f: [(g, f)] * 4,
    "widths": lambda g, f: [(g, f - 3), (g, 17), (g, f), (g, 1)],
    "first attention": lambda g, f: [(0, f), (g, 17), (g, f), (g, f)],
    "middle attention": lambda g, f: [(g, f), (0, 11), (g, f), (g, f)],
    "ffns": lambda g, f: [(g, 0), (g, f), (g, 0), (g, 9)],
    "first layer": lambda g, f: [(0, 0), (0, 5), (g, f), (g, 0)],
    "last layer": lambda g, f: [(g, f), (g, 0), (g, 9), (0, 0)],
}


@cache
def parent_of(case_id: str) -> Parent:
    return tiny_parent(CASES[IDS.index(case_id)])


def rules(*formats: FormatName) -> DeployRecipe:
    return DeployRecipe(formats=formats)


def architecture_of(parent: Parent, name: str) -> Architecture:
    return Architecture.of(WHOLE_HEADS[name](parent.shape.kv_groups, parent.shape.ffn_width))


@pytest.mark.parametrize("name", WHOLE_HEADS)
@pytest.mark.parametrize("case_id", DECILM_IDS)
def test_vllm_files_compute_the_child(case_id: str, name: str, tmp_path: Path) -> None:
    parent = parent_of(case_id)
    child = prune(parent, architecture_of(parent, name), Slices(parent))
    check_child(child.config, "vllm", rules("vllm"))
    with pytest.MonkeyPatch.context() as patch:
        # Its own fresh process is the next test's affair.
        patch.setattr("llmprune.formats.vllm._prove", lambda directory: None)
        write_vllm(child, None, tmp_path / "vllm")
    with torch.inference_mode():
        expected = child(tokens()).logits
    assert_close(decilm_logits(tmp_path / "vllm", tokens()), expected)


def test_vllm_files_are_read_back_in_a_fresh_process(tmp_path: Path) -> None:
    parent = parent_of("llama-biased")
    child = prune(parent, architecture_of(parent, "first layer"), Slices(parent))
    written = write_formats(child, tiny_tokenizer(), rules("hf", "vllm"), tmp_path)
    assert [(entry["format"], entry["file"]) for entry in written] == [("vllm", VLLM_DIRECTORY)]
    config = json.loads((tmp_path / VLLM_DIRECTORY / "config.json").read_text())
    assert config["architectures"] == ["DeciLMForCausalLM"] and config["model_type"] == "nemotron-nas"
    assert [block["attention"]["no_op"] for block in config["block_configs"]] == [False, False, False]
    assert [block["ffn"]["no_op"] for block in config["block_configs"]] == [False, False, True]
    proven = json.loads((tmp_path / VLLM_DIRECTORY / "llmprune.json").read_text())["files"]
    assert proven.keys() == contents(tmp_path / VLLM_DIRECTORY).keys() - {"llmprune.json"}
    assert {"tokenizer.json", "model.safetensors", "configuration_decilm.py"} <= proven.keys()
    with pytest.raises(ExportError, match="not empty"):
        write_formats(child, None, rules("vllm"), tmp_path)


@pytest.mark.parametrize("damage", ["missing", "misshapen"])
def test_vllm_files_that_do_not_fit_their_config_are_refused(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = parent_of("llama-gqa")
    child = prune(parent, architecture_of(parent, "widths"), Slices(parent))
    name = "model.layers.1.mlp.up_proj.weight"

    def damaged(*_: object) -> dict[str, torch.Tensor]:
        tensors = {key: value.contiguous() for key, value in child.state_dict().items() if key != "lm_head.weight"}
        tensors |= {name: tensors[name][:3].clone()} if damage == "misshapen" else {}
        return {key: value for key, value in tensors.items() if key != name or damage == "misshapen"}

    monkeypatch.setattr("llmprune.formats.vllm._tensors", damaged)
    with pytest.raises(ExportError, match=f"{damage} tensors: {name}"):
        write_vllm(child, None, tmp_path / "vllm")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case_id", IDS)
def test_sizes_of_a_child_are_its_tensors(case_id: str) -> None:
    parent = parent_of(case_id)
    shape = parent.shape
    groups = max(1, shape.kv_groups - 1)
    architecture = Architecture.of([(groups, 7), (0, shape.ffn_width), (0, 0), (shape.kv_groups, 0)])
    child = prune(parent, architecture, Slices(parent))
    assert layer_sizes(child.config) == (
        LayerSizes(groups * shape.queries_per_group, groups, 7),
        LayerSizes(0, 0, shape.ffn_width),
        LayerSizes(shape.kv_groups * shape.queries_per_group, shape.kv_groups, 0),
    )
    full = LayerSizes(shape.kv_groups * shape.queries_per_group, shape.kv_groups, shape.ffn_width)
    assert layer_sizes(parent.model.config) == (full,) * shape.layers


def space_of(parent: Parent, **changes: object) -> Space:
    return Space.of(parent.shape, 1, 8, **changes)  # type: ignore[arg-type]


def test_hf_cuts_nothing() -> None:
    parent = parent_of("qwen3-gqa")
    space = space_of(parent, size="large")
    assert cut(space, parent, rules("hf")) == space


def test_vllm_leaves_attention_whole_or_out() -> None:
    parent = parent_of("llama-gqa")
    space = cut(space_of(parent, size="large"), parent, rules("hf", "vllm"))
    assert space.attention == (AttentionChoice(0), AttentionChoice(3))
    assert len(space.ffn) == 6


def test_where_query_heads_have_to_stay_kv_groups_may_merge() -> None:
    parent = parent_of("llama-gqa")
    space = cut(space_of(parent, merge_kv=True), parent, rules("vllm"))
    assert space.attention == (AttentionChoice(0), MergedChoice(1), AttentionChoice(3))
    assert merging_helps(parent, rules("hf", "vllm"), "medium")
    assert not merging_helps(parent, rules("hf"), "medium") and not merging_helps(parent, rules("vllm"), "layer")
    assert not merging_helps(parent_of("llama-mqa"), rules("vllm"), "medium")
    for family, helps in (("olmo2-gqa", True), ("phi3-gqa", True), ("qwen3-gqa", False), ("gpt2-mha", False)):
        assert merging_helps(parent_of(family), rules("gguf"), "small") == helps


def test_hf_uniform_keeps_what_stock_attributes_can_say() -> None:
    llama, phi3 = parent_of("llama-gqa"), parent_of("phi3-gqa")
    # 4 and 2 heads divide the hidden size of 48; phi3 derives the head dim, so there heads are all or none.
    assert cut(space_of(llama, size="small"), llama, rules("hf-uniform")).attention == tuple(
        map(AttentionChoice, range(4))
    )
    assert cut(space_of(phi3, size="small"), phi3, rules("hf-uniform")).attention == (
        AttentionChoice(0),
        AttentionChoice(3),
    )


def test_a_space_with_nothing_left_is_refused() -> None:
    parent = parent_of("phi3-gqa")
    space = Space.of(parent.shape, 1, parent.shape.ffn_width, drop=False, size="small")
    with pytest.raises(RecipeError, match=r"leave nothing of the space to choose.*Phi3Config has no words"):
        cut(space, parent, rules("hf-uniform"))


@pytest.mark.parametrize("case_id", ["qwen3-gqa", "gemma2-gqa", "opt-mha"])
def test_a_family_that_a_format_cannot_hold_is_refused_before_the_search(case_id: str) -> None:
    parent = parent_of(case_id)
    with pytest.raises(UnsupportedModelError, match=f"vllm, which cannot hold {parent.source}: the DeciLM schema"):
        check_parent(parent, rules("vllm"), "medium")
    check_parent(parent, rules("hf"), "large")


def test_hf_uniform_wants_a_uniform_space() -> None:
    parent = parent_of("llama-gqa")
    check_parent(parent, rules("hf-uniform"), "layer")
    with pytest.raises(RecipeError, match=r"space\.size must be small or layer for llama; got medium"):
        check_parent(parent, rules("hf", "hf-uniform"), "medium")


def test_an_impossible_export_names_layer_value_and_fix() -> None:
    parent = parent_of("llama-gqa")
    mixed = Architecture.of([(3, 40), (2, 40), (3, 8), (3, 40)])
    child = prune(parent, mixed, Slices(parent))
    with pytest.raises(ExportError, match=r"vllm cannot hold this child: .*layer 1 has 4, others 6; search with"):
        check_child(child.config, "vllm", rules("hf"))
    with pytest.raises(
        ExportError, match=r"layer 1 has 4 query heads, 2 KV heads and FFN width 40, layer 0 6, 3 and 40"
    ):
        check_child(child.config, "hf-uniform", rules("hf"))
    check_child(child.config, "hf", rules("hf"))
    alike = prune(parent, Architecture((LayerChoice(AttentionChoice(3), FfnChoice(8)),) * 4), Slices(parent))
    check_child(alike.config, "hf-uniform", rules("hf"))


def test_vllm_wants_a_hidden_size_that_is_a_multiple_of_the_query_heads() -> None:
    config = LlamaConfig(hidden_size=48, num_attention_heads=6, num_key_value_heads=3, head_dim=8)
    check_child(config, "vllm", rules("hf"))
    config.num_attention_heads, config.num_key_value_heads = 10, 5
    with pytest.raises(ExportError, match="multiple of its query heads; this child has 10 and 48"):
        check_child(config, "vllm", rules("hf"))


def test_every_format_of_a_recipe_is_described() -> None:
    assert set(FORMATS) == set(FORMAT_NAMES)
    assert all(form.holds and form.served_by for form in FORMATS.values())


def test_gguf_in_q8_0_leaves_rows_of_whole_blocks() -> None:
    parent = parent_of("llama-wide-heads")
    space = Space.of(parent.shape, 1, 8)
    q8 = DeployRecipe(formats=("gguf",), gguf_type="q8_0")
    with pytest.raises(UnsupportedModelError, match="hidden_size must be a multiple of 32 for gguf in q8_0, got 48"):
        check_parent(parent, q8, "medium")
    kept = cut(space, parent, q8)
    assert kept.ffn == (FfnChoice(0), FfnChoice(32), FfnChoice(40))
    assert kept.attention == (AttentionChoice(0), AttentionChoice(3))
    assert cut(space, parent, rules("gguf")) == space
    # Timed in llama.cpp, it is the same limits, whatever the child is written in.
    timed = DeployRecipe(gguf_type="q8_0")
    assert cut(space, parent, timed, "llamacpp") == kept
    assert cut(space, parent, timed) == space
    whole = Space(parent.shape, "medium", kept.attention[-1:], (FfnChoice(8), FfnChoice(40)))
    with pytest.raises(RecipeError, match=r"=\['hf'\] and workload\.engine=llamacpp leave nothing .*multiple of 32"):
        cut(whole, parent, timed, "llamacpp")


def test_a_checkpoint_is_converted_where_it_lies(tmp_path: Path) -> None:
    parent = parent_of("llama-biased")
    child = prune(parent, architecture_of(parent, "ffns"), Slices(parent))
    child.save_pretrained(tmp_path / "child")
    tiny_tokenizer().save_pretrained(tmp_path / "child")
    model = ModelRecipe(path=str(tmp_path / "child"), device="cpu")
    both = DeployRecipe(formats=("gguf", "vllm"), gguf_type="f32")
    result = convert(model, both, None, silent, force=False)
    assert [entry["file"] for entry in result["formats"]] == [gguf_name("f32"), VLLM_DIRECTORY]
    assert result["formats"][0]["proof"].startswith("run in llama.cpp: KL")
    assert (tmp_path / "child" / "model-F32.gguf").is_file()
    with pytest.raises(ExportError, match="is there already; use --force"):
        convert(model, both, None, silent, force=False)
    convert(model, both, None, silent, force=True)
    assert not [path for path in (tmp_path / "child").iterdir() if path.name.startswith(".")]


def test_half_precision_reaches_the_formats_as_it_is(tmp_path: Path) -> None:
    parent = make_parent(tiny_model(CASES[IDS.index("llama-gqa")]).bfloat16(), None, source="half")
    child = prune(parent, architecture_of(parent, "widths"), Slices(parent))
    gguf, vllm = write_formats(child, None, DeployRecipe(formats=("gguf", "vllm"), gguf_type="f32"), tmp_path)
    assert gguf["proof"].startswith("run in llama.cpp") and vllm["file"] == VLLM_DIRECTORY
    assert json.loads((tmp_path / VLLM_DIRECTORY / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_gguf_that_computes_something_else_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = parent_of("llama-gqa")
    child = prune(parent, architecture_of(parent, "widths"), Slices(parent))
    other = prune(parent, architecture_of(parent, "middle attention"), Slices(parent))
    monkeypatch.setattr(conversion, "write_gguf", lambda child, *rest: write_gguf(other, *rest))
    with pytest.raises(ExportError, match=r"llama\.cpp computes something else from model-F16\.gguf: KL"):
        write_formats(child, None, rules("gguf"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_place_to_convert_to_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="not a directory that files could be added to; name one with --to"):
        convert(ModelRecipe(path="org/name"), rules("gguf"), None, silent, force=False)
    parent = parent_of("opt-mha")
    parent.model.save_pretrained(tmp_path)
    with pytest.raises(ExportError, match=r"gguf cannot hold this child: gguf holds the families .*; got opt"):
        convert(ModelRecipe(path=str(tmp_path)), rules("gguf"), None, silent, force=False)
