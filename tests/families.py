"""Tiny random models of every supported family, and the oracle they are held to: the masked parent."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from llmprune.choices.architecture import Architecture, ParentShape
from llmprune.choices.choice import Choice, Kept
from llmprune.choices.kv_groups import AttentionChoice
from llmprune.choices.merged import MergedChoice
from llmprune.choices.rows import unit_rows
from llmprune.data.tokens import SourceTokens, Split
from llmprune.models.modeling_pruned import FAMILIES
from llmprune.models.parent import Parent, make_parent

LAYERS, HIDDEN, VOCAB = 4, 48, 300
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "intermediate_size": 40,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED, MULTI_QUERY, MULTI_HEAD = (
    {"num_key_value_heads": 3},
    {"num_key_value_heads": 1},
    {"num_key_value_heads": 6},
)


@dataclass(frozen=True)
class Case:
    """A family, and the config values that make its tiny model."""

    model_type: str
    label: str
    values: dict[str, Any] = field(hash=False)


def _cases() -> Iterator[Case]:
    for label, heads in (("gqa", GROUPED), ("mqa", MULTI_QUERY), ("mha", MULTI_HEAD)):
        yield Case("llama", label, {**COMMON, **heads, "tie_word_embeddings": True})
    yield Case("llama", "biased", {**COMMON, **GROUPED, "attention_bias": True, "mlp_bias": True})
    yield Case("llama", "wide-heads", {**COMMON, **GROUPED, "head_dim": 12})
    llama3_rope = {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    yield Case("llama", "llama3-rope", {**COMMON, **GROUPED, "rope_parameters": llama3_rope})
    sliding = {"sliding_window": 8}
    yield Case("mistral", "gqa", {**COMMON, **GROUPED, "head_dim": 8, "sliding_window": None})
    yield Case("mistral", "sliding", {**COMMON, **GROUPED, "head_dim": 8, **sliding})
    yield Case("qwen2", "gqa", {**COMMON, **GROUPED})
    yield Case("qwen2", "tied", {**COMMON, **GROUPED, "tie_word_embeddings": True})
    yield Case("qwen2", "sliding", {**COMMON, **GROUPED, **sliding, "use_sliding_window": True, "max_window_layers": 2})
    yield Case("qwen3", "gqa", {**COMMON, **GROUPED, "head_dim": 8})
    yield Case("smollm3", "gqa", {**COMMON, **GROUPED, "no_rope_layer_interval": 2})
    yield Case("granite", "gqa", {**COMMON, **GROUPED, "residual_multiplier": 0.5, "logits_scaling": 2.0})
    yield Case("olmo2", "gqa", {**COMMON, **GROUPED})
    yield Case("gemma2", "gqa", {**COMMON, **GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, **sliding})
    yield Case("gemma3_text", "gqa", {**COMMON, **GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, **sliding})
    yield Case("gemma3_text", "mqa", {**COMMON, **MULTI_QUERY, "head_dim": 8, "query_pre_attn_scalar": 8, **sliding})
    full = {"layer_types": ["full_attention"] * LAYERS}
    yield Case("gemma3_text", "full", {**COMMON, **GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, **full})
    yield Case("phi3", "gqa", {**COMMON, **GROUPED})
    long_rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "partial_rotary_factor": 0.5,
        "short_factor": [1.0, 1.5],
        "long_factor": [2.0, 4.0],
        "original_max_position_embeddings": 16,
    }
    yield Case("phi3", "longrope", {**COMMON, **GROUPED, "rope_parameters": long_rope, "sliding_window": 8})
    yield Case("phi3", "mha", {**COMMON, **MULTI_HEAD})
    yield Case("gpt_neox", "parallel", {**COMMON, "use_parallel_residual": True})
    yield Case("gpt_neox", "sequential", {**COMMON, "use_parallel_residual": False})
    yield Case("gpt_neox", "unbiased", {**COMMON, "attention_bias": False})
    gpt2 = {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 6, "n_positions": 128}
    yield Case("gpt2", "mha", {**gpt2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    yield Case("gpt2", "n_inner", {**gpt2, "n_inner": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    opt = {key: value for key, value in COMMON.items() if key != "intermediate_size"}
    yield Case("opt", "mha", {**opt, "ffn_dim": 40, "word_embed_proj_dim": HIDDEN})
    yield Case("opt", "projected", {**opt, "ffn_dim": 40, "word_embed_proj_dim": 32, "enable_bias": False})


CASES = list(_cases())
IDS = [f"{case.model_type}-{case.label}" for case in CASES]
# Where several query heads read a KV head, some of them can leave.
GROUPED_IDS = [name for name, case in zip(IDS, CASES, strict=True) if case.values.get("num_key_value_heads", 6) < 6]

# Where KV heads can merge: there are several, and the config can say how many.
MERGING_IDS = [
    name
    for name, case in zip(IDS, CASES, strict=True)
    if FAMILIES[case.model_type].kv_heads and case.values["num_key_value_heads"] > 1
]


def tiny_model(case: Case, seed: int = 0) -> PreTrainedModel:
    """A random model of the case, in eval mode, with every weight, norm and bias away from 0 and 1."""
    family = FAMILIES[case.model_type]
    torch.manual_seed(seed)
    model = getattr(transformers, family.causal_lm)(getattr(transformers, family.config)(**case.values))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def tiny_parent(case: Case, seed: int = 0) -> Parent:
    return make_parent(tiny_model(case, seed), None, source=case.model_type)


def tokens(rows: int = 2, length: int = 20, seed: int = 0) -> torch.Tensor:
    """Random token ids (rows, length) that avoid the special ones."""
    return torch.randint(5, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def two_sources(length: int) -> Split:
    """Random text of two sources, of unequal size and weight."""
    sources = {
        "news": SourceTokens(tokens(3, length, seed=1), torch.ones(3)),
        "code": SourceTokens(tokens(2, length, seed=2), torch.ones(2)),
    }
    return Split("calibration", sources, {"news": 0.25, "code": 0.75}, length, bos=False)


@dataclass(frozen=True)
class Slices:
    """The plainest library: keeps pseudo-random units, cuts the output projection, re-solves nothing."""

    parent: Parent
    seed: int = 0

    def kept(self, layer: int, choice: Choice) -> Kept:
        return Kept(self.kept_units(layer, choice), self.kept_queries(layer, choice))

    def kept_units(self, layer: int, choice: Choice) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1000 + layer * 2 + (choice.kind == "ffn"))
        if isinstance(choice, MergedChoice):
            return torch.arange(self.parent.shape.kv_groups)
        return torch.randperm(self.parent.shape.units(choice.kind), generator=generator)[: choice.units].sort().values

    def norm_squares(self, layer: int, name: str) -> None:
        return None

    def input_squares(self, layer: int, kind: str) -> None:
        return None

    def head_squares(self) -> None:
        return None

    def kept_queries(self, layer: int, choice: Choice) -> torch.Tensor | None:
        if not isinstance(choice, AttentionChoice) or choice.queries_per_group is None:
            return None
        shape = self.parent.shape
        generator = torch.Generator().manual_seed(self.seed * 1000 + 500 + layer)
        order_KQ = torch.rand(shape.kv_groups, shape.queries_per_group, generator=generator).argsort(dim=1)
        return order_KQ[:, : choice.queries_per_group].sort(dim=1).values[self.kept_units(layer, choice)]

    def output(self, layer: int, choice: Choice, weight_DI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return weight_DI[:, self.columns(layer, choice)], self.parent.output_bias(layer, choice.kind)

    def columns(self, layer: int, choice: Choice) -> torch.Tensor:
        """What the output projection still reads, counted out head by head: no code is shared with surgery."""
        shape, units = self.parent.shape, self.kept_units(layer, choice).tolist()
        if choice.kind == "ffn":
            return torch.tensor(units, dtype=torch.int64)
        kept = self.kept_queries(layer, choice)
        queries = [range(shape.queries_per_group)] * len(units) if kept is None else kept.tolist()
        heads = [
            unit * shape.queries_per_group + query for unit, row in zip(units, queries, strict=True) for query in row
        ]
        return torch.tensor([head * shape.head_dim + i for head in heads for i in range(shape.head_dim)])


def merging(shape: ParentShape, layers: dict[int, int]) -> Architecture:
    """The parent's architecture with all query heads of some layers on so many KV heads."""
    return shape.architecture.with_choices((i, MergedChoice(k)) for i, k in layers.items())


def overwritten(parent: Parent, layers: dict[int, int]) -> Parent:
    """A copy of the parent whose key and value heads are, in some layers, the means of those that share one of so many
    KV heads: all at full size, counted out head by head; no code is shared with surgery."""
    shape, model = parent.shape, copy.deepcopy(parent.model)
    copied, rows = make_parent(model, None, source=parent.source), shape.kv_groups * shape.head_dim
    for layer, heads in layers.items():
        for name, value in copied.block(layer, "attention").named_parameters():
            # Phi-3 has queries, keys and values in one; a norm of keys spans all heads or is the same for each.
            starts = {"qkv_proj": (len(value) - 2 * rows, len(value) - rows), "k_proj": (0,), "v_proj": (0,)}.get(
                name.split(".")[0], (0,) if name == "k_norm.weight" and len(value) == rows else ()
            )
            for start in starts:
                per_head = value.data[start : start + rows].reshape(heads, shape.kv_groups // heads, shape.head_dim, -1)
                mean = per_head.double().mean(dim=1, keepdim=True).expand(per_head.shape)
                value.data[start : start + rows] = mean.reshape(rows, *value.shape[1:]).to(value.dtype)
    return copied


@contextmanager
def masked(parent: Parent, architecture: Architecture, library: Slices) -> Iterator[PreTrainedModel]:
    """The parent with what `architecture` leaves out set to zero by hooks, all tensors at their full size."""
    shape, handles = parent.shape, []
    for layer, choice in architecture.blocks():
        kind = choice.kind
        output = parent.output_projection(layer, kind)
        if choice.units == 0:
            handles.append(output.register_forward_hook(lambda module, args, result: torch.zeros_like(result)))
        elif choice != shape.full(kind):
            kept, queries = library.kept_units(layer, choice), library.kept_queries(layer, choice)
            handles.append(output.register_forward_pre_hook(_keep_only(library.columns(layer, choice))))
            for name, layout in parent.names(kind).rows.items():
                if name.endswith("_norm"):
                    norm = parent.block(layer, kind).get_submodule(name)
                    handles.append(
                        norm.register_forward_hook(_norm_over(unit_rows(layout, kept, shape, kind, queries)))
                    )
    try:
        yield parent.model
    finally:
        for handle in handles:
            handle.remove()


def _keep_only(columns: torch.Tensor) -> Any:
    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        mask = torch.zeros(args[0].shape[-1])
        mask[columns] = 1
        return (args[0] * mask,)

    return hook


def _norm_over(rows: torch.Tensor) -> Any:
    """OLMo 2's norm spans all heads: with heads gone, its mean is over those that stay."""

    def hook(module: Any, args: tuple[torch.Tensor], result: torch.Tensor) -> torch.Tensor:
        kept = args[0][..., rows]
        scale = torch.rsqrt(kept.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)
        return args[0] * scale * module.weight

    return hook
