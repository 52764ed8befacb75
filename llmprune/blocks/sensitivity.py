"""What leaving units out of one block costs in quality, estimated for every choice from one backward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmprune.architecture import BLOCK_KINDS, BlockKind, Space
from llmprune.blocks.library import BlockLibrary
from llmprune.data.tokens import Split
from llmprune.models.modeling_pruned import part_rows, unit_rows
from llmprune.models.parent import Parent

WINDOWS_A_BATCH = 2

DeltaNats = dict[tuple[int, BlockKind, int], float]


@dataclass(frozen=True)
class _Candidate:
    """One choice of one block: the inputs it keeps, its output projection, and bias (None: the parent's)."""

    units: int
    columns_S: torch.Tensor
    weight_DS: torch.Tensor
    bias_D: torch.Tensor


def estimate_delta_nats(
    parent: Parent,
    split: Split,
    library: BlockLibrary,
    *,
    tokens: int,
    progress: Callable[[int, int], None] | None = None,
) -> DeltaNats:
    """Estimated nats per token that each choice costs, put alone into the parent: {(layer, kind, units): delta}.

    With `delta_t` the change of the block's output at token t and `g_t` the gradient of the summed NLL with respect
    to that output: mean_t g_t.delta_t + 1/2 mean_t (g_t.delta_t)^2, the first-order term and the Fisher form of the
    second. It sees no interaction between blocks: what is built on it is re-measured as whole models.

    About `tokens` tokens of `split` are used, shared over its sources by weight. Cost: one forward and one backward
    pass over activations (the parent's weights are frozen), and local matrix products. The parent's own choice is 0.
    """
    candidates = _all_candidates(parent, library)
    totals: DeltaNats = dict.fromkeys(
        ((layer, kind, c.units) for (layer, kind), cs in candidates.items() for c in cs), 0.0
    )
    plan = _batches(split, tokens)
    for done, (windows, share) in enumerate(plan):
        sums, count = _batch_scores(parent, candidates, windows)
        for key, value in sums.items():
            totals[key] += share * value / count
        if progress:
            progress(done + 1, len(plan))
    for layer in range(parent.shape.layers):
        for kind in BLOCK_KINDS:
            totals[layer, kind, parent.shape.units(kind)] = 0.0
    return totals


def _batches(split: Split, tokens: int) -> list[tuple[torch.Tensor, float]]:
    """Batches of windows, each with its share of the mixture."""
    plan = []
    for name, source in split.sources.items():
        wanted = max(1, round(tokens * split.weights[name] / split.seq_len))
        batches = torch.split(source.windows[:wanted], WINDOWS_A_BATCH)
        rows = sum(len(batch) for batch in batches)
        plan += [(batch, split.weights[name] * len(batch) / rows) for batch in batches]
    return plan


def _all_candidates(parent: Parent, library: BlockLibrary) -> dict[tuple[int, BlockKind], list[_Candidate]]:
    space: Space = library.space
    parts = part_rows(parent.shape.queries_per_group, parent.shape.head_dim)
    candidates: dict[tuple[int, BlockKind], list[_Candidate]] = {}
    for layer in range(parent.shape.layers):
        for kind in BLOCK_KINDS:
            full, layout = parent.shape.units(kind), "q" if kind == "attention" else "c"
            weight, bias = parent.output_weight(layer, kind), parent.output_bias(layer, kind)
            own_bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
            entries = candidates.setdefault((layer, kind), [])
            for units in space.ladder(kind)[:-1]:
                if units == 0:
                    empty = weight.new_empty(weight.shape[0], 0)
                    entries.append(_Candidate(0, torch.empty(0, dtype=torch.int64), empty, torch.zeros_like(own_bias)))
                    continue
                new_weight, new_bias = library.output(layer, kind, units)
                columns = unit_rows(layout, library.kept_units(layer, kind, units), full, parts)
                bias_D = own_bias if new_bias is None else new_bias.to(own_bias)
                entries.append(_Candidate(units, columns.to(weight.device), new_weight.to(weight), bias_D))
    return candidates


def _batch_scores(
    parent: Parent, candidates: Mapping[tuple[int, BlockKind], list[_Candidate]], windows: torch.Tensor
) -> tuple[DeltaNats, int]:
    """Sums over the batch's tokens of g.delta + (g.delta)^2 / 2 for every candidate, and the number of tokens."""
    sums: DeltaNats = {}

    def watch(layer: int, kind: BlockKind) -> Any:
        def forward_hook(_: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            inputs_NI = args[0].detach().reshape(-1, args[0].shape[-1])
            output_ND = output.detach().reshape(-1, output.shape[-1])

            def backward_hook(gradient: torch.Tensor) -> None:
                gradient_ND = gradient.detach().reshape(output_ND.shape)
                # g.(W'x + b' - y) without forming the change: project the gradient once per candidate.
                parent_part_N = (gradient_ND * output_ND).sum(1)
                for candidate in candidates[layer, kind]:
                    projected_NS = gradient_ND @ candidate.weight_DS
                    change_N = (projected_NS * inputs_NI[:, candidate.columns_S]).sum(1)
                    change_N = change_N + gradient_ND @ candidate.bias_D - parent_part_N
                    sums[layer, kind, candidate.units] = float((change_N + 0.5 * change_N.square()).double().sum())

            output.register_hook(backward_hook)  # type: ignore[no-untyped-call]

        return forward_hook

    handles = [
        parent.output_projection(layer, kind).register_forward_hook(watch(layer, kind)) for layer, kind in candidates
    ]
    try:
        with torch.enable_grad():
            embedded = parent.model.get_input_embeddings()(windows.to(parent.device)).detach().requires_grad_()
            logits = parent.model(inputs_embeds=embedded, use_cache=False).logits[:, :-1].float()
            targets = windows[:, 1:].to(logits.device)
            nats = nn.functional.cross_entropy(
                logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="sum"
            )
            nats.backward()  # type: ignore[no-untyped-call]
    finally:
        for handle in handles:
            handle.remove()
    return sums, int(targets.numel())


def block_influence(parent: Parent, split: Split, *, tokens: int) -> list[float]:
    """Block influence of each layer: 1 - mean_t cos(h_l,t, h_{l+1},t) (ShortGPT, arXiv 2403.03853). Low: drop first."""
    influence_L = torch.zeros(parent.shape.layers, dtype=torch.float64)
    batch_L = torch.zeros_like(influence_L)

    def watch(layer: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            similarity = nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
            batch_L[layer] = 1.0 - similarity.double().mean().item()

        return hook

    handles = [
        parent.layer(layer).register_forward_hook(watch(layer), with_kwargs=True)
        for layer in range(parent.shape.layers)
    ]
    try:
        with torch.inference_mode():
            for windows, share in _batches(split, tokens):
                parent.model.base_model(input_ids=windows.to(parent.device), use_cache=False)
                influence_L += share * batch_L
    finally:
        for handle in handles:
            handle.remove()
    return [float(value) for value in influence_L]
