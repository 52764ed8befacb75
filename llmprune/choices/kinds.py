"""The kinds of choice that there are: a further one is a module beside these and an entry here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from llmprune.choices.choice import Choice
from llmprune.choices.dimensions import BlockKind, Dimensions
from llmprune.choices.ffn import FfnChoice
from llmprune.choices.kv_groups import AttentionChoice
from llmprune.choices.merged import MergedChoice
from llmprune.choices.stored import StoredAttention, StoredFfn, whole
from llmprune.core.errors import ArchitectureError, quoted
from llmprune.core.recipe import SpaceRecipe

KINDS: tuple[type[Choice], ...] = (StoredAttention, StoredFfn, AttentionChoice, MergedChoice, FfnChoice)
"""The first that knows a text is its kind."""


def parse_choice(data: Any, kind: BlockKind) -> Choice:
    """The choice for a block of this kind that `data` is the JSON of.

    Raises ArchitectureError if no kind of choice knows it, or a value is none; and TypeError on what is no mapping.
    """
    found = (own.from_json(data) for own in KINDS if own.kind == kind)
    choice = next((choice for choice in found if choice is not None), None)
    if choice is None or ("stored" in data and choice.stored is None):
        raise ArchitectureError(f"no choice for the {kind} block of a layer is said so: {quoted(data)}")
    for name, number in choice.plain.to_json().items():
        if type(number) is not int or number < 0:
            raise ArchitectureError(f"{name} is an integer >= 0; a layer has {quoted(number)}")
    return choice


def by_kind(choices: Iterable[Choice]) -> Iterator[tuple[type[Choice], list[Choice]]]:
    """The choices of each kind that has any among these, kind by kind; stored in each type, they are of another."""
    every = list(choices)
    for kind in KINDS:
        own = [choice for choice in every if type(choice) is kind]
        for stored in dict.fromkeys(choice.stored for choice in own):
            yield kind, [choice for choice in own if choice.stored == stored]


def ladder_of(kind: BlockKind, shape: Dimensions, rules: SpaceRecipe) -> tuple[Choice, ...]:
    """What a search may choose for a block of this kind, ascending in size; the last is the parent's own.

    Raises ArchitectureError on rules that the parent breaks.
    """
    choices = [choice for own in KINDS if own.kind == kind for choice in own.ladder(shape, rules)]
    own = whole(shape, kind)
    return tuple(sorted(choices, key=lambda choice: (choice == own, choice.rows(shape), choice.units)))
