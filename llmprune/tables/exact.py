"""Exact replace-one-block scores: one choice put into the parent, the whole model scored (Puzzle, arXiv 2411.19146)."""

from __future__ import annotations

import math
from collections.abc import Iterable

from llmprune.choices.choice import AnyChoice, Assignment
from llmprune.choices.space import Space
from llmprune.choices.vocabulary import VocabularyChoice
from llmprune.core.errors import ArchitectureError, ModelError
from llmprune.core.progress import Advance
from llmprune.core.recipe import TablesRecipe
from llmprune.data.tokens import Split
from llmprune.measure.quality.perplexity import quality_from_windows
from llmprune.measure.quality.scores import SplitScorer
from llmprune.tables.estimate import DeltaNats, cautious

BROKEN = 100.0
"""Nats a token: more than any text costs, and still a number that a solver can add."""


def is_exact(choice: AnyChoice, space: Space, rules: TablesRecipe) -> bool:
    """Whether this choice is scored exactly: where the rules want it, and of the vocabulary always, as no block's
    output tells what that costs. The parent's own costs nothing, exactly."""
    if isinstance(choice, VocabularyChoice):
        return choice != space.vocabulary[-1]
    if choice == space.shape.full(choice.kind):
        return False
    return choice.kind in rules.exact or (choice.units == 0 and "drops" in rules.exact)


def exact_delta_nats(
    scorer: SplitScorer,
    split: Split,
    space: Space,
    choices: Iterable[Assignment],
    progress: Advance,
    *,
    caution: float = 0.0,
) -> DeltaNats:
    """Nats per token that each of `choices` costs, put alone into the parent: {(layer, choice): delta}; with `caution`
    as in `cautious`.

    `scorer` scores `split`; one that starts at the first changed layer makes this about half as dear as a forward pass
    a choice. Layers are taken in order, so that the scorer's states are used while they are there. A choice that breaks
    the model (NaN, infinite loss, no attention left) costs BROKEN.
    """
    ordered = sorted(choices, key=lambda key: key[0])
    parent = space.shape.architecture
    base = quality_from_windows(split, scorer.score(parent).nats).per_source
    found: DeltaNats = {}
    for done, (layer, choice) in enumerate(ordered):
        progress(done, len(ordered))
        try:
            scores = scorer.score(parent.with_choice(layer, choice))
            found_by_source = quality_from_windows(split, scores.nats).per_source
            lost = {name: own.nats_per_token - base[name].nats_per_token for name, own in found_by_source.items()}
            delta = cautious(lost, split.weights, caution) if all(map(math.isfinite, lost.values())) else BROKEN
        except (ArchitectureError, ModelError):
            delta = BROKEN
        found[layer, choice] = min(delta, BROKEN)
    progress(len(ordered), len(ordered))
    return found
