"""The type of embedding and output head as a choice: rounded as a file holds them, scored, tabled and found again."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
from closeness import assert_close
from families import COMMON, Case, Slices, tiny_parent, tokens
from test_stored import SHAPE, ffn, split_of

from llmprune.baselines.allocation import bits
from llmprune.blocks.library import build_library
from llmprune.choices.architecture import Architecture, LayerChoice
from llmprune.choices.choice import Assignment
from llmprune.choices.dimensions import BLOCK_KINDS, WHOLE_MODEL
from llmprune.choices.ffn import FfnChoice
from llmprune.choices.space import Space
from llmprune.choices.stored import StoredFfn
from llmprune.choices.vocabulary import PARENTS_VOCABULARY, VocabularyChoice
from llmprune.core.errors import ArchitectureError
from llmprune.core.recipe import ImportanceRecipe, TablesRecipe
from llmprune.data.tokens import Split
from llmprune.forecast.plan import Plan
from llmprune.formats.gguf import write_gguf
from llmprune.formats.served_size import served_size
from llmprune.measure.quality.perplexity import quality_from_windows, score
from llmprune.measure.quality.prefix import PrefixScorer
from llmprune.models.parent import Parent
from llmprune.models.stored import as_stored, store_again, stored_weights
from llmprune.models.surgery import prune
from llmprune.numerics.ggml import TYPES, from_blocks, to_blocks
from llmprune.publish.gguf_proof import prove_gguf
from llmprune.report.rows import vocabulary_facts
from llmprune.tables.block_tables import BlockTables
from llmprune.tables.costs import cost_table, probe_architectures
from llmprune.tables.exact import exact_delta_nats, is_exact
from llmprune.tables.together import together_factors, weighed

Q4, Q5 = VocabularyChoice("q4_0"), VocabularyChoice("q5_0")


@cache
def parent(tied: bool = False) -> Parent:
    return tiny_parent(Case("llama", f"vocabulary tied={tied}", {**SHAPE, "tie_word_embeddings": tied}))


def space_of(parent: Parent) -> Space:
    return Space.of(parent.shape, 1, 256, precision=("q5_0", "q4_0"))


@pytest.fixture(scope="module")
def split() -> Split:
    return split_of(torch.randint(128, (6, 24), generator=torch.Generator().manual_seed(0)))


def test_types_are_offered_narrowest_first_where_rows_fit() -> None:
    assert space_of(parent()).vocabulary == (Q4, Q5, PARENTS_VOCABULARY)
    assert Space.of(parent().shape, 1, 256).vocabulary == ()
    odd = tiny_parent(Case("llama", "rows of 48", {**COMMON, "hidden_size": 48, "head_dim": 12}))
    with pytest.raises(ArchitectureError, match=r"hidden_size 48: rows are stored in blocks of 32 in q4_0"):
        prune(odd, odd.shape.architecture.with_choice(WHOLE_MODEL, Q4), Slices(odd))


def test_a_space_and_an_architecture_come_back_from_their_text() -> None:
    space = space_of(parent())
    assert Space.from_json(space.to_json()) == space
    assert space.decisions[-1].name == "vocabulary"
    stored = parent().shape.architecture.with_choice(WHOLE_MODEL, Q4)
    assert Architecture.from_json(stored.to_json()) == stored
    assert stored.hash != parent().shape.architecture.hash
    # What was written before there was such a choice is read, and named, as it was.
    assert "vocabulary" not in parent().shape.architecture.to_json()
    old = {name: value for name, value in Space.of(parent().shape, 1, 256).to_json().items() if name != "vocabulary"}
    assert Space.from_json(old) == Space.of(parent().shape, 1, 256)
    with pytest.raises(ArchitectureError, match="no VocabularyChoice"):
        Space.of(parent().shape, 1, 256).indices(stored)


@pytest.mark.parametrize("text", [{"stored": "q9"}, {"rows": 3}, {"stored": "q4_0", "rows": 3}, [], "q4_0"])
def test_texts_that_are_no_vocabulary_are_refused(text: Any) -> None:
    with pytest.raises(ArchitectureError, match="a vocabulary is"):
        Architecture.from_json({**parent().shape.architecture.to_json(), "vocabulary": text})


@pytest.mark.parametrize("tied", [True, False])
def test_a_childs_numbers_are_those_of_its_file(tied: bool, tmp_path: Path) -> None:
    own = parent(tied)
    architecture = own.shape.architecture.with_choices([(1, ffn(512, "q5_0")), (WHOLE_MODEL, Q4)])
    child = prune(own, architecture, Slices(own))
    before, after = own.model.state_dict(), child.state_dict()
    names = {"model.embed_tokens.weight", "lm_head.weight"}
    for name, value in after.items():
        if name in names:
            assert torch.equal(value, from_blocks(to_blocks(before[name], "q4_0"), "q4_0")), name
        elif ".1.mlp." not in name:
            assert value.data_ptr() == before[name].data_ptr(), name
    assert (child.get_input_embeddings().weight is child.get_output_embeddings().weight) is tied
    assert names & stored_weights(child).keys() == (names if not tied else names - {"lm_head.weight"})
    path = tmp_path / "child.gguf"
    write_gguf(child, None, path, "q8_0")
    held = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert ("output.weight" in held) is not tied
    for name in ("token_embd.weight", *(() if tied else ("output.weight",))):
        numbers = torch.from_numpy(gguf.quants.dequantize(held[name].data, held[name].tensor_type))
        state = "model.embed_tokens.weight" if name.startswith("token") else "lm_head.weight"
        assert held[name].tensor_type.name == "Q4_0" and torch.equal(numbers, after[state])
    assert held["blk.0.attn_q.weight"].tensor_type.name == "Q8_0"
    assert prove_gguf(child, path, "q8_0").contents_kl < 1e-9


def test_it_weighs_as_much_less_as_the_file_does() -> None:
    sizes = [
        served_size(prune(parent(), a, Slices(parent())), parent().shape, a, "q8_0")
        for a in (parent().shape.architecture, parent().shape.architecture.with_choice(WHOLE_MODEL, Q4))
    ]
    numbers = 2 * COMMON["vocab_size"] * SHAPE["hidden_size"]
    assert sizes[0].bytes - sizes[1].bytes == numbers * (TYPES["q8_0"].bits - TYPES["q4_0"].bits) / 8
    # The embedding is looked up, not read.
    assert sizes[0].decode_bytes - sizes[1].decode_bytes == (sizes[0].bytes - sizes[1].bytes) / 2
    assert [size.stored_as for size in sizes] == ["GGUF q8_0", "GGUF q8_0+q4_0"]


@pytest.mark.parametrize("tied", [True, False])
def test_a_repaired_child_is_rounded_again(tied: bool) -> None:
    own = parent(tied)
    child = prune(own, own.shape.architecture.with_choice(WHOLE_MODEL, Q5), Slices(own))
    changed = child.state_dict()["model.embed_tokens.weight"] * 1.1
    expected = from_blocks(to_blocks(changed, "q5_0"), "q5_0")
    assert torch.equal(as_stored(child, {"model.embed_tokens.weight": changed})["model.embed_tokens.weight"], expected)
    child.get_input_embeddings().weight = torch.nn.Parameter(changed, requires_grad=False)
    child.tie_weights()
    store_again(child)
    assert torch.equal(child.get_input_embeddings().weight, expected)
    assert (child.get_input_embeddings().weight is child.get_output_embeddings().weight) is tied


@pytest.mark.parametrize("tied", [True, False])
def test_scores_start_where_what_came_before_is_the_same(tied: bool, split: Split) -> None:
    own = parent(tied)
    scorer = PrefixScorer(own, Slices(own), split)
    whole = own.shape.architecture
    for architecture in (
        whole,
        whole.with_choice(WHOLE_MODEL, Q4),
        whole.with_choices([(2, ffn(256, "q5_0")), (WHOLE_MODEL, Q4)]),
        whole.with_choices([(2, ffn(256, "q5_0")), (WHOLE_MODEL, Q5)]),
        whole.without_layers([0]).with_choice(WHOLE_MODEL, Q5),
        whole.with_choice(2, ffn(256, "q5_0")),
    ):
        scorer.remember(architecture)
        for _ in range(2):
            found = quality_from_windows(split, scorer.score(architecture).nats)
            assert found == score(prune(own, architecture, Slices(own)), split)


def test_tables_hold_what_it_loses_and_saves(split: Split) -> None:
    own, space = parent(), space_of(parent())
    library = build_library(own, split, ImportanceRecipe(), space)
    assert [key for key in space.assignments() if is_exact(key[1], space, TablesRecipe())] == [
        (WHOLE_MODEL, Q4),
        (WHOLE_MODEL, Q5),
    ]
    wanted = [(WHOLE_MODEL, Q4), (WHOLE_MODEL, Q5)]
    lost = exact_delta_nats(PrefixScorer(own, library, split), split, space, wanted, lambda *_: None)
    base = score(own.model, split).nats_per_token
    for (_, choice), nats in lost.items():
        child = prune(own, own.shape.architecture.with_choice(WHOLE_MODEL, choice), library)
        assert nats == pytest.approx(score(child, split).nats_per_token - base, abs=1e-9) and nats != 0
    probes = probe_architectures(space)
    assert probes[Q4] == own.shape.architecture.with_choice(WHOLE_MODEL, Q4)
    speeds = {choice: {"decode": 1.25 if choice == Q4 else 1.1} for choice in probes}
    costs = cost_table(space, speeds)
    assert costs.saving["decode"][Q4] == pytest.approx(0.2) and costs.saving["decode"][PARENTS_VOCABULARY] == 0
    both = own.shape.architecture.with_choices([(0, ffn(256, "q4_0")), (WHOLE_MODEL, Q4)])
    alone = own.shape.architecture.with_choice(0, ffn(256, "q4_0"))
    assert costs.relative_time(alone, "decode") - costs.relative_time(both, "decode") == pytest.approx(0.2)
    scores = dict.fromkeys(space.assignments(), 0.0) | lost
    factors = together_factors(space, scores, 0, lambda _: 0.0, lambda *_: None)
    assert weighed(scores, factors, both)[WHOLE_MODEL, Q5] == lost[WHOLE_MODEL, Q5]
    tables = BlockTables(scores, [0.0] * 3, costs, factors)
    assert next(iter(vocabulary_facts(tables, "decode"))) == ("q4_0", lost[WHOLE_MODEL, Q4], pytest.approx(0.2))
    again = BlockTables.from_json(space, tables.to_json())
    assert again == tables and again.nats_lost(both) == lost[WHOLE_MODEL, Q4]


def test_children_run(split: Split) -> None:
    child = prune(parent(), parent().shape.architecture.with_choice(WHOLE_MODEL, Q4), Slices(parent()))
    with torch.inference_mode():
        assert not torch.equal(child(tokens()).logits, parent().model(tokens()).logits)


def test_bits_alone_are_those_of_an_enumeration() -> None:
    """Every block whole: of all ways to store them, the least nats at the speed."""
    space = space_of(parent())
    drawn = random.Random(0)
    scores: dict[Assignment, float] = {
        (layer, choice): 0.0 if choice == space.ladders[choice.kind][-1] else drawn.random()
        for layer, choice in space.assignments()
    }
    speeds = {choice: {"decode": 1.0 + 0.3 * drawn.random()} for choice in probe_architectures(space)}
    costs = cost_table(space, speeds)
    tables = BlockTables(scores, [0.0] * 3, costs, together_factors(space, scores, 0, lambda _: 0.0, lambda *_: None))
    given: Any = SimpleNamespace(space=space, tables=tables, phase="decode")
    whole = [
        [choice for choice in space.ladder(kind) if choice.units == space.shape.units(kind)] for kind in BLOCK_KINDS
    ]
    assert [len(ladder) for ladder in whole] == [3, 3]
    every = [
        Architecture(tuple(LayerChoice(*blocks) for blocks in layers), vocabulary)
        for layers in product(product(*whole), repeat=3)
        for vocabulary in space.vocabulary
    ]
    for speedup in (1.05, 1.2):
        found = bits(given, speedup)
        fast = [one for one in every if costs.speedup(one, "decode") >= speedup]
        assert found is not None and found in fast
        assert tables.nats_lost(found) == pytest.approx(min(map(tables.nats_lost, fast)), rel=1e-4)
    assert bits(given, 9.0) is None
    given.space = Space.of(parent().shape, 1, 256)
    assert bits(given, 1.1) is None


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_rounded_by_what_enters_it(tied: bool, split: Split, tmp_path: Path) -> None:
    own = parent(tied)
    # One layer a pass: it is the last layer's that sees the head.
    library = build_library(own, split, ImportanceRecipe(), space_of(own))
    with torch.inference_mode():
        states = own.model.base_model(split.sources["text"].windows, use_cache=False).last_hidden_state
    squares = library.head_squares()
    assert squares is not None
    assert_close(squares, states.double().square().mean(dim=(0, 1)), terms=144)
    child, before = prune(own, own.shape.architecture.with_choice(WHOLE_MODEL, Q4), library), own.model.state_dict()
    head, plain = (from_blocks(to_blocks(before["lm_head.weight"], "q4_0", by), "q4_0") for by in (squares, None))
    assert torch.equal(child.state_dict()["lm_head.weight"], head) and not torch.equal(head, plain)
    if not tied:
        looked_up = from_blocks(to_blocks(before["model.embed_tokens.weight"], "q4_0"), "q4_0")
        assert torch.equal(child.state_dict()["model.embed_tokens.weight"], looked_up)
    # What is rounded by importance is not rounded anew by the proof, whatever else it is called.
    path = tmp_path / "child.gguf"
    write_gguf(child, None, path, "q8_0")
    assert prove_gguf(child, path, "q8_0").contents_kl < 1e-9
    # Another library's children are rounded by its own.
    assert torch.equal(
        prune(own, own.shape.architecture.with_choice(WHOLE_MODEL, Q4), Slices(own)).state_dict()["lm_head.weight"],
        plain,
    )
    assert build_library(own, split, ImportanceRecipe(), Space.of(own.shape, 1, 256)).head_squares() is None


def test_a_type_that_is_slow_to_unpack_costs_time() -> None:
    space = space_of(parent())
    probes = probe_architectures(space)

    def speed(choice: Any) -> float:
        if choice in (Q5, StoredFfn(FfnChoice(512), "q5_0")):
            return 0.8
        return 1.2 if choice.stored else 1.1

    errors = {choice: {"prefill": 0.01} for choice in probes}
    costs = cost_table(space, {choice: {"prefill": speed(choice)} for choice in probes}, errors)
    saving = costs.saving["prefill"]
    assert saving[Q5] == pytest.approx(-0.25) and saving[Q4] > 0
    assert saving[StoredFfn(FfnChoice(512), "q5_0")] == pytest.approx(-0.25 / 3, rel=0.1)
    # What has fewer rows in that type, or another type, is not charged for it; and plain blocks never cost time.
    assert saving[StoredFfn(FfnChoice(256), "q5_0")] > 0 and saving[StoredFfn(FfnChoice(512), "q4_0")] > 0
    assert min(saving[choice] for choice in space.ffn if choice.stored is None) == 0
    assert costs.speedup(parent().shape.architecture.with_choice(WHOLE_MODEL, Q5), "prefill") < 1


def test_a_forecast_counts_what_is_kept_rounded() -> None:
    nothing: Any = None
    plan = Plan(nothing, space_of(parent()), nothing, 300, 0, 4)
    assert plan.rounded_vocabulary_bytes == 2 * 2 * 4 * 300 * 256
    assert replace(plan, space=Space.of(parent().shape, 1, 256)).rounded_vocabulary_bytes == 0
