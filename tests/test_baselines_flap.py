"""FLAP: its scores, its one threshold and its bias, each against a direct computation; and libraries from one pass."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from baselines_tiny import FLAP, given_of, library_of, random_parent, random_split, space_of
from closeness import assert_close
from torch import nn

from llmprune.baselines.flap import (
    at_threshold,
    compensate,
    flap,
    global_threshold,
    needs_bias,
    params_per_unit,
)
from llmprune.blocks import library as module
from llmprune.blocks.library import LibrarySpec, build_libraries, build_library
from llmprune.choices.architecture import Architecture
from llmprune.choices.dimensions import BLOCK_KINDS
from llmprune.choices.rows import input_columns
from llmprune.core.recipe import ImportanceRecipe
from llmprune.models.parent import Parent
from llmprune.models.surgery import prune

RECIPES = [ImportanceRecipe(method=m, refit=False) for m in ("magnitude", "wanda-sp", "flap")]  # type: ignore[arg-type]
MIXED = Architecture.of([(1, 12), (2, 8), (1, 24)])


def inputs(parent: Parent) -> dict[Any, tuple[torch.Tensor, torch.Tensor]]:
    """All inputs of every output projection on the calibration split (N, I), and each row's weight (N,)."""
    split = random_split("calibration")
    seen: dict[Any, list[torch.Tensor]] = {(i, kind): [] for i in range(3) for kind in BLOCK_KINDS}
    handles = [
        parent.output_projection(*key).register_forward_pre_hook(
            lambda module, args, key=key: seen[key].append(args[0].double().flatten(0, 1))
        )
        for key in seen
    ]
    shares = []
    with torch.inference_mode():
        for name, source in split.sources.items():
            parent.model(input_ids=source.windows)
            shares.append(torch.full((source.windows.numel(),), split.weights[name] / source.windows.numel()))
    for handle in handles:
        handle.remove()
    return {key: (torch.cat(found), torch.cat(shares).double()) for key, found in seen.items()}


def test_scores_are_standardised_fluctuations_and_means_are_of_the_inputs() -> None:
    parent = random_parent()
    library = library_of(parent, space_of(parent), FLAP)
    for (layer, kind), (x_NI, share_N) in inputs(parent).items():
        mean_I = share_N @ x_NI
        variance_I = share_N @ (x_NI - mean_I).square()
        metric_I = variance_I * parent.output_weight(layer, kind).double().square().sum(0)
        standard_I = (metric_I - metric_I.mean()) / metric_I.std()
        score_U, found_mean_I = library.fluctuation(layer, kind)
        assert_close(found_mean_I, mean_I)
        torch.testing.assert_close(score_U, standard_I.view(len(score_U), -1).mean(1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("share", [0.1, 0.35, 0.6, 0.9])
def test_one_threshold_for_all_units_at_equal_parameters(share: float) -> None:
    parent = random_parent()
    space = space_of(parent)
    library = library_of(parent, space, FLAP)
    scores = {(i, kind): library.fluctuation(i, kind)[0] for i, kind in space.blocks()}
    # Rows of q, k and v and columns of o, six wide, of two query heads and one key/value head; gate, up and down.
    params = {"attention": 24 * 6 * (2 + 1 + 1 + 2), "ffn": 3 * 24}
    assert {kind: params_per_unit(parent, kind) for kind in BLOCK_KINDS} == params
    ranked = sorted(
        ((float(s), params[kind]) for (_, kind), score_U in scores.items() for s in score_U), key=lambda p: -p[0]
    )
    total, kept, best = sum(p for _, p in ranked), 0, (float("inf"), 0.0)
    for value, unit_params in ranked:
        kept += unit_params
        best = min(best, (abs(kept - (1 - share) * total), value), key=lambda pair: pair[0])
    threshold = global_threshold(scores, params, share)  # type: ignore[arg-type]
    assert threshold == best[1]
    architecture = at_threshold(space, scores, threshold)
    for layer, choice in architecture.blocks():
        above = int((scores[layer, choice.kind] > threshold).sum())
        offered = [other.units for other in space.ladder(choice.kind) if other.units]
        assert choice.units == min(offered, key=lambda units: (abs(units - above), units))


def test_the_path_gets_smaller_and_never_drops_a_block() -> None:
    parent = random_parent()
    given = given_of(parent, library_of(parent, space_of(parent), FLAP))
    path = list(flap(given))
    assert path[0] == parent.shape.architecture and len(set(path)) == len(path) > 10
    for before, after in pairwise(path):
        pairs = zip(before.blocks(), after.blocks(), strict=True)
        assert all(0 < small.units <= large.units for (_, large), (_, small) in pairs)


@pytest.mark.parametrize("biased", [False, True])
def test_the_child_computes_the_formula(biased: bool) -> None:
    parent = random_parent(biased=biased)
    library = library_of(parent, space_of(parent), FLAP)
    child = prune(parent, MIXED, library)
    compensate(parent, library, child, MIXED)
    assert needs_bias(parent, MIXED) is not biased
    assert not needs_bias(parent, parent.shape.architecture)

    def replaced(weight_DI: torch.Tensor, bias: torch.Tensor | None, kept: torch.Tensor, mean_I: torch.Tensor) -> Any:
        left = torch.ones(weight_DI.shape[1], dtype=torch.bool)
        left[kept] = False
        shift_D = weight_DI[:, left] @ mean_I[left].float() + (0 if bias is None else bias)
        return lambda module, args, result: args[0][..., kept] @ weight_DI[:, kept].mT + shift_D

    handles = []
    for layer, choice in MIXED.blocks():
        if choice != parent.shape.full(choice.kind):
            columns = input_columns(library.kept(layer, choice).units_U, parent.shape, choice.kind)
            weight, bias = parent.output_weight(layer, choice.kind), parent.output_bias(layer, choice.kind)
            hook = replaced(weight, bias, columns, library.fluctuation(layer, choice.kind)[1])
            handles.append(parent.output_projection(layer, choice.kind).register_forward_hook(hook))
    ids = random_split("validation").sources["ant"].windows
    with torch.inference_mode():
        expected = parent.model(input_ids=ids).logits
        for handle in handles:
            handle.remove()
        found = child(input_ids=ids).logits
        untouched = parent.model(input_ids=ids).logits
    assert_close(found, expected)
    assert not torch.allclose(untouched, expected, atol=1e-3)
    assert all((module.bias is not None) is biased for module in projections(parent))


def projections(parent: Parent) -> list[nn.Linear]:
    found = [parent.output_projection(layer, kind) for layer in range(3) for kind in BLOCK_KINDS]
    return [module for module in found if isinstance(module, nn.Linear)]


def test_dropped_layers_shift_where_the_biases_go() -> None:
    parent = random_parent()
    library = library_of(parent, space_of(parent), FLAP)
    architecture = Architecture.of([(0, 0), (2, 24), (2, 8)])
    child = prune(parent, architecture, library)
    compensate(parent, library, child, architecture)
    with_bias = {name for name, module in child.named_modules() if getattr(module, "bias", None) is not None}
    assert with_bias == {"model.layers.1.mlp.down_proj"}


def test_one_pass_builds_what_separate_passes_build(tmp_path: Path) -> None:
    parent = random_parent()
    space, split = space_of(parent, size="large"), random_split("calibration")
    steps: list[tuple[int, int]] = []
    specs = [LibrarySpec(recipe, tmp_path / recipe.method) for recipe in RECIPES]
    together = build_libraries(
        parent, split, specs, space, input_hash="x", progress=lambda done, total: steps.append((done, total))
    )
    assert steps == [(done, 3) for done in range(4)]
    for recipe, library in zip(RECIPES, together, strict=True):
        assert library.hash == build_library(parent, split, recipe, space).hash


def test_a_killed_build_is_finished_for_the_layers_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = random_parent()
    space, split = space_of(parent), random_split("calibration")
    specs = [LibrarySpec(recipe, tmp_path / recipe.method) for recipe in RECIPES]
    whole = [library.hash for library in build_libraries(parent, split, specs, space, input_hash="x")]
    (tmp_path / "flap" / "layer_001.safetensors").unlink()
    (tmp_path / "magnitude" / "layer_002.safetensors").unlink()
    wanted: list[Any] = []
    walk = module.layer_statistics
    monkeypatch.setattr(
        module, "layer_statistics", lambda *args, **kw: wanted.append(kw["layers"]) or walk(*args, **kw)
    )
    assert [library.hash for library in build_libraries(parent, split, specs, space, input_hash="x")] == whole
    assert wanted == [[1, 2]]
    build_libraries(parent, split, specs, space, input_hash="x")
    assert wanted == [[1, 2]]
