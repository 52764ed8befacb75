"""OLMo 2 norms its queries and keys over all heads at once: what is left of such a norm sees another scale."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_close
from families import CASES, IDS, tiny_model, tokens

from llmprune.blocks.library import BlockLibrary, build_library
from llmprune.choices.kv_groups import AttentionChoice
from llmprune.choices.space import Space
from llmprune.core.recipe import ImportanceRecipe
from llmprune.data.tokens import SourceTokens, Split
from llmprune.models.parent import Parent, make_parent
from llmprune.models.surgery import prune

CASE = CASES[IDS.index("olmo2-gqa")]
LOUD = 4.0
SPLIT = Split(
    "calibration",
    {
        "a": SourceTokens(tokens(6, seed=1), torch.full((6,), 20)),
        "b": SourceTokens(tokens(2, seed=2), torch.full((2,), 20)),
    },
    {"a": 0.25, "b": 0.75},
    20,
    False,
)


@pytest.fixture(scope="module")
def parent() -> Parent:
    """The first KV group is louder than the others, and feeds nothing: leaving it out should change nothing."""
    model = tiny_model(CASE)
    shape = make_parent(model, None).shape
    queries = shape.queries_per_group * shape.head_dim
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight[:queries] *= LOUD
            layer.self_attn.k_proj.weight[: shape.head_dim] *= LOUD
            layer.self_attn.o_proj.weight[:, :queries] = 0
    return make_parent(model, None)


@pytest.fixture(scope="module")
def library(parent: Parent) -> BlockLibrary:
    space = Space.of(parent.shape, 1, parent.shape.ffn_width)
    return build_library(parent, SPLIT, ImportanceRecipe(refit=False), space)


def test_squares_are_what_enters_the_norm_by_source_weight(parent: Parent, library: BlockLibrary) -> None:
    for layer, module in enumerate(parent.model.model.layers):
        for name in ("q_norm", "k_norm"):
            wanted = 0.0
            for source, rows in SPLIT.sources.items():
                seen: list[torch.Tensor] = []
                handle = module.self_attn.get_submodule(name).register_forward_hook(
                    lambda _, args, output, seen=seen: seen.append(args[0])  # type: ignore[misc]
                )
                with torch.no_grad():
                    parent.model(input_ids=rows.windows)
                handle.remove()
                wanted = wanted + SPLIT.weights[source] * seen[0].double().square().mean(dim=(0, 1))
            found = library.norm_squares(layer, name)
            assert found is not None
            assert_close(found, wanted, terms=8 * 20)
    assert library.norm_squares(0, "q_proj") is None


def test_a_norm_over_fewer_heads_gives_them_their_old_scale(parent: Parent, library: BlockLibrary) -> None:
    """On average over the calibration tokens; unscaled, what is left would be as loud as the whole was."""
    shape = parent.shape
    quieter = parent.shape.architecture.with_choices(
        (layer, AttentionChoice(shape.kv_groups - 1)) for layer in range(shape.layers)
    )

    class Unscaled(BlockLibrary):
        def norm_squares(self, layer: int, name: str) -> None:
            return None

    ids = tokens(4, seed=3)
    with torch.no_grad():
        of_parent, scaled, unscaled = (
            model(input_ids=ids).logits
            for model in (
                parent.model,
                prune(parent, quieter, library),
                prune(parent, quieter, Unscaled(library.space, library.layers)),
            )
        )
    near, far = ((logits - of_parent).abs().mean() for logits in (scaled, unscaled))
    assert near < 0.5 * far
    kept_U = library.kept(0, quieter.layers[0].attention).units_U
    assert 0 not in kept_U.tolist(), "the group that feeds nothing leaves first"
