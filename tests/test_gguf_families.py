"""GGUF files in the architectures that llama.cpp has for families beside Llama, held to transformers in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from closeness import tolerance
from families import CASES, COMMON, GROUPED, IDS, Case, Slices, merging, tiny_model, tiny_parent, tokens
from transformers import PreTrainedModel

from llmprune.choices.architecture import Architecture, LayerChoice
from llmprune.choices.ffn import FfnChoice
from llmprune.choices.kv_groups import AttentionChoice
from llmprune.choices.stored import StoredAttention, StoredFfn
from llmprune.core.errors import ExportError
from llmprune.core.recipe import GgufType
from llmprune.formats.gguf import tensor_bytes, write_gguf
from llmprune.formats.gguf_families import GGUF_FAMILIES
from llmprune.formats.gguf_limits import (
    gguf_child_problem,
    gguf_choice_problem,
    gguf_problem,
    gguf_sizes,
    gguf_types_problem,
)
from llmprune.measure.speed.llamacpp import GgufModel, logits_of
from llmprune.models.modeling_pruned import FAMILIES
from llmprune.models.parent import Parent
from llmprune.models.surgery import is_stock, prune
from llmprune.publish.gguf_proof import MAX_CONTENTS_KL, prove_gguf

LENGTH = 40
"""Tokens of a text: well beyond the sliding windows of 8."""
LOOKED_UP = 1e-3
"""Largest difference of a logit that llama.cpp's GELU, a table of f16, was seen to make in these models: 8e-4."""

SLIDING = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}
MULTIPLIERS = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
}
TWO_BASES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 9000.0, "factor": 8.0},
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
HALF_TURNED = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}


def case(model_type: str, label: str = "plain", **values: Any) -> Case:
    return Case(model_type, label, {**COMMON, **GROUPED, **values})


def known(name: str) -> Case:
    return CASES[IDS.index(name)]


PLAIN = {
    one.model_type: one
    for one in (
        case("qwen3", head_dim=8),
        case("smollm3", num_hidden_layers=8),
        case("granite", **MULTIPLIERS),
        case("olmo2"),
        case("gemma2", **SLIDING),
        case("gemma3_text", num_hidden_layers=7, **SLIDING),
        case("phi3"),
        known("gpt_neox-parallel"),
        known("gpt2-n_inner"),
    )
}
VARIANTS = (
    case("qwen3", "wide heads", head_dim=12, tie_word_embeddings=True),
    case("qwen3", "linear", rope_parameters=LINEAR),
    case("smollm3", "untied", tie_word_embeddings=False),
    case("granite", "biased", attention_bias=True, mlp_bias=True, head_dim=12),
    case("granite", "linear", rope_parameters=LINEAR),
    case("olmo2", "linear", rope_parameters=LINEAR),
    case("gemma2", "capped", **SLIDING, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    case("gemma2", "linear", **SLIDING, rope_parameters=LINEAR),
    case("gemma3_text", "two bases", num_hidden_layers=7, **SLIDING, rope_parameters=TWO_BASES),
    case("gemma3_text", "capped", **SLIDING, final_logit_softcapping=3.0),
    case("phi3", "half turned", rope_parameters=HALF_TURNED, tie_word_embeddings=True),
    known("phi3-mha"),
    known("gpt_neox-sequential"),
    Case("gpt_neox", "half turned", {**COMMON, "rope_parameters": HALF_TURNED, "hidden_act": "gelu_new"}),
    known("gpt2-mha"),
)
GONE = {"smollm3": range(2, 6), "gemma3_text": (0, 3)}
"""Layers that leave; of a family that is not here, the second."""


def child_of(parent: Parent, kind: str) -> PreTrainedModel:
    shape, model_type = parent.shape, parent.model.config.model_type
    groups = shape.kv_groups if GGUF_FAMILIES[model_type].heads_fill_hidden else 2
    architecture = {
        "parent": shape.architecture,
        "narrower": Architecture.of([(groups, 24)] * shape.layers),
        "fewer layers": shape.architecture.without_layers(GONE.get(model_type, (1,))),
    }[kind]
    return prune(parent, architecture, Slices(parent))


def difference(child: PreTrainedModel, path: Path) -> float:
    """Largest difference of a logit between transformers and llama.cpp on the child's file; the largest logit is 1."""
    write_gguf(child, None, path, "f32")
    ids_BT = tokens(length=LENGTH)
    with torch.inference_mode(), GgufModel(path) as model:
        expected = child(ids_BT).logits
        return float((logits_of(model, ids_BT) - expected).abs().max() / expected.abs().max())


def bound(model_type: str) -> float:
    return tolerance(1.0) if "silu" in str(GGUF_FAMILIES[model_type].needs) else LOOKED_UP


@pytest.mark.parametrize("kind", ["parent", "narrower", "fewer layers"])
@pytest.mark.parametrize("model_type", PLAIN)
def test_children_compute_the_same(model_type: str, kind: str, tmp_path: Path) -> None:
    child = child_of(tiny_parent(PLAIN[model_type]), kind)
    assert difference(child, tmp_path / "child.gguf") <= bound(model_type)
    architecture = gguf.GGUFReader(tmp_path / "child.gguf").fields["general.architecture"].contents()
    assert architecture == GGUF_FAMILIES[model_type].architecture != "deci"


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda one: f"{one.model_type} {one.label}")
def test_variants_of_families_compute_the_same(variant: Case, tmp_path: Path) -> None:
    assert difference(tiny_model(variant), tmp_path / "model.gguf") <= bound(variant.model_type)


@pytest.mark.parametrize("model_type", ["qwen3", "granite", "smollm3", "olmo2", "gemma2", "gemma3_text", "phi3"])
def test_merged_kv_groups_compute_the_same(model_type: str, tmp_path: Path) -> None:
    parent = tiny_parent(PLAIN[model_type])
    child = prune(parent, merging(parent.shape, dict.fromkeys(range(parent.shape.layers), 1)), Slices(parent))
    assert difference(child, tmp_path / "child.gguf") <= bound(model_type)


@pytest.mark.parametrize("model_type", ["qwen3", "granite", "smollm3", "gemma2", "gemma3_text"])
def test_fewer_query_heads_a_group_compute_the_same(model_type: str, tmp_path: Path) -> None:
    parent = tiny_parent(PLAIN[model_type])
    few = LayerChoice(AttentionChoice(3, queries_per_group=1), FfnChoice(24))
    child = prune(parent, Architecture((few,) * parent.shape.layers), Slices(parent))
    assert difference(child, tmp_path / "child.gguf") <= bound(model_type)


@pytest.mark.parametrize("model_type", ["qwen3", "granite", "gemma2", "gemma3_text"])
def test_alike_is_a_matter_of_sizes_not_of_the_class(model_type: str, tmp_path: Path) -> None:
    """Five heads do not divide the hidden size: no stock class says so, and llama.cpp does not ask."""
    values = {**PLAIN[model_type].values, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8}
    parent = tiny_parent(Case(model_type, "eight heads", values))
    child = prune(parent, Architecture.of([(5, 24)] * parent.shape.layers), Slices(parent))
    assert not is_stock(child.config)
    assert difference(child, tmp_path / "child.gguf") <= bound(model_type)


def test_every_family_but_one_is_known_and_tested() -> None:
    own = {name for name, family in GGUF_FAMILIES.items() if not family.layers_differ}
    assert own == PLAIN.keys() and FAMILIES.keys() - GGUF_FAMILIES.keys() == {"opt"}


BLOCKY = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 96}


def blocky(model_type: str) -> Parent:
    """A parent whose rows q8_0 can store, and so those of its narrower child."""
    values = {**PLAIN[model_type].values, **BLOCKY}
    if model_type == "gpt2":
        values |= {"n_embd": 64, "n_head": 8, "n_inner": 96}
    return tiny_parent(replace(PLAIN[model_type], values=values))


def as_written(model_type: str, name: str, numbers: torch.Tensor, heads: int) -> torch.Tensor:
    """A tensor of the child as the file is to have it, row by row; no code is shared with the writer."""
    if model_type == "gpt2" and numbers.ndim == 2 and not name.startswith(("token", "position")):
        return torch.stack([numbers[:, i] for i in range(numbers.shape[1])])
    if model_type.startswith("gemma") and "norm" in name:
        return numbers + 1
    size = len(numbers) // heads
    if model_type in ("smollm3", "granite") and name.startswith(("attn_q.", "attn_k.")):
        halves = [i // 2 + (i % 2) * (size // 2) for i in range(size)]
        return torch.stack([numbers[head * size + i] for head in range(heads) for i in halves])
    if model_type == "gpt_neox" and name.startswith("attn_qkv"):
        third = size // 3
        rows = [head * size + kind * third + i for kind in range(3) for head in range(heads) for i in range(third)]
        return torch.stack([numbers[i] for i in rows])
    return numbers


@pytest.mark.parametrize("model_type", PLAIN)
def test_a_file_in_q8_0_has_the_childs_numbers_rounded_and_nothing_else(model_type: str, tmp_path: Path) -> None:
    parent, path, family = blocky(model_type), tmp_path / "child.gguf", GGUF_FAMILIES[model_type]
    child = prune(parent, Architecture.of([(parent.shape.kv_groups, 64)] * parent.shape.layers), Slices(parent))
    write_gguf(child, None, path, "q8_0")
    held = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert {name: tensor.n_bytes for name, tensor in held.items()} == tensor_bytes(child, "q8_0")
    expected = {}
    for own, numbers in child.state_dict().items():
        index, _, within = own.removeprefix(f"{parent.family.layers}.").partition(".")
        in_layer = own.startswith(f"{parent.family.layers}.")
        module, _, part = (within if in_layer else own).rpartition(".")
        name = (family.layer if in_layer else family.whole)[module] + f".{part}"
        if name != "output.weight" or not child.config.tie_word_embeddings:
            heads = 4 if name.startswith("attn_k.") else 8
            expected[f"blk.{index}.{name}" if in_layer else name] = as_written(model_type, name, numbers, heads)
    assert held.keys() == expected.keys()
    for name, numbers in expected.items():
        tensor = held[name]
        plain = numbers.ndim == 1 or name.startswith("position")
        assert tensor.tensor_type.name == ("F32" if plain else "Q8_0"), name
        if not plain:
            type_ = gguf.GGMLQuantizationType.Q8_0
            blocks = gguf.quants.quantize(numbers.contiguous().numpy(), type_)
            numbers = torch.from_numpy(gguf.quants.dequantize(blocks, type_))
        assert np.array_equal(gguf.quants.dequantize(tensor.data, tensor.tensor_type), numbers.numpy()), name


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "gpt2"])
def test_children_in_half_precision_are_proven(model_type: str, tmp_path: Path) -> None:
    """The scale of Gemma's embeddings, the root of 48, is no number of bfloat16."""
    child, path = tiny_model(PLAIN[model_type]).bfloat16(), tmp_path / "child.gguf"
    write_gguf(child, None, path, "f32")
    assert prove_gguf(child, path, "f32").contents_kl < MAX_CONTENTS_KL / 10


@pytest.mark.parametrize("weights", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("model_type", PLAIN)
def test_files_are_proven(model_type: str, weights: GgufType, tmp_path: Path) -> None:
    """By a limit that knows how llama.cpp rounds GELU, of children that make much of little."""
    parent, path = blocky(model_type), tmp_path / "child.gguf"
    with torch.no_grad():
        parent.model.get_output_embeddings().weight.mul_(4)
    child = prune(parent, Architecture.of([(parent.shape.kv_groups, 64)] * parent.shape.layers), Slices(parent))
    write_gguf(child, None, path, weights)
    proof = prove_gguf(child, path, weights)
    assert proof.contents_kl < MAX_CONTENTS_KL / 10


@pytest.mark.parametrize("model_type", ["qwen3", "granite", "gpt_neox", "phi3"])
def test_blocks_may_have_types_of_their_own(model_type: str, tmp_path: Path) -> None:
    """Layers are alike in size only; where rows change places, their blocks do."""
    parent, path = blocky(model_type), tmp_path / "child.gguf"
    attention, ffn = AttentionChoice(parent.shape.kv_groups), FfnChoice(64)
    stored = LayerChoice(StoredAttention(attention, "q4_0"), StoredFfn(ffn, "q5_0"))
    layers = [stored, LayerChoice(attention, ffn)] * (parent.shape.layers // 2)
    child = prune(parent, Architecture(tuple(layers)), Slices(parent))
    write_gguf(child, None, path, "q8_0")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert (types["blk.0.attn_output.weight"], types["blk.0.ffn_down.weight"]) == ("Q4_0", "Q5_0")
    assert types["blk.1.attn_output.weight"] == types["blk.1.ffn_down.weight"] == "Q8_0"
    assert prove_gguf(child, path, "q8_0").contents_kl < MAX_CONTENTS_KL / 10


def test_weights_that_lie_the_other_way_round_have_no_types_of_their_own() -> None:
    assert gguf_types_problem(tiny_parent(PLAIN["gpt2"]).model.config) is not None
    assert gguf_types_problem(tiny_parent(PLAIN["gpt_neox"]).model.config) is None


@pytest.mark.parametrize(
    ("refused", "named"),
    [
        (case("qwen3", attention_bias=True), "attention_bias must be False for gguf, which llama.cpp's qwen3 computes"),
        (case("qwen3", use_sliding_window=True, sliding_window=8, max_window_layers=2), "attends to 8 positions of up"),
        (case("qwen3", rope_parameters={**LINEAR, "rope_type": "dynamic"}), "one of default, linear for gguf, got dyn"),
        (case("qwen3", hidden_act="gelu"), "hidden_act must be silu or swish"),
        (
            case("smollm3", no_rope_layer_interval=2),
            r"no_rope_layers must be \[1, 1, 1, 0\] for gguf.* got \[1, 0, 1, 0",
        ),
        (case("smollm3", mlp_bias=True), "mlp_bias must be False"),
        (case("olmo2", tie_word_embeddings=True), "tie_word_embeddings must be False"),
        (case("olmo2", head_dim=12), "query heads x head_dim must be hidden_size for gguf.*got 6 x 12 of 48; keep all"),
        (case("gemma2", **{**SLIDING, "query_pre_attn_scalar": 5}), "query_pre_attn_scalar must be head_dim.*5 and 8"),
        (case("gemma2", **SLIDING, num_hidden_layers=46), "num_hidden_layers must not be 46"),
        (case("gemma2", **SLIDING, attn_logit_softcapping=None), "attn_logit_softcapping must be a number"),
        (case("gemma2", **SLIDING, tie_word_embeddings=False), "tie_word_embeddings must be True"),
        (case("gemma3_text", **SLIDING, attn_logit_softcapping=9.0), "attn_logit_softcapping must be None"),
        (case("gemma3_text", **SLIDING, use_bidirectional_attention=True), "use_bidirectional_attention must be False"),
        (known("gemma3_text-full"), "layer_types must have a sliding_attention"),
        (case("gemma3_text", **SLIDING, rope_parameters={**TWO_BASES, "sliding_attention": LINEAR}), "must be default"),
        (known("phi3-longrope"), "rope_type must be one of default for gguf, got longrope"),
        (case("phi3", sliding_window=8), "attends to 8 positions"),
        (known("gpt_neox-unbiased"), "attention_bias must be True"),
        (Case("gpt2", "relu", {**PLAIN["gpt2"].values, "activation_function": "relu"}), "got relu; use hf"),
        (known("opt-mha"), "gguf holds the families llama, .*; got opt; use hf"),
    ],
    ids=lambda value: f"{value.model_type} {value.label}" if isinstance(value, Case) else "",
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(refused: Case, named: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=named):
        write_gguf(tiny_model(refused), None, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("layers", "named"),
    [
        (
            [(3, 40), (3, 24), (3, 40), (3, 40)],
            "layer 1 has 6 query heads, 3 KV heads and FFN width 24, layer 0 6, 3 and",
        ),
        ([(3, 40), (3, 40), (2, 40), (3, 40)], "layer 2 has 4 query heads"),
        ([(3, 40), (0, 40), (3, 40), (3, 40)], "layer 1 has 0 query heads"),
        ([(0, 40), (3, 40), (3, 40), (3, 40)], "layer 0 has 0 query heads"),
        (
            [(3, 0)] * 4,
            r"layer 0 has 6 query heads, 3 KV heads and FFN width 0.*search with space\.size=small or layer",
        ),
    ],
)
def test_layers_that_differ_are_refused(layers: list[tuple[int, int]], named: str, tmp_path: Path) -> None:
    parent = tiny_parent(PLAIN["qwen3"])
    child = prune(parent, Architecture.of(layers), Slices(parent))
    assert gguf_problem(child.config) is None and named[:12] in (gguf_child_problem(child.config) or "")
    with pytest.raises(ExportError, match=named):
        write_gguf(child, None, tmp_path / "child.gguf")
    assert not list(tmp_path.iterdir())


def test_a_layer_without_a_rotary_embedding_leaves_with_its_run() -> None:
    parent = tiny_parent(PLAIN["smollm3"])
    for gone, held in (((0, 1, 2, 3), True), ((4, 5, 6, 7), True), ((3,), False), ((0,), False), ((7,), False)):
        child = prune(parent, parent.shape.architecture.without_layers(gone), Slices(parent))
        # The run at the end may be a part of one: then no layer has another place.
        assert (gguf_problem(child.config) is None) == (held or gone == (7,)), gone


def test_fewer_query_heads_are_refused_where_they_have_to_fill_the_hidden_size() -> None:
    for model_type, family in GGUF_FAMILIES.items():
        if model_type in PLAIN:
            parent = tiny_parent(PLAIN[model_type])
            config, shape = parent.model.config, parent.shape
            problem = gguf_choice_problem(config, shape, AttentionChoice(shape.kv_groups - 1))
            assert (problem is not None) == family.heads_fill_hidden
            assert problem is None or "keep all query heads" in problem
            assert gguf_choice_problem(config, shape, FfnChoice(13)) is None
            assert "medium" not in gguf_sizes(config)
            assert ("layer" in gguf_sizes(config)) == (model_type != "smollm3")
