"""Rounding by ggml: every type, held to gguf's own reading of it."""

from __future__ import annotations

from typing import get_args

import gguf
import numpy as np
import pytest
import torch

from llmprune.core.errors import ModelError
from llmprune.core.recipe import GgufType
from llmprune.numerics.ggml import TYPES, from_blocks, to_blocks

EVERY: tuple[GgufType, ...] = get_args(GgufType)
LOSSY = [name for name in EVERY if name not in ("f32", "f16", "q8_0")]
WORST: dict[GgufType, float] = {
    "f32": 0.0,
    "f16": 0.0005,
    "q8_0": 0.01,
    "q6_k": 0.03,
    "q5_k": 0.06,
    "q5_1": 0.06,
    "q5_0": 0.07,
    "q4_k": 0.12,
    "q4_1": 0.12,
    "q4_0": 0.14,
    "iq4_nl": 0.12,
    "iq4_xs": 0.12,
    "q3_k": 0.24,
    "q2_k": 0.45,
}
"""Root mean square error of normal numbers, over theirs: one and a third to one and a half times what was found."""


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    return torch.randn(48, 512, generator=torch.Generator().manual_seed(1))


def error(weight: torch.Tensor, name: GgufType, squares: torch.Tensor | None, seen_by: torch.Tensor) -> float:
    change = from_blocks(to_blocks(weight, name, squares), name) - weight
    return float(((change.square() * seen_by).mean() / (weight.square() * seen_by).mean()).sqrt())


def test_there_is_an_entry_for_each_type_widest_first() -> None:
    assert tuple(TYPES) == EVERY
    for name, own in TYPES.items():
        assert own.type.name == name.upper()
        assert own.bits == 8 * gguf.GGML_QUANT_SIZES[own.type][1] / own.block


@pytest.mark.parametrize("name", EVERY)
def test_blocks_have_their_size_and_say_nearly_the_numbers(name: GgufType, weight: torch.Tensor) -> None:
    blocks = to_blocks(weight, name)
    assert blocks.nbytes == weight.numel() * TYPES[name].bits / 8
    found = error(weight, name, None, torch.ones(512))
    assert WORST[name] / 3 <= found <= WORST[name]
    read = gguf.quants.dequantize(blocks, TYPES[name].type)
    assert np.array_equal(read, from_blocks(blocks, name).numpy())


@pytest.mark.parametrize("name", ["q8_0", "q5_0", "q5_1", "q4_0", "q4_1"])
def test_where_gguf_rounds_as_well_it_rounds_alike(name: GgufType, weight: torch.Tensor) -> None:
    assert np.array_equal(to_blocks(weight, name), gguf.quants.quantize(weight.numpy(), TYPES[name].type))


@pytest.mark.parametrize("name", EVERY)
def test_every_row_is_rounded_for_itself(name: GgufType, weight: torch.Tensor) -> None:
    """So that what stays of a block may be cut out before or after."""
    squares, rows = torch.rand(512, generator=torch.Generator().manual_seed(2)), torch.tensor([40, 3, 17])
    whole = to_blocks(weight, name, squares)
    assert np.array_equal(to_blocks(weight[rows], name, squares), whole[rows.numpy()])


@pytest.mark.parametrize("name", LOSSY)
def test_columns_that_count_more_are_rounded_better(name: GgufType, weight: torch.Tensor) -> None:
    seen_by = torch.logspace(-3, 3, 512)[torch.randperm(512, generator=torch.Generator().manual_seed(3))]
    assert error(weight, name, seen_by, seen_by) < 0.95 * error(weight, name, None, seen_by)


@pytest.mark.parametrize("name", [name for name in EVERY if name != "f32"])
@pytest.mark.parametrize("value", [1e6, float("nan"), float("-inf")])
def test_numbers_that_a_type_cannot_hold_are_refused(name: GgufType, value: float, weight: torch.Tensor) -> None:
    spoilt = weight.clone()
    spoilt[7, 9] = value
    with pytest.raises(ModelError, match=f"within .-65504 for gguf in {name}; use f32"):
        to_blocks(spoilt, name)
