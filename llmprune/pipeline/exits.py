"""The stage that searches where tokens may leave early: exits are trained, rules are scored from stored figures, the
best are measured, and the pick becomes a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.choices.architecture import Architecture
from llmprune.core.budgets import Budget, Pick, parse_budget, pick_record
from llmprune.core.errors import ExportError, RecipeError
from llmprune.core.files import read_json, write_json
from llmprune.core.recipe import Recipe
from llmprune.data.tokens import Split, TokenSplits
from llmprune.exits.costs import measure_costs
from llmprune.exits.measuring import score_exits, time_exits, worst_token_speedup
from llmprune.exits.record import (
    PICKED_BY,
    EstimatedExits,
    ExitRecord,
    ExitsFound,
    TrunkFigures,
    exits_id,
    rules_text,
)
from llmprune.exits.search import Trunk, baselines, beyond, non_dominated, search_rules, worth_measuring
from llmprune.exits.statistics import gather_statistics
from llmprune.exits.training import train_exits
from llmprune.formats.limits import check_exits_in
from llmprune.measure.quality.perplexity import Quality, score
from llmprune.measure.record import QUOTED, MeasuredOn, Quoted, Record, child_id
from llmprune.measure.speed.host import fingerprint
from llmprune.measure.speed.turns import timing
from llmprune.models.checkpoint import check_destination, write_checkpoint
from llmprune.models.exits import check_exits, with_exits
from llmprune.models.modeling_pruned import ExitRules
from llmprune.pipeline.exports import child_of, travelling
from llmprune.pipeline.judges import Judges
from llmprune.pipeline.prepare import Ground, cut_text, lay_ground, stock_up
from llmprune.pipeline.run import Run
from llmprune.pipeline.run_directory import RunDirectory, hash_of, read_front
from llmprune.recover.held_out import windows_of
from llmprune.recover.repair import Repair

EXITS = "exits"
"""What a trained set of exits is called among the repairs of its trunk."""
AUTO = (0.4, 0.55, 0.7, 0.8, 0.9)
"""Shares of a trunk's depth at which exits may stand."""


def check_exits_recipe(recipe: Recipe) -> list[Budget]:
    """The recipe's limits. Raises RecipeError or ExportError if its exits can be neither timed nor written."""
    if recipe.workload.engine != "torch":
        raise RecipeError(
            f"exits are timed in torch, which alone runs them; workload.engine={recipe.workload.engine} is of another "
            "run: search with workload.engine=torch"
        )
    if recipe.workload.batch != 1:
        raise RecipeError(
            "tokens of a batch would leave at different depths: exits need workload.batch=1, got "
            f"{recipe.workload.batch}"
        )
    check_exits_in(recipe.deploy.formats)
    budgets = [parse_budget(text) for text in recipe.exits.budgets]
    known = [name for name in PICKED_BY if name != "decode_tokens_per_s"]
    for budget in budgets:
        if budget.metric not in known:
            raise RecipeError(f"exits.budgets limit {', '.join(known)}; got {budget}")
    return budgets


def find_exits(run: Run) -> ExitsFound:
    """Train, search and measure; writes and returns `exits.json`. A stage that was done for the same inputs is read."""
    return _Stage.of(run).found()


def export_exits(run: Run, pick: Pick, to: Path, *, force: bool = False) -> dict[str, Any]:
    """Write the picked model with exits to `to`, proven in a fresh process with its exits and without."""
    check_destination(to, force=force)
    stage = _Stage.of(run)
    record = pick_record(stage.found().records, pick)
    with run.show(f"exporting {record.id} and proving it"):
        return stage.write(record, to, force=force)


@dataclass(frozen=True, eq=False)
class _Source:
    """What exits are put into."""

    id: str
    architecture: Architecture
    decode_speedup: float
    model: PreTrainedModel


@dataclass(frozen=True, eq=False)
class _Stage:
    run: Run
    budgets: Sequence[Budget]
    ground: Ground
    tokens: TokenSplits

    @classmethod
    def of(cls, run: Run) -> _Stage:
        budgets = check_exits_recipe(run.recipe)
        ground = lay_ground(run)
        check_exits(ground.parent.model)
        return cls(run, budgets, ground, cut_text(run, ground))

    @property
    def parent(self) -> PreTrainedModel:
        return self.ground.parent.model

    @cached_property
    def sources(self) -> list[_Source]:
        """The parent, then usable children of the front, fastest first."""
        whole, front = self.ground.parent.shape.architecture, self.run.directory.front
        found = [_Source(child_id(whole.hash, self.ground.parent_hash), whole, 1.0, self.parent)]
        if self.run.recipe.exits.trunks > 1 and front.is_file():
            judges = Judges(self.run, stock_up(self.run, self.ground))
            usable = [
                one for one in read_front(self.run.directory).children if one.usable and one.architecture != whole
            ]
            usable.sort(key=lambda one: -one.decode_speedup.median)
            found += [self._child(judges, one) for one in usable[: self.run.recipe.exits.trunks - 1]]
        return found

    def _child(self, judges: Judges, record: Record) -> _Source:
        child = child_of(self.run, judges, record)
        return _Source(record.id, record.architecture, record.decode_speedup.median, child)

    def found(self) -> ExitsFound:
        run, file = self.run, self.run.directory.exits
        splits = [self.tokens[name].hash for name in ("search", "validation")]
        quoted = [self.tokens[name].hash for name in QUOTED if name in self.tokens.splits]
        key = hash_of(
            [source.id for source in self.sources],
            run.recipe.exits.decisive(),
            self.ground.workload.to_json(),
            fingerprint(),
            self._learnt_from.hash,
            *splits,
            *quoted,
        )
        if not run.directory.is_done(EXITS, key, file):
            write_json(file, self._make().stored())
            run.directory.mark_done(EXITS, key)
        return read_exits(run.directory)

    @property
    def _learnt_from(self) -> Split:
        return self.tokens["recovery" if "recovery" in self.tokens.splits else "calibration"]

    def trained(self, source: _Source) -> Repair:
        """The exits of one trunk, trained once for the same inputs."""
        rules, layers = self.run.recipe.exits, self.candidates(source)
        path = self.run.directory.repair_of(source.id, EXITS)
        key = hash_of(source.id, self.ground.parent_hash, layers, rules.minutes, rules.seed, self._learnt_from.hash)
        if (known := Repair.read(path, key)) is not None:
            return known
        windows_WT, _, fitted_W = windows_of(self._learnt_from)
        held_out = windows_WT[~fitted_W] if not fitted_W.all() else windows_WT[-1:]
        told = f"training exits behind layers {', '.join(map(str, layers))} of {source.id}"
        with self.run.show(told) as advance:
            trained = train_exits(
                source.model, layers, windows_WT[fitted_W], held_out[0], rules.minutes, rules.seed, advance
            )
        facts = {name: value for name, value in asdict(trained).items() if name != "tensors"}
        repair = Repair.of(EXITS, trained.tensors, facts)
        repair.write(path, key)
        return repair

    def candidates(self, source: _Source) -> list[int]:
        """Layers behind which its exits may stand. Raises RecipeError if there are none."""
        depth, asked = source.model.config.num_hidden_layers, self.run.recipe.exits.layers
        layers = sorted({round(share * depth) for share in AUTO} if asked == "auto" else set(asked))
        if fitting := [layer for layer in layers if 1 <= layer < depth]:
            return fitting
        raise RecipeError(f"exits.layers stand behind a layer from 1 to {depth - 1} of {source.id}; got {layers}")

    def _make(self) -> ExitsFound:
        run, rules = self.run, self.run.recipe.exits
        trunks, figures = [], []
        for source in self.sources:
            repair, layers = self.trained(source), self.candidates(source)
            with run.show(f"reading what the exits of {source.id} say") as advance:
                statistics = gather_statistics(source.model, repair.tensors, layers, self.tokens["search"], advance)
            with run.show(f"timing the parts of {source.id}"), timing(self.ground.workload.device):
                costs = measure_costs(source.model, repair.tensors, layers, self.ground.workload, rules.repeats)
            trunks.append(Trunk(source.id, source.decode_speedup, statistics, costs))
            figures.append(_figures(trunks[-1], repair.facts))
        with run.show("searching where tokens leave") as advance:
            tried = search_rules(trunks, rules, self.budgets, trunks[0].statistics.trunk_nats, advance)
        if not tried:
            stated = ", ".join(map(str, self.budgets))
            raise RecipeError(f"none of {rules.trials} rules holds exits.budgets {stated}; loosen them")
        chosen = worth_measuring(tried, trunks, rules.size)
        records = [self._measured(one) for one in chosen]
        return ExitsFound(
            parent=self.sources[0].id,
            trunks=tuple(figures),
            front=tuple(non_dominated(beyond(tried, trunks))),
            baselines=tuple(one for trunk in trunks for one in non_dominated(baselines(trunk))),
            records=tuple(records),
            trials=rules.trials,
        )

    def model(self, trunk: str, rules: ExitRules) -> tuple[PreTrainedModel, _Source, Repair]:
        source = next(one for one in self.sources if one.id == trunk)
        repair = self.trained(source)
        return with_exits(source.model, rules, repair.tensors), source, repair

    def _measured(self, wanted: EstimatedExits) -> ExitRecord:
        run, rules, mode = self.run, ExitRules.from_json(wanted.rules), wanted.mode
        model, source, repair = self.model(wanted.trunk, rules)
        workload, repeats, split = self.ground.workload, run.recipe.exits.repeats, self.tokens["validation"]
        with run.show(f"measuring exits {rules_text(wanted.rules)}") as advance:
            quality, depths = self._quality(model, split, mode)
            parents = self._parents(split)
            prompts = prompts_of(split, workload.prompt_tokens + workload.generated_tokens, repeats)
            with timing(workload.device):
                free = time_exits(self.parent, model, prompts, workload, mode, free=True, advance=advance)
                of_text = free if mode == "draft" else time_exits(self.parent, model, prompts, workload)
                worst = worst_token_speedup(self.parent, model, prompts[:1], workload, mode, repeats)
        of_quoted = {
            name: Quoted.beside(self._quality(model, self.tokens[name], mode)[0], self._parents(self.tokens[name]))
            for name in QUOTED
            if name in self.tokens.splits
        }
        return ExitRecord(
            id=exits_id(source.id, mode, rules, repair.name),
            hash=source.architecture.hash,
            trunk=source.id,
            mode=mode,
            rules=rules.to_json(),
            nats_per_token=quality.nats_per_token,
            ppl=quality.ppl,
            ppl_ratio=quality.ppl / parents.ppl,
            decode_tokens_per_s=of_text.decode_tokens_per_s,
            decode_speedup=of_text.decode_speedup,
            worst_token_speedup=worst,
            depths=depths or of_text.depths,
            generated_speedup=free.decode_speedup,
            generated_depths=free.depths,
            estimated=wanted,
            measured_on=MeasuredOn(
                dataset=split.dataset,
                split=split.name,
                seq_len=split.seq_len,
                tokens=quality.tokens,
                bos=split.bos,
                workload=workload.to_json(),
                repeats=repeats,
                host=fingerprint(),
            ),
            **of_quoted,
        )

    def _quality(self, model: PreTrainedModel, split: Split, mode: str) -> tuple[Quality, tuple[float, ...]]:
        """What is drafted and verified is the trunk's own."""
        if mode == "draft":
            return score(model, split), ()
        found = score_exits(model, split)
        return found.quality, found.depths

    def _parents(self, split: Split) -> Quality:
        known: dict[str, Quality] = self.__dict__.setdefault("_of_parent", {})
        if split.name not in known:
            known[split.name] = score(self.parent, split)
        return known[split.name]

    def write(self, record: ExitRecord, to: Path, *, force: bool) -> dict[str, Any]:
        model, source, repair = self.model(record.trunk, ExitRules.from_json(record.rules))
        if exits_id(source.id, record.mode, ExitRules.from_json(record.rules), repair.name) != record.id:
            raise ExportError(
                f"{record.id} was measured with exits that the run no longer has; delete {self.run.directory.exits} "
                "and run llmprune exits again"
            )
        metadata = {"id": record.id, "exits": record.stored(), **travelling(self.run, self.ground.parent)}
        proof = write_checkpoint(model, self.ground.parent.tokenizer, source.architecture, metadata, to, force=force)
        return {"directory": str(to), "id": record.id, "proof": asdict(proof), "figures": record.to_json()}


def read_exits(directory: RunDirectory) -> ExitsFound:
    """What `exits.json` holds. Raises RunDirectoryError if it is damaged."""
    return ExitsFound.read(read_json(directory.exits), directory.exits, "delete it and run llmprune exits again")


def _figures(trunk: Trunk, facts: Mapping[str, Any]) -> TrunkFigures:
    found = trunk.statistics
    return TrunkFigures(
        id=trunk.id,
        nats_per_token=found.trunk_nats,
        decode_speedup=trunk.decode_speedup,
        layers=found.layers,
        agreement=tuple(found.agreement.tolist()),
        kl=tuple(facts["kl_trained"].values()),
        trained_tokens=facts["tokens"],
        trained_seconds=facts["seconds"],
        costs=trunk.costs.to_json(),
    )


def prompts_of(split: Split, tokens: int, count: int) -> Tensor:
    """As many windows as are decoded, source by source in turn: (count, tokens). Raises RecipeError if short."""
    if split.seq_len < tokens:
        raise RecipeError(
            f"exits are timed on windows of text: data.seq_len={split.seq_len} must hold workload.prompt_tokens and "
            f"workload.generated_tokens, {tokens}"
        )
    sources = list(split.sources.values())
    found = [
        sources[i % len(sources)].windows[i // len(sources) % len(sources[i % len(sources)].windows)]
        for i in range(count)
    ]
    return torch.stack(found)[:, :tokens]
