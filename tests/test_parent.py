"""What can be loaded as a parent, and how everything else is refused: before weights are read, if the config tells."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from closeness import assert_close
from families import CASES, COMMON, GROUPED, IDS, Case, Slices, tiny_model, tiny_parent, tokens
from safetensors.torch import load_file, save_file
from tiny import tiny_tokenizer
from transformers import (
    BertConfig,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from llmprune.choices.architecture import Architecture
from llmprune.core.errors import ModelError, UnsupportedModelError
from llmprune.core.recipe_inputs import ModelRecipe
from llmprune.data.bos import puts_bos
from llmprune.models.modeling_pruned import FAMILIES
from llmprune.models.parent import check_config, load_parent, make_parent, supported_families
from llmprune.models.surgery import prune

LLAMA = CASES[IDS.index("llama-biased")]
PLAIN = CASES[IDS.index("llama-wide-heads")]
FAMILY_LIST = "gemma2, gemma3_text, gpt2, gpt_neox, granite, llama, mistral, olmo2, opt, phi3, qwen2, qwen3, smollm3"


def load(path: Path | str, **values: Any) -> Any:
    return load_parent(ModelRecipe(path=str(path), device=values.pop("device", "cpu"), **values))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny llama with a tokenizer, as transformers saves it."""
    directory = tmp_path / "parent"
    tiny_model(LLAMA).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def edit_config(checkpoint: Path, **values: Any) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(tokens()).logits


def test_checkpoint_loads(checkpoint: Path) -> None:
    parent = load(checkpoint)
    assert torch.equal(logits_of(parent.model), logits_of(tiny_model(LLAMA)))
    assert parent.tokenizer is not None and parent.tokenizer("boats")["input_ids"]
    assert not parent.model.training and parent.source == checkpoint.name
    shape = parent.shape
    assert (shape.layers, shape.kv_groups, shape.queries_per_group, shape.head_dim) == (4, 3, 2, 8)
    assert (shape.hidden_size, shape.ffn_width) == (48, 40)
    assert load(checkpoint).hash == parent.hash != make_parent(tiny_model(LLAMA, seed=1), None).hash
    half = load(checkpoint, dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16 and half.hash != parent.hash


def test_supported_families_are_the_tables() -> None:
    assert ", ".join(supported_families()) == FAMILY_LIST
    assert set(supported_families()) == set(FAMILIES) == {case.model_type for case in CASES}


def heterogeneous_llama() -> Any:
    return LlamaConfig(**COMMON, **GROUPED, per_layer_config={"1": {"intermediate_size": 20}})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BloomConfig(), f"model type 'bloom'; supported are: {FAMILY_LIST}"),
        (BertConfig(), "model type 'bert'; supported are: gemma2, "),
        (MixtralConfig(), r"mixture-of-experts model \(mixtral\); only dense families can be pruned: gemma2, "),
        (Qwen3MoeConfig(), r"mixture-of-experts model \(qwen3_moe\)"),
        (
            LlamaConfig(quantization_config={"quant_method": "gptq", "bits": 4}),
            r"is quantised \(gptq\); float weights are needed: name the unquantised model",
        ),
        (heterogeneous_llama(), "is a pruned model already; prune its dense parent instead"),
        (OPTConfig(do_layer_norm_before=False), "do_layer_norm_before=false.* the other OPT sizes can be pruned"),
        (GPT2Config(scale_attn_by_inverse_layer_idx=True), "scales attention by layer index.* plain GPT-2 models can"),
        (GPT2Config(add_cross_attention=True), "cross-attention; plain GPT-2 models can be pruned"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_config_alone_is_refused(config: Any, message: str, tmp_path: Path) -> None:
    """The directory holds no weights: were they looked for, the error would be another."""
    with pytest.raises(UnsupportedModelError, match=message):
        check_config(config, origin="the model")
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=message) as refused:
        load(tmp_path)
    assert str(tmp_path) in str(refused.value)


def test_pruned_child_is_refused(tmp_path: Path) -> None:
    parent = tiny_parent(LLAMA)
    child = prune(parent, Architecture.of([(3, 40), (0, 40), (1, 7), (2, 0)]), Slices(parent))
    with pytest.raises(UnsupportedModelError, match="is a pruned model already; prune its dense parent instead"):
        make_parent(child, None)
    child.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModelError, match="is a pruned model already; prune its dense parent instead"):
        load(tmp_path)


def _remove_config(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()


def _corrupt_config(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text('{"model_type": "llama",')


def _no_object_config(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text("[1, 2]")


def _unheard_of(checkpoint: Path) -> None:
    edit_config(checkpoint, model_type="unheard_of")


def _wrong_type(checkpoint: Path) -> None:
    edit_config(checkpoint, hidden_size="wide")


def _own_code(checkpoint: Path) -> None:
    edit_config(checkpoint, model_type="mine", auto_map={"AutoConfig": "mine.MyConfig"})


def _pickled(checkpoint: Path) -> None:
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()


def _truncated(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def _empty(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(b"")


def _missing_tensor(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})


def _other_width(checkpoint: Path) -> None:
    edit_config(checkpoint, intermediate_size=44)


def _no_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()


def _no_tokenizer(checkpoint: Path) -> None:
    for path in checkpoint.glob("tokenizer*"):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove_config, "holds no config.json; name a transformers checkpoint or a .gguf file"),
        (_corrupt_config, "not a valid JSON file"),
        (_no_object_config, "config"),
        (_unheard_of, "`unheard_of`"),
        (_wrong_type, "hidden_size"),
        (_own_code, "brings code of its own; set model.trust_remote_code=true only if you trust it"),
        (_pickled, r"model\.safetensors.*convert \.bin files first"),
        (_truncated, "cannot load model .*safetensors"),
        (_empty, "cannot load model .*safetensors"),
        (_missing_tensor, r"lacks .*model\.layers\.2\.mlp\.up_proj\.weight"),
        (_other_width, r"misshapes 20 tensors .*mlp\.down_proj\.weight \[48, 40\] for \[48, 44\]"),
        (_no_weights, r"no file named model\.safetensors"),
        (_no_tokenizer, "tokenizer"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_damaged_checkpoint_is_refused(damage: Callable[[Path], None], message: str, checkpoint: Path) -> None:
    damage(checkpoint)
    with pytest.raises(ModelError, match=message) as refused:
        load(checkpoint)
    assert str(checkpoint) in str(refused.value)
    assert len(str(refused.value)) < 900


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./not/there", r"model.path ./not/there is not a directory with a config.json, nor a .gguf file"),
        ("/not/there.gguf", "model.path /not/there.gguf is not a file"),
        ("nobody/is-not-cached", r"cannot load model nobody/is-not-cached: .*Give a Hub id, a directory"),
        ("no spaces allowed", "cannot load model no spaces allowed"),
    ],
)
def test_missing_path_is_refused(path: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(path)


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "meta:x"])
def test_unknown_device_is_refused_before_weights_are_read(device: str, tmp_path: Path) -> None:
    LlamaConfig(**COMMON).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"model.device '{device}' cannot be used here .*; use another, such as cpu"):
        load(tmp_path, device=device)


def test_layers_that_differ_are_refused() -> None:
    model = tiny_model(LLAMA)
    model.model.layers[2].mlp.down_proj = torch.nn.Linear(36, 48)
    with pytest.raises(
        UnsupportedModelError, match=r"ffn output of layer 2 is \(48, 36\), its config implies \(48, 40\)"
    ):
        make_parent(model, None)


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_llama_gguf(
    path: Path,
    model: PreTrainedModel,
    *,
    quantised: bool = False,
    extra: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> None:
    """A tiny llama as llama.cpp stores it: pairs of rotary rows side by side in q and k; its matrices in Q8_0 if
    `quantised`."""
    config, tokenizer = model.config, json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get))
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            pairs = values.reshape(-1, 2, config.head_dim // 2, config.hidden_size)
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        module, _, suffix = name.removeprefix("model.layers.").rpartition(".")
        index, _, rest = module.partition(".")
        stored = f"blk.{index}.{GGUF_NAMES[rest]}" if index.isdigit() else GGUF_NAMES[module]
        kind = gguf.GGMLQuantizationType.Q8_0 if quantised and values.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{stored}.{suffix}", gguf.quants.quantize(values, kind), raw_dtype=kind)
    extra(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_loads_as_the_same_weights(tmp_path: Path) -> None:
    model = tiny_model(PLAIN)
    write_llama_gguf(tmp_path / "tiny.gguf", model)
    parent = load(tmp_path / "tiny.gguf")
    assert parent.source == "tiny.gguf"
    assert parent.shape == make_parent(model, None).shape
    for name, tensor in model.state_dict().items():
        assert torch.equal(parent.model.state_dict()[name], tensor), name
    assert_close(logits_of(parent.model), logits_of(model))
    text = "The river was wide, café"
    assert parent.tokenizer(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]
    child = prune(parent, Architecture.of([(0, 40), (2, 17), (3, 0), (1, 40)]), Slices(parent))
    child.save_pretrained(tmp_path / "child")
    assert "quantization_config" not in json.loads((tmp_path / "child" / "config.json").read_text())
    parent.model.to(torch.bfloat16)


@pytest.mark.parametrize(
    ("pre", "said", "opens"),
    [
        (None, None, False),
        (None, True, True),
        ("gpt-2", None, False),
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
    ],
)
def test_bos_of_a_gguf_file_is_llama_cpp_s(pre: str | None, said: bool | None, opens: bool, tmp_path: Path) -> None:
    def extra(writer: gguf.GGUFWriter) -> None:
        if pre is not None:
            writer.add_tokenizer_pre(pre)
        if said is not None:
            writer.add_add_bos_token(said)

    write_llama_gguf(tmp_path / "tiny.gguf", tiny_model(PLAIN), extra=extra)
    parent = load(tmp_path / "tiny.gguf")
    assert parent.tokenizer is not None and puts_bos(parent.tokenizer) is opens


def test_quantised_gguf_is_dequantised(tmp_path: Path) -> None:
    values = {**COMMON, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    model = tiny_model(Case("llama", "blocks of 32", {**values, "head_dim": 16}))
    write_llama_gguf(tmp_path / "tiny.gguf", model, quantised=True)
    parent = load(tmp_path / "tiny.gguf")
    assert parent.output_weight(0, "ffn").dtype == torch.float32
    for name, tensor in model.state_dict().items():
        loaded = parent.model.state_dict()[name]
        torch.testing.assert_close(loaded, tensor, atol=float(tensor.abs().max()) / 200, rtol=0, msg=name)
    prune(parent, Architecture.of([(1, 9), (0, 64), (2, 0), (2, 64)]), Slices(parent)).save_pretrained(
        tmp_path / "child"
    )


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            lambda writer: writer.add_tensor("rope_freqs.weight", np.linspace(1, 8, 6, dtype=np.float32)),
            r"\(rope_freqs\.weight\).*name the safetensors model",
        ),
        (
            lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN),
            r"\(rope\.scaling\.type=yarn\).*name the safetensors model",
        ),
    ],
    ids=["tensor", "key"],
)
def test_gguf_with_scaled_rope_is_refused(
    extra: Callable[[gguf.GGUFWriter], None], message: str, tmp_path: Path
) -> None:
    """transformers ignores what scales a rotary embedding in GGUF, such as the factors of Llama 3."""
    write_llama_gguf(tmp_path / "tiny.gguf", tiny_model(PLAIN), extra=extra)
    with pytest.raises(UnsupportedModelError, match=message):
        load(tmp_path / "tiny.gguf")


def test_gguf_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    model = tiny_model(PLAIN)
    del model.model.layers[1].mlp.up_proj
    write_llama_gguf(tmp_path / "tiny.gguf", model)
    with pytest.raises(ModelError, match=r"lacks .*model\.layers\.1\.mlp\.up_proj\.weight"):
        load(tmp_path / "tiny.gguf")


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("clip", "GGUF architecture 'clip'; transformers reads: .*llama"),
        ("bloom", f"model type 'bloom'; supported are: {FAMILY_LIST}"),
    ],
)
def test_gguf_of_another_architecture_is_refused(architecture: str, message: str, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", architecture)
    writer.add_block_count(1)
    writer.add_vocab_size(8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match=message):
        load(tmp_path / "other.gguf")


@pytest.mark.parametrize(
    "content", [b"", b"GGUF", b"not a GGUF file, whatever its name says" * 9, b"GGUF" + b"\xff" * 99]
)
def test_bytes_named_gguf_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "fake.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=r"fake\.gguf is not a readable GGUF file"):
        load(tmp_path / "fake.gguf")


def test_truncated_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_llama_gguf(path, tiny_model(PLAIN))
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ModelError, match=r"tiny\.gguf is not a readable GGUF file"):
        load(path)
