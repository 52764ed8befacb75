"""What a narrower residual stream keeps of the wide one, and how what reads it makes up for the rest.

Shapes: D the hidden size, E that of the child (E <= D).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.models.parent import Parent
from llmprune.numerics.refit import refit
from llmprune.resize.stream import Place, final_norm, gain, is_tied, norms, readings

DAMP = 1e-3
"""Share of the mean square of what is read that is added to all of it before least squares are solved."""
GAIN_WIDTH = 0.2
"""Of their root mean square, in which gains before a head that is the embedding are alike: rotation stays within groups
of such channels."""


@dataclass(frozen=True, eq=False)
class Basis:
    """One child's stream in terms of its parent's."""

    down_DE: Tensor
    """The child's stream is `x down`, x (..., D) the parent's: orthonormal columns, in float64."""
    gains: Mapping[str, Tensor]
    """By the name of a norm: what the child's multiplies its normalised input by (E,), but for `scales`."""
    ups: Mapping[str, Tensor]
    """By the name of a place: (D, E), what the weights of the maps that read there are multiplied by."""
    scales: Mapping[str, float]
    """By the name of a norm: what is left of the root mean square that the parent's norm divides by. The child's norm
    divides by that of what is kept, so its gain is multiplied by this."""
    energy: float
    """Share of the square of what enters norms that is kept: a mean over norms and tokens, 0 to 1."""


def channel_basis(parent: Parent, places: Mapping[str, Place], hidden_size: int, *, refit_readers: bool) -> Basis:
    """The channels of most importance, in their order: the mean over norms of `|gain| * E|x^|`, which is Minitron's
    activation of a channel behind the norm (arXiv 2407.14679, section 2.2)."""
    gains = {name: gain(parent.model.get_submodule(name)) for name in norms(parent)}
    importance_D = torch.stack([gains[name].abs() * places[name].magnitude_D for name in gains]).mean(dim=0)
    kept_E = importance_D.argsort(descending=True, stable=True)[:hidden_size].sort().values
    down_DE = torch.eye(len(importance_D), dtype=torch.float64, device=kept_E.device)[:, kept_E]
    ups = {}
    for reading in readings(parent):
        read_DD = places[reading.place].gram_DD
        if reading.norm is not None:
            read_DD = gains[reading.norm][:, None] * read_DD * gains[reading.norm]
        ups[reading.place] = _rebuilt(read_DD, kept_E) if refit_readers else down_DE
    return _basis(places, down_DE, {name: own[kept_E] for name, own in gains.items()}, ups)


def rotated_basis(parent: Parent, places: Mapping[str, Place], hidden_size: int, *, refit_readers: bool) -> Basis:
    """The principal directions of what enters the norms, all norms counting alike; their gains go into what reads
    behind them (SliceGPT, arXiv 2401.15024, section 3.3, with one basis for all).

    A head that is the embedding cannot take up a gain. Directions are then sought within groups of channels whose gains
    before it are alike, and of these gains, turned into the basis, the child's norm has what a norm can have: the
    diagonal. One group for all would be wrong by far: the channel of massive activations has a gain of its own.
    """
    last, tied = final_norm(parent), is_tied(parent)
    gains = {name: gain(parent.model.get_submodule(name)) for name in norms(parent)}
    mean_DD = torch.stack([places[name].gram_DD for name in gains]).mean(dim=0)
    basis_DD = _directions(mean_DD, _alike(gains[last]) if tied else torch.zeros_like(gains[last]))
    kept_E = torch.arange(hidden_size, device=basis_DD.device)
    ups = {}
    for reading in readings(parent):
        assert reading.norm is not None, "refused before"
        turned_DD = basis_DD.mT @ places[reading.place].gram_DD @ basis_DD
        up_DE = _rebuilt(turned_DD, kept_E) if refit_readers else torch.eye(len(turned_DD)).to(turned_DD)[:, kept_E]
        ups[reading.place] = gains[reading.norm][:, None] * (basis_DD @ up_DE)
    down_DE = basis_DD[:, :hidden_size]
    own = {name: torch.ones_like(down_DE[0]) for name in gains}
    if tied:
        own[last] = gains[last] @ down_DE.square()
    return _basis(places, down_DE, own, ups)


def _basis(
    places: Mapping[str, Place], down_DE: Tensor, gains: Mapping[str, Tensor], ups: Mapping[str, Tensor]
) -> Basis:
    full, kept = down_DE.shape
    shares = {
        name: float(((places[name].gram_DD @ down_DE) * down_DE).sum() / places[name].gram_DD.trace().clamp(min=1e-30))
        for name in gains
    }
    scales = {name: math.sqrt(share * full / kept) for name, share in shares.items()}
    return Basis(down_DE, gains, ups, scales, sum(shares.values()) / len(shares))


def _alike(gain_D: Tensor) -> Tensor:
    """A number for each channel (D,), the same for those whose gains are alike."""
    return (gain_D / (GAIN_WIDTH * gain_D.square().mean().sqrt())).round()


def _directions(gram_DD: Tensor, group_D: Tensor) -> Tensor:
    """Principal directions within groups of channels, those with the largest second moment first: (D, D)."""
    basis, values = [], []
    for group in torch.unique(group_D):
        channels = torch.where(group_D == group)[0]
        own, vectors = torch.linalg.eigh(gram_DD[channels][:, channels])
        basis.append(torch.zeros(len(gram_DD), len(own)).to(gram_DD).index_copy(0, channels, vectors))
        values.append(own)
    return torch.cat(basis, dim=1)[:, torch.cat(values).argsort(descending=True, stable=True)]


def _rebuilt(gram_DD: Tensor, kept_E: Tensor) -> Tensor:
    """(D, E): the least-squares estimate of all that is read, from what is kept of it."""
    return refit(torch.eye(len(gram_DD)).to(gram_DD), gram_DD, kept_E, DAMP)[0]
