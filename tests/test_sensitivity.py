"""Estimated losses against finite differences of the loss itself, and block influence against its definition."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from families import CASES, IDS, VOCAB, tiny_model, tiny_parent, tokens
from torch import Tensor, nn

from llmprune.architecture import BlockKind, Space
from llmprune.blocks.sensitivity import block_influence, estimate_delta_nats
from llmprune.data.tokens import SourceTokens, Split
from llmprune.measure.quality import score
from llmprune.models.modeling_pruned import input_axis
from llmprune.models.parent import Parent, make_parent

SEQ_LEN = 16
EVERYTHING = 10_000
LAYER = 1
FINAL_NORMS = {
    "llama-gqa": "model.norm",
    "gpt2-mha": "transformer.ln_f",
    "gpt_neox-parallel": "gpt_neox.final_layer_norm",
}


@pytest.fixture(scope="module")
def split() -> Split:
    """Two sources of unequal size and weight."""
    sources = {
        "news": SourceTokens(tokens(3, SEQ_LEN, seed=1), torch.ones(3)),
        "code": SourceTokens(tokens(2, SEQ_LEN, seed=2), torch.ones(2)),
    }
    return Split("calibration", sources, {"news": 0.25, "code": 0.75}, SEQ_LEN, bos=False)


def double_parent(case_id: str) -> Parent:
    """In float64, where finite differences have digits to spare."""
    return make_parent(tiny_model(CASES[IDS.index(case_id)]).double(), None)


@dataclass
class Shrunk:
    """Stands in for a library: a choice keeps every unit, but some output weights (and the bias) times 1 - eps."""

    parent: Parent
    eps: float

    @property
    def space(self) -> Space:
        shape = self.parent.shape
        return Space(shape, (1, shape.kv_groups), (1, shape.ffn_width))

    def kept_units(self, layer: int, kind: BlockKind, units: int) -> Tensor:
        return torch.arange(self.parent.shape.units(kind))

    def output(self, layer: int, kind: BlockKind, units: int) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.parent.output_weight(layer, kind).clone(), self.parent.output_bias(layer, kind)
        weight[:, ::2] *= 1 - self.eps
        return weight, None if bias is None else bias * (1 - self.eps)

    def put_into_the_model(self, layer: int, kind: BlockKind) -> Any:
        """A copy of the parent's model with this one block's output replaced."""
        model = copy.deepcopy(self.parent.model)
        projection: Any = make_parent(model, None).output_projection(layer, kind)
        weight, bias = self.output(layer, kind, 1)
        projection.weight.copy_(weight if input_axis(projection) == 1 else weight.T)
        if bias is not None:
            projection.bias.copy_(bias)
        return model


@pytest.mark.parametrize("kind", ["attention", "ffn"])
@pytest.mark.parametrize("case_id", FINAL_NORMS)
def test_the_first_order_is_the_derivative_of_the_loss(case_id: str, kind: BlockKind, split: Split) -> None:
    parent, eps = double_parent(case_id), 1e-3
    estimates, losses = [], []
    for step in (-eps, eps):
        library: Any = Shrunk(parent, step)
        estimates.append(estimate_delta_nats(parent, split, library, tokens=EVERYTHING)[LAYER, kind, 1])
        losses.append(score(library.put_into_the_model(LAYER, kind), split).nats_per_token)
    estimated, measured = ((after - before) / (2 * eps) for before, after in (estimates, losses))
    assert abs(measured) > 1e-3, "there is a slope to find"
    assert estimated == pytest.approx(measured, rel=0.02)


def test_the_second_order_is_the_fisher_form(split: Split) -> None:
    parent, eps = double_parent("llama-gqa"), 0.5
    up, down = (
        estimate_delta_nats(parent, split, Shrunk(parent, step), tokens=EVERYTHING)  # type: ignore[arg-type]
        for step in (eps, -eps)
    )
    # The linear terms cancel; what is left is a mean of squares.
    curvatures = {key: (up[key] + down[key]) / eps**2 for key in up if key[2] == 1}
    assert all(curvature > 0 for curvature in curvatures.values())
    quarter = estimate_delta_nats(parent, split, Shrunk(parent, eps / 2), tokens=EVERYTHING)  # type: ignore[arg-type]
    for key, curvature in curvatures.items():
        linear = (up[key] - down[key]) / (2 * eps)
        assert quarter[key] == pytest.approx(linear * eps / 2 + curvature * (eps / 2) ** 2 / 2, rel=1e-4, abs=1e-7)


def test_dropping_a_block_is_estimated_along_all_of_its_output(split: Split) -> None:
    """A dropped block is the parent's output times 1 - 1, its bias included."""
    parent = double_parent("gpt2-mha")

    @dataclass
    class Everything(Shrunk):
        @property
        def space(self) -> Space:
            return Space(self.parent.shape, (0, 1, self.parent.shape.kv_groups), (0, 1, self.parent.shape.ffn_width))

        def output(self, layer: int, kind: BlockKind, units: int) -> tuple[Tensor, Tensor | None]:
            weight, bias = self.parent.output_weight(layer, kind), self.parent.output_bias(layer, kind)
            return weight * 0, None if bias is None else bias * 0

    estimated = estimate_delta_nats(parent, split, Everything(parent, 1.0), tokens=EVERYTHING)  # type: ignore[arg-type]
    for layer in range(parent.shape.layers):
        assert estimated[layer, "attention", 0] == pytest.approx(estimated[layer, "attention", 1])
        assert estimated[layer, "ffn", 0] == pytest.approx(estimated[layer, "ffn", 1])


def test_the_parents_own_choice_costs_nothing(split: Split) -> None:
    parent = tiny_parent(CASES[0])
    seen: list[tuple[int, int]] = []
    estimated = estimate_delta_nats(
        parent,
        split,
        Shrunk(parent, 0.1),  # type: ignore[arg-type]
        tokens=EVERYTHING,
        progress=lambda done, total: seen.append((done, total)),
    )
    full = {(layer, kind, units) for layer, kind, units in estimated if units == parent.shape.units(kind)}
    assert len(full) == 2 * parent.shape.layers and len(estimated) == 2 * len(full)
    assert all(estimated[key] == 0.0 for key in full)
    assert seen == [(done, len(seen)) for done in range(1, len(seen) + 1)]


@pytest.mark.parametrize("case_id", FINAL_NORMS)
def test_block_influence_is_what_the_hidden_states_say(case_id: str, split: Split) -> None:
    parent = tiny_parent(CASES[IDS.index(case_id)])
    direct = torch.zeros(parent.shape.layers, dtype=torch.float64)
    bare = copy.deepcopy(parent.model)
    # The last of `hidden_states` has been through the final norm.
    path, _, name = FINAL_NORMS[case_id].rpartition(".")
    setattr(bare.get_submodule(path), name, nn.Identity())
    for source, weight in ((split.sources[name], split.weights[name]) for name in split.sources):
        with torch.inference_mode():
            states = bare(input_ids=source.windows, output_hidden_states=True).hidden_states
        for layer, (before, after) in enumerate(itertools.pairwise(states)):
            similarity = nn.functional.cosine_similarity(before, after, dim=-1)
            direct[layer] += weight * (1 - similarity.double().mean())
    assert block_influence(parent, split, tokens=EVERYTHING) == pytest.approx(direct.tolist(), abs=1e-6)


def test_fewer_tokens_are_shared_over_the_sources(split: Split) -> None:
    parent = tiny_parent(CASES[0])
    rows: list[int] = []
    parent.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    estimate_delta_nats(parent, split, Shrunk(parent, 0.1), tokens=2 * SEQ_LEN)  # type: ignore[arg-type]
    assert rows == [1, 2], "a quarter and three quarters of two windows, one each at the least"


@pytest.mark.parametrize("measure", [estimate_delta_nats, block_influence])
def test_hooks_are_gone_after_an_error(measure: Any, split: Split) -> None:
    parent = tiny_parent(CASES[0])
    beyond = SourceTokens(torch.full((1, SEQ_LEN), VOCAB), torch.ones(1))
    broken = Split("calibration", {"a": split.sources["news"], "b": beyond}, {"a": 0.5, "b": 0.5}, SEQ_LEN, False)
    library = (Shrunk(parent, 0.1),) if measure is estimate_delta_nats else ()
    for some in (split, broken):
        if some is broken:
            with pytest.raises(IndexError):
                measure(parent, some, *library, tokens=EVERYTHING)
        else:
            measure(parent, some, *library, tokens=EVERYTHING)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in parent.model.modules())
    assert all(parameter.grad is None for parameter in parent.model.parameters())
