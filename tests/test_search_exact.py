"""Exact scores of a choice: what the whole child loses, in place of the estimate, where the rules want it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from closeness import tolerance
from families import CASES, IDS, tiny_parent, tokens
from tiny import paired_by_bytes

from llmprune.blocks.library import BlockLibrary, build_library
from llmprune.choices.architecture import Architecture
from llmprune.choices.choice import Choice
from llmprune.choices.space import Space
from llmprune.core.errors import ModelError
from llmprune.core.progress import silent
from llmprune.core.recipe import ImportanceRecipe, TablesRecipe, WorkloadRecipe
from llmprune.data.tokens import SourceTokens, Split
from llmprune.measure.quality.perplexity import quality_from_windows, score_windows
from llmprune.measure.quality.prefix import PrefixScorer
from llmprune.measure.quality.scores import WindowScores
from llmprune.measure.speed.throughput import Workload
from llmprune.models.parent import Parent
from llmprune.models.surgery import prune
from llmprune.tables import block_tables
from llmprune.tables.block_tables import BlockTables, build_tables
from llmprune.tables.estimate import estimate_delta_nats
from llmprune.tables.exact import BROKEN, exact_delta_nats, is_exact

SEQ_LEN = 16
SETS: tuple[Any, ...] = (("attention",), ("ffn",), ("drops",), ("attention", "drops"), ("attention", "ffn"))
WORKLOAD = Workload.from_recipe(WorkloadRecipe(prompt_tokens=8, generated_tokens=4), "float32", "cpu")


@pytest.fixture(scope="module")
def parent() -> Parent:
    return tiny_parent(CASES[IDS.index("llama-gqa")])


@pytest.fixture(scope="module")
def split() -> Split:
    sources = {"a": SourceTokens(tokens(8, SEQ_LEN), torch.ones(8))}
    return Split("calibration", sources, {"a": 1.0}, SEQ_LEN, bos=False)


@pytest.fixture(scope="module")
def library(parent: Parent, split: Split) -> BlockLibrary:
    return build_library(parent, split, ImportanceRecipe(), Space.of(parent.shape, 1, 10))


def lost(parent: Parent, library: BlockLibrary, split: Split, layer: int, choice: Choice) -> float:
    """The oracle: the whole child is made and scored."""

    def nats(model: Any) -> float:
        return quality_from_windows(split, score_windows(model, split)).nats_per_token

    child = prune(parent, parent.shape.architecture.with_choice(layer, choice), library)
    return nats(child) - nats(parent.model)


def built(parent: Parent, library: BlockLibrary, split: Split, rules: TablesRecipe) -> BlockTables:
    return build_tables(parent, split, library, WORKLOAD, 1, rules, show=silent)


def test_what_the_rules_want_exact(library: BlockLibrary) -> None:
    space = library.space

    def wanted(*exact: Any) -> set[Choice]:
        rules = TablesRecipe(exact=exact)
        return {choice for choice in (*space.attention, *space.ffn) if is_exact(choice, space, rules)}

    assert wanted() == set()
    assert wanted("attention") == set(space.attention[:-1]) and wanted("ffn") == set(space.ffn[:-1])
    assert wanted("drops") == {space.attention[0], space.ffn[0]}
    assert wanted("ffn", "drops") == {*space.ffn[:-1], space.attention[0]}


@pytest.mark.parametrize("exact", SETS, ids="+".join)
def test_exact_scores_are_those_of_the_whole_child_and_the_rest_is_estimated(
    exact: Any, parent: Parent, library: BlockLibrary, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_tables, "measure_paired", paired_by_bytes)
    rules = TablesRecipe(tokens=64, exact=exact)
    found = built(parent, library, split, rules).delta_nats
    # Half of the split, as the rules say.
    scored = split.head({"a": 4})
    estimated = estimate_delta_nats(parent, split, library, tokens=64)
    assert found.keys() == estimated.keys()
    different = 0
    nats_rounding = tolerance(math.log(parent.model.config.vocab_size))
    for (layer, choice), nats in found.items():
        if is_exact(choice, library.space, rules):
            assert nats == pytest.approx(lost(parent, library, scored, layer, choice), abs=nats_rounding)
            different += abs(nats - estimated[layer, choice]) > 1e-9
        else:
            assert nats == estimated[layer, choice]
    assert different > 0, "an estimate is no exact score"


def test_tables_with_exact_drops_differ_at_drops_alone(
    parent: Parent, library: BlockLibrary, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_tables, "measure_paired", paired_by_bytes)
    plain, exact = (
        built(parent, library, split, TablesRecipe(tokens=64, exact=e)).delta_nats for e in ((), ("drops",))
    )
    differ = {key for key in plain if plain[key] != exact[key]}
    assert differ == {(layer, choice) for layer, choice in plain if choice.units == 0}


def test_choices_are_scored_by_layer_and_counted(parent: Parent, library: BlockLibrary, split: Split) -> None:
    told: list[tuple[int, int]] = []
    choices = [(2, library.space.ffn[0]), (0, library.space.ffn[1]), (1, library.space.attention[0])]
    scorer = PrefixScorer(parent, library, split)
    found = exact_delta_nats(scorer, split, library.space, choices, lambda *at: told.append(at))
    assert list(found) == sorted(choices, key=lambda key: key[0])
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_a_choice_that_breaks_the_model_costs_a_number_all_the_same(
    parent: Parent, library: BlockLibrary, split: Split
) -> None:
    scorer = PrefixScorer(parent, library, split)
    broken, whole = library.space.ffn[0], library.space.shape.architecture

    class Fragile:
        def score(self, architecture: Architecture) -> WindowScores:
            if architecture == whole.with_choice(1, broken):
                raise ModelError("logits must be numbers")
            found = scorer.score(architecture)
            infinite = architecture == whole.with_choice(2, broken)
            return WindowScores({name: n / 0.0 if infinite else n for name, n in found.nats.items()})

    choices = [(layer, broken) for layer in range(3)]
    found = exact_delta_nats(Fragile(), split, library.space, choices, lambda done, total: None)
    assert [found[layer, broken] == BROKEN for layer in range(3)] == [False, True, True]
