"""Merged KV heads, for every family that can say them: the child is the parent with its heads overwritten by means."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from families import CASES, IDS, MERGING_IDS, Slices, masked, merging, overwritten, tiny_parent, tokens
from tiny import numbered_documents, save_tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache

from llmprune.blocks.library import build_library
from llmprune.choices.architecture import Architecture, ParentShape
from llmprune.choices.ffn import FfnChoice
from llmprune.choices.kv_groups import AttentionChoice
from llmprune.choices.merged import MergedChoice
from llmprune.choices.space import Space
from llmprune.core.errors import ArchitectureError, UnsupportedModelError
from llmprune.core.recipe import ImportanceRecipe
from llmprune.data.tokens import SourceTokens, Split
from llmprune.measure.quality.perplexity import score_windows
from llmprune.measure.quality.prefix import PrefixScorer
from llmprune.models.beside import OwnBlocks, own_inputs
from llmprune.models.parent import Parent, make_parent
from llmprune.models.sizes import size_of
from llmprune.models.surgery import is_stock, prune
from llmprune.tables.estimate import estimate_delta_nats
from llmprune.tables.exact import exact_delta_nats

HEADS: dict[str, Callable[[ParentShape], dict[int, int]]] = {
    "one head": lambda shape: dict.fromkeys(range(shape.layers), 1),
    "fewest and most": lambda shape: {0: 1, 3: MergedChoice.of(shape)[-1].kv_groups},
    "first alone": lambda shape: {0: MergedChoice.of(shape)[-1].kv_groups},
}
CHANGES = [(1, AttentionChoice(0)), (1, FfnChoice(17)), (2, FfnChoice(0)), (3, FfnChoice(11))]


@cache
def parent_of(case_id: str) -> Parent:
    return tiny_parent(CASES[IDS.index(case_id)])


@pytest.fixture(params=MERGING_IDS, scope="module")
def parent(request: pytest.FixtureRequest) -> Parent:
    return parent_of(request.param)


def logits_of(model: PreTrainedModel, tokens_BT: torch.Tensor, **extra: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(tokens_BT, **extra).logits


def test_the_families_that_merge() -> None:
    assert {name.split("-")[0] for name in MERGING_IDS} == {
        *("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "gemma2", "gemma3_text", "olmo2", "phi3")
    }


@pytest.mark.parametrize("name", HEADS)
def test_merged_equals_overwritten(parent: Parent, name: str) -> None:
    heads = HEADS[name](parent.shape)
    architecture = merging(parent.shape, heads)
    child = prune(parent, architecture, Slices(parent))
    expected = logits_of(overwritten(parent, heads).model, tokens())
    assert_close(logits_of(child, tokens()), expected)
    assert (logits_of(parent.model, tokens()) - expected).abs().max() > 1e-2, "merging changes nothing"
    # One number of KV heads in all layers is what every stock config can say.
    assert is_stock(child.config) == (name == "one head") == (type(child) is type(parent.model))
    size, of_parent = (size_of(model, parent.shape, a) for model, a in _with_architectures(child, parent, architecture))
    fewer = sum(parent.shape.kv_groups - kept for kept in heads.values())
    assert of_parent.kv_bytes_per_token - size.kv_bytes_per_token == 2 * fewer * parent.shape.head_dim * 4
    rows = sum(
        parent.shape.rows(parent.shape.full("attention")) - parent.shape.rows(architecture.layers[i].attention)
        for i in heads
    )
    # Biases and norms of the heads leave as well.
    assert rows * parent.shape.hidden_size <= of_parent.params - size.params <= rows * (parent.shape.hidden_size + 2)


def _with_architectures(child: Any, parent: Parent, architecture: Any) -> list[tuple[Any, Any]]:
    return [(child, architecture), (parent.model, parent.shape.architecture)]


def test_merged_beside_dropped_and_narrow_blocks(parent: Parent) -> None:
    heads = HEADS["fewest and most"](parent.shape)
    child = prune(parent, merging(parent.shape, heads).with_choices(CHANGES), Slices(parent))
    means = overwritten(parent, heads)
    with masked(means, parent.shape.architecture.with_choices(CHANGES), Slices(means)) as oracle:
        expected = logits_of(oracle, tokens())
    assert_close(logits_of(child, tokens()), expected)


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_a_merged_childs_cache(parent: Parent, cache_class: type) -> None:
    child = prune(parent, merging(parent.shape, HEADS["fewest and most"](parent.shape)), Slices(parent))
    tokens_BT = tokens(length=16)
    extra = {"max_cache_len": 16} if cache_class is StaticCache else {}
    kept = cache_class(config=child.config, **extra)
    parts = [logits_of(child, part, past_key_values=kept, use_cache=True) for part in tokens_BT.split([5, 1, 7, 3], 1)]
    assert_close(torch.cat(parts, 1), logits_of(child, tokens_BT, use_cache=False))


def test_unchanged_tensors_are_the_parents_and_the_parent_stays(parent: Parent) -> None:
    before = {name: tensor.clone() for name, tensor in parent.model.state_dict().items()}
    child = prune(parent, merging(parent.shape, {1: 1}), Slices(parent)).state_dict()
    changed = set()
    for name, tensor in parent.model.state_dict().items():
        assert torch.equal(tensor, before[name])
        if child[name].data_ptr() != tensor.data_ptr():
            changed.add(name.removeprefix("model.layers.1.self_attn.").split(".")[0])
    # The library's output projection is a tensor of its own in any case.
    assert changed - {"o_proj"} <= {"k_proj", "v_proj", "k_norm", "qkv_proj"}


def identical(case_id: str) -> Parent:
    """A parent in which all KV heads of a layer are alike."""
    means = overwritten(parent_of(case_id), dict.fromkeys(range(4), 1))
    return make_parent(means.model, None)


@pytest.mark.parametrize("case_id", MERGING_IDS)
def test_heads_that_are_alike_merge_without_loss(case_id: str) -> None:
    alike = identical(case_id)
    child = prune(alike, merging(alike.shape, dict.fromkeys(range(4), 1)), Slices(alike))
    assert_close(logits_of(child, tokens()), logits_of(alike.model, tokens()))
    theirs, mine = alike.model.state_dict(), child.state_dict()
    for name in mine:
        if ".k_proj" in name or ".v_proj" in name:
            assert torch.equal(mine[name], theirs[name][: len(mine[name])]), "a mean of equals is what they are"


@pytest.mark.parametrize("case_id", MERGING_IDS)
def test_merged_blocks_give_what_enters_the_overwritten_parents_output_projection(case_id: str) -> None:
    parent = parent_of(case_id)
    for choice in MergedChoice.of(parent.shape):
        blocks = OwnBlocks(parent, choice)
        for layer, block in ((layer, blocks.of(layer)) for layer in (0, 2)):
            found: list[torch.Tensor] = []
            expected: list[torch.Tensor] = []
            # Only this layer's heads are overwritten, so what comes before it is the parent's.
            means = overwritten(parent, {layer: choice.kv_groups})
            handles = [
                parent.block(layer, "attention").register_forward_pre_hook(
                    lambda module, args, kwargs, block=block, found=found: found.append(
                        own_inputs(block, args, kwargs)
                    ),
                    with_kwargs=True,
                ),
                means.output_projection(layer, "attention").register_forward_pre_hook(
                    lambda module, args, expected=expected: expected.append(args[0])
                ),
            ]
            for some in (parent, means):
                logits_of(some.model, tokens(), use_cache=False)
            for handle in handles:
                handle.remove()
            assert_close(found[0], expected[0])


@pytest.mark.parametrize("case_id", ["gpt2-mha", "opt-mha", "gpt_neox-parallel"])
def test_families_that_cannot_say_it_are_refused(case_id: str) -> None:
    parent = parent_of(case_id)
    with pytest.raises(UnsupportedModelError, match=r"no number of KV heads.*set space\.merge_kv=false"):
        prune(parent, merging(parent.shape, {0: 3}), Slices(parent))


@pytest.mark.parametrize(
    ("case_id", "choice", "legal"),
    [
        ("llama-gqa", MergedChoice(2), "1"),
        ("llama-gqa", MergedChoice(3), "1"),
        ("llama-mha", MergedChoice(4), "1 or 2 or 3"),
        ("llama-mqa", MergedChoice(1), "never so with one KV group"),
    ],
)
def test_other_numbers_of_kv_heads_are_refused(case_id: str, choice: MergedChoice, legal: str) -> None:
    shape = parent_of(case_id).shape
    with pytest.raises(ArchitectureError, match=f"layer 2 keeps .* KV groups: merged_kv_groups is {legal}$"):
        shape.check(shape.architecture.with_choice(2, choice))


def test_the_text_of_older_versions_is_refused_with_the_new_one() -> None:
    shape = parent_of("llama-gqa").shape
    old = shape.architecture.with_choice(1, AttentionChoice(1, 6))
    with pytest.raises(ArchitectureError, match=r"all query heads on fewer KV heads are said by merged_kv_groups$"):
        shape.check(Architecture.from_json(old.to_json()))
    new = shape.architecture.with_choice(1, MergedChoice(1))
    assert new.to_json()["layers"][1]["attention"] == {"merged_kv_groups": 1}
    assert Architecture.from_json(new.to_json()) == new


@pytest.mark.parametrize("case_id", ["llama-mha", "olmo2-gqa", "phi3-gqa"])
def test_a_scorer_that_starts_at_the_merged_layer_scores_the_whole_child(case_id: str) -> None:
    parent = parent_of(case_id)
    split = Split("search", {"a": SourceTokens(tokens(4, 16), torch.full((4,), 30))}, {"a": 1.0}, 16, bos=False)
    scorer = PrefixScorer(parent, Slices(parent), split)
    for heads in ({2: 1}, {3: 1}, {1: 1, 3: MergedChoice.of(parent.shape)[-1].kv_groups}):
        architecture = merging(parent.shape, heads)
        expected = score_windows(prune(parent, architecture, Slices(parent)), split)
        assert torch.equal(scorer.score(architecture).nats["a"], expected["a"])
    assert scorer.work.candidates < scorer.work.plain, "what comes before the merged layer is the parent's"


def test_the_estimate_tells_heads_that_merge_well_from_those_that_do_not(tmp_path: Path) -> None:
    """In a model that has learnt: layer 1 with heads that nearly agree, and the other layer that loses most."""
    texts = [text for name in ("ant", "bee") for text in numbered_documents(name)]
    save_tiny_llama(tmp_path, texts)
    trained = make_parent(AutoModelForCausalLM.from_pretrained(tmp_path), None)
    parent = overwritten(trained, {1: 1})
    for name, value in parent.block(1, "attention").named_parameters():
        if name[0] in "kv":
            value.data += 0.02 * value.data.std() * torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
    ids = [token for text in texts for token in tiny_tokenizer()(text)["input_ids"]]
    windows = torch.tensor(ids[: len(ids) // 16 * 16]).reshape(-1, 16)[:48]
    split = Split("calibration", {"a": SourceTokens(windows, torch.full((48,), 16))}, {"a": 1.0}, 16, bos=False)
    space = Space.of(parent.shape, 1, 16, merge_kv=True)
    merged = MergedChoice.of(parent.shape)[0]
    losses = {}
    for refit in (True, False):
        library = build_library(parent, split, ImportanceRecipe(refit=refit), space)
        estimated = estimate_delta_nats(parent, split, library, tokens=split.tokens)
        wanted = [(layer, merged) for layer in range(3)]
        scorer = PrefixScorer(parent, library, split)
        exact = exact_delta_nats(scorer, split, space, wanted, lambda done, total: None)
        if not refit:
            clear = max(wanted, key=exact.__getitem__)
            assert exact[clear] > 10 * abs(exact[1, merged]) and estimated[clear] > 10 * abs(estimated[1, merged])
            assert exact[1, merged] != 0 != estimated[1, merged]
        losses[refit] = sum(exact.values())
    assert losses[True] < losses[False], "the refit makes up for some of it"
