"""A parent on several devices: what is cut from it, scored, timed and written, held to the same on one device.

Two stand-ins for GPUs: tensors under other names, which must not be mixed (two_gpus.py); and the CPU under its two
names, "cpu" and "cpu:0", where accelerate hangs the same hooks and everything else is real.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from families import CASES, IDS, LAYERS, Slices, tiny_model, tiny_parent, tokens
from test_prefix import SPLIT
from tiny import tiny_tokenizer
from two_gpus import Place, spread, two_gpus

from llmprune.choices.architecture import Architecture
from llmprune.measure.quality.perplexity import score_windows
from llmprune.measure.quality.prefix import PrefixScorer
from llmprune.measure.speed.throughput import Workload, measure_paired
from llmprune.models.checkpoint import write_checkpoint
from llmprune.models.parent import Parent, make_parent
from llmprune.models.placement import is_spread
from llmprune.models.surgery import prune

GPUS = ("cuda:0", "cuda:1")
# To accelerate a name and a device are two places.
NAMES_OF_THE_CPU = ("cpu", torch.device("cpu"))
FAMILIES_OF_EACH_LAYOUT = ["llama-gqa", "qwen2-gqa", "gemma2-gqa", "opt-projected", "gpt_neox-parallel", "gpt2-mha"]
CUTS = {
    "narrower": [(3, 40), (2, 23), (1, 9), (3, 17)],
    "without a layer of each": [(2, 13), (0, 0), (0, 0), (2, 13)],
    "on one device alone": [(2, 13), (3, 40), (0, 0), (0, 0)],
}


def device_map(parent: Parent, first: Place, last: Place) -> Mapping[str, Place]:
    """Half of the layers on each; what stands before them on the first, what follows on the last but for a head that
    is the embedding."""
    stack, _, layers = parent.family.layers.rpartition(".")
    siblings = [name for name, _ in parent.model.get_submodule(stack).named_children()]
    after = siblings.index(layers)
    of_stack = {
        f"{stack}.{name}": first if number < after or "rotary" in name or "wpe" in name else last
        for number, name in enumerate(siblings)
        if number != after
    }
    head = parent.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    tied = head.weight is parent.model.get_input_embeddings().weight  # type: ignore[no-untyped-call]
    (name,) = [name for name, module in parent.model.named_modules() if module is head]
    halves = {f"{parent.family.layers}.{i}": first if i < LAYERS // 2 else last for i in range(LAYERS)}
    found = {**of_stack, **halves, name: first if tied else last}
    # The first entry is where inputs go.
    return dict(sorted(found.items(), key=lambda entry: entry[1] != first))


def spread_parent(case_id: str, devices: tuple[Place, Place]) -> Parent:
    case = CASES[IDS.index(case_id)]
    parent = make_parent(spread(tiny_model(case), device_map(tiny_parent(case), *devices)), None)
    assert is_spread(parent.model) and str(parent.device) == devices[0]
    return parent


@pytest.fixture
def gpus() -> Iterator[None]:
    with two_gpus():
        yield


@pytest.mark.usefixtures("gpus")
def test_what_the_stand_in_is_for() -> None:
    one, other = (torch.ones(2, device=place) for place in GPUS)
    assert (one + one).device == torch.device("cuda:0") and float((one + 1).sum()) == 4
    for mixed in (lambda: one + other, lambda: one + torch.ones(2)):
        with pytest.raises(RuntimeError, match="expected all tensors on one device"):
            mixed()
    assert torch.equal(one.cpu() + other.to("cpu"), torch.full((2,), 2.0))


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("case_id", FAMILIES_OF_EACH_LAYOUT)
def test_children_compute_where_their_layers_are(case_id: str, cut: str) -> None:
    parent, alone = spread_parent(case_id, GPUS), tiny_parent(CASES[IDS.index(case_id)])
    units = [(min(groups, parent.shape.kv_groups), min(width, parent.shape.ffn_width)) for groups, width in CUTS[cut]]
    architecture = Architecture.of(units)
    child = prune(parent, architecture, Slices(parent))
    layers = child.get_submodule(parent.family.layers)
    for own, layer in zip(layers.children(), architecture.kept_layers, strict=True):
        assert {str(one.device) for one in own.parameters()} <= {GPUS[layer >= LAYERS // 2]}
    ids_BT = tokens(2, 12)
    with torch.inference_mode():
        expected = prune(alone, architecture, Slices(alone))(ids_BT).logits
        found = child(ids_BT.to("cuda:0")).logits
    assert str(found.device) == "cuda:0" and torch.equal(found.cpu(), expected)


@pytest.mark.usefixtures("gpus")
def test_scores_are_those_of_one_device() -> None:
    parent, alone = spread_parent("llama-gqa", GPUS), tiny_parent(CASES[IDS.index("llama-gqa")])
    scorer = PrefixScorer(parent, Slices(parent), SPLIT)
    for architecture in (parent.shape.architecture, Architecture.of(CUTS["narrower"])):
        expected = score_windows(prune(alone, architecture, Slices(alone)), SPLIT)
        for nats in (
            scorer.score(architecture).nats,
            score_windows(prune(parent, architecture, Slices(parent)), SPLIT),
        ):
            assert all(torch.equal(nats[name], values) for name, values in expected.items())


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize("case_id", FAMILIES_OF_EACH_LAYOUT)
def test_a_spread_parent_and_its_children_are_timed(case_id: str) -> None:
    parent = spread_parent(case_id, GPUS)
    child = prune(parent, parent.shape.architecture.with_choices([]), Slices(parent))
    workload = Workload(2, 8, 4, "float32", 1, str(parent.device))
    _, (speed,) = measure_paired(parent.model, [child], workload, repeats=1)
    assert speed.decode_speedup.median > 0


def test_a_spread_child_is_written_and_proven(tmp_path: Path) -> None:
    parent, tokenizer = spread_parent("llama-gqa", NAMES_OF_THE_CPU), tiny_tokenizer()
    architecture = Architecture.of(CUTS["without a layer of each"])
    child = prune(parent, architecture, Slices(parent))
    assert is_spread(child)
    # Numbers, as GPUs have: of the CPU transformers would think that weights are offloaded there.
    child.hf_device_map = {name: int(place != "cpu") for name, place in child.hf_device_map.items()}
    proof = write_checkpoint(child, tokenizer, architecture, {}, tmp_path / "child")
    assert proof.max_logit_difference < 1e-5
