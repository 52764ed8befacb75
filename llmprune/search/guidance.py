"""What a run gives its guided samplers: estimates at any architecture, seeds along a path, and races."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmprune.blocks.library import BlockLibrary
from llmprune.choices.architecture import Architecture
from llmprune.choices.choice import AnyChoice, Assignment
from llmprune.choices.dimensions import WHOLE_MODEL
from llmprune.choices.space import Space
from llmprune.core.errors import ArchitectureError, RunDirectoryError
from llmprune.core.progress import Show
from llmprune.core.recipe import SearchRecipe, TablesRecipe
from llmprune.data.tokens import Split
from llmprune.measure.quality.perplexity import quality_from_windows
from llmprune.measure.quality.racing import race
from llmprune.measure.quality.scores import WindowScorer
from llmprune.measure.speed.turns import scoring
from llmprune.models.parent import Parent
from llmprune.search.warm_starts import MARGIN
from llmprune.tables.allocate import Scores
from llmprune.tables.costs import CostTable
from llmprune.tables.estimate import estimate_delta_nats
from llmprune.tables.shrinkage import Shrinkage
from llmprune.tables.together import weighed
from llmprune.tables.walk import walk

ESTIMATES_KEPT = 8
"""Tables that are remembered: a guided sampler asks for the same few incumbents again and again."""

Seed = tuple[str, Architecture]
"""A label, and where a search may start from."""


@dataclass
class Estimates:
    """Estimated nats a token of every choice, put alone into any architecture, weighed and shrunk; the last few are
    kept."""

    parent: Parent
    split: Split
    library: BlockLibrary
    tokens: int
    """Of `split`, that each estimate takes."""
    device: str
    shrinkage: Shrinkage
    together: Mapping[AnyChoice, float]
    """What choices cost together, over the sum of their scores (see `tables.together`)."""
    of_parent: Scores
    """What the tables have of the parent itself, so weighed and shrunk: it is not estimated again."""
    caution: float = 0.0
    _kept: dict[Architecture, Scores] = field(default_factory=dict)

    def at(self, architecture: Architecture) -> Scores:
        if architecture == self.parent.shape.architecture:
            return self.of_parent
        if architecture not in self._kept:
            with scoring(self.device):
                found = estimate_delta_nats(
                    self.parent, self.split, self.library, tokens=self.tokens, at=architecture, caution=self.caution
                )
            if len(self._kept) == ESTIMATES_KEPT:
                del self._kept[next(iter(self._kept))]
            found = weighed(found | self._of_vocabulary(architecture), self.together, architecture)
            self._kept[architecture] = self.shrinkage.apply(found, architecture)
        return self._kept[architecture]

    def _of_vocabulary(self, architecture: Architecture) -> dict[Assignment, float]:
        """What another vocabulary costs than an architecture has: as much as in the parent."""
        nats = {choice: self.of_parent[WHOLE_MODEL, choice] for choice in self.library.space.vocabulary}
        return {(WHOLE_MODEL, choice): own - nats[architecture.vocabulary] for choice, own in nats.items()}


def walked_seeds(
    estimate: Callable[[Architecture], Scores],
    costs: CostTable,
    search: SearchRecipe,
    rules: TablesRecipe,
    show: Show,
) -> list[Seed]:
    """Labelled seeds, one for each of the search's targets that a path from the parent reaches."""
    aims = [target * MARGIN for target in search.targets]
    with show("walking from the parent to the targets") as advance:
        found = dict(walk(estimate, costs, search.phase, aims, step=rules.path_step, progress=advance))
    targets = zip(search.targets, aims, strict=True)
    return [(f"path-{target:g}x", found[aim]) for target, aim in targets if aim in found]


def seeds_to_json(seeds: Sequence[Seed]) -> list[dict[str, Any]]:
    return [{"label": label, "architecture": architecture.to_json()} for label, architecture in seeds]


def seeds_from_json(space: Space, data: Any, file: Path) -> list[Seed]:
    """Inverse of `seeds_to_json`. Raises RunDirectoryError on anything else, or what is not of the space."""
    try:
        seeds = [(str(seed["label"]), Architecture.from_json(seed["architecture"])) for seed in data]
        for _, architecture in seeds:
            space.indices(architecture)
    except (KeyError, TypeError, ArchitectureError) as error:
        raise RunDirectoryError(
            f"{file} does not hold the seeds of this run's space ({type(error).__name__}: {error}); "
            "delete it and start again"
        ) from error
    return seeds


def winner(scorer: WindowScorer, split: Split, candidates: Sequence[Architecture], device: str) -> Architecture:
    """The best of several candidates in a race on the tokens of `split`; the first if none computes numbers."""
    with scoring(device):
        raced = race(scorer, split, candidates)
    finalists = {r.architecture: r.scores for r in raced if r.kept and r.scores is not None}
    nats = {a: quality_from_windows(split, scores.nats).nats_per_token for a, scores in finalists.items()}
    return min(nats, key=nats.__getitem__, default=candidates[0])
