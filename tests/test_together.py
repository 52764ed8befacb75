"""What choices cost together, held to the sums of their scores."""

from __future__ import annotations

import math

import pytest
from tiny import tiny_space

from llmprune.choices.architecture import Architecture
from llmprune.choices.ffn import FfnChoice
from llmprune.choices.kv_groups import AttentionChoice
from llmprune.choices.space import Space
from llmprune.core.errors import ModelError
from llmprune.tables.together import FURTHEST, together_architectures, together_factors, weighed

SPACE: Space = tiny_space(layers=4)
WHOLE = SPACE.shape.architecture
SCORES = {
    (layer, choice): 0.1 * (len(SPACE.ladder(kind)) - 1 - place)
    for layer, kind in SPACE.blocks()
    for place, choice in enumerate(SPACE.ladder(kind))
}


def summed(architecture: Architecture) -> float:
    return sum(SCORES[layer, choice] for layer, choice in architecture.blocks())


def factors_of(score: object, rungs: int = 3) -> dict[object, float]:
    return together_factors(SPACE, SCORES, rungs, score, lambda done, total: None)  # type: ignore[arg-type, return-value]


def test_children_make_one_choice_in_all_layers_and_no_drop() -> None:
    found = together_architectures(SPACE, 3)
    assert found and all(choice.units and choice != SPACE.shape.full(choice.kind) for choice in found)
    for choice, architecture in found.items():
        assert {layer.block(choice.kind) for layer in architecture.layers} == {choice}
        other = "ffn" if choice.kind == "attention" else "attention"
        assert {layer.block(other) for layer in architecture.layers} == {SPACE.shape.full(other)}
    assert together_architectures(SPACE, 0) == {}


def test_scores_that_add_up_stay() -> None:
    found = factors_of(lambda architecture: 2.0 + summed(architecture))
    assert all(factor == pytest.approx(1) for factor in found.values())
    assert weighed(SCORES, found, WHOLE) == pytest.approx(SCORES)  # type: ignore[arg-type]


def test_sums_are_held_to_what_is_really_lost_half_by_half() -> None:
    def score(architecture: Architecture) -> float:
        halves = {"attention": 0.0, "ffn": 0.0}
        for layer, choice in architecture.blocks():
            halves[choice.kind] += SCORES[layer, choice]
        return 3.0 * halves["attention"] + 0.5 * halves["ffn"]

    found = factors_of(score)
    # Drops take the nearest rung's.
    assert [found[choice] for choice in SPACE.attention] == pytest.approx([3.0] * len(SPACE.attention))
    assert [found[choice] for choice in SPACE.ffn] == pytest.approx([0.5] * len(SPACE.ffn))
    joint = weighed(SCORES, found, WHOLE)  # type: ignore[arg-type]
    for choice, architecture in together_architectures(SPACE, 3).items():
        assert sum(joint[key] for key in architecture.blocks()) == pytest.approx(score(architecture)), choice


def test_away_from_the_parent_the_deeper_cut_of_the_two_decides() -> None:
    factors = {choice: 1.0 + choice.units for kind in ("attention", "ffn") for choice in SPACE.ladder(kind)}  # type: ignore[arg-type]
    mild, deep = SPACE.ffn[-2], SPACE.ffn[1]
    at = WHOLE.with_choice(0, mild)
    found = weighed({(0, deep): 1.0, (0, SPACE.ffn[-1]): -1.0, (1, deep): 1.0}, factors, at)
    assert found == {
        (0, deep): factors[deep],
        (0, SPACE.ffn[-1]): -factors[mild],
        (1, deep): factors[deep],
    }


def test_what_says_nothing_is_left_out() -> None:
    def broken(architecture: Architecture) -> float:
        if architecture == WHOLE:
            return 1.0
        raise ModelError("logits must be numbers")

    assert set(factors_of(broken).values()) == {1.0}
    assert set(factors_of(lambda architecture: 1.0).values()) == {1.0}, "nothing is lost"
    assert set(factors_of(lambda architecture: math.inf if architecture != WHOLE else 1.0).values()) == {1.0}
    far = factors_of(lambda architecture: 1e6 * summed(architecture))
    assert set(far.values()) == {FURTHEST}
    assert isinstance(SPACE.attention[0], AttentionChoice) and isinstance(SPACE.ffn[0], FfnChoice)
