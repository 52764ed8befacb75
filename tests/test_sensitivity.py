"""Estimated losses against finite differences of the loss itself, and block influence against its definition."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from closeness import assert_close, tolerance
from families import (
    CASES,
    IDS,
    VOCAB,
    Slices,
    masked,
    merging,
    overwritten,
    tiny_model,
    tiny_parent,
    tokens,
    two_sources,
)
from torch import Tensor, nn

from llmprune.blocks.library import build_library
from llmprune.choices.architecture import Architecture, ParentShape
from llmprune.choices.choice import Choice, Kept
from llmprune.choices.dimensions import BlockKind
from llmprune.choices.ffn import FfnChoice
from llmprune.choices.kv_groups import AttentionChoice
from llmprune.choices.merged import MergedChoice
from llmprune.choices.space import Space
from llmprune.core.recipe import ImportanceRecipe
from llmprune.data.tokens import SourceTokens, Split
from llmprune.measure.quality.perplexity import score
from llmprune.models.modeling_pruned import input_axis
from llmprune.models.parent import Parent, make_parent
from llmprune.models.surgery import prune
from llmprune.tables.estimate import DeltaNats, estimate, estimate_delta_nats

SEQ_LEN = 16
ONE: dict[BlockKind, Choice] = {"attention": AttentionChoice(1), "ffn": FfnChoice(1)}
EVERYTHING = 10_000
LAYER = 1
FINAL_NORMS = {
    "llama-gqa": "model.norm",
    "gpt2-mha": "transformer.ln_f",
    "gpt_neox-parallel": "gpt_neox.final_layer_norm",
}
BEHIND_NORMS = ("gemma2-gqa", "gemma3_text-full", "olmo2-gqa")
"""Where a norm stands between the block and the residual stream."""


@pytest.fixture(scope="module")
def split() -> Split:
    return two_sources(SEQ_LEN)


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
        return Space(shape, "medium", (ONE["attention"], shape.full("attention")), (ONE["ffn"], shape.full("ffn")))

    def kept(self, layer: int, choice: Choice) -> Kept:
        return Kept(torch.arange(self.parent.shape.units(choice.kind)))

    def norm_squares(self, layer: int, name: str) -> None:
        return None

    def input_squares(self, layer: int, kind: str) -> None:
        return None

    def head_squares(self) -> None:
        return None

    def output(self, layer: int, choice: Choice, weight_DI: Tensor) -> tuple[Tensor, Tensor | None]:
        weight = weight_DI.clone()
        bias = self.parent.output_bias(layer, choice.kind)
        weight[:, ::2] *= 1 - self.eps
        return weight, None if bias is None else bias * (1 - self.eps)

    def put_into_the_model(self, layer: int, kind: BlockKind) -> Any:
        """A copy of the parent's model with this one block's output replaced."""
        model = copy.deepcopy(self.parent.model)
        projection: Any = make_parent(model, None).output_projection(layer, kind)
        weight, bias = self.output(layer, ONE[kind], self.parent.output_weight(layer, kind))
        projection.weight.copy_(weight if input_axis(projection) == 1 else weight.T)
        if bias is not None:
            projection.bias.copy_(bias)
        return model


@pytest.mark.parametrize("kind", ["attention", "ffn"])
@pytest.mark.parametrize("case_id", [*FINAL_NORMS, *BEHIND_NORMS, "granite-gqa"])
def test_the_first_order_is_the_derivative_of_the_loss(case_id: str, kind: BlockKind, split: Split) -> None:
    parent, eps = double_parent(case_id), 1e-3
    estimates, losses = [], []
    for step in (-eps, eps):
        library: Any = Shrunk(parent, step)
        estimates.append(estimate_delta_nats(parent, split, library, tokens=EVERYTHING)[LAYER, ONE[kind]])
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
    curvatures = {key: (up[key] + down[key]) / eps**2 for key in up if key[1] in ONE.values()}
    assert all(curvature > 0 for curvature in curvatures.values())
    quarter = estimate_delta_nats(parent, split, Shrunk(parent, eps / 2), tokens=EVERYTHING)  # type: ignore[arg-type]
    for key, curvature in curvatures.items():
        linear = (up[key] - down[key]) / (2 * eps)
        assert quarter[key] == pytest.approx(linear * eps / 2 + curvature * (eps / 2) ** 2 / 2, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("kind", ["attention", "ffn"])
@pytest.mark.parametrize("case_id", [*BEHIND_NORMS, "granite-gqa", "gpt_neox-parallel"])
def test_a_dropped_block_is_missed_where_it_meets_the_stream(case_id: str, kind: BlockKind, split: Split) -> None:
    """In front of a norm the gradient is orthogonal to the output, and every drop would be free."""
    parent = double_parent(case_id)
    library: Any = Sliced(parent)
    estimated = estimate_delta_nats(parent, split, library, tokens=EVERYTHING)
    for layer in (0, LAST):
        expected = estimate_by_hand(parent, split, layer, lambda source: 0.0, kind)
        dropped = AttentionChoice(0) if kind == "attention" else FfnChoice(0)
        assert abs(expected) > 1e-4, "dropping a block changes something"
        assert estimated[layer, dropped] == pytest.approx(expected, rel=1e-3)


def test_dropping_a_block_is_estimated_along_all_of_its_output(split: Split) -> None:
    """A dropped block is the parent's output times 1 - 1, its bias included."""
    parent = double_parent("gpt2-mha")

    @dataclass
    class Everything(Shrunk):
        @property
        def space(self) -> Space:
            shape = self.parent.shape
            attention = (AttentionChoice(0), AttentionChoice(1), AttentionChoice(shape.kv_groups))
            return Space(shape, "medium", attention, (FfnChoice(0), FfnChoice(1), FfnChoice(shape.ffn_width)))

        def output(self, layer: int, choice: Choice, weight_DI: Tensor) -> tuple[Tensor, Tensor | None]:
            bias = self.parent.output_bias(layer, choice.kind)
            return weight_DI * 0, None if bias is None else bias * 0

    estimated = estimate_delta_nats(parent, split, Everything(parent, 1.0), tokens=EVERYTHING)  # type: ignore[arg-type]
    for layer in range(parent.shape.layers):
        assert estimated[layer, AttentionChoice(0)] == pytest.approx(estimated[layer, AttentionChoice(1)])
        assert estimated[layer, FfnChoice(0)] == pytest.approx(estimated[layer, FfnChoice(1)])


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
    full = {(layer, choice) for layer, choice in estimated if choice == parent.shape.full(choice.kind)}
    assert len(full) == 2 * parent.shape.layers and len(estimated) == 2 * len(full)
    assert all(estimated[key] == 0.0 for key in full)
    assert seen == [(done, len(seen)) for done in range(1, len(seen) + 1)]


# Not olmo2: its norms span all heads, so the parent's modules do not compute what a child with fewer heads does.
AT_FAMILIES = (
    "llama-gqa",
    "llama-biased",
    "qwen3-gqa",
    "gemma2-gqa",
    "phi3-gqa",
    "gpt_neox-parallel",
    "gpt2-n_inner",
    "opt-mha",
)


class Sliced(Slices):
    """The plainest library, over the ladders of a large space."""

    @property
    def space(self) -> Space:
        return Space.of(self.parent.shape, 1, 10, size="large")


def smaller(shape: ParentShape) -> Architecture:
    """Narrowed blocks of both kinds, dropped ones, and - where there are any to spare - fewer query heads."""
    narrow = AttentionChoice(shape.kv_groups - 1, shape.queries_per_group - 1 or None)
    return shape.architecture.with_choices(
        [(0, narrow), (1, AttentionChoice(0)), (1, FfnChoice(20)), (2, FfnChoice(0)), (3, FfnChoice(10))]
    )


@pytest.mark.parametrize("case_id", AT_FAMILIES)
def test_the_estimate_at_an_architecture_runs_its_child(case_id: str, split: Split) -> None:
    parent = double_parent(case_id)
    library, at, seen = Sliced(parent), smaller(parent.shape), []
    handle = parent.model.register_forward_hook(lambda module, args, output: seen.append(output.logits.detach()))
    estimated = estimate_delta_nats(parent, split, library, tokens=EVERYTHING, at=at)  # type: ignore[arg-type]
    handle.remove()
    child = prune(parent, at, library)
    for windows, logits in zip((b for s in split.sources.values() for b in s.windows.split(2)), seen, strict=True):
        with torch.inference_mode():
            # The norms of some families compute in float32.
            assert_close(logits, child(windows).logits)
    assert (seen[0] - parent.model(split.sources["news"].windows[:2]).logits).abs().max() > 1e-2
    own = set(at.blocks())
    assert all(estimated[key] == 0 for key in own)
    # Blocks that are not there, and those that are narrow, may grow back.
    others = {key: value for key, value in estimated.items() if key not in own}
    assert {(1, parent.shape.full("attention")), (2, parent.shape.full("ffn"))} <= others.keys()
    assert all(math.isfinite(value) and value != 0 for value in others.values())
    assert not any(module._forward_hooks for module in parent.model.modules())


LAST = 3


@dataclass(frozen=True)
class Nudged(Sliced):
    """In the last layer two choices of one kind keep the same; the second has some output weights times 1 - eps."""

    eps: float = 0.0
    kind: BlockKind = "ffn"

    def pair(self) -> tuple[Choice, Choice]:
        ladder = self.space.ladder(self.kind)
        return ladder[1], ladder[2]

    def _same(self, layer: int, choice: Choice) -> Choice:
        return self.pair()[0] if (layer, choice) == (LAST, self.pair()[1]) else choice

    def kept_units(self, layer: int, choice: Choice) -> Tensor:
        return super().kept_units(layer, self._same(layer, choice))

    def norm_squares(self, layer: int, name: str) -> None:
        return None

    def input_squares(self, layer: int, kind: str) -> None:
        return None

    def head_squares(self) -> None:
        return None

    def kept_queries(self, layer: int, choice: Choice) -> Tensor | None:
        return super().kept_queries(layer, self._same(layer, choice))

    def output(self, layer: int, choice: Choice, weight_DI: Tensor) -> tuple[Tensor, Tensor | None]:
        same = self._same(layer, choice)
        weight, bias = super().output(layer, same, weight_DI)
        return (weight, bias) if same == choice else (self._nudged(weight, 1), bias)

    def nudge(self, child: Any) -> Any:
        """The child, with the output of its last layer's block as the second of the pair has it."""
        model = copy.deepcopy(child)
        names = self.parent.names(self.kind)
        projection = model.get_submodule(f"{self.parent.family.layers}.{LAST}.{names.module}".rstrip("."))
        projection = projection.get_submodule(names.output)
        projection.weight = nn.Parameter(self._nudged(projection.weight.detach(), input_axis(projection)))
        return model

    def _nudged(self, weight: Tensor, axis: int) -> Tensor:
        # Not all alike: a norm that follows the block would take a common factor away.
        factors = torch.ones(weight.shape[axis], dtype=weight.dtype)
        factors[::2] -= self.eps
        return weight * (factors if axis == 1 else factors[:, None])


@pytest.mark.parametrize("kind", ["attention", "ffn"])
@pytest.mark.parametrize("case_id", AT_FAMILIES)
def test_the_first_order_at_an_architecture_is_the_derivative_of_its_childs_loss(
    case_id: str, kind: BlockKind, split: Split
) -> None:
    parent, eps = double_parent(case_id), 1e-3
    estimates, losses = [], []
    for step in (-eps, eps):
        library: Any = Nudged(parent, eps=step, kind=kind)
        before, after = library.pair()
        at = smaller(parent.shape).with_choice(LAST, before)
        estimates.append(estimate_delta_nats(parent, split, library, tokens=EVERYTHING, at=at)[LAST, after])
        losses.append(score(library.nudge(prune(parent, at, library)), split).nats_per_token)
    estimated, measured = ((up - down) / (2 * eps) for down, up in (estimates, losses))
    assert abs(measured) > 1e-4, "there is a slope to find"
    assert estimated == pytest.approx(measured, rel=0.03, abs=1e-5)


class Merging(Sliced):
    """The plainest library, over the ladders of a large space with merged KV heads."""

    @property
    def space(self) -> Space:
        return Space.of(self.parent.shape, 1, 10, size="large", merge_kv=True)


MERGING_FAMILIES = ("llama-mha", "llama-biased", "mistral-sliding", "qwen3-gqa", "gemma2-gqa", "olmo2-gqa", "phi3-gqa")


def estimate_by_hand(
    parent: Parent, split: Split, layer: int, new_output: Callable[[str], Any], kind: BlockKind = "attention"
) -> float:
    """mean g.delta + mean (g.delta)^2 / 2, where `new_output` of a source takes the place of what a layer's block adds
    to the residual stream, with the gradient from autograd."""
    total = 0.0
    for name, source in split.sources.items():
        kept: list[Tensor] = []
        module = parent.adds_to_stream(layer, kind)

        def leaf(module: nn.Module, args: Any, output: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(output.detach().requires_grad_())
            return kept[0]

        handle = module.register_forward_hook(leaf)
        logits = parent.model(source.windows, use_cache=False).logits[:, :-1].float()
        handle.remove()
        nn.functional.cross_entropy(logits.flatten(0, 1), source.windows[:, 1:].flatten(), reduction="sum").backward()
        change_BT = (kept[0].grad * (new_output(name) - kept[0].detach())).sum(-1)  # type: ignore[operator]
        summed = float((change_BT + 0.5 * change_BT.square()).sum())
        total += split.weights[name] * summed / source.windows[:, 1:].numel()
    return total


def attention_outputs(parent: Parent, split: Split, layer: int) -> dict[str, Tensor]:
    """What a layer's attention adds, by source."""
    outputs: list[Tensor] = []
    handle = parent.adds_to_stream(layer, "attention").register_forward_hook(
        lambda module, args, output: outputs.append(output.detach())
    )
    for source in split.sources.values():
        parent.model(source.windows, use_cache=False)
    handle.remove()
    return dict(zip(split.sources, outputs, strict=True))


@pytest.mark.parametrize("case_id", MERGING_FAMILIES)
def test_merged_kv_heads_are_estimated_on_inputs_of_their_own(case_id: str, split: Split) -> None:
    parent = double_parent(case_id)
    library: Any = Merging(parent)
    estimated = estimate_delta_nats(parent, split, library, tokens=EVERYTHING)
    for choice in MergedChoice.of(parent.shape):
        for layer in (0, LAST):
            # Only this layer's heads are overwritten, so what comes before it is the parent's.
            outputs = attention_outputs(overwritten(parent, {layer: choice.kv_groups}), split, layer)
            expected = estimate_by_hand(parent, split, layer, outputs.__getitem__)
            # The norms of some families compute in float32.
            assert estimated[layer, choice] == pytest.approx(expected, rel=1e-4, abs=1e-7)
            assert abs(expected) > 1e-6, "merging changes something"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in parent.model.modules())


@pytest.mark.parametrize("case_id", MERGING_FAMILIES)
def test_the_estimate_at_an_architecture_with_merged_kv_heads_runs_its_child(case_id: str, split: Split) -> None:
    parent, seen = double_parent(case_id), []
    library: Any = Merging(parent)
    heads = {0: 1, 2: MergedChoice.of(parent.shape)[-1].kv_groups}
    at = merging(parent.shape, heads).with_choices([(1, FfnChoice(20)), (3, FfnChoice(10))])
    handle = parent.model.register_forward_hook(lambda module, args, output: seen.append(output.logits.detach()))
    estimated = estimate_delta_nats(parent, split, library, tokens=EVERYTHING, at=at)
    handle.remove()
    child = prune(parent, at, library)
    for windows, logits in zip((b for s in split.sources.values() for b in s.windows.split(2)), seen, strict=True):
        with torch.inference_mode():
            # The norms of some families compute in float32.
            assert_close(logits, child(windows).logits)
    own = set(at.blocks())
    assert all(estimated[key] == 0 for key in own)
    assert all(math.isfinite(value) and value != 0 for key, value in estimated.items() if key not in own)
    # The gradient that reaches a layer comes through the merged heads above it: as in the child itself.
    means = overwritten(parent, heads)
    narrow = parent.shape.architecture.with_choices([(1, FfnChoice(20)), (3, FfnChoice(10))])
    with masked(means, narrow, Slices(means)):
        expected = estimate_by_hand(means, split, 1, lambda source: 0.0)
    assert estimated[1, AttentionChoice(0)] == pytest.approx(expected, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("case_id", ["llama-mha", "phi3-gqa"])
def test_merging_heads_that_are_alike_costs_nothing(case_id: str, split: Split) -> None:
    first = double_parent(case_id)
    parent = overwritten(first, dict.fromkeys(range(4), 1))
    space = Space.of(parent.shape, 1, 10, merge_kv=True)
    library = build_library(parent, split, ImportanceRecipe(), space)
    estimated = estimate_delta_nats(parent, split, library, tokens=EVERYTHING)
    assert all(
        abs(estimated[layer, choice]) < tolerance(1.0) for layer in range(4) for choice in MergedChoice.of(parent.shape)
    )
    assert max(abs(value) for value in estimated.values()) > 1e-2, "other choices cost something"
    child = prune(parent, merging(parent.shape, dict.fromkeys(range(4), 1)), library)
    assert_close(child(tokens()).logits, parent.model(tokens()).logits)


def test_the_estimate_at_the_parent_is_the_default(split: Split) -> None:
    parent = double_parent("llama-gqa")
    library: Any = Sliced(parent)
    default = estimate_delta_nats(parent, split, library, tokens=EVERYTHING)
    at_parent = estimate_delta_nats(parent, split, library, tokens=EVERYTHING, at=parent.shape.architecture)
    assert at_parent == default
    assert estimate_delta_nats(parent, split, library, tokens=EVERYTHING, at=smaller(parent.shape)) != default


def test_caution_adds_what_the_sources_disagree_by(split: Split) -> None:
    parent = double_parent("llama-gqa")
    library: Any = Sliced(parent)

    def estimated(some: Split, caution: float) -> DeltaNats:
        return estimate_delta_nats(parent, some, library, tokens=EVERYTHING, caution=caution)

    alone = [
        estimated(replace(split, sources={name: source}, weights={name: 1.0}), 0.0)
        for name, source in split.sources.items()
    ]
    weights = list(split.weights.values())
    mean, wary = estimated(split, 0.0), estimated(split, 2.0)
    for key in mean:
        own = [found[key] for found in alone]
        middle = math.fsum(w * value for w, value in zip(weights, own, strict=True))
        spread = math.sqrt(math.fsum(w * (value - middle) ** 2 for w, value in zip(weights, own, strict=True)))
        assert mean[key] == pytest.approx(middle, rel=1e-6, abs=1e-7)
        assert wary[key] == pytest.approx(middle + 2 * spread, rel=1e-6, abs=1e-7)
    assert any(wary[key] > mean[key] + 1e-4 for key in mean), "the sources disagree"


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
    for walked in (False, True):
        found = estimate(parent, split, Shrunk(parent, 0.1), tokens=EVERYTHING, walked=walked)  # type: ignore[arg-type]
        assert found.influence == pytest.approx(direct.tolist(), abs=tolerance(1.0))


def test_fewer_tokens_are_shared_over_the_sources(split: Split) -> None:
    parent = tiny_parent(CASES[0])
    rows: list[int] = []
    parent.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    estimate_delta_nats(parent, split, Shrunk(parent, 0.1), tokens=2 * SEQ_LEN)  # type: ignore[arg-type]
    assert rows == [1, 2], "a quarter and three quarters of two windows, one each at the least"


@pytest.mark.parametrize("walked", [False, True])
def test_hooks_are_gone_after_an_error(walked: bool, split: Split) -> None:
    parent = tiny_parent(CASES[0])
    library: Any = Shrunk(parent, 0.1)
    beyond = SourceTokens(torch.full((1, SEQ_LEN), VOCAB), torch.ones(1))
    broken = Split("calibration", {"a": split.sources["news"], "b": beyond}, {"a": 0.5, "b": 0.5}, SEQ_LEN, False)
    for some in (split, broken):
        if some is broken:
            with pytest.raises(IndexError):
                estimate(parent, some, library, tokens=EVERYTHING, walked=walked)
        else:
            estimate(parent, some, library, tokens=EVERYTHING, walked=walked)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in parent.model.modules())
    assert all(parameter.grad is None for parameter in parent.model.parameters())
