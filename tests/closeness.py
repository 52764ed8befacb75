"""How near two results of the same mathematics must be, whichever CPU, threads and order of summation made them."""

from __future__ import annotations

import math

import torch

MARGIN = 2.0
"""Roundings add up like a random walk; its end is rarely twice its typical length away."""

FORWARD_TERMS = 900
"""Numbers summed one after another on the way to a logit of the small models of these tests: four layers of about
48 + 20 + 48 + 48 + 40 (projections, positions, output, FFN), and the head."""


def tolerance(scale: float, *, terms: int = FORWARD_TERMS, dtype: torch.dtype = torch.float32) -> float:
    """The rounding that sums of `terms` numbers in `dtype` may show, where the largest figure has size `scale`."""
    return MARGIN * torch.finfo(dtype).eps * math.sqrt(terms) * scale


def assert_close(
    found: torch.Tensor,
    expected: torch.Tensor,
    *,
    terms: int = FORWARD_TERMS,
    dtype: torch.dtype = torch.float32,
    scale: float | None = None,
    msg: str | None = None,
) -> None:
    """Both are equal up to the rounding of computing them in `dtype`; `scale` is the largest expected size unless told:
    for what is left of a subtraction, the size of what was subtracted."""
    size = float(expected.abs().max()) if scale is None else scale
    atol = tolerance(size, terms=terms, dtype=dtype)
    torch.testing.assert_close(found.double(), expected.double(), atol=atol, rtol=0, msg=msg)
