"""The contract of surgery, for every supported family: the child is the masked parent, only smaller."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from families import CASES, GROUPED_IDS, IDS, Case, Slices, masked, tiny_model, tiny_parent, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmprune.choices.architecture import DROPPED, Architecture, LayerChoice, ParentShape
from llmprune.choices.dimensions import BlockKind
from llmprune.choices.ffn import FfnChoice
from llmprune.choices.kv_groups import AttentionChoice
from llmprune.core.errors import ArchitectureError
from llmprune.models.modeling_pruned import NoAttention, NoFfn
from llmprune.models.parent import Parent, make_parent
from llmprune.models.sizes import size_of
from llmprune.models.surgery import is_stock, prune

# Short enough that phi3's longrope, which changes its frequencies after 16 tokens, does not change them midway.
CACHED_TOKENS = 16


def fewer(groups: int) -> int:
    """Not all KV groups, if there is more than one."""
    return max(1, groups - 1)


ARCHITECTURES: dict[str, Callable[[int, int], list[tuple[int, int]]]] = {
    "heterogeneous": lambda g, f: [(0, f), (fewer(g), 17), (g, 0), (1, f - 3)],
    "no middle layer": lambda g, f: [(g, 13), (1, f), (0, 0), (fewer(g), f)],
    "no first layer": lambda g, f: [(0, 0), (fewer(g), f), (g, 7), (g, f)],
    "no last layer": lambda g, f: [(g, f), (1, f), (g, 9), (0, 0)],
    "one block a layer": lambda g, f: [(0, f), (g, 0), (0, 11), (1, 0)],
    "late attention": lambda g, f: [(0, f), (0, 5), (0, f), (fewer(g), f)],
    "no ffn": lambda g, f: [(g, 0)] * 4,
    "uniform ffn": lambda g, f: [(g, 13)] * 4,
    "uniform both": lambda g, f: [(fewer(g), 13)] * 4,
    "depth": lambda g, f: [(g, f), (0, 0), (0, 0), (g, f)],
    "one layer": lambda g, f: [(0, 0), (0, 0), (g, f), (0, 0)],
}
STOCK = ("uniform ffn", "depth", "one layer")

# Of parents whose KV heads serve several query heads: (KV groups, query heads a group or None for all, FFN width).
Triples = list[tuple[int, int | None, int]]
QUERY_ARCHITECTURES: dict[str, Callable[[int, int, int], Triples]] = {
    "queries and groups": lambda g, q, f: [(g, q - 1, f), (fewer(g), 1, 17), (0, None, f), (fewer(g), None, 0)],
    "queries alone": lambda g, q, f: [(g, None, f), (g, 1, f), (g, q - 1, f), (g, None, f)],
    "queries in the only attention": lambda g, q, f: [(0, None, f), (0, None, 0), (fewer(g), 1, f), (0, None, 5)],
    "one query a group": lambda g, q, f: [(g, 1, f)] * 4,
    "one query a group, shallow": lambda g, q, f: [(g, 1, 13), (0, None, 0), (0, None, 0), (g, 1, 13)],
}


def architecture_of(name: str, shape: ParentShape) -> Architecture:
    return Architecture.of(ARCHITECTURES[name](shape.kv_groups, shape.ffn_width))


def with_queries(triples: Triples) -> Architecture:
    return Architecture(
        tuple(LayerChoice(AttentionChoice(groups, queries), FfnChoice(width)) for groups, queries, width in triples)
    )


def query_architecture_of(name: str, shape: ParentShape) -> Architecture:
    return with_queries(QUERY_ARCHITECTURES[name](shape.kv_groups, shape.queries_per_group, shape.ffn_width))


@cache
def parent_of(case_id: str) -> Parent:
    return tiny_parent(CASES[IDS.index(case_id)])


@pytest.fixture(params=IDS, scope="module")
def parent(request: pytest.FixtureRequest) -> Parent:
    return parent_of(request.param)


@pytest.fixture(params=GROUPED_IDS, scope="module")
def grouped(request: pytest.FixtureRequest) -> Parent:
    """A parent whose KV heads serve several query heads each."""
    return parent_of(request.param)


def child_of(parent: Parent, name: str = "heterogeneous") -> PreTrainedModel:
    return prune(parent, architecture_of(name, parent.shape), Slices(parent))


def logits_of(model: PreTrainedModel, tokens_BT: torch.Tensor, **extra: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(tokens_BT, **extra).logits


def attentions(child: PreTrainedModel, parent: Parent) -> list[Any]:
    """The attention modules that are there."""
    layers = child.get_submodule(parent.family.layers).children()
    modules = [layer.get_submodule(parent.family.attention.module) for layer in layers]
    return [module for module in modules if not isinstance(module, NoAttention)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sliced_equals_masked(parent: Parent, name: str) -> None:
    architecture, library, tokens_BT = architecture_of(name, parent.shape), Slices(parent), tokens()
    child = prune(parent, architecture, library)
    with masked(parent, architecture, library) as oracle:
        expected = logits_of(oracle, tokens_BT)
    assert_close(logits_of(child, tokens_BT), expected)
    assert (logits_of(parent.model, tokens_BT) - expected).abs().max() > 1e-2, "the mask changes nothing"
    # Gemma 2 caps its attention logits, which only transformers' eager kernel does.
    assert child.config._attn_implementation == ("eager" if "Gemma2" in type(child).__name__ else "sdpa")
    if name in STOCK:
        assert is_stock(child.config) and type(child) is type(parent.model)
    assert child.config.num_hidden_layers == len(architecture.kept_layers)
    assert not child.training


def test_every_family_with_grouped_queries_is_among_the_grouped() -> None:
    assert [name for name in IDS if parent_of(name).shape.queries_per_group > 1] == GROUPED_IDS


@pytest.mark.parametrize("name", QUERY_ARCHITECTURES)
def test_fewer_queries_sliced_equals_masked(grouped: Parent, name: str) -> None:
    shape = grouped.shape
    architecture, library, tokens_BT = query_architecture_of(name, shape), Slices(grouped), tokens()
    child = prune(grouped, architecture, library)
    with masked(grouped, architecture, library) as oracle:
        expected = logits_of(oracle, tokens_BT)
    assert_close(logits_of(child, tokens_BT), expected)
    assert (logits_of(grouped.model, tokens_BT) - expected).abs().max() > 1e-2, "the mask changes nothing"
    # A stock class has one head count for all layers, and must not work out the head size from it.
    assert is_stock(child.config) == (name.startswith("one query") and not grouped.family.derives_head_dim)
    assert (type(child) is type(grouped.model)) == is_stock(child.config)
    groups = [layer.attention.kv_groups for layer in architecture.layers]
    size = size_of(child, shape, architecture)
    assert size.kv_bytes_per_token == 2 * sum(groups) * shape.head_dim * 4, "the cache is of KV heads alone"
    fewer_rows = sum(
        shape.rows(shape.full("attention")) - shape.rows(layer.attention)
        for layer in architecture.layers
        if layer.attention.kv_groups
    )
    left = shape.architecture.with_choices(
        (i, choice) for i, choice in architecture.blocks() if choice.kind == "ffn" or not choice.units
    )
    with_all_heads = size_of(prune(grouped, left, library), shape, left)
    # Biases and norms of the heads leave as well.
    assert fewer_rows * shape.hidden_size <= with_all_heads.params - size.params
    assert with_all_heads.params - size.params <= fewer_rows * (shape.hidden_size + 2)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(case_id=st.sampled_from(["llama-gqa", "llama-mqa", "gpt_neox-sequential"]), data=st.data())
def test_any_architecture_sliced_equals_masked(case_id: str, data: st.DataObject) -> None:
    parent = parent_of(case_id)
    queries = [None, *range(1, parent.shape.queries_per_group)]
    attention = st.builds(AttentionChoice, st.integers(1, parent.shape.kv_groups), st.sampled_from(queries))
    choice = st.builds(
        LayerChoice,
        st.just(AttentionChoice(0)) | attention,
        st.builds(FfnChoice, st.integers(0, parent.shape.ffn_width)),
    )
    layers = st.lists(choice, min_size=parent.shape.layers, max_size=parent.shape.layers)
    drawn = layers.filter(lambda chosen: any(layer.attention.kv_groups for layer in chosen))
    architecture = Architecture(tuple(data.draw(drawn)))
    library = Slices(parent, seed=data.draw(st.integers(0, 9)))
    child = prune(parent, architecture, library)
    with masked(parent, architecture, library) as oracle:
        expected = logits_of(oracle, tokens())
    assert_close(logits_of(child, tokens()), expected)
    size = size_of(child, parent.shape, architecture)
    assert size.params == sum({parameter.data_ptr(): parameter.numel() for parameter in child.parameters()}.values())


def test_unchanged_architecture_gives_the_parents_bits(parent: Parent) -> None:
    child = prune(parent, parent.shape.architecture, Slices(parent))
    assert type(child) is type(parent.model)
    assert torch.equal(logits_of(child, tokens()), logits_of(parent.model, tokens()))
    assert child.state_dict().keys() == parent.model.state_dict().keys()


def test_parent_is_not_mutated(parent: Parent) -> None:
    tensors = {name: tensor.clone() for name, tensor in parent.model.state_dict().items()}
    config, text, logits = copy.deepcopy(parent.model.config), repr(parent.model), logits_of(parent.model, tokens())
    for name in ("heterogeneous", "no middle layer", "uniform both", "depth"):
        child = child_of(parent, name)
        logits_of(child, tokens())
        child.config.use_cache = False
        assert child.generation_config is not parent.model.generation_config
    assert parent.model.config.to_dict() == config.to_dict()
    assert repr(parent.model) == text
    assert parent.model.state_dict().keys() == tensors.keys()
    for name, tensor in parent.model.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name
    assert torch.equal(logits_of(parent.model, tokens()), logits)


@pytest.mark.parametrize("name", ["heterogeneous", "no middle layer"])
def test_unchanged_blocks_share_storage_and_changed_ones_are_contiguous(parent: Parent, name: str) -> None:
    architecture = architecture_of(name, parent.shape)
    child = prune(parent, architecture, Slices(parent))
    theirs = parent.model.state_dict()
    shared = 0
    for key, tensor in child.state_dict().items():
        before, dot, rest = key.partition(f"{parent.family.layers}.")
        if dot:
            index, _, rest = rest.partition(".")
            original = theirs[f"{before}{dot}{architecture.kept_layers[int(index)]}.{rest}"]
        else:
            original = theirs[key]
        if tensor.shape == original.shape and tensor.data_ptr() == original.data_ptr():
            shared += 1
            assert tensor.stride() == original.stride()
        else:
            assert dot and tensor.is_contiguous(), key
            storage = tensor.untyped_storage()
            assert storage.data_ptr() != original.untyped_storage().data_ptr(), f"{key} is a view of the parent"
            assert storage.nbytes() == tensor.nbytes, f"{key} keeps what left in memory"
    for index, layer in enumerate(architecture.kept_layers):
        for kind in ("attention", "ffn"):
            if architecture.layers[layer].block(kind) == parent.shape.full(kind):
                block = child.get_submodule(f"{parent.family.layers}.{index}.{parent.names(kind).module}".rstrip("."))
                output = block.get_submodule(parent.names(kind).output)
                assert output.weight.data_ptr() == parent.output_projection(layer, kind).weight.data_ptr()
    assert shared > 0
    embedding, output = child.get_input_embeddings(), child.get_output_embeddings()
    assert (output.weight is embedding.weight) == parent.model.config.tie_word_embeddings


def uncached_and(cache: Any, child: PreTrainedModel, chunks: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a pass without cache, and of one that feeds `chunks` tokens at a time."""
    tokens_BT = tokens(length=sum(chunks))
    ends = [sum(chunks[:i]) for i in range(len(chunks) + 1)]
    parts = [
        logits_of(child, tokens_BT[:, start:end], past_key_values=cache, use_cache=True)
        for start, end in pairwise(ends)
    ]
    return logits_of(child, tokens_BT, use_cache=False), torch.cat(parts, dim=1)


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
@pytest.mark.parametrize(
    ("name", "chunks"),
    [
        ("late attention", [1] * CACHED_TOKENS),
        ("late attention", [5, 1, 7, 3]),
        ("heterogeneous", [5, 1, 7, 3]),
        ("no first layer", [5, 1, 7, 3]),
    ],
)
def test_cached_equals_uncached(parent: Parent, name: str, cache_class: type, chunks: list[int]) -> None:
    child = child_of(parent, name)
    extra = {"max_cache_len": CACHED_TOKENS} if cache_class is StaticCache else {}
    uncached, cached = uncached_and(cache_class(config=child.config, **extra), child, chunks)
    assert_close(cached, uncached)


@pytest.mark.parametrize("name", ["late attention", "depth"])
def test_bare_cache(parent: Parent, name: str) -> None:
    """A cache made without the config knows nothing of layers without attention."""
    child = child_of(parent, name)
    uncached, cached = uncached_and(DynamicCache(), child, [5, 1, 7, 3])
    assert_close(cached, uncached)


def test_cache_of_the_models_own_making(parent: Parent) -> None:
    child = child_of(parent, "late attention")
    tokens_BT = tokens(length=CACHED_TOKENS)
    with torch.inference_mode():
        first = child(tokens_BT[:, :6], use_cache=True)
    rest = logits_of(child, tokens_BT[:, 6:], past_key_values=first.past_key_values)
    assert_close(rest, logits_of(child, tokens_BT)[:, 6:])


def greedy(child: PreTrainedModel, tokens_BT: torch.Tensor, mask_BT: torch.Tensor, **extra: Any) -> torch.Tensor:
    """Eight tokens for each row."""
    with torch.inference_mode():
        found = child.generate(
            tokens_BT,
            attention_mask=mask_BT,
            max_new_tokens=8,
            min_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
            **extra,
        )
    return found[:, tokens_BT.shape[1] :]


def test_left_padded_generation_equals_single(parent: Parent) -> None:
    child = child_of(parent)
    tokens_BT = tokens(rows=3, length=8)
    mask_BT = torch.ones_like(tokens_BT)
    for row, padding in enumerate((0, 2, 5)):
        mask_BT[row, :padding] = 0
    padded = greedy(child, tokens_BT * mask_BT, mask_BT)
    for row, mask in enumerate(mask_BT):
        single = tokens_BT[row : row + 1, mask.bool()]
        assert torch.equal(greedy(child, single, torch.ones_like(single))[0], padded[row])
    assert torch.equal(greedy(child, tokens_BT * mask_BT, mask_BT, use_cache=False), padded)
    assert torch.equal(greedy(child, tokens_BT * mask_BT, mask_BT, cache_implementation="static"), padded)


def gradients(child: PreTrainedModel) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    child.zero_grad()
    child(tokens(), labels=tokens(), use_cache=False).loss.backward()
    return {name: parameter.grad for name, parameter in child.named_parameters()}


def test_reloaded_child_trains(parent: Parent, tmp_path: Path) -> None:
    child = child_of(parent)
    child.save_pretrained(tmp_path)
    reloaded = type(child).from_pretrained(tmp_path).train()
    plain = gradients(reloaded)
    for name, gradient in plain.items():
        assert gradient is not None and gradient.isfinite().all() and gradient.any(), name
    runs: list[int] = []
    last = reloaded.get_submodule(f"{parent.family.layers}.3").get_submodule(parent.family.ffn.module)
    last.get_submodule(parent.family.ffn.output).register_forward_pre_hook(lambda *_: runs.append(1))
    # transformers renamed it within the versions that are supported.
    getattr(reloaded, "activation_checkpointing_enable", reloaded.gradient_checkpointing_enable)()
    recomputed = gradients(reloaded)
    assert len(runs) == 2, "nothing was recomputed"
    for name, gradient in recomputed.items():
        assert_close(gradient, plain[name])


def test_eager_attention_reaches_the_layers(parent: Parent) -> None:
    child = child_of(parent)
    expected = logits_of(child, tokens())
    child.set_attn_implementation("eager")
    with torch.inference_mode():
        found = child(tokens(), output_attentions=True)
    assert_close(found.logits, expected)
    modules = attentions(child, parent)
    assert [module.config._attn_implementation for module in modules] == ["eager"] * 3
    shape = parent.shape
    groups = [layer.attention.kv_groups for layer in architecture_of("heterogeneous", shape).layers]
    heads = [weights.shape[1] for weights in found.attentions if weights is not None]
    assert heads == [count * shape.queries_per_group for count in groups if count]


def kernel_calls(child: PreTrainedModel, parent: Parent, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """What the attention kernel is given in one pass: heads of queries, keys and values, and their size."""
    seen = []
    if child.config._attn_implementation == "sdpa":
        kernels, kernel_name = ALL_ATTENTION_FUNCTIONS, "sdpa"
    else:
        kernels, kernel_name = vars(sys.modules[type(parent.model).__module__]), "eager_attention_forward"
    kernel = kernels[kernel_name]

    def recording(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kw: Any
    ) -> Any:
        seen.append((query.shape[1], key.shape[1], value.shape[1], query.shape[-1]))
        return kernel(module, query, key, value, *args, **kw)

    monkeypatch.setitem(kernels, kernel_name, recording)
    logits_of(child, tokens())
    return seen


def assert_projections_fit(child: PreTrainedModel, parent: Parent, heads: list[tuple[int, int]]) -> None:
    """The projections of every attention module have the rows of (query heads, KV heads), and no more."""
    head_dim = parent.shape.head_dim
    for attention, (queries, groups) in zip(attentions(child, parent), heads, strict=True):
        rows = {"q": queries * head_dim, "k": groups * head_dim, "v": groups * head_dim}
        for name, layout in parent.family.attention.rows.items():
            module = attention.get_submodule(name)
            expected = sum(rows[letter] for letter in layout.replace("|", ""))
            for parameter in module.parameters():
                assert expected in parameter.shape, f"{name} has {tuple(parameter.shape)}"
        columns = attention.get_submodule(parent.family.attention.output).weight.shape
        assert sorted(columns) == sorted((rows["q"], parent.shape.hidden_size))


def test_the_kernel_gets_the_heads_that_were_asked_for(parent: Parent, monkeypatch: pytest.MonkeyPatch) -> None:
    """LLM-Pruner, with the default kernel, gives 8 query and 2 KV heads where 6 and 2 were asked for."""
    shape, kept = parent.shape, fewer(parent.shape.kv_groups)
    child = prune(parent, Architecture.of([(kept, shape.ffn_width)] * shape.layers), Slices(parent))
    heads = (kept * shape.queries_per_group, kept)
    assert kernel_calls(child, parent, monkeypatch) == [(*heads, kept, shape.head_dim)] * shape.layers
    assert_projections_fit(child, parent, [heads] * shape.layers)


@pytest.mark.parametrize("name", QUERY_ARCHITECTURES)
def test_the_kernel_gets_the_query_heads_that_were_asked_for(
    grouped: Parent, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = grouped.shape
    architecture = query_architecture_of(name, shape)
    child = prune(grouped, architecture, Slices(grouped))
    attending = [layer.attention for layer in architecture.layers if layer.attention.kv_groups]
    heads = [(choice.kv_groups * choice.queries(shape), choice.kv_groups) for choice in attending]
    calls = [(queries, groups, groups, shape.head_dim) for queries, groups in heads]
    assert kernel_calls(child, grouped, monkeypatch) == calls
    assert_projections_fit(child, grouped, heads)


def test_fewer_queries_cached_equals_uncached(grouped: Parent) -> None:
    architecture = query_architecture_of("queries in the only attention", grouped.shape)
    child = prune(grouped, architecture, Slices(grouped))
    for made in (DynamicCache(config=child.config), DynamicCache()):
        uncached, cached = uncached_and(made, child, [5, 1, 7, 3])
        assert_close(cached, uncached)


@pytest.mark.parametrize("kind", ["attention", "ffn"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_dropped_block_contributes_nothing(case: Case, kind: BlockKind) -> None:
    """Biases and norms of a dropped block included: whatever they are, the child is the same."""
    parent, other = tiny_parent(case), make_parent(tiny_model(case), None)
    architecture = parent.shape.architecture.with_choice(1, DROPPED[kind])
    names = other.names(kind)
    prefixes = [name if name.startswith("fc") else f"{names.module}." for name in (names.module or "fc",)]
    changed = 0
    for name, parameter in other.layer(1).named_parameters():
        if name.startswith((*prefixes, *names.leave_with_block)):
            parameter.data.add_(1.0)
            changed += 1
    assert changed >= 3
    child, same = (prune(p, architecture, Slices(p)) for p in (parent, other))
    assert torch.equal(logits_of(child, tokens()), logits_of(same, tokens()))
    assert not torch.allclose(logits_of(other.model, tokens()), logits_of(parent.model, tokens()), atol=1e-3)
    removed = child.get_submodule(f"{parent.family.layers}.1").get_submodule(names.module or names.output)
    assert isinstance(removed, NoAttention if kind == "attention" else NoFfn)
    assert not list(removed.parameters())


def test_bfloat16_parent_gives_a_bfloat16_child() -> None:
    parent = make_parent(tiny_model(CASES[0]).to(torch.bfloat16), None)
    architecture, library = architecture_of("heterogeneous", parent.shape), Slices(parent)
    child = prune(parent, architecture, library)
    assert {tensor.dtype for tensor in child.parameters()} == {torch.bfloat16} == {child.dtype}
    exact = prune(make_parent(copy.deepcopy(parent.model).float(), None), architecture, library)
    assert_close(logits_of(child, tokens()), logits_of(exact, tokens()), terms=2 * 4, dtype=torch.bfloat16)


def test_lists_that_are_not_a_layers_stay_whole() -> None:
    case = CASES[IDS.index("llama-gqa")]
    ends = [2, 3, 4, 5]  # as many as the model has layers
    parent = tiny_parent(Case(case.model_type, "ends", {**case.values, "eos_token_id": ends}))
    assert child_of(parent, "depth").config.eos_token_id == ends


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([(3, 40)] * 3, "the parent has 4, the architecture 3"),
        ([(4, 40)] * 4, r"layer 0 keeps .*kv_groups=4.* 3 units in its attention block"),
        ([(3, 40)] * 3 + [(3, 41)], r"layer 3 keeps .*ffn_width=41.* 40 units in its ffn block"),
        ([(0, 40)] * 4, "keeps attention in at least one layer"),
    ],
)
def test_what_is_no_sub_network_is_refused(layers: list[tuple[int, int]], message: str) -> None:
    parent = parent_of("llama-gqa")
    with pytest.raises(ArchitectureError, match=message):
        prune(parent, Architecture.of(layers), Slices(parent))


@pytest.mark.parametrize(
    ("case_id", "layer", "message"),
    [
        ("llama-gqa", (3, 2, 40), r"layer 0 keeps .* 2 query heads a KV group: queries_per_group is from 1 to 1"),
        ("llama-gqa", (3, 0, 40), "queries_per_group is from 1 to 1"),
        ("llama-gqa", (0, 1, 40), "left out where all stay or the block is dropped"),
        ("llama-mha", (6, 1, 40), "1 query heads a KV group"),
        ("gpt2-n_inner", (6, 1, 40), "1 query heads a KV group"),
    ],
)
def test_query_heads_that_the_parent_does_not_have_are_refused(
    case_id: str, layer: tuple[int, int, int], message: str
) -> None:
    parent = parent_of(case_id)
    rest = parent.shape.architecture.layers[1:]
    architecture = Architecture((*with_queries([layer]).layers, *rest))
    with pytest.raises(ArchitectureError, match=message):
        prune(parent, architecture, Slices(parent))
