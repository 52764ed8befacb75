"""One run at work: what its stages read and make, each loaded or computed when it is first asked for."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llmprune.baselines.methods import METHODS, own_libraries
from llmprune.blocks.library import BlockLibrary, Plan, build_libraries, build_library, load_library, stored_layers
from llmprune.blocks.statistics import few_tokens_warning
from llmprune.choices.architecture import Architecture
from llmprune.choices.dimensions import BLOCK_KINDS
from llmprune.choices.space import Space
from llmprune.core.budgets import parse_budget, parse_pick
from llmprune.core.errors import RunDirectoryError
from llmprune.core.files import exists, read_json, write_json
from llmprune.core.progress import Show, silent
from llmprune.core.recipe import BaselineName, Recipe, SearchRecipe, SplitName
from llmprune.data.store import load_token_splits, save_token_splits
from llmprune.data.tokens import Split, TokenSplits, build_token_splits
from llmprune.formats.limits import check_parent, cut, merging_helps
from llmprune.measure.quality.perplexity import batch_windows
from llmprune.measure.quality.prefix import STATES_BYTES, PrefixScorer
from llmprune.measure.quality.racing import race_batch
from llmprune.measure.quality.score_store import ScoreStore, StoredScorer
from llmprune.measure.speed.host import fingerprint
from llmprune.measure.speed.llamacpp_engine import check_engine
from llmprune.measure.speed.throughput import Workload, check_compiler
from llmprune.models.licence import stated_licence
from llmprune.models.loading import dtype_of
from llmprune.models.parent import Parent, check_choices, check_lengths, load_parent
from llmprune.pipeline.run_directory import RunDirectory, hash_of
from llmprune.search.guidance import Estimates, Seed, seeds_from_json, seeds_to_json, walked_seeds, winner
from llmprune.search.judging import QUOTED, Judge
from llmprune.search.samplers.guide import Guide
from llmprune.search.samplers.make import GUIDED
from llmprune.search.warm_starts import MARGIN
from llmprune.search.workers.studies import StudyFacts
from llmprune.tables.allocate import Allocator, Scores
from llmprune.tables.block_tables import BlockTables, build_tables
from llmprune.tables.reach import Reach, measure_reach, reach_from_json, reach_to_json
from llmprune.tables.shrinkage import Shrinkage

PACKAGES = ("llmprune", "torch", "transformers", "accelerate", "datasets", "optuna", "numpy")


@dataclass
class Run:
    """One run at work: its directory, its recipe, and what its stages made, each loaded or computed when asked for.

    The caller holds `directory.locked()`, unless the run is `joined`: then it only reads the directory.
    """

    directory: RunDirectory
    recipe: Recipe
    show: Show = silent
    storage: str | None = None
    """URL of the study's storage; None is the run's journal file. May hold a password."""
    joined: bool = False
    say: Callable[[str], None] = lambda line: None
    """Tells the user one line beside the steps that `show` draws."""
    _scorers: dict[tuple[str, str], StoredScorer] = field(default_factory=dict)
    _baseline_libraries: dict[str, BlockLibrary] = field(default_factory=dict)

    @classmethod
    def start(cls, path: Path, recipe: Recipe, show: Show = silent) -> Run:
        """Begin a run, or continue the one that is there. Every rule that can be checked early is checked here."""
        parse_pick(recipe.export.pick)
        for budget in recipe.search.budgets:
            parse_budget(budget)
        directory = RunDirectory(path)
        directory.adopt(recipe)
        return cls(directory, recipe, show)

    @classmethod
    def open(cls, path: Path, show: Show = silent) -> Run:
        """Continue the run that is there, with its own recipe."""
        directory = RunDirectory(path)
        return cls(directory, directory.stored_recipe(), show)

    @classmethod
    def join(cls, path: Path, show: Show = silent, *, storage: str | None = None) -> Run:
        """Take part, as a worker, in the search of the run that is there or is copied from where it was started."""
        directory = RunDirectory(path)
        return cls(directory, directory.stored_recipe(), show, storage, joined=True)

    @cached_property
    def parent(self) -> Parent:
        with self.show("loading the parent"):
            known = self.directory.read_provenance().get("parent", {})
            # What auto meant when the run began, it means to its end, on whatever device it goes on.
            settled = known.get("dtype", "auto") if self.recipe.model.dtype == "auto" else self.recipe.model.dtype
            parent = load_parent(self.recipe.model.model_copy(update={"dtype": settled}))
            self.parent_hash = parent.hash
        check_lengths(parent, self.recipe)
        check_parent(parent, self.recipe.deploy, self.recipe.space.size)
        if self.recipe.workload.compile:
            check_compiler(parent.device)
        if self.recipe.workload.engine == "llamacpp":
            check_engine(parent, self.recipe.deploy.gguf_type)
        if self.joined:
            return parent
        if known.get("hash", self.parent_hash) != self.parent_hash:
            raise RunDirectoryError(
                f"{self.recipe.model.path} is not the model this run was made with (its weights have changed); "
                "use another --out"
            )
        local = exists(self.recipe.model.path)
        if "licence" not in known:
            # Once a run: the header of a GGUF file takes seconds.
            licence = stated_licence(self.recipe.model.path)
            known["licence"] = licence and licence.to_json()
        self.directory.note(
            parent={
                "model": parent.source,
                "revision": self.recipe.model.revision,
                "hash": self.parent_hash,
                "dtype": dtype_of(parent.model),
                "on_hub": not local,
                "licence": known["licence"],
            },
            versions={name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
            host=fingerprint(),
        )
        return parent

    @cached_property
    def space(self) -> Space:
        rules = self.recipe.space
        whole = Space.of(
            self.parent.shape,
            rules.kv_groups_step,
            rules.ffn_step,
            drop=rules.drop,
            size=rules.size,
            merge_kv=rules.merge_kv or merging_helps(self.parent, self.recipe.deploy, rules.size),
        )
        check_choices(self.parent, (*whole.attention, *whole.ffn))
        return cut(whole, self.parent, self.recipe.deploy, self.recipe.workload.engine)

    @cached_property
    def workload(self) -> Workload:
        recipe, parent = self.recipe, self.parent
        return Workload.from_recipe(
            recipe.workload, dtype_of(parent.model), str(parent.device), recipe.deploy.gguf_type
        )

    @cached_property
    def reach(self) -> Reach:
        """What the space can reach at all, which takes seconds to know: no library is needed."""
        file, space = self.directory.reach, self.space
        ladders = [[choice.to_json() for choice in space.ladder(kind)] for kind in BLOCK_KINDS]
        key = hash_of(self.parent_hash, space.size, ladders, self.workload.to_json(), fingerprint())
        if not self.directory.is_done("reach", key, file):
            with self.show("timing what the space can reach"):
                write_json(file, reach_to_json(measure_reach(self.parent, space, self.workload)))
            self.directory.mark_done("reach", key)
        try:
            return reach_from_json(read_json(file))
        except (KeyError, TypeError) as error:
            raise RunDirectoryError(f"{file} is damaged ({type(error).__name__}: {error}); delete it") from error

    @cached_property
    def tokens(self) -> TokenSplits:
        path, tokenizer = self.directory.tokens, self.parent.tokenizer
        if self.joined:
            if not path.is_file():
                raise RunDirectoryError(f"a worker needs {path}; copy it from the run directory of llmprune search")
            return load_token_splits(path)
        assert tokenizer is not None, "a parent that was loaded has a tokenizer"
        key = hash_of(self.recipe.data.identity(), self.parent_hash)
        if not self.directory.is_done("tokens", key, path):
            with self.show("cutting text into token splits"):
                splits = build_token_splits(self.recipe.data, tokenizer)
                save_token_splits(splits, path)
            self.directory.note(data=dict(splits.provenance))
            self.directory.mark_done("tokens", key)
        return load_token_splits(path)

    @cached_property
    def library(self) -> BlockLibrary:
        split = self.tokens["calibration"]
        input_hash = hash_of(self.parent_hash, split.hash)
        if self.joined:
            return load_library(self.directory.library, self.recipe.importance, self.space, input_hash=input_hash)
        built = stored_layers(self.directory.library, self.recipe.importance, self.space, input_hash=input_hash)
        few = few_tokens_warning(self.parent.shape, split.tokens)
        if few and self.recipe.importance.refit and built < self.parent.shape.layers:
            self.say(few)
        with self.show("ordering and refitting blocks") as advance:
            return build_library(
                self.parent,
                split,
                self.recipe.importance,
                self.space,
                self.directory.library,
                input_hash=input_hash,
                memory_bytes=self.recipe.importance.memory_bytes,
                progress=advance,
            )

    @cached_property
    def tables(self) -> BlockTables:
        path = self.directory.tables
        rules = self.recipe.tables
        if self.joined:
            # Whose tables a worker proposes from is the search's affair, also on another of several like GPUs.
            if not path.is_file():
                raise RunDirectoryError(f"a worker needs {path}; copy it from the run directory of llmprune search")
            return BlockTables.from_json(self.space, read_json(path))
        estimated = self.tokens["estimate"]
        key = hash_of(
            self.library.hash,
            estimated.hash,
            self.workload.to_json(),
            fingerprint(),
            rules.tokens,
            rules.exact,
            rules.caution,
        )
        if not self.directory.is_done("tables", key, path):
            tables = build_tables(
                self.parent,
                estimated,
                self.library,
                self.workload,
                self.recipe.workload.repeats,
                rules,
                show=self.show,
            )
            write_json(path, tables.to_json())
            self.directory.mark_done("tables", key)
        return BlockTables.from_json(self.space, read_json(path))

    @cached_property
    def estimates(self) -> Estimates:
        split, rules = self.tokens["estimate"], self.recipe.tables
        return Estimates(
            self.parent,
            split,
            self.library,
            rules.path_tokens,
            self.workload.device,
            self._shrinkage,
            of_parent=self.scores,
            caution=rules.caution,
        )

    @cached_property
    def scores(self) -> Scores:
        """What a knapsack minimises: the tables' nats, shrunk."""
        return self._shrinkage.apply(self.tables.delta_nats, self.space.shape.architecture)

    @property
    def _shrinkage(self) -> Shrinkage:
        return Shrinkage.of(self.tables.delta_nats, self.recipe.tables.shrinkage)

    @cached_property
    def path(self) -> list[Seed]:
        """Labelled seeds, one for each of the recipe's targets that a path from the parent reaches."""
        search, rules, tables = self.recipe.search, self.recipe.tables, self.tables
        file = self.directory.seeds
        made_of = [self.library.hash, self.tokens["estimate"].hash, tables.to_json()]
        key = hash_of(*made_of, search.objective, search.targets, rules.model_dump())
        if not self.directory.is_done("seeds", key, file):
            write_json(file, seeds_to_json(walked_seeds(self.estimates.at, tables.costs, search, rules, self.show)))
            self.directory.mark_done("seeds", key)
        return seeds_from_json(self.space, read_json(file), file)

    @cached_property
    def guide(self) -> Guide | None:
        """What a guided sampler knows; None if the recipe's is none."""
        search = self.recipe.search
        if search.sampler not in GUIDED:
            return None

        def raced(candidates: Sequence[Architecture]) -> Architecture:
            return winner(self.scorer(self.tokens["search"]), self.tokens["search"], candidates, self.workload.device)

        allocator = Allocator(self.scores, self.tables.costs)
        return Guide(allocator, search.objective, self._aims(), raced, self.estimates.at)

    def _aims(self) -> tuple[float, ...]:
        """The targets; those that the export's pick demands are aimed at from above, since a pick is a hard limit."""
        demanded = {b.limit for b in parse_pick(self.recipe.export.pick).budgets if b.metric == self.speed}
        return tuple(target * MARGIN if target in demanded else target for target in self.recipe.search.targets)

    @property
    def study_name(self) -> str:
        """Trials of one study compare: same children, same tokens, same workload, same kind of machine."""
        search = self.recipe.search
        return hash_of(
            self.library.hash,
            self.tokens["search"].hash,
            self._workload_on_any_device(),
            fingerprint(),
            [search.objective, list(search.budgets), *_rewarded(search)],
        )[:16]

    def study_inputs(self) -> Iterator[tuple[str, str]]:
        """Name and hash of all that decides what a trial means, the cheap ones first."""
        search = self.recipe.search
        yield "objective and budgets", hash_of(search.objective, list(search.budgets), *_rewarded(search))
        # Studies from before KV groups could merge have a hash without that word.
        unsaid = set() if self.recipe.space.merge_kv else {"merge_kv"}
        yield "space", hash_of(self.recipe.space.model_dump(mode="json", exclude=unsaid))
        assert self.parent, "its hash is known once it is loaded"
        yield "parent", self.parent_hash
        yield "workload", hash_of(self._workload_on_any_device())
        yield "calibration tokens", self.tokens["calibration"].hash
        yield "search tokens", self.tokens["search"].hash
        yield "library", self.library.hash

    def study_facts(self) -> StudyFacts:
        """What `search` writes into its study, for workers to compare."""
        hashes = dict(self.study_inputs())
        # The number of threads is the hardware's, unless the recipe names it.
        workload = {**self._workload_on_any_device(), "threads": self.recipe.workload.threads}
        key = hash_of({**hashes, "workload": hash_of(workload)})[:16]
        return StudyFacts(self.study_name, key, hashes, fingerprint())

    def _workload_on_any_device(self) -> dict[str, Any]:
        """One of several like GPUs is as good as another."""
        return {**self.workload.to_json(), "device": self.workload.device.partition(":")[0]}

    @property
    def speed(self) -> str:
        """The figure that is the search's second objective."""
        return f"{self.recipe.search.objective}_speedup"

    def baseline_libraries(self, names: Iterable[BaselineName]) -> dict[BaselineName, BlockLibrary]:
        """The block library of each baseline: the run's, or its own; all that are missing come from one pass."""
        names = list(names)
        wanted = {name: METHODS[name].importance for name in names}
        own = own_libraries(names, self.recipe.importance)
        missing = [recipe for method, recipe in own.items() if method not in self._baseline_libraries]
        if missing:
            split = self.tokens["calibration"]
            plans = [Plan(recipe, self.directory.library_of(recipe.method)) for recipe in missing]
            with self.show(f"ordering blocks by {', '.join(recipe.method for recipe in missing)}") as advance:
                built = build_libraries(
                    self.parent,
                    split,
                    plans,
                    self.space,
                    input_hash=hash_of(self.parent_hash, split.hash),
                    memory_bytes=self.recipe.importance.memory_bytes,
                    progress=advance,
                )
            self._baseline_libraries |= {recipe.method: found for recipe, found in zip(missing, built, strict=True)}
        return {
            name: self._baseline_libraries[i.method] if i and i.method in own else self.library
            for name, i in wanted.items()
        }

    def scorer(self, split: Split, library: BlockLibrary | None = None) -> StoredScorer:
        """Scores children of the run's (or another) library on a split, none of them twice in the life of the run."""
        library = library or self.library
        key = split.hash, library.hash
        if key not in self._scorers:
            # On validation tokens a few whole children are scored: hidden states would not be read again.
            states = STATES_BYTES if split.name == "search" else 0
            batch = batch_windows(self.parent.model, split.seq_len)
            batch = min(batch, race_batch(split)) if split.name == "search" else batch
            scorer = PrefixScorer(
                self.parent,
                library,
                split,
                parent_bytes=states,
                candidate_bytes=states,
                batch_tokens=batch * split.seq_len,
            )
            made_of = hash_of(self.parent_hash, library.hash)
            # The states of one library's children are of no use to another's, and take memory.
            self._scorers = {k: s for k, s in self._scorers.items() if k[1] in (library.hash, self.library.hash)}
            self._scorers[key] = StoredScorer(scorer, ScoreStore(self.directory.scores, made_of, split))
        return self._scorers[key]

    def judge(
        self, name: SplitName, repeats: int, baseline: BaselineName | None = None, *, tokens: int | None = None
    ) -> Judge:
        """What judges candidates, or a baseline's children, on a split, or on about so many of its first tokens."""
        split = self.tokens[name]
        if tokens is not None:
            split = split.head(split.first_windows(min(1.0, tokens / split.tokens)))
        library, finish = self.library, None
        if baseline is not None:
            library, complete = self.baseline_libraries([baseline])[baseline], METHODS[baseline].finish
            finish = partial(complete, self.parent, library) if complete else None
        scorer = self.scorer(split, library)
        return Judge(self.parent, library, split, self.workload, repeats, scorer, finish)

    def quoting(self, baseline: BaselineName | None = None) -> list[Judge]:
        """What measures the figures that are quoted of a child, or of a baseline's: on text nothing is chosen on."""
        return [self.judge(name, 1, baseline) for name in QUOTED if name in self.tokens.splits]

    @property
    def quoted_hashes(self) -> list[str]:
        """Of the tokens that those figures are of."""
        return [self.tokens[name].hash for name in QUOTED if name in self.tokens.splits]


def _rewarded(search: SearchRecipe) -> list[Any]:
    """What a scalar reward depends on; nothing where there is none."""
    return [] if search.reward == "front" else [search.reward, list(search.targets)]
