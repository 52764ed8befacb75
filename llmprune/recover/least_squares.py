"""Least squares of one stop of a sequential refit: moments over tokens, a ladder of ridges, and held-out windows to
choose among them.

Shapes: W windows, B of a batch, T tokens of a window, N tokens, D hidden size, I inputs of an output projection.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Shares of the mean diagonal of the inputs' second moment, tried on held-out tokens."""
LEAST_GAIN = 0.1
"""A norm's gain below this share of its root mean square is no reason to move a row much."""


@dataclass(frozen=True)
class LeastSquares:
    """Least squares of one stop."""

    inputs_WTI: Tensor
    stream_WTD: Tensor
    target_WTD: Tensor
    weight_DI: Tensor
    bias_D: Tensor | None
    norm: nn.Module | None
    scale: float
    share_W: Tensor
    batches: Sequence[slice]

    def output(self, rows: slice | Tensor, weight_DI: Tensor, bias_D: Tensor | None) -> Tensor:
        """What the block adds to the stream: (B, T, D)."""
        output = nn.functional.linear(self.inputs_WTI[rows].to(weight_DI.device), weight_DI, bias_D)
        return self.scale * (output if self.norm is None else self.norm(output))

    def add(self, rows: slice, weight_DI: Tensor, bias_D: Tensor | None) -> None:
        """Take the stream through the block."""
        self.stream_WTD[rows] += self.output(rows, weight_DI, bias_D).to(self.stream_WTD)

    def solve(self, fit_W: Tensor) -> tuple[float | None, Tensor, Tensor | None, float, float]:
        """The best ridge with its weight and bias, and the held-out error before and after."""
        held_out_W = torch.where(~fit_W)[0]
        before = self._error(held_out_W, self.weight_DI, self.bias_D)
        best: tuple[float | None, Tensor, Tensor | None, float] = (None, self.weight_DI, self.bias_D, before)
        for ridge, weight_DI, bias_D in self._solutions(fit_W):
            error = self._error(held_out_W, weight_DI, bias_D)
            if error < best[3]:
                best = (ridge, weight_DI, bias_D, error)
        return (*best[:3], before, best[3])

    def _weights(self, rows: slice | Tensor) -> Tensor:
        """Of tokens, (B, T)."""
        squares_BT = self.target_WTD[rows].float().square().mean(-1)
        return self.share_W[rows, None] / squares_BT.clamp(min=torch.finfo(torch.float32).tiny)

    def _error(self, windows_W: Tensor, weight_DI: Tensor, bias_D: Tensor | None) -> float:
        total = 0.0
        for rows in torch.split(windows_W, self.batches[0].stop):
            output = self.output(rows, weight_DI, bias_D).cpu()
            distance = (self.target_WTD[rows] - self.stream_WTD[rows] - output).float().square().mean(-1)
            total += float((self._weights(rows) * distance).sum(dtype=torch.float64))
        return total / float(self.share_W[windows_W].sum() * self.target_WTD.shape[1])

    def _solutions(self, fit_W: Tensor) -> Iterator[tuple[float, Tensor, Tensor | None]]:
        inputs, outputs = self.weight_DI.shape[1], self.weight_DI.shape[0]
        device = self.weight_DI.device
        gram_II = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        cross_DI = torch.zeros(outputs, inputs, dtype=torch.float64, device=device)
        mean_I, mean_D, weight = gram_II.new_zeros(inputs), gram_II.new_zeros(outputs), 0.0
        for rows in torch.split(torch.where(fit_W)[0], self.batches[0].stop):
            x_NI = self.inputs_WTI[rows].to(device).float().flatten(0, 1)
            output = nn.functional.linear(x_NI.to(self.weight_DI), self.weight_DI, self.bias_D)
            wanted = (self.target_WTD[rows] - self.stream_WTD[rows]).to(device).float().flatten(0, 1) / self.scale
            if self.norm is None:
                residual_ND = wanted - output.float()
            else:
                residual_ND = (wanted - self.norm(output).float()) * self._inverse_gain()
                x_NI = x_NI / output.float().square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)
            w_N1 = self._weights(rows).to(device).flatten()[:, None]
            weighted_NI = x_NI * w_N1
            gram_II += weighted_NI.mT @ x_NI
            cross_DI += residual_ND.mT @ weighted_NI
            mean_I += weighted_NI.sum(0)
            mean_D += (residual_ND * w_N1).sum(0)
            weight += float(w_N1.sum(dtype=torch.float64))
        centred = self.bias_D is not None and self.norm is None
        gram_II, cross_DI, mean_I, mean_D = (value / weight for value in (gram_II, cross_DI, mean_I, mean_D))
        if centred:
            gram_II = gram_II - torch.outer(mean_I, mean_I)
            cross_DI = cross_DI - torch.outer(mean_D, mean_I)
        scale = float(gram_II.diagonal().mean())
        if not (scale > 0 and math.isfinite(scale)):
            return
        for ridge in RIDGES:
            damped_II = gram_II.clone()
            damped_II.diagonal().add_(ridge * scale)
            factor_II, failed = torch.linalg.cholesky_ex(damped_II)
            if failed:
                continue
            change_DI = torch.cholesky_solve(cross_DI.mT, factor_II).mT
            bias_D = self.bias_D
            if centred:
                assert bias_D is not None
                bias_D = (bias_D + mean_D - change_DI @ mean_I).to(bias_D)
            yield ridge, (self.weight_DI + change_DI).to(self.weight_DI), bias_D

    def _inverse_gain(self) -> Tensor:
        """One over the norm's gain (D,), drawn to 0 where that is next to nothing."""
        assert self.norm is not None
        ones_D = torch.ones(self.weight_DI.shape[0], device=self.weight_DI.device, dtype=self.weight_DI.dtype)
        gain_D = self.norm(ones_D[None])[0].float()
        floor = LEAST_GAIN * gain_D.square().mean().sqrt()
        inverse_D: Tensor = gain_D / (gain_D.square() + floor.square())
        return inverse_D
