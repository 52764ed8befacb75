"""Who judges children in a run: on which tokens, of which library, none of them twice."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property

from llmprune.baselines.methods import METHODS, own_libraries
from llmprune.blocks.library import BlockLibrary, LibrarySpec, build_libraries
from llmprune.core.recipe import BaselineName
from llmprune.core.recipe_inputs import SplitName
from llmprune.data.tokens import Split
from llmprune.measure.quality.likeness import ParentsLogits
from llmprune.measure.quality.perplexity import batch_windows
from llmprune.measure.quality.prefix import STATES_BYTES, PrefixScorer
from llmprune.measure.quality.racing import race_batch
from llmprune.measure.quality.score_store import ScoreStore, StoredScorer
from llmprune.measure.record import QUOTED
from llmprune.measure.speed.verifying import VerifyCosts
from llmprune.pipeline.prepare import Stock, library_inputs, time_verification
from llmprune.pipeline.run import Run
from llmprune.pipeline.run_directory import hash_of
from llmprune.search.judging import Finish, Judge


@dataclass
class Judges:
    """Makes the judges of one run; keeps their scorers, and the libraries that baselines have of their own."""

    run: Run
    stock: Stock
    _scorers: dict[tuple[str, str], StoredScorer] = field(default_factory=dict)
    _libraries: dict[str, BlockLibrary] = field(default_factory=dict)

    def judge(
        self,
        name: SplitName,
        repeats: int,
        baseline: BaselineName | None = None,
        *,
        tokens: int | None = None,
        finish: Finish | None = None,
    ) -> Judge:
        """What judges candidates, or a baseline's children, on a split, or on about so many of its first tokens;
        children that are repaired as `finish` says."""
        stock, split = self.stock, self.stock.tokens[name]
        if tokens is not None:
            split = split.head(split.first_windows(min(1.0, tokens / split.tokens)))
        library = stock.library
        if baseline is not None:
            library, finishing = self.libraries([baseline])[baseline], METHODS[baseline].finish
            finish = finishing(stock.parent, library) if finishing else None
        scorer = self.scorer(split, library)
        return Judge(stock.parent, library, split, stock.workload, repeats, scorer, finish, verify=self.verify)

    @cached_property
    def verify(self) -> VerifyCosts | None:
        """What verification takes, where children are judged as drafts."""
        return time_verification(self.run, self.stock) if self.run.recipe.search.objective == "draft" else None

    def quoting(self, baseline: BaselineName | None = None, *, finish: Finish | None = None) -> list[Judge]:
        """What measures the figures that are quoted of a child, or of a baseline's: on text nothing is chosen on."""
        found = [self.judge(name, 1, baseline, finish=finish) for name in QUOTED if name in self.stock.tokens.splits]
        return [replace(one, parents_logits=self._of_parent) if one.split.name == "test" else one for one in found]

    @cached_property
    def _of_parent(self) -> ParentsLogits:
        """Its logits on the test split."""
        return ParentsLogits(self.stock.parent.model, self.stock.tokens["test"])

    def scorer(self, split: Split, library: BlockLibrary | None = None) -> StoredScorer:
        """Scores children of the run's (or another) library on a split, none of them twice in the life of the run."""
        stock = self.stock
        library = library or stock.library
        key = split.hash, library.hash
        if key not in self._scorers:
            # On validation tokens a few whole children are scored: hidden states would not be read again.
            states = STATES_BYTES if split.name == "search" else 0
            batch = batch_windows(stock.parent.model, split.seq_len)
            batch = min(batch, race_batch(split)) if split.name == "search" else batch
            scorer = PrefixScorer(
                stock.parent,
                library,
                split,
                parent_bytes=states,
                candidate_bytes=states,
                batch_tokens=batch * split.seq_len,
            )
            made_of = hash_of(stock.parent_hash, library.hash)
            # The states of one library's children are of no use to another's, and take memory.
            self._scorers = {k: s for k, s in self._scorers.items() if k[1] in (library.hash, stock.library.hash)}
            self._scorers[key] = StoredScorer(scorer, ScoreStore(self.run.directory.scores, made_of, split))
        return self._scorers[key]

    def libraries(self, names: Iterable[BaselineName]) -> dict[BaselineName, BlockLibrary]:
        """The block library of each baseline: the run's, or its own; all that are missing come from one pass."""
        names, rules = list(names), self.run.recipe.importance
        wanted = {name: METHODS[name].importance for name in names}
        own = own_libraries(names, rules)
        missing = [recipe for method, recipe in own.items() if method not in self._libraries]
        if missing:
            specs = [LibrarySpec(recipe, self.run.directory.library_of(recipe.method)) for recipe in missing]
            with self.run.show(f"ordering blocks by {', '.join(recipe.method for recipe in missing)}") as advance:
                built = build_libraries(
                    self.stock.parent,
                    self.stock.tokens["calibration"],
                    specs,
                    self.stock.space,
                    input_hash=library_inputs(self.stock, self.stock.tokens),
                    progress=advance,
                )
            self._libraries |= {recipe.method: found for recipe, found in zip(missing, built, strict=True)}
        return {
            name: self._libraries[i.method] if i and i.method in own else self.stock.library
            for name, i in wanted.items()
        }
