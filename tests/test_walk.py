"""A parent that is walked layer by layer computes what it computes as a whole, wherever its weights lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import disk_offload
from closeness import tolerance
from families import CASES, IDS, Case, tiny_parent, tokens, two_sources

from llmprune.blocks.library import BlockLibrary, build_library
from llmprune.choices.choice import Choice
from llmprune.choices.dimensions import BLOCK_KINDS
from llmprune.choices.ffn import FfnChoice
from llmprune.choices.merged import MergedChoice
from llmprune.choices.space import Space
from llmprune.core.recipe import ImportanceRecipe
from llmprune.data.tokens import Split
from llmprune.models.parent import Parent, make_parent
from llmprune.models.placement import is_spread
from llmprune.models.waiting import with_room
from llmprune.models.walk import Walk
from llmprune.tables.estimate import estimate, is_walked

SEQ_LEN = 16
THREE = ("llama-gqa", "gemma2-gqa", "gpt_neox-parallel")
"""Norms before the block, norms behind it, and both blocks on one stream with biases."""


def case_of(name: str) -> Case:
    return CASES[IDS.index(name)]


@pytest.fixture(scope="module")
def split() -> Split:
    return two_sources(SEQ_LEN)


def walked_logits(parent: Parent, ids_BT: torch.Tensor) -> torch.Tensor:
    walk = Walk(parent, ids_BT.shape[1])
    states = walk.embedded(ids_BT)
    with torch.no_grad():
        for layer in range(parent.shape.layers):
            with walk.layer(layer) as run:
                states = run(states)
        with walk.behind() as run:
            return run(states)


def weights_of(parent: Parent) -> dict[str, torch.Tensor]:
    return dict(parent.model.named_parameters())


@pytest.mark.parametrize("name", IDS)
def test_layer_by_layer_every_family_computes_its_logits(name: str) -> None:
    parent, ids = tiny_parent(case_of(name)), tokens(2, SEQ_LEN)
    with torch.no_grad():
        expected = parent.model(input_ids=ids, use_cache=False).logits
    assert torch.equal(walked_logits(parent, ids), expected)
    with torch.no_grad():
        assert torch.equal(parent.model(input_ids=ids, use_cache=False).logits, expected), "the model is as it was"


@pytest.mark.parametrize("name", THREE)
def test_half_precision_is_walked_in_float32_on_a_cpu_and_left_as_it_was(name: str) -> None:
    parent, ids = tiny_parent(case_of(name)), tokens(2, SEQ_LEN)
    half = make_parent(parent.model.to(torch.bfloat16), None)
    before = weights_of(half)
    pointers = {name: tensor.data_ptr() for name, tensor in before.items()}
    found = walked_logits(half, ids)
    assert found.dtype == torch.float32
    after = weights_of(half)
    assert {name: tensor.data_ptr() for name, tensor in after.items()} == pointers
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    wide = make_parent(half.model.float(), None)
    with torch.no_grad():
        expected = wide.model(input_ids=ids, use_cache=False).logits
    # Rotary tables and embeddings come in the model's own dtype.
    assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("name", IDS)
def test_walked_and_whole_estimates_are_the_same(name: str, split: Split) -> None:
    parent = tiny_parent(case_of(name))
    space = Space.of(parent.shape, 1, 16)
    library = build_library(parent, split, ImportanceRecipe(), space)
    narrow = parent.shape.architecture.with_choices([(1, FfnChoice(16)), (2, space.attention[0])])
    for at in (None, narrow):
        whole, walked = (estimate(parent, split, library, tokens=80, at=at, walked=way) for way in (False, True))
        assert whole.delta_nats.keys() == walked.delta_nats.keys()
        scale = max(map(abs, whole.delta_nats.values()))
        for key, nats in whole.delta_nats.items():
            assert walked.delta_nats[key] == pytest.approx(nats, abs=tolerance(scale)), key
        assert walked.influence == pytest.approx(whole.influence, abs=tolerance(1.0))
    assert all(parameter.grad is None for parameter in parent.model.parameters())


def test_choices_with_inputs_of_their_own_are_walked_too(split: Split) -> None:
    parent = tiny_parent(case_of("llama-biased"))
    space = Space.of(parent.shape, 1, 16, merge_kv=True)
    library = build_library(parent, split, ImportanceRecipe(), space)
    at = parent.shape.architecture.with_choice(1, MergedChoice(1))
    whole, walked = (estimate(parent, split, library, tokens=80, at=at, walked=way) for way in (False, True))
    assert walked.delta_nats == pytest.approx(whole.delta_nats, abs=tolerance(max(whole.delta_nats.values())))


class Counted(BlockLibrary):
    """How often an output projection is made."""

    made: dict[tuple[int, Choice], int]

    def output(self, layer: int, choice: Choice, weight_DI: torch.Tensor) -> Any:
        self.made[layer, choice] = self.made.get((layer, choice), 0) + 1
        return super().output(layer, choice, weight_DI)


def test_a_walked_estimate_makes_every_choice_once_whatever_the_text_is_long(split: Split) -> None:
    parent = tiny_parent(case_of("llama-gqa"))
    space = Space.of(parent.shape, 1, 8)
    built = build_library(parent, split, ImportanceRecipe(), space)
    library = Counted(space, built.layers)
    object.__setattr__(library, "made", {})
    estimate(parent, split, library, tokens=80, walked=True)
    wanted = {(i, c) for i, kind in space.blocks() for c in space.ladder(kind)[:-1] if c.units}
    assert library.made == dict.fromkeys(wanted, 1)


@pytest.mark.parametrize("name", THREE)
def test_a_parent_on_disk_is_brought_once_a_layer_for_its_library_and_twice_for_an_estimate(
    name: str, split: Split, tmp_path: Path
) -> None:
    parent, elsewhere = tiny_parent(case_of(name)), tiny_parent(case_of(name))
    space = Space.of(parent.shape, 1, 16)
    expected = build_library(parent, split, ImportanceRecipe(), space)
    estimated = estimate(parent, split, expected, tokens=80)
    layer_bytes = sum(p.nbytes for i in range(parent.shape.layers) for p in parent.layer(i).parameters())
    disk_offload(elsewhere.model, tmp_path, execution_device=torch.device("cpu"))
    elsewhere.model.hf_device_map = {"model": "disk", "lm_head": "cpu"}
    assert is_spread(elsewhere.model) and is_walked(elsewhere)
    assert all(p.is_meta for i in range(parent.shape.layers) for p in elsewhere.layer(i).parameters())
    library = build_library(elsewhere, split, ImportanceRecipe(), space)
    assert library.hash == expected.hash
    found = estimate(elsewhere, split, library, tokens=80)
    scale = max(map(abs, estimated.delta_nats.values()))
    assert found.delta_nats == pytest.approx(estimated.delta_nats, abs=tolerance(scale))
    assert all(p.is_meta for i in range(parent.shape.layers) for p in elsewhere.layer(i).parameters()), "put back"
    walk = Walk(elsewhere, SEQ_LEN)
    for layer in range(parent.shape.layers):
        with walk.layer(layer) as run, torch.no_grad():
            for _ in range(3):
                run(torch.zeros(1, SEQ_LEN, parent.shape.hidden_size))
    assert walk.brought_bytes == layer_bytes


def test_a_walk_that_fails_leaves_the_weights_where_they_were(split: Split) -> None:
    parent = make_parent(tiny_parent(case_of("llama-gqa")).model.to(torch.bfloat16), None)
    walk = Walk(parent, SEQ_LEN)
    with pytest.raises(RuntimeError), walk.layer(1) as run:
        assert parent.output_weight(1, "ffn").dtype == torch.float32
        run(torch.zeros(1, SEQ_LEN, 3))
    for kind in BLOCK_KINDS:
        assert parent.output_weight(1, kind).dtype == torch.bfloat16


def test_where_there_is_no_room_for_both_the_parent_waits_in_cpu_memory() -> None:
    parent = tiny_parent(case_of("llama-gqa"))
    asked: list[Any] = []

    def work(device: torch.device | None) -> str:
        asked.append(device)
        if device is None:
            raise torch.OutOfMemoryError("no room")
        return "done"

    assert with_room(parent.model, work) == "done"
    assert asked == [None, parent.device], "first where it lies, then brought there layer by layer"
    with pytest.raises(torch.OutOfMemoryError, match="even so"):
        with_room(parent.model, raising(torch.OutOfMemoryError("even so")))


def raising(error: Exception) -> Any:
    def work(device: torch.device | None) -> None:
        raise error

    return work
