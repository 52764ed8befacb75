"""The pipeline in order. A stage whose stored input hash matches is skipped: that is the whole resume mechanism."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llmprune.architecture import Architecture, Space
from llmprune.blocks.library import BlockLibrary, build_library
from llmprune.data.store import load_token_splits, save_token_splits
from llmprune.data.tokens import TokenSplits, build_token_splits
from llmprune.errors import RunDirectoryError
from llmprune.files import read_json, write_json
from llmprune.measure.host import fingerprint
from llmprune.measure.throughput import Workload
from llmprune.models.checkpoint import check_destination, write_checkpoint
from llmprune.models.parent import Parent, load_parent
from llmprune.models.surgery import prune
from llmprune.progress import Show, silent
from llmprune.recipe import Recipe
from llmprune.run_directory import RunDirectory, hash_of
from llmprune.search.baselines import baseline_architectures
from llmprune.search.budgets import Pick, parse_budget, parse_pick, pick_record
from llmprune.search.evaluate import Judge, Record
from llmprune.search.front import candidates_for_front, non_dominated
from llmprune.search.storage import open_journal
from llmprune.search.study import Report, SearchOutcome, open_study, records, run_study
from llmprune.search.tables import BlockTables, build_tables
from llmprune.search.warm_starts import warm_starts

PACKAGES = ("llmprune", "torch", "transformers", "accelerate", "datasets", "optuna", "numpy")


@dataclass
class Run:
    """One run at work: its directory, its recipe, and what its stages made, each loaded or computed when asked for.

    The caller holds `directory.locked()`.
    """

    directory: RunDirectory
    recipe: Recipe
    show: Show = silent

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
        return Space.of(self.parent.shape, rules.kv_groups_step, rules.ffn_step, drop=rules.drop)

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

    def judge(self, split: str, repeats: int) -> Judge:
        return Judge.of(self.parent, self.library, self.tokens[split], self.workload, repeats)  # type: ignore[index]


def search(run: Run, report: Report | None = None) -> SearchOutcome:
    """Search until the recipe's trials or minutes are used up; trials that are there count."""
    rules = run.recipe.search
    tables = run.tables
    study = open_study(open_journal(run.directory.journal), run.study_name, rules)
    starts = warm_starts(tables.delta_nats, tables.influence, tables.costs, rules.objective, rules.warm_starts)
    with run.show("searching") as advance:

        def on_trial(finished: int, record: Record) -> None:
            advance(finished, rules.trials)
            if report:
                report(finished, record)

        judge = run.judge("search", run.recipe.workload.repeats)
        advance(0, rules.trials)
        return run_study(study, judge, rules, run.space, starts, on_trial)


def front(run: Run) -> dict[str, Any]:
    """Re-measure the best trials and the baselines on validation tokens; writes and returns `front.json`.

    Raises RunDirectoryError if no trial has finished.
    """
    rules, speed = run.recipe.front, f"{run.recipe.search.objective}_speedup"
    study = open_study(open_journal(run.directory.journal), run.study_name, run.recipe.search)
    trials = [record for record in records(study) if record["hash"] != run.parent.shape.architecture.hash]
    if not trials:
        raise RunDirectoryError(f"{run.directory.path} has no finished trial; run llmprune search first")
    key = hash_of(
        run.study_name, sorted(record["hash"] for record in trials), run.tokens["validation"].hash, rules.model_dump()
    )
    if not run.directory.is_done("front", key, run.directory.front):
        # The middle pick makes sure that something stands beside the baselines.
        picks = [parse_pick(run.recipe.export.pick), parse_pick(f"{speed}>={rules.baselines_at}")]
        chosen = candidates_for_front(trials, speed, rules.size, picks)
        baselines = _baselines(run, len(trials))
        judge = run.judge("validation", rules.repeats)
        with run.show("re-measuring on validation tokens") as advance:
            total = len(chosen) + len(baselines) + 1
            parent = judge.parent_record()
            measured: list[Record] = []
            for record in chosen:
                advance(len(measured) + 1, total)
                measured.append(judge.judge(Architecture.from_json(record["architecture"]), record["name"]))
            beside: list[Record] = []
            for name, architecture in baselines.items():
                advance(len(measured) + len(beside) + 1, total)
                beside.append(judge.judge(architecture, name))
            advance(total, total)
        children = non_dominated(measured, speed)
        write_json(run.directory.front, {"parent": parent, "children": children, "baselines": beside})
        run.directory.mark_done("front", key)
    return read_front(run.directory)


def _baselines(run: Run, trials: int) -> Mapping[str, Architecture]:
    rules, search_rules, tables = run.recipe.front, run.recipe.search, run.tables
    with run.show("choosing baselines at the same speed") as advance:
        return baseline_architectures(
            run.judge("search", 1),
            tables.influence,
            tables.costs,
            search_rules.objective,
            rules.baselines_at,
            draws=trials if rules.random_draws is None else rules.random_draws,
            seed=search_rules.seed,
            progress=advance,
        )


def read_front(directory: RunDirectory) -> dict[str, Any]:
    """The front that is stored. Raises RunDirectoryError if there is none, or it is damaged."""
    if not directory.front.is_file():
        raise RunDirectoryError(f"{directory.path} has no front yet; run llmprune front first")
    data = read_json(directory.front)
    if not isinstance(data, dict) or {"parent", "children", "baselines"} - data.keys():
        raise RunDirectoryError(f"{directory.front} is damaged; delete it and run llmprune front again")
    return data


def export(run: Run, pick: Pick, to: Path, *, force: bool = False) -> dict[str, Any]:
    """Write the picked child to `to`, proven in a fresh process; returns what was written.

    Raises BudgetError if no child holds the pick, ExportError if the directory is taken or the proof fails.
    """
    check_destination(to, force=force)
    measured = read_front(run.directory)
    record = pick_record([*measured["children"], *measured["baselines"]] if pick.hash else measured["children"], pick)
    with run.show(f"exporting {record['hash']} and proving it"):
        return _write(run, dict(record), to, force=force)


def write_children(run: Run) -> list[Path]:
    """Write every child of the front to the run's `children/HASH`, unless it is there already."""
    children = read_front(run.directory)["children"]
    paths = [run.directory.children / record["hash"] for record in children]
    with run.show("writing and proving the front's checkpoints") as advance:
        for done, (path, record) in enumerate(zip(paths, children, strict=True), start=1):
            if not path.exists():
                _write(run, record, path, force=False)
            advance(done, len(paths))
    return paths


def _write(run: Run, record: Record, to: Path, *, force: bool) -> dict[str, Any]:
    architecture = Architecture.from_json(record["architecture"])
    child = prune(run.parent, architecture, run.library)
    provenance = {key: value for key, value in run.directory.read_provenance().items() if key != "stages"}
    recipe = run.recipe.model_dump(mode="json")
    # A checkpoint travels: it names files, not the places they had on this machine.
    recipe["model"]["path"], recipe["export"]["to"] = run.parent.source, None
    if (tokenizer := recipe["model"]["tokenizer"]) and Path(tokenizer).expanduser().exists():
        recipe["model"]["tokenizer"] = Path(tokenizer).name
    for source in recipe["data"]["sources"]:
        source["path"] = source["path"] and Path(source["path"]).name
    metadata = {"figures": record, "provenance": provenance, "recipe": recipe}
    proof = write_checkpoint(child, run.parent.tokenizer, architecture, metadata, to, force=force)
    return {"directory": str(to), "hash": record["hash"], "proof": asdict(proof), "figures": record}


def compress(run: Run, to: Path, *, report: Report | None = None, force: bool = False) -> dict[str, Any]:
    """Every stage in order: search, front, the front's checkpoints, and the recipe's pick exported to `to`.

    A checkpoint that is at `to` already and is the picked child is left as it is.
    """
    search(run, report)
    measured = front(run)
    if run.recipe.front.checkpoints == "all":
        write_children(run)
    pick = parse_pick(run.recipe.export.pick)
    picked = pick_record(measured["children"], pick)
    written = exported_hash(to)
    exported = {"directory": str(to), "hash": written}
    if written != picked["hash"]:
        exported = export(run, pick, to, force=force or (written is not None and to == run.directory.export))
    return {**measured, "exported": exported}


def exported_hash(directory: Path) -> str | None:
    """Hash of the child in a checkpoint directory of ours, if it is one."""
    metadata = directory / "llmprune.json"
    return str(read_json(metadata).get("hash")) if metadata.is_file() else None
