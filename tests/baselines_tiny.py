"""A random tiny parent, its tokens, tables and judges, for the tests of baselines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from llmprune.baselines.given import Given, Nats
from llmprune.blocks.library import BlockLibrary, build_library
from llmprune.choices.architecture import Architecture
from llmprune.choices.choice import Choice
from llmprune.choices.dimensions import BLOCK_KINDS
from llmprune.choices.space import Space
from llmprune.core.recipe import ImportanceRecipe, SpaceSize
from llmprune.core.recipe_inputs import SplitName
from llmprune.data.tokens import SourceTokens, Split
from llmprune.measure.quality.perplexity import score
from llmprune.measure.quality.prefix import PrefixScorer
from llmprune.measure.speed.throughput import Speed, Spread, Workload
from llmprune.models.parent import Parent, make_parent
from llmprune.models.surgery import prune
from llmprune.search.judging import Judge
from llmprune.tables.block_tables import BlockTables
from llmprune.tables.costs import CostTable

WORKLOAD = Workload(batch=1, prompt_tokens=4, generated_tokens=2, dtype="float32", threads=1, device="cpu")
FLAP = ImportanceRecipe(method="flap", refit=False)


def random_parent(*, layers: int = 3, biased: bool = False) -> Parent:
    """A Llama whose every weight is random; two KV groups of two query heads, 24 channels."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=24,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        attention_bias=biased,
        mlp_bias=biased,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return make_parent(model, None, source="tiny")


def random_split(name: SplitName, windows: int = 6, seed: int = 0) -> Split:
    """Two sources, of unequal weight."""
    generator = torch.Generator().manual_seed(seed)

    def source() -> SourceTokens:
        ids = torch.randint(3, 64, (windows, 8), generator=generator)
        return SourceTokens(ids, torch.full((windows,), 20))

    return Split(name, {"ant": source(), "bee": source()}, {"ant": 0.75, "bee": 0.25}, seq_len=8, bos=False)


def space_of(parent: Parent, *, drop: bool = True, size: SpaceSize = "medium") -> Space:
    return Space.of(parent.shape, 1, 4, drop=drop, size=size)


def library_of(parent: Parent, space: Space, recipe: ImportanceRecipe | None = None) -> BlockLibrary:
    return build_library(parent, random_split("calibration"), recipe or ImportanceRecipe(), space)


def tables_of(space: Space) -> BlockTables:
    """Savings in proportion to the rows that leave, random scores and influences."""
    generator = torch.Generator().manual_seed(1)
    rows, share = space.shape.rows, 0.9 / (2 * space.shape.layers)
    saving: dict[Choice, float] = {
        choice: share * (1 - rows(choice) / rows(space.shape.full(kind)))
        for kind in BLOCK_KINDS
        for choice in space.ladder(kind)
    }
    saving |= dict.fromkeys(space.vocabulary, 0.0)
    delta_nats = {
        (layer, choice): float(torch.rand((), generator=generator)) * saving[choice]
        for layer, kind in space.blocks()
        for choice in space.ladder(kind)
    }
    influence = torch.rand(space.shape.layers, generator=generator).tolist()
    return BlockTables(
        delta_nats,
        influence,
        CostTable(space, {"decode": saving, "prefill": saving}),
        dict.fromkeys((*space.attention, *space.ffn), 1.0),
    )


def given_of(parent: Parent, library: BlockLibrary, nats: Nats | None = None, *, draws: int = 4) -> Given:
    def scored(architectures: Sequence[Architecture]) -> list[float]:
        return [nats_of(parent, library, architecture) for architecture in architectures]

    return Given(parent, library, tables_of(library.space), "decode", draws, 0, nats or scored)


def nats_of(parent: Parent, library: BlockLibrary, architecture: Architecture) -> float:
    return score(prune(parent, architecture, library), random_split("search", seed=5)).nats_per_token


def judge_of(parent: Parent, library: BlockLibrary, name: SplitName, finish: Any = None) -> Judge:
    split = random_split(name, seed={"search": 5, "validation": 7, "test": 11}[name])
    return Judge(parent, library, split, WORKLOAD, 1, PrefixScorer(parent, library, split), finish)


def paired_by_size(
    reference: PreTrainedModel, candidates: Sequence[PreTrainedModel], *rest: Any
) -> tuple[Speed, list[Speed]]:
    """Stands in for `measure_paired`: a model is as fast as it is small, and never as fast as the tables say."""

    def spread(value: float) -> Spread:
        return Spread(value, 0.9 * value, 1.1 * value)

    def size(model: PreTrainedModel) -> int:
        return 2000 + sum(parameter.numel() for parameter in model.parameters())

    def speed(model: PreTrainedModel) -> Speed:
        ratio = size(reference) / size(model)
        return Speed(spread(1000 * ratio), spread(100 * ratio), spread(ratio), spread(ratio))

    return speed(reference), [speed(candidate) for candidate in candidates]
