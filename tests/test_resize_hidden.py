"""Cutting the hidden size: a rotation alone changes nothing, cut channels are masked ones, and children are stock."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CASES, HIDDEN, IDS, tiny_model, tiny_parent, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmprune.core.errors import ArchitectureError, ModelError, UnsupportedModelError
from llmprune.data.tokens import SourceTokens, Split
from llmprune.models import fresh_process
from llmprune.models.loading import quiet_loading
from llmprune.models.modeling_pruned import FAMILIES
from llmprune.models.parent import Parent, make_parent
from llmprune.resize import stream
from llmprune.resize.basis import DAMP, channel_basis, rotated_basis
from llmprune.resize.hidden import (
    WAYS,
    config_problem,
    cut_hidden,
    legal_hidden_sizes,
    rotation_problem,
    size_problem,
)

CASE = dict(zip(IDS, CASES, strict=True))
SAID = [name for name in IDS if not FAMILIES[CASE[name].model_type].derives_head_dim]
ROTATED = [name for name in SAID if FAMILIES[CASE[name].model_type].attention.output_norm is None]
KEPT = 24
"""Half of the stream, and a multiple of the six heads, which some configs ask for."""


def split_of(rows: int = 16, seed: int = 3) -> Split:
    """Two sources of unequal length and weight."""
    windows = tokens(rows, 20, seed)
    cut = rows // 4
    sources = {"a": windows[:cut], "b": windows[cut:]}
    return Split(
        "calibration",
        {name: SourceTokens(own, torch.full((len(own),), 20)) for name, own in sources.items()},
        {"a": 0.5, "b": 0.5},
        20,
        False,
    )


def token_weights(split: Split) -> Tensor:
    """What each token of the split counts, source by source; they sum to 1."""
    return torch.cat(
        [
            torch.full((own.windows.numel(),), split.weights[name] / own.windows.numel(), dtype=torch.float64)
            for name, own in split.sources.items()
        ]
    )


def exact(parent: Parent, monkeypatch: pytest.MonkeyPatch) -> Parent:
    """The parent in float64, its norms too: families take theirs in float32 whatever comes in."""
    norm = parent.model.get_submodule(stream.final_norm(parent))
    offset = stream.gain_offset(norm)

    def forward(self: Any, x: Tensor) -> Tensor:
        eps = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (offset + self.weight)

    monkeypatch.setattr(type(norm), "forward", forward)
    parent.model.double()
    return parent


def even_gain(parent: Parent) -> Parent:
    """The parent with one gain for all channels before its head, if that is its embedding."""
    if stream.is_tied(parent):
        parent.model.get_submodule(stream.final_norm(parent)).weight.data.fill_(1.3)
    return parent


def entering(parent: Parent, split: Split, names: list[str]) -> dict[str, Tensor]:
    """All that enters modules, in float64: (N, D) each."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    with ExitStack() as hooks, torch.inference_mode():
        for name in names:
            module = parent.model.get_submodule(name)
            handle = module.register_forward_pre_hook(lambda _, args, own=seen[name]: own.append(args[0].double()))
            hooks.callback(handle.remove)
        for source in split.sources.values():
            parent.model(source.windows)
    return {name: torch.cat([part.flatten(0, 1) for part in parts]) for name, parts in seen.items()}


def unit(x: Tensor) -> Tensor:
    return x / x.square().mean(-1, keepdim=True).sqrt()


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(tokens()).logits
    return found


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", ROTATED)
def test_a_rotation_alone_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = exact(even_gain(tiny_parent(CASE[name])), monkeypatch)
    child = cut_hidden(parent, split_of(), HIDDEN, way="rotation").model
    embedding = parent.model.get_input_embeddings().weight
    assert relative(child.get_input_embeddings().weight, embedding) > 0.1, "nothing was rotated"
    assert relative(logits(child), logits(parent.model)) < 1e-8


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("name", ROTATED)
def test_directions_that_hold_nothing_cost_nothing(name: str, refit: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that stays within half of its dimensions, in no channel's own direction, is cut to that half. Norms add
    a small number to what they divide by, which weighs more in fewer dimensions."""
    parent = exact(even_gain(tiny_parent(CASE[name])), monkeypatch)
    basis_DE = torch.linalg.qr(torch.randn(HIDDEN, KEPT, dtype=torch.float64)).Q
    state = parent.model.state_dict()
    state["model.embed_tokens.weight"].copy_(state["model.embed_tokens.weight"] @ basis_DE @ basis_DE.T)
    for writer in stream.writers(parent):
        state[f"{writer}.weight"].copy_(basis_DE @ basis_DE.T @ state[f"{writer}.weight"])
        if f"{writer}.bias" in state:
            state[f"{writer}.bias"].copy_(basis_DE @ basis_DE.T @ state[f"{writer}.bias"])
    cut = cut_hidden(parent, split_of(), KEPT, way="rotation", multiple=8, refit=refit)
    assert cut.energy == pytest.approx(1, abs=1e-5)
    assert relative(logits(cut.model), logits(parent.model)) < 1e-3


@contextmanager
def masked(parent: Parent, split: Split, kept: Tensor) -> Iterator[None]:
    """Within it, all but the kept channels of the parent's stream are zero, and its norms look at the kept ones only,
    scaled by what these are of the root mean square of all."""
    names = stream.norms(parent)
    gone = torch.ones(parent.shape.hidden_size, dtype=torch.bool).index_fill(0, kept, False)
    weights, inputs = token_weights(split)[:, None], entering(parent, split, names)

    def without(_: Any, args: Any, output: Tensor) -> Tensor:
        return output.masked_fill(gone, 0)

    def over_kept(scale: Tensor, offset: float) -> Any:
        def hook(module: Any, args: tuple[Tensor], output: Tensor) -> Tensor:
            x = args[0][..., kept]
            eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
            own = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (offset + module.weight[kept]) * scale
            return torch.zeros_like(output).index_copy(-1, kept, own.to(output))

        return hook

    with ExitStack() as hooks:
        embedding = parent.model.get_input_embeddings()
        hooks.callback(embedding.register_forward_hook(without).remove)
        for name in names:
            norm = parent.model.get_submodule(name)
            scale = (unit(inputs[name])[:, kept].square().mean(-1, keepdim=True) * weights).sum().sqrt()
            hooks.callback(norm.register_forward_hook(over_kept(scale, stream.gain_offset(norm))).remove)
        yield


@pytest.mark.parametrize("name", SAID)
def test_cut_channels_are_masked_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parent, split = exact(tiny_parent(CASE[name]), monkeypatch), split_of()
    child = cut_hidden(parent, split, KEPT, way="channels", multiple=8, refit=False).model
    basis = channel_basis(parent, stream.collect_places(parent, split), KEPT, refit_readers=False)
    with masked(parent, split, basis.down_DE.argmax(dim=0)):
        expected = logits(parent.model)
    # The root mean squares that scale norms are taken in float32.
    assert relative(logits(child), expected) < 1e-5
    assert relative(expected, logits(parent.model)) > 0.1, "the mask does nothing"


@pytest.mark.parametrize("name", ["llama-gqa", "gemma2-gqa", "olmo2-gqa"])
def test_the_most_active_channels_stay(name: str) -> None:
    parent, split = tiny_parent(CASE[name]), split_of()
    names, weights = stream.norms(parent), token_weights(split)[:, None]
    importance = torch.zeros(HIDDEN, dtype=torch.float64)
    for own, x in entering(parent, split, names).items():
        norm = parent.model.get_submodule(own)
        importance += ((stream.gain_offset(norm) + norm.weight.double()).abs() * unit(x).abs() * weights).sum(0)
    basis = channel_basis(parent, stream.collect_places(parent, split), KEPT, refit_readers=False)
    assert basis.down_DE.argmax(dim=0).tolist() == importance.topk(KEPT).indices.sort().values.tolist()


@pytest.mark.parametrize("way", WAYS)
def test_what_reads_the_stream_is_solved_again(way: str) -> None:
    """By ridge regression written out, one row a token: from what is kept to what the map gave of all."""
    parent, split = tiny_parent(CASE["llama-biased"]), split_of()
    places = stream.collect_places(parent, split)
    make = channel_basis if way == "channels" else rotated_basis
    basis = make(parent, places, KEPT, refit_readers=True)
    child = cut_hidden(parent, split, KEPT, way=way, multiple=8).model  # type: ignore[arg-type]
    for reading in (stream.readings(parent)[3], stream.readings(parent)[-1]):
        assert reading.norm is not None
        gain_D = stream.gain(parent.model.get_submodule(reading.norm))
        x = unit(entering(parent, split, [reading.norm])[reading.norm])
        weight = parent.model.get_submodule(reading.maps[-1]).weight.double()
        # The ridge is on all that is read: on channels behind the gain, on directions before it.
        read = x * gain_D if way == "channels" else x
        full = weight if way == "channels" else weight * gain_D
        root = token_weights(split).sqrt()[:, None]
        ridge = (DAMP * (read * root).square().sum(0).mean()).sqrt() * torch.eye(HIDDEN, dtype=torch.float64)
        rows = torch.cat([read * root, ridge])
        expected = torch.linalg.lstsq(rows @ basis.down_DE, rows @ full.T).solution.T
        found = child.get_submodule(reading.maps[-1]).weight.double()
        assert relative(found, expected) < 1e-4
        cut = weight @ basis.down_DE if way == "channels" else full @ basis.down_DE
        assert relative(found, cut) > 0.01, "the refit does nothing"


def test_channels_that_repeat_others_are_made_up_for() -> None:
    """Half of the channels are mixtures of the others, five times as small: what they say can be told without them."""
    parent = tiny_parent(CASE["qwen3-gqa"])
    mixing = 0.2 * torch.linalg.qr(torch.randn(KEPT, KEPT)).Q
    state = parent.model.state_dict()
    embedding = state["model.embed_tokens.weight"]
    embedding[:, KEPT:] = embedding[:, :KEPT] @ mixing.T
    for writer in stream.writers(parent):
        state[f"{writer}.weight"][KEPT:] = mixing @ state[f"{writer}.weight"][:KEPT]
    for norm in stream.norms(parent):
        state[f"{norm}.weight"].fill_(1)
    expected, errors = logits(parent.model), {}
    for refit in (False, True):
        child = cut_hidden(parent, split_of(), KEPT, way="channels", multiple=8, refit=refit).model
        errors[refit] = relative(logits(child), expected)
    assert errors[True] < 0.01 < 0.1 < errors[False]


def test_a_head_that_is_the_embedding_stays_it() -> None:
    """Channels whose gains before the head are far apart are not mixed, and what gain a group has is kept."""
    parent = tiny_parent(CASE["llama-gqa"])
    norm = parent.model.get_submodule("model.norm")
    norm.weight.data[:] = 1.0
    norm.weight.data[5:9] = -3.0
    cut = cut_hidden(parent, split_of(), 40, way="rotation", multiple=8)
    assert cut.model.get_output_embeddings().weight is cut.model.get_input_embeddings().weight
    basis = rotated_basis(parent, stream.collect_places(parent, split_of()), 40, refit_readers=True)
    in_group = basis.down_DE[5:9].square().sum(0)
    torch.testing.assert_close(in_group, in_group.round())
    gains = cut.model.get_submodule("model.norm").weight.double() / basis.scales["model.norm"]
    torch.testing.assert_close(gains, torch.where(in_group > 0.5, -3.0, 1.0).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SAID)
def test_children_are_stock_checkpoints_and_parents(name: str, way: str, tmp_path: Path) -> None:
    parent = tiny_parent(CASE[name])
    if way == "rotation" and name not in ROTATED:
        pytest.skip("is refused")
    before = parent.hash
    child = cut_hidden(parent, split_of(), KEPT, way=way, multiple=8).model  # type: ignore[arg-type]
    assert type(child) is type(parent.model)
    with quiet_loading():
        child.save_pretrained(tmp_path)
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(loaded.eval()), logits(child), rtol=0, atol=0)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    again = make_parent(loaded, None).shape
    assert again.hidden_size == KEPT
    for field in ("layers", "kv_groups", "queries_per_group", "head_dim", "ffn_width"):
        assert getattr(again, field) == getattr(parent.shape, field)
    # Nothing of the parent's moved, no hook is left, and nothing is shared: a child may be trained.
    assert parent.hash == before
    assert not any(module._forward_pre_hooks for module in parent.model.modules())
    assert not {p.data_ptr() for p in parent.model.parameters()} & {p.data_ptr() for p in child.parameters()}


STRANGER = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
assert "llmprune" not in sys.modules
ids = torch.arange(5, 25)[None]
with torch.inference_mode():
    print(type(model).__name__, model(ids).logits.double().sum().item())
"""


def test_a_stranger_loads_a_child_that_its_own_config_refuses(tmp_path: Path) -> None:
    """Six heads do not divide 32, which LlamaConfig asks for; a Mistral computes the same, and does not ask."""
    parent = tiny_parent(CASE["llama-gqa"])
    child = cut_hidden(parent, split_of(), 32, way="rotation").model
    with quiet_loading():
        child.save_pretrained(tmp_path / "child")
    (tmp_path / "script.py").write_text(STRANGER)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    finished = fresh_process.run_script(str(tmp_path / "script.py"), [str(tmp_path / "child")], environment)
    assert finished.returncode == 0, finished.stderr[-3000:]
    name, total = finished.stdout.split()
    assert name == "MistralForCausalLM"
    with torch.inference_mode():
        expected = child(torch.arange(5, 25)[None]).logits.double()
    assert float(total) == pytest.approx(float(expected.sum()), abs=1e-4 * float(expected.abs().sum()))


def test_a_twin_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that uses 24 channels of 48, cut to 32, which only the twin can say."""
    parent = exact(even_gain(tiny_parent(CASE["llama-llama3-rope"])), monkeypatch)
    mistral = tiny_model(CASE["mistral-gqa"]).get_submodule("model.norm")
    monkeypatch.setattr(type(mistral), "forward", type(parent.model.get_submodule("model.norm")).forward)
    state = parent.model.state_dict()
    state["model.embed_tokens.weight"][:, KEPT:] = 0
    for writer in stream.writers(parent):
        state[f"{writer}.weight"][KEPT:] = 0
    for way in WAYS:
        child = cut_hidden(parent, split_of(), 32, way=way).model
        assert child.config.model_type == "mistral"
        assert relative(logits(child), logits(parent.model)) < 1e-3


@pytest.mark.parametrize("name", [name for name in IDS if name not in SAID])
def test_configs_without_head_dim_are_refused(name: str) -> None:
    parent = tiny_parent(CASE[name])
    problem = config_problem(parent)
    assert problem is not None and "no field head_dim" in problem
    assert legal_hidden_sizes(parent, 8) == []
    with pytest.raises(UnsupportedModelError, match="no field head_dim"):
        cut_hidden(parent, split_of(), KEPT, way="channels", multiple=8)


@pytest.mark.parametrize("name", [name for name in SAID if name not in ROTATED])
def test_norms_behind_blocks_forbid_rotation(name: str) -> None:
    parent = tiny_parent(CASE[name])
    assert "post_attention_layernorm" in (rotation_problem(parent) or "")
    with pytest.raises(UnsupportedModelError, match='use way="channels"'):
        cut_hidden(parent, split_of(), KEPT, way="rotation", multiple=8)


def test_sizes_that_are_not_legal_say_why() -> None:
    parent, biased = tiny_parent(CASE["llama-gqa"]), tiny_parent(CASE["llama-biased"])
    assert legal_hidden_sizes(parent, 8) == [40, 32, 24, 16, 8]
    # A Mistral has no biases, so there the heads must divide.
    assert legal_hidden_sizes(biased, 8) == [24]
    assert legal_hidden_sizes(parent) == [32]
    assert size_problem(parent, HIDDEN) is None
    for own, size, message in (
        (parent, 50, "from 32 to the parent's 48, got 50"),
        (parent, 0, "from 32 to the parent's 48, got 0"),
        (parent, 40, "a multiple of 32, got 40; use 32"),
        (biased, 32, "refused by LlamaConfig.*number of attention heads"),
    ):
        with pytest.raises(ArchitectureError, match=message):
            cut_hidden(own, split_of(), size)
    with pytest.raises(ArchitectureError, match="way must be one of rotation, channels; got 'svd'"):
        cut_hidden(parent, split_of(), 32, way="svd")  # type: ignore[arg-type]


def test_activations_that_overflow_are_told() -> None:
    parent = tiny_parent(CASE["llama-gqa"])
    parent.model.get_input_embeddings().weight.data[tokens(1, 1, 3)[0, 0]] = torch.inf
    with pytest.raises(ModelError, match=r"must be finite, but those entering model.layers.0.input_layernorm"):
        cut_hidden(parent, split_of(), 32)


def test_tokens_count_by_their_source() -> None:
    parent, split = tiny_parent(CASE["gemma3_text-gqa"]), split_of()
    name = stream.norms(parent)[2]
    x = unit(entering(parent, split, [name])[name])
    place = stream.collect_places(parent, split)[name]
    torch.testing.assert_close(place.gram_DD, (x * token_weights(split)[:, None]).T @ x, rtol=1e-5, atol=1e-5)


def test_the_families_that_can_be_cut() -> None:
    served = ["gemma2", "gemma3_text", "granite", "llama", "mistral", "olmo2", "qwen2", "qwen3", "smollm3"]
    assert sorted({CASE[name].model_type for name in SAID}) == served
