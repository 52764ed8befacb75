"""Statistics and the block library of a tiny parent, on disk and in memory."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from families import overwritten
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llmprune.blocks.changes import CHANGE_PARTS
from llmprune.blocks.library import BlockLibrary, build_library, load_library, stored_layers
from llmprune.blocks.solve import refitted
from llmprune.blocks.statistics import BlockStatistics, layer_statistics, statistics_bytes
from llmprune.choices.dimensions import BLOCK_KINDS, BlockKind
from llmprune.choices.ffn import FfnChoice
from llmprune.choices.kv_groups import AttentionChoice
from llmprune.choices.merged import MergedChoice
from llmprune.choices.space import Space
from llmprune.core.errors import ArchitectureError, ModelError, RecipeError, RunDirectoryError
from llmprune.core.recipe import ImportanceRecipe
from llmprune.data.tokens import SourceTokens, Split
from llmprune.models.parent import Parent, make_parent
from llmprune.numerics.refit import flap_bias, refit, unit_columns

LAYERS, KV_GROUPS, FFN_WIDTH = 3, 4, 40
UNIT_SIZE: dict[BlockKind, int] = {"attention": 12, "ffn": 1}
OBS = ImportanceRecipe()


def tiny_parent(*, bias: bool = False, dtype: torch.dtype = torch.float32, query_heads: int = 8) -> Parent:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=24,
        intermediate_size=FFN_WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=query_heads,
        num_key_value_heads=KV_GROUPS,
        head_dim=6,
        attention_bias=bias,
        mlp_bias=bias,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return make_parent(model.to(dtype), None)


def tiny_split(seq_len: int = 16, **windows: int) -> Split:
    generator = torch.Generator().manual_seed(1)
    sources = {}
    for name, count in windows.items():
        ids = torch.randint(0, 64, (count, seq_len), generator=generator)
        sources[name] = SourceTokens(ids, torch.full((count,), seq_len))
    weights = dict(zip(sources, (0.75, 0.25) if len(sources) == 2 else (1.0,), strict=True))
    return Split("calibration", sources, weights, seq_len, False)


@pytest.fixture(scope="module")
def parent() -> Parent:
    return tiny_parent()


@pytest.fixture(scope="module")
def split() -> Split:
    return tiny_split(wiki=2, web=5)


@pytest.fixture
def space(parent: Parent) -> Space:
    return Space.of(parent.shape, 1, 16)


def inputs_of(parent: Parent, ids: Tensor, layer: int, kind: BlockKind) -> Tensor:
    """Direct: what enters one output projection, (tokens, in) in float64."""
    seen = []
    hook = parent.output_projection(layer, kind).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        for window in ids:
            parent.model(input_ids=window[None])
    hook.remove()
    return torch.cat([x.flatten(0, 1) for x in seen]).double()


def collected(parent: Parent, split: Split, **asked: Any) -> dict[tuple[int, BlockKind], BlockStatistics]:
    """Of all layers that were asked for, together."""
    found = layer_statistics(parent, split, **asked)
    return {(layer, kind): statistics for layer, blocks in found for kind, statistics in blocks.items()}


def test_statistics_are_the_weighted_moments_of_the_inputs(parent: Parent, split: Split) -> None:
    statistics = collected(parent, split)
    assert list(statistics) == [(layer, kind) for layer in range(LAYERS) for kind in BLOCK_KINDS]
    for (layer, kind), found in statistics.items():
        gram, mean = torch.zeros(()), torch.zeros(())
        for name, source in split.sources.items():
            x = inputs_of(parent, source.windows, layer, kind)
            gram = gram + split.weights[name] * (x.mT @ x / len(x))
            mean = mean + split.weights[name] * x.mean(dim=0)
        assert found.tokens == split.tokens
        assert not found.gram_II.is_inference()
        assert_close(found.gram_II, gram)
        assert_close(found.mean_I, mean)
        assert_close(found.mean_square_I, gram.diagonal())
        assert_close(found.variance_I, gram.diagonal() - mean**2, scale=float(gram.diagonal().max()))


def test_the_batch_does_not_matter(parent: Parent, split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = collected(parent, split, layers=[1])
    monkeypatch.setattr("llmprune.blocks.statistics.BATCH_TOKENS", 40)
    parts = collected(parent, split, layers=[1])
    assert list(whole) == list(parts) == [(1, "attention"), (1, "ffn")]
    for key, found in whole.items():
        assert_close(found.gram_II, parts[key].gram_II)


@pytest.mark.parametrize("merged", [0, 1, 2])
def test_statistics_leave_no_hooks_and_say_what_they_take(parent: Parent, split: Split, merged: int) -> None:
    own = MergedChoice.of(parent.shape)[:merged]
    statistics = collected(parent, split, layers=[0], own=own)
    taken = sum(s.gram_II.nbytes + s.mean_I.nbytes for s in statistics.values())
    beside = statistics[0, "attention"].own
    assert len(beside) == merged and not statistics[0, "ffn"].own
    taken += sum(m.gram_II.nbytes + m.cross_II.nbytes + m.mean_I.nbytes for m in beside.values())
    assert taken == statistics_bytes(parent.shape, own)
    assert not any(module._forward_pre_hooks for module in parent.model.modules())


def test_activations_that_are_not_finite_name_their_layer(split: Split) -> None:
    broken = tiny_parent()
    with torch.no_grad():
        broken.model.get_submodule("model.layers.1.mlp.up_proj").weight[3, 2] = torch.inf
    with pytest.raises(ModelError, match="ffn block of layer 1"):
        collected(broken, split)
    assert not any(module._forward_pre_hooks for module in broken.model.modules())


def assert_within_a_step(found: Tensor, exact: Tensor, parents: Tensor, slack: float = 2e-6) -> None:
    """A weight is off by half a step of its row and column at most: 1/127 of the largest change of the column, rows
    being measured by their mean change."""
    change = (exact - parents).abs()
    rows = change.mean(dim=1, keepdim=True).clamp(min=1e-30)
    steps = rows * (change / rows).amax(dim=0) / 127
    assert ((found - exact).abs() <= 0.501 * steps + slack).all()


@pytest.mark.parametrize("method", ["obs", "magnitude", "wanda-sp", "flap"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("resolve", [False, True])
def test_library_holds_nested_choices_and_their_outputs(split: Split, method: str, bias: bool, resolve: bool) -> None:
    parent = tiny_parent(bias=bias)
    space = Space.of(parent.shape, 1, 16)
    recipe = ImportanceRecipe.model_validate({"method": method, "refit": resolve})
    library = build_library(parent, split, recipe, space)
    statistics = collected(parent, split)
    for (layer, kind), block in statistics.items():
        weight, own_bias = parent.output_weight(layer, kind), parent.output_bias(layer, kind)
        larger = library.kept(layer, parent.shape.full(kind)).units_U.tolist()
        assert larger == list(range(parent.shape.units(kind)))
        for choice in reversed(space.ladder(kind)[:-1]):
            kept, queries = library.kept(layer, choice)
            assert kept.tolist() == sorted(kept.tolist()) and len(kept) == choice.units
            assert set(kept.tolist()) < set(larger) and queries is None
            larger = kept.tolist()
            if choice.units == 0:
                continue
            columns = unit_columns(kept, UNIT_SIZE[kind])
            mean = block.mean_I if bias else None
            if resolve:
                expected = refit(weight, block.gram_II, columns, 0.01, mean_I=mean, bias_D=own_bias)
            elif method == "flap" and mean is not None:
                expected = weight[:, columns], flap_bias(weight, mean, columns, own_bias)
            else:
                expected = weight[:, columns], own_bias
            found_weight, found_bias = library.output(layer, choice, weight)
            assert found_weight.dtype == weight.dtype and found_weight.is_contiguous()
            assert_within_a_step(found_weight, expected[0], weight[:, columns])
            assert (found_bias is None) == (not bias)
            torch.testing.assert_close(found_bias, expected[1], rtol=1e-5, atol=1e-6)


def large(parent: Parent) -> list[Space]:
    """Spaces with choices of query heads: fine, coarse, and without drops."""
    return [
        Space.of(parent.shape, step, 16, drop=drop, size="large") for step, drop in ((1, True), (2, True), (3, False))
    ]


@pytest.mark.parametrize("method", ["obs", "magnitude", "wanda-sp", "flap"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("resolve", [False, True])
def test_query_heads_are_nested_and_their_outputs_are_the_plain_refit(
    split: Split, method: str, bias: bool, resolve: bool
) -> None:
    parent = tiny_parent(bias=bias, query_heads=12)
    shape = parent.shape
    recipe = ImportanceRecipe.model_validate({"method": method, "refit": resolve})
    statistics = collected(parent, split)
    for space in large(parent):
        library = build_library(parent, split, recipe, space)
        fewer = [choice for choice in space.attention if choice.queries_per_group is not None]
        assert {choice.queries_per_group for choice in fewer} == {1, 2}
        for layer in range(LAYERS):
            weight, own_bias = parent.output_weight(layer, "attention"), parent.output_bias(layer, "attention")
            block, of_count = statistics[layer, "attention"], dict[int, set[tuple[int, int]]]()
            for choice in fewer:
                groups, queries = library.kept(layer, choice)
                assert torch.equal(groups, library.kept(layer, AttentionChoice(choice.kv_groups)).units_U)
                assert queries is not None and queries.shape == (choice.kv_groups, choice.queries_per_group)
                assert torch.equal(queries, queries.sort(dim=1).values)
                heads = [
                    group * shape.queries_per_group + query
                    for group, row in zip(groups.tolist(), queries.tolist(), strict=True)
                    for query in row
                ]
                # Counted out head by head: which columns the weight is for.
                columns = torch.tensor([head * shape.head_dim + i for head in heads for i in range(shape.head_dim)])
                mean = block.mean_I if bias else None
                if resolve:
                    expected = refit(weight, block.gram_II, columns, 0.01, mean_I=mean, bias_D=own_bias)
                elif method == "flap" and mean is not None:
                    expected = weight[:, columns], flap_bias(weight, mean, columns, own_bias)
                else:
                    expected = weight[:, columns], own_bias
                found = library.output(layer, choice, weight)
                assert found[0].is_contiguous() and found[0].dtype == weight.dtype
                assert_within_a_step(found[0], expected[0], weight[:, columns])
                torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-6)
                pairs = {(group, q) for group, row in zip(groups.tolist(), queries.tolist(), strict=True) for q in row}
                of_count.setdefault(choice.kv_groups, pairs)
                # The ladder ascends: for one number of groups, more query heads come later.
                assert of_count[choice.kv_groups] <= pairs
                of_count[choice.kv_groups] = pairs
            for smaller, larger in itertools.pairwise(sorted(fewer, key=lambda c: (c.queries_per_group, c.kv_groups))):
                if smaller.queries_per_group == larger.queries_per_group:
                    kept = [set(library.kept(layer, choice).units_U.tolist()) for choice in (smaller, larger)]
                    assert kept[0] < kept[1], "a KV group that stays keeps the same query heads"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", ["obs", "flap"])
def test_behind_merged_kv_heads_the_output_is_the_least_squares_fit(split: Split, method: str, bias: bool) -> None:
    parent = tiny_parent(bias=bias)
    space = Space.of(parent.shape, 1, 16, merge_kv=True)
    recipe = ImportanceRecipe.model_validate({"method": method})
    library = build_library(parent, split, recipe, space)
    for layer, choice in itertools.product(range(LAYERS), MergedChoice.of(parent.shape)):
        kept, queries = library.kept(layer, choice)
        assert kept.tolist() == list(range(KV_GROUPS)) and queries is None
        # Rows of all sources together, each weighted by its share: one least-squares problem, with rows for the ridge.
        means = overwritten(parent, {layer: choice.kv_groups})
        columns = []
        for some in (parent, means):
            x = [inputs_of(some, source.windows, layer, "attention") for source in split.sources.values()]
            columns.append(torch.cat(x))
        sizes = {name: source.windows.numel() for name, source in split.sources.items()}
        shares = [torch.full((count,), split.weights[name] / count) for name, count in sizes.items()]
        root = torch.cat(shares).double().sqrt()[:, None]
        x, z = columns
        weight = parent.output_weight(layer, "attention").double()
        mean_x, mean_z = ((root.square() * some).sum(0) if bias else torch.zeros_like(some[0]) for some in (x, z))
        centred = root * (z - mean_z)
        ridge = recipe.damp * centred.square().sum() / len(weight.T)
        system = torch.cat([centred, ridge.sqrt() * torch.eye(len(weight.T), dtype=torch.float64)])
        target = torch.cat([root * (x - mean_x) @ weight.T, ridge.sqrt() * weight.T])
        expected = torch.linalg.lstsq(system, target).solution.T
        found, found_bias = library.output(layer, choice, parent.output_weight(layer, "attention"))
        assert found.dtype == torch.float32 and found.shape == weight.shape
        # Moments are multiplied out in float32: in float64 the refit itself is exact (test_blocks_refit).
        assert_within_a_step(found.double(), expected, weight, slack=3e-4)
        assert (expected - weight).abs().max() > 1e-2, "there is something to re-solve"
        assert (found_bias is None) == (not bias)
        own_bias = parent.output_bias(layer, "attention")
        if found_bias is not None and own_bias is not None:
            shift = weight @ mean_x - expected @ mean_z
            torch.testing.assert_close(found_bias.double(), own_bias + shift, rtol=0, atol=3e-4)


def test_without_a_refit_merged_blocks_keep_the_output_and_need_no_statistics(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, seen = tiny_parent(bias=True), []
    monkeypatch.setattr("llmprune.blocks.statistics.OwnBlocks", lambda *args: seen.append(args))
    space = Space.of(parent.shape, 1, 16, merge_kv=True)
    library = build_library(parent, split, ImportanceRecipe(method="flap", refit=False), space)
    weight, bias = library.output(1, MergedChoice(2), parent.output_weight(1, "attention"))
    assert torch.equal(weight, parent.output_weight(1, "attention"))
    assert bias is not None and torch.equal(bias, parent.output_bias(1, "attention"))  # type: ignore[arg-type]
    assert not seen


def test_merging_changes_nothing_for_the_other_choices_and_comes_back_from_disk(
    parent: Parent, split: Split, tmp_path: Path
) -> None:
    plain, merging = (Space.of(parent.shape, 1, 16, size="large", merge_kv=merge) for merge in (False, True))
    of_plain = build_library(parent, split, OBS, plain, tmp_path / "plain", input_hash="a")
    of_merging = build_library(parent, split, OBS, merging, tmp_path / "merging", input_hash="a")
    for mine, theirs in zip(of_plain.layers, of_merging.layers, strict=True):
        new = theirs.tensors.keys() - mine.tensors.keys()
        labels = [choice.label for choice in MergedChoice.of(parent.shape)]
        assert new == {f"attention/{label}/{part}" for label in labels for part in CHANGE_PARTS}
        assert all(torch.equal(tensor, theirs.tensors[name]) for name, tensor in mine.tensors.items())
    assert same(of_merging, load_library(tmp_path / "merging", OBS, merging, input_hash="a"))
    assert stored_layers(tmp_path / "plain", OBS, merging, input_hash="a") == 0
    assert stored_layers(tmp_path / "plain", OBS, plain, input_hash="a") == LAYERS


def test_query_heads_leave_least_important_first(split: Split) -> None:
    parent = tiny_parent(query_heads=12)
    (space, *_), shape = large(parent), parent.shape
    library = build_library(parent, split, ImportanceRecipe(method="magnitude"), space)
    for layer in range(LAYERS):
        columns_I = parent.output_weight(layer, "attention").double().norm(dim=0)
        scores_KQ = columns_I.view(shape.kv_groups, shape.queries_per_group, shape.head_dim).sum(dim=2)
        for queries in (1, 2):
            kept = library.kept(layer, AttentionChoice(shape.kv_groups, queries)).queries_UQ
            assert torch.equal(kept, scores_KQ.topk(queries, dim=1).indices.sort(dim=1).values)  # type: ignore[arg-type]


def test_query_heads_change_nothing_for_the_other_choices(parent: Parent, split: Split, space: Space) -> None:
    plain = build_library(parent, split, OBS, space)
    with_queries = build_library(parent, split, OBS, Space.of(parent.shape, 1, 16, size="large"))
    for mine, theirs in zip(plain.layers, with_queries.layers, strict=True):
        assert mine.tensors.keys() < theirs.tensors.keys()
        assert all(torch.equal(tensor, theirs.tensors[name]) for name, tensor in mine.tensors.items())


def test_a_library_with_query_heads_comes_back_from_disk(parent: Parent, split: Split, tmp_path: Path) -> None:
    space = Space.of(parent.shape, 1, 16, size="large")
    built = build_library(parent, split, OBS, space, tmp_path, input_hash="a")
    again = load_library(tmp_path, OBS, space, input_hash="a")
    assert same(built, again)
    choice = AttentionChoice(2, 1)
    weight = parent.output_weight(1, "attention")
    assert torch.equal(built.output(1, choice, weight)[0], again.output(1, choice, weight)[0])
    assert again.output(1, choice, weight)[0].shape == (parent.shape.hidden_size, parent.shape.inputs(choice))
    with pytest.raises(RunDirectoryError, match=r"layer_000\.safetensors was built from another"):
        load_library(tmp_path, OBS, Space.of(parent.shape, 1, 16), input_hash="a")


def test_choices_off_the_ladder_are_refused(parent: Parent, split: Split) -> None:
    library = build_library(parent, split, OBS, Space.of(parent.shape, 2, 16, drop=False))
    with pytest.raises(ArchitectureError, match=r"ffn block of layer 2 with 16, 32, 40 units, got 20"):
        library.kept(2, FfnChoice(20))
    with pytest.raises(ArchitectureError, match=r"attention block of layer 0 with 2, 4 units, got 0"):
        library.kept(0, AttentionChoice(0))
    with pytest.raises(ArchitectureError, match=r"attention block of layer 0 with 2, 4 units, got 2x1"):
        library.kept(0, AttentionChoice(2, 1))
    with pytest.raises(AssertionError, match="no output projection of its own"):
        library.output(2, FfnChoice(40), parent.output_weight(2, "ffn"))
    with pytest.raises(ArchitectureError, match="layer must be from 0 to 2, got 3"):
        library.output(3, FfnChoice(16), parent.output_weight(2, "ffn"))


def same(a: BlockLibrary, b: BlockLibrary) -> bool:
    return a.hash == b.hash and all(
        torch.equal(tensor, y.tensors[name])
        for x, y in zip(a.layers, b.layers, strict=True)
        for name, tensor in x.tensors.items()
    )


def test_a_library_is_made_in_one_pass_over_the_tokens(parent: Parent, split: Split, space: Space) -> None:
    ran: list[int] = []
    hooks = [
        parent.output_projection(layer, "ffn").register_forward_hook(
            lambda module, args, output: ran.append(output.shape[:2].numel())
        )
        for layer in range(LAYERS)
    ]
    steps: list[tuple[int, int]] = []
    try:
        build_library(parent, split, OBS, space, progress=lambda *step: steps.append(step))
    finally:
        for hook in hooks:
            hook.remove()
    assert sum(ran) == LAYERS * split.tokens
    assert steps == [(done, LAYERS) for done in range(LAYERS + 1)]


def test_what_is_stored_is_the_refit_to_a_hundredth_of_what_it_changes(parent: Parent, split: Split) -> None:
    """In a quarter of the bytes that the weights themselves would take."""
    space = Space.of(parent.shape, 1, 8)
    library = build_library(parent, split, OBS, space)
    for (layer, kind), block in collected(parent, split).items():
        weight = parent.output_weight(layer, kind)
        for choice in refitted(space, kind):
            columns = choice.columns(library.kept(layer, choice), parent.shape)
            exact, _ = refit(weight, block.gram_II, columns, OBS.damp)
            found, _ = library.output(layer, choice, weight)
            changes = (exact - weight[:, columns]).norm()
            assert changes > 0 and (found - exact).norm() <= 0.01 * changes, (layer, choice)
    stored = sum(t.nbytes for one in library.layers for name, t in one.tensors.items() if "/change" in name)
    whole = sum(
        4 * parent.shape.hidden_size * choice.inputs(parent.shape)
        for kind in BLOCK_KINDS
        for choice in refitted(space, kind)
    )
    assert stored < (0.25 + 0.15) * LAYERS * whole, "scales weigh in a model as small as this"


def test_recipes_of_before_may_still_say_how_much_memory_a_pass_took() -> None:
    old = ImportanceRecipe.model_validate({"memory_gb": 0.001})
    assert old == ImportanceRecipe() and "memory_gb" not in old.decisive()


def replace(file: Path, contents: bytes) -> None:
    """A new file of that name: a library maps the old one, which must not change under it."""
    file.unlink()
    file.write_bytes(contents)


def test_a_killed_build_resumes(parent: Parent, split: Split, space: Space, tmp_path: Path) -> None:
    built = build_library(parent, split, OBS, space, tmp_path, input_hash="a")
    assert same(built, build_library(parent, split, OBS, space))
    assert same(built, load_library(tmp_path, OBS, space, input_hash="a"))
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == [f"layer_00{i}.safetensors" for i in range(LAYERS)]

    files[0].unlink()
    replace(files[2], files[2].read_bytes()[:-100])
    written = files[1].stat().st_mtime_ns
    totals = set[int]()
    again = build_library(
        parent, split, OBS, space, tmp_path, input_hash="a", progress=lambda _, total: totals.add(total)
    )
    assert totals == {2}
    assert files[1].stat().st_mtime_ns == written
    assert same(again, built)

    totals.clear()
    build_library(parent, split, OBS, space, tmp_path, input_hash="a", progress=lambda _, total: totals.add(total))
    assert not totals


def test_a_build_from_other_inputs_is_not_taken_over(
    parent: Parent, split: Split, space: Space, tmp_path: Path
) -> None:
    built = build_library(parent, split, OBS, space, tmp_path, input_hash="a")
    other_recipe = ImportanceRecipe(method="magnitude")
    finer = Space.of(parent.shape, 1, 8)
    for recipe, some_space, input_hash in ((OBS, space, "b"), (other_recipe, space, "a"), (OBS, finer, "a")):
        with pytest.raises(RunDirectoryError, match=r"layer_000\.safetensors was built from another"):
            load_library(tmp_path, recipe, some_space, input_hash=input_hash)
    other = build_library(parent, split, other_recipe, space, tmp_path, input_hash="a")
    assert other.hash != built.hash
    assert same(other, load_library(tmp_path, other_recipe, space, input_hash="a"))


def test_bad_files_are_named(parent: Parent, split: Split, space: Space, tmp_path: Path) -> None:
    build_library(parent, split, OBS, space, tmp_path, input_hash="a")
    file = tmp_path / "layer_001.safetensors"
    whole = file.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    for contents, problem in (
        (b"", "is not a whole layer"),
        (whole[: len(whole) // 2], "is not a whole layer"),
        (b"\xff" * 64 + whole[64:], "is not a whole layer"),
        (flipped, "does not have the contents it was written with"),
        ((tmp_path / "layer_000.safetensors").read_bytes(), "was built from another"),
    ):
        replace(file, contents)
        with pytest.raises(RunDirectoryError, match=rf"layer_001\.safetensors {problem}.*build the library again"):
            load_library(tmp_path, OBS, space, input_hash="a")
    file.unlink()
    with pytest.raises(RunDirectoryError, match=r"cannot read .*layer_001\.safetensors"):
        load_library(tmp_path, OBS, space, input_hash="a")


def test_a_refit_that_the_dtype_cannot_hold_is_refused(split: Split) -> None:
    parent = tiny_parent(dtype=torch.float16)
    with torch.no_grad():
        parent.output_projection(LAYERS - 1, "ffn").weight.fill_(60_000)  # type: ignore[operator, union-attr]
    with pytest.raises(ModelError, match=r"ffn block of layer 2 does not fit into torch\.float16"):
        build_library(parent, split, OBS, Space.of(parent.shape, 1, 16))


def test_too_little_damping_names_the_block(parent: Parent, space: Space) -> None:
    with pytest.raises(
        RecipeError, match=r"importance\.damp .* got 1e-30 in the attention block of layer 0; use 1e-29"
    ):
        build_library(parent, tiny_split(seq_len=4, wiki=1), ImportanceRecipe(damp=1e-30), space)
