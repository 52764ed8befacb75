"""The sequential refit, held in every family to what the refitted child computes as a whole model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close, tolerance
from families import CASES, IDS, VOCAB, Case, Slices, tiny_parent
from test_families import ARCHITECTURES
from transformers import PreTrainedModel

from llmprune.choices.architecture import Architecture
from llmprune.data.tokens import SourceTokens, Split
from llmprune.models.parent import Parent
from llmprune.models.streams import Shelf
from llmprune.models.surgery import prune
from llmprune.recover.sequential import SequentialRefit, refit_sequentially

KINDS_OF_CUT = ("heterogeneous", "no middle layer", "one block a layer", "uniform both", "no last layer")


def text(windows: int = 32, length: int = 12) -> Split:
    """Random tokens of two sources of other weights."""
    generator = torch.Generator().manual_seed(3)
    sources = {
        name: SourceTokens(torch.randint(5, VOCAB, (count, length), generator=generator), torch.full((count,), 40))
        for name, count in (("ant", windows), ("bee", windows // 2))
    }
    return Split("calibration", sources, {"ant": 0.7, "bee": 0.3}, length, False)


def cut(parent: Parent, name: str) -> Architecture:
    shape = parent.shape
    return Architecture.of(ARCHITECTURES[name](shape.kv_groups, shape.ffn_width))


def refitted(child: PreTrainedModel, found: SequentialRefit) -> PreTrainedModel:
    """A copy of the child with what was solved."""
    changed = copy.deepcopy(child)
    missing, unexpected = changed.load_state_dict(dict(found.tensors), strict=False)
    assert not unexpected and len(missing) + len(found.tensors) == len(changed.state_dict())
    return changed


@contextmanager
def last_layer_outputs(model: PreTrainedModel, path: str) -> Iterator[list[torch.Tensor]]:
    """What the last layer gives to each batch that runs within."""
    seen: list[torch.Tensor] = []

    def hook(module: Any, args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = list(model.get_submodule(path).children())[-1].register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def distance(parent: Parent, child: PreTrainedModel, split: Split) -> float:
    """From the parent's last stream, over its mean square, on held-out windows: by whole forward passes."""
    total, share = 0.0, 0.0
    for name, source in split.sources.items():
        held_out = source.windows[7::8]
        streams = []
        for model in (parent.model, child):
            with torch.inference_mode(), last_layer_outputs(model, parent.family.layers) as seen:
                model.base_model(input_ids=held_out, use_cache=False)
            streams.append(seen[0].double())
        errors = (streams[0] - streams[1]).square().mean(-1) / streams[0].square().mean(-1)
        weight = split.weights[name] / source.windows.numel()
        total, share = total + weight * float(errors.sum()), share + weight * held_out.numel()
    return total / share


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("name", KINDS_OF_CUT)
def test_what_the_walk_says_of_the_last_block_is_what_the_whole_child_computes(case: Case, name: str) -> None:
    parent = tiny_parent(case)
    architecture, split = cut(parent, name), text()
    child = prune(parent, architecture, Slices(parent))
    before = {key: value.clone() for key, value in child.state_dict().items()}
    found = refit_sequentially(parent, child, architecture, split)
    for key, value in child.state_dict().items():
        assert torch.equal(value, before[key]), f"{key} of the child was touched"
    last = found.blocks[-1]
    after = distance(parent, refitted(child, found), split)
    assert last.error_after == pytest.approx(after, rel=tolerance(1.0), abs=tolerance(1e-3))
    assert last.error_after <= last.error_before
    assert all(block.error_after <= block.error_before for block in found.blocks)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_child_that_is_its_parent_has_nothing_to_gain(case: Case) -> None:
    parent = tiny_parent(case)
    whole = parent.shape.architecture
    found = refit_sequentially(parent, prune(parent, whole, Slices(parent)), whole, text(16))
    assert max(block.error_before for block in found.blocks) <= tolerance(1.0) ** 2
    for name, value in found.tensors.items():
        assert_close(value, parent.model.state_dict()[name])


def test_one_block_is_solved_as_least_squares_solve_it() -> None:
    """The last FFN alone is cut: its target is the parent's last stream, its inputs are seen by a hook."""
    parent = tiny_parent(CASES[0])
    shape, split = parent.shape, text()
    architecture = Architecture.of([(shape.kv_groups, shape.ffn_width)] * 3 + [(shape.kv_groups, 9)])
    child = prune(parent, architecture, Slices(parent))
    found = refit_sequentially(parent, child, architecture, split)
    (name,) = (name for name in found.tensors if name.startswith("model.layers.3.mlp"))
    inputs: list[torch.Tensor] = []
    handle = child.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
        lambda module, args: inputs.append(args[0])
    )
    rows: list[torch.Tensor] = []
    wanted: list[torch.Tensor] = []
    for source_name, source in split.sources.items():
        windows = source.windows[torch.arange(len(source.windows)) % 8 != 7]
        with torch.inference_mode():
            with last_layer_outputs(parent.model, "model.layers") as theirs:
                parent.model.base_model(input_ids=windows, use_cache=False)
            with last_layer_outputs(child, "model.layers") as own:
                child.base_model(input_ids=windows, use_cache=False)
        share = split.weights[source_name] / source.windows.numel()
        weight = (share / theirs[0].double().square().mean(-1, keepdim=True)).sqrt()
        rows.append((inputs.pop().double() * weight).flatten(0, 1))
        wanted.append(((theirs[0] - own[0]).double() * weight).flatten(0, 1))
    handle.remove()
    x, r = torch.cat(rows), torch.cat(wanted)
    (ridge,) = (block.ridge for block in found.blocks if block.layer == 3 and block.kinds == ("ffn",))
    assert ridge is not None
    scale = (ridge * x.square().sum(0).mean()).sqrt()
    stacked = torch.cat([x, scale * torch.eye(x.shape[1])])
    change = torch.linalg.lstsq(stacked, torch.cat([r, torch.zeros(x.shape[1], r.shape[1])])).solution.T
    expected = child.state_dict()[name].double() + change
    assert_close(found.tensors[name], expected, terms=len(x))


@pytest.mark.parametrize("memory", [0, 1 << 30], ids=["files", "memory"])
def test_states_may_lie_in_files(tmp_path: Path, memory: int) -> None:
    parent = tiny_parent(CASES[0])
    architecture = cut(parent, "heterogeneous")
    child = prune(parent, architecture, Slices(parent))
    found = refit_sequentially(parent, child, architecture, text(), memory_bytes=memory, scratch=tmp_path)
    assert not list(tmp_path.iterdir()), "scratch files go when it is done"
    plain = refit_sequentially(parent, child, architecture, text())
    assert all(torch.equal(value, plain.tensors[name]) for name, value in found.tensors.items())
    with Shelf(memory, tmp_path) as shelf:
        shelf.place((4, 5), torch.float32).fill_(1.0)
        assert bool(list(tmp_path.iterdir())) == (memory == 0)


def test_the_cut_is_repaired_where_blocks_lean_on_each_other() -> None:
    parent = tiny_parent(CASES[0])
    for name in KINDS_OF_CUT:
        architecture = cut(parent, name)
        child = prune(parent, architecture, Slices(parent))
        found = refit_sequentially(parent, child, architecture, text(64))
        assert distance(parent, refitted(child, found), text(64)) < 0.9 * distance(parent, child, text(64)), name
