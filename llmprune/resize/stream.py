"""The residual stream of a parent: which norms and matrices read it, which write it, and what text says of it.

Shapes: D the hidden size, N tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmprune.choices.dimensions import BLOCK_KINDS
from llmprune.core.errors import ModelError
from llmprune.core.progress import Advance
from llmprune.data.tokens import Split
from llmprune.models.parent import Parent, is_norm

BATCH_TOKENS = 2048
"""Tokens of one forward pass, in whole windows."""


@dataclass(frozen=True)
class Reading:
    """What linear maps make of the stream behind one norm."""

    norm: str | None
    """The norm's name in the model; None where the maps read the stream itself (OLMo 2)."""
    maps: tuple[str, ...]
    """Names of the nn.Linear modules that read what the norm gives."""

    @property
    def place(self) -> str:
        """Name of the module whose input says what is read: the norm or, where there is none, the first of the maps."""
        return self.norm or self.maps[0]


def final_norm(parent: Parent) -> str:
    """Name of the norm between the last layer and the head."""
    return parent.family.layers.rpartition(".")[0] + ".norm"


def head_name(parent: Parent) -> str:
    """Name of the output head's module."""
    return _name(parent, parent.model.get_output_embeddings())  # type: ignore[no-untyped-call]


def embedding_name(parent: Parent) -> str:
    """Name of the input embedding's module."""
    return _name(parent, parent.model.get_input_embeddings())


def _name(parent: Parent, module: nn.Module) -> str:
    names: dict[nn.Module, str] = {own: name for name, own in parent.model.named_modules()}
    return names[module]


def is_tied(parent: Parent) -> bool:
    """Whether the head is the embedding."""
    return len(parent.vocabulary_names()) == 1


def readings(parent: Parent) -> list[Reading]:
    """All that reads the stream, in its order; the head comes last."""
    found = []
    for layer in range(parent.shape.layers):
        for kind in BLOCK_KINDS:
            names, prefix = parent.names(kind), f"{parent.family.layers}.{layer}"
            before = [name for name in names.leave_with_block if name != names.output_norm]
            assert len(before) <= 1, "what leaves with a block is its norms"
            block = parent.block(layer, kind)
            maps = [name for name in names.rows if not is_norm(block.get_submodule(name))]
            found.append(
                Reading(
                    f"{prefix}.{before[0]}" if before else None,
                    tuple(f"{prefix}.{names.module}.{name}" for name in maps),
                )
            )
    return [*found, Reading(final_norm(parent), (head_name(parent),))]


def writers(parent: Parent) -> list[str]:
    """Names of the projections whose output, perhaps behind a norm, is added to the stream, in its order."""
    return [
        f"{parent.family.layers}.{layer}.{parent.names(kind).module}.{parent.names(kind).output}"
        for layer in range(parent.shape.layers)
        for kind in BLOCK_KINDS
    ]


def norms(parent: Parent) -> list[str]:
    """Names of all norms over the hidden size: before blocks, behind them, and before the head."""
    of_layers = [
        f"{parent.family.layers}.{layer}.{name}"
        for layer in range(parent.shape.layers)
        for kind in BLOCK_KINDS
        for name in parent.names(kind).leave_with_block
    ]
    return [*of_layers, final_norm(parent)]


def gain(norm: nn.Module) -> Tensor:
    """What a norm multiplies its normalised input by, in float64: (D,). Its weight, or one more than it (Gemma)."""
    return norm.get_parameter("weight").detach().double() + gain_offset(norm)


def gain_offset(norm: nn.Module) -> float:
    """What a norm adds to its weight: 0, or 1 (Gemma). A new one of the class, which has a gain of 1, tells."""
    fresh: nn.Module = type(norm)(1)
    return 1.0 - float(fresh.get_parameter("weight").detach())


@dataclass(frozen=True, eq=False, slots=True)
class Place:
    """Moments of the stream where something reads it, or of what is added to it, over the mixture of sources, in
    float64.

    What enters a norm counts as `x^ = x / rms(x)`. Raw streams have tokens a thousand times as large as the rest
    (massive activations), and would know of little else.
    """

    gram_DD: Tensor
    """`E[x^ x^^T]`, whose trace is D; where maps read the stream without a norm, `E[x x^T]`."""
    magnitude_D: Tensor
    """`E|x^_j|`."""


def collect_places(parent: Parent, split: Split, *, progress: Advance = lambda done, total: None) -> dict[str, Place]:
    """Run the split through the parent, and look at what enters every norm over the hidden size, and what maps read
    without one: by the names of those modules. Every source counts by its weight, however many tokens it has.
    `progress` counts windows.

    Memory beside the parent: a float64 matrix (D, D) a place. Raises ModelError if an activation is not finite.
    """
    size = parent.shape.hidden_size
    sums = {name: _Sums(name, size, parent.device, is_norm=True) for name in norms(parent)}
    for reading in readings(parent):
        if reading.norm is None:
            sums[reading.place] = _Sums(reading.place, size, parent.device, is_norm=False)
    windows, done = sum(len(source.windows) for source in split.sources.values()), 0
    with ExitStack() as hooks, torch.inference_mode():
        for name, own in sums.items():
            hooks.callback(parent.model.get_submodule(name).register_forward_pre_hook(own).remove)
        for share, ids_BT in _batches(split):
            for own in sums.values():
                own.token_share = share
            parent.model.base_model(input_ids=ids_BT.to(parent.device), use_cache=False)
            done += len(ids_BT)
            progress(done, windows)
    return {name: Place(own.gram_DD, own.magnitude_D) for name, own in sums.items()}


def _batches(split: Split) -> Iterator[tuple[float, Tensor]]:
    """Batches of windows, and the weight of each of their tokens."""
    for name, source in split.sources.items():
        share = split.weights[name] / source.windows.numel()
        for ids_BT in torch.split(source.windows, max(1, BATCH_TOKENS // split.seq_len)):
            yield share, ids_BT


class _Sums:
    """Running weighted sums over what enters one module, whose forward pre-hook this is."""

    def __init__(self, name: str, hidden_size: int, device: torch.device, *, is_norm: bool) -> None:
        self.name, self.is_norm, self.token_share = name, is_norm, 0.0
        self.gram_DD = torch.zeros(hidden_size, hidden_size, dtype=torch.float64, device=device)
        self.magnitude_D = torch.zeros(hidden_size, dtype=torch.float64, device=device)

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x_ND = args[0].reshape(-1, len(self.magnitude_D)).float().to(self.gram_DD.device)
        # A stream of zeros has no direction.
        unit_ND = x_ND / x_ND.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-20)
        read_ND = unit_ND if self.is_norm else x_ND
        gram_DD = read_ND.mT @ read_ND
        if not bool(gram_DD.diagonal().isfinite().all()):
            raise ModelError(
                f"activations must be finite, but those entering {self.name} are not; load the parent with "
                "model.dtype=float32, or check its weights"
            )
        self.gram_DD.add_(gram_DD, alpha=self.token_share)
        self.magnitude_D.add_(unit_ND.abs().sum(dim=0), alpha=self.token_share)
