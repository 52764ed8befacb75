"""One run at work: what its stages read and make, each loaded or computed when it is first asked for."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path

from llmprune.blocks.library import BlockLibrary, Plan, build_libraries, build_library
from llmprune.data.store import load_token_splits, save_token_splits
from llmprune.data.tokens import TokenSplits, build_token_splits
from llmprune.errors import RunDirectoryError
from llmprune.files import read_json, write_json
from llmprune.measure.host import fingerprint
from llmprune.measure.quality import Quality, score
from llmprune.measure.throughput import Workload
from llmprune.models.parent import Parent, check_lengths, load_parent
from llmprune.progress import Show, silent
from llmprune.recipe import BaselineName, Recipe, SplitName
from llmprune.run_directory import RunDirectory, hash_of
from llmprune.search.baselines.methods import METHODS
from llmprune.search.budgets import parse_budget, parse_pick
from llmprune.search.evaluate import Judge
from llmprune.search.tables import BlockTables, build_tables
from llmprune.space import Space

PACKAGES = ("llmprune", "torch", "transformers", "accelerate", "datasets", "optuna", "numpy")


@dataclass
class Run:
    """One run at work: its directory, its recipe, and what its stages made, each loaded or computed when asked for.

    The caller holds `directory.locked()`.
    """

    directory: RunDirectory
    recipe: Recipe
    show: Show = silent
    _parent_qualities: dict[SplitName, Quality] = field(default_factory=dict)
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

    @cached_property
    def parent(self) -> Parent:
        with self.show("loading the parent"):
            parent = load_parent(self.recipe.model)
            self.parent_hash = parent.hash
        check_lengths(parent, self.recipe)
        known = self.directory.read_provenance().get("parent", {}).get("hash", self.parent_hash)
        if known != self.parent_hash:
            raise RunDirectoryError(
                f"{self.recipe.model.path} is not the model this run was made with (its weights have changed); "
                "use another --out"
            )
        self.directory.note(
            parent={"model": parent.source, "revision": self.recipe.model.revision, "hash": self.parent_hash},
            versions={name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
            host=fingerprint(),
        )
        return parent

    @cached_property
    def space(self) -> Space:
        rules = self.recipe.space
        return Space.of(self.parent.shape, rules.kv_groups_step, rules.ffn_step, drop=rules.drop, size=rules.size)

    @cached_property
    def workload(self) -> Workload:
        return Workload.from_recipe(self.recipe.workload, self.recipe.model.dtype, str(self.parent.device))

    @cached_property
    def tokens(self) -> TokenSplits:
        path, tokenizer = self.directory.tokens, self.parent.tokenizer
        assert tokenizer is not None, "a parent that was loaded has a tokenizer"
        key = hash_of(self.recipe.data.model_dump(mode="json"), self.parent_hash)
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
        with self.show("ordering and refitting blocks") as advance:
            return build_library(
                self.parent,
                split,
                self.recipe.importance,
                self.space,
                self.directory.library,
                input_hash=hash_of(self.parent_hash, split.hash),
                progress=advance,
            )

    @cached_property
    def tables(self) -> BlockTables:
        path = self.directory.tables
        key = hash_of(self.library.hash, self.workload.to_json(), fingerprint())
        if not self.directory.is_done("tables", key, path):
            tables = build_tables(
                self.parent,
                self.tokens["calibration"],
                self.library,
                self.workload,
                self.recipe.workload.repeats,
                tokens=self.recipe.data.search_tokens,
                show=self.show,
            )
            write_json(path, tables.to_json())
            self.directory.mark_done("tables", key)
        return BlockTables.from_json(self.space, read_json(path))

    @property
    def study_name(self) -> str:
        """Trials of one study compare: same children, same tokens, same workload, same kind of machine."""
        search = self.recipe.search
        return hash_of(
            self.library.hash,
            self.tokens["search"].hash,
            self.workload.to_json(),
            fingerprint(),
            [search.objective, list(search.budgets)],
        )[:16]

    @property
    def speed(self) -> str:
        """The figure that is the search's second objective."""
        return f"{self.recipe.search.objective}_speedup"

    def baseline_libraries(self, names: Iterable[BaselineName]) -> dict[BaselineName, BlockLibrary]:
        """The block library of each baseline: the run's, or its own; all that are missing come from one pass."""
        names = list(names)
        wanted = {name: METHODS[name].importance for name in names}
        own = {i.method: i for i in wanted.values() if i and i != self.recipe.importance}
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
                    progress=advance,
                )
            self._baseline_libraries |= {recipe.method: found for recipe, found in zip(missing, built, strict=True)}
        return {
            name: self._baseline_libraries[i.method] if i and i.method in own else self.library
            for name, i in wanted.items()
        }

    def judge(self, split: SplitName, repeats: int, baseline: BaselineName | None = None) -> Judge:
        """What judges candidates, or a baseline's children, on a split; the parent is scored once for each split."""
        if split not in self._parent_qualities:
            self._parent_qualities[split] = score(self.parent.model, self.tokens[split])
        quality = self._parent_qualities[split]
        library, finish = self.library, None
        if baseline is not None:
            library, complete = self.baseline_libraries([baseline])[baseline], METHODS[baseline].finish
            finish = partial(complete, self.parent, library) if complete else None
        return Judge(self.parent, library, self.tokens[split], self.workload, repeats, quality, finish)
