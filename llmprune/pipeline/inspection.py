"""Before anything is pruned: what a model holds and where its time goes, and what a run would cost."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from llmprune.baselines.methods import own_libraries
from llmprune.blocks.library import load_library, stored_layers
from llmprune.choices.dimensions import BLOCK_KINDS, BlockKind
from llmprune.choices.space import Space
from llmprune.core.budgets import parse_budget, parse_pick, pick_record
from llmprune.core.errors import LlmpruneError, RunDirectoryError
from llmprune.core.progress import Show, silent
from llmprune.core.recipe import Recipe
from llmprune.forecast.forecast import Until
from llmprune.forecast.plan import Done
from llmprune.forecast.rates import measure_rates
from llmprune.formats.served_size import served_size
from llmprune.measure.record import Front
from llmprune.measure.room import Room
from llmprune.measure.speed.host import fingerprint
from llmprune.measure.speed.profile import HEAD, TimeShares, time_shares
from llmprune.measure.speed.throughput import Workload
from llmprune.models.checkpoint import check_destination
from llmprune.models.parent import Parent
from llmprune.models.sizes import size_of
from llmprune.models.stand_in import parts_of, whole_of
from llmprune.pipeline.exports import exported_id
from llmprune.pipeline.fitting import advise, asked_by, asked_of, candidates_for, fit_plan, forecast_within, plan_of
from llmprune.pipeline.fronts import make_front
from llmprune.pipeline.judges import Judges
from llmprune.pipeline.prepare import (
    Ground,
    Stock,
    cut_text,
    device_of,
    library_inputs,
    outline_ground,
    score_choices,
)
from llmprune.pipeline.resizing import is_asked, sizes_of
from llmprune.pipeline.run import Run
from llmprune.pipeline.run_directory import RunDirectory
from llmprune.pipeline.searching import estimates_for, study_name, trials_of, walk_path
from llmprune.search.workers.storage import opened_storage
from llmprune.tables.reach import check_reach, measure_reach, reach_to_json

FFN_RUNGS = 16
"""Widths that `inspect` assumes a search may choose among."""
_OWN = "own"
"""The recipe that is forecast, beside those that come along."""


def inspect_parent(parent: Parent, workload: Workload, repeats: int) -> dict[str, Any]:
    """Shape and sizes of the model, for every block its units, parameters, bytes and share of measured time; and what a
    search that may drop and narrow every block could reach at all."""
    shares = time_shares(parent, workload, repeats)
    space = Space.of(parent.shape, 1, max(1, parent.shape.ffn_width // FFN_RUNGS))
    reach = measure_reach(parent, space, workload)
    layers = [
        {
            "layer": layer,
            **{
                kind: {
                    "kv_groups" if kind == "attention" else "ffn_width": parent.shape.units(kind),
                    **_block_size(parent, layer, kind),
                    "prefill_share": shares.prefill[layer, kind],
                    "decode_share": shares.decode[layer, kind],
                }
                for kind in BLOCK_KINDS
            },
        }
        for layer in range(parent.shape.layers)
    ]
    return {
        "model": parent.source,
        "model_type": parent.model.config.model_type,
        "shape": asdict(parent.shape),
        **asdict(size_of(parent.model, parent.shape, parent.shape.architecture)),
        "layers": layers,
        "vocabulary": _vocabulary(parent, shares),
        "totals": _totals(shares),
        # The head is one of them.
        "outside_blocks": {
            phase: max(0.0, 1.0 - sum(getattr(shares, phase).values()) + getattr(shares, phase)[HEAD])
            for phase in ("prefill", "decode")
        },
        "reach": reach_to_json(reach),
        "measured_on": {"workload": workload.to_json(), "repeats": repeats, "host": fingerprint()},
    }


def _vocabulary(parent: Parent, shares: TimeShares) -> dict[str, Any]:
    """Rows, parameters and bytes of the matrices with a row a token, tied or not, and the head's share of the time."""
    matrices = [parent.model.get_parameter(name) for name in parent.vocabulary_names()]
    return {
        "rows": matrices[0].shape[0],
        "params": sum(matrix.numel() for matrix in matrices),
        "bytes": sum(matrix.numel() * matrix.element_size() for matrix in matrices),
        "prefill_share": shares.prefill[HEAD],
        "decode_share": shares.decode[HEAD],
    }


def _totals(shares: TimeShares) -> dict[str, dict[str, float]]:
    """Share of the time of all attentions, all FFNs and the output head, by phase: what a dimension can save."""
    return {
        phase: {
            **{kind: sum(share for block, share in taken.items() if block[1] == kind) for kind in BLOCK_KINDS},
            "vocabulary": taken[HEAD],
        }
        for phase, taken in (("prefill", shares.prefill), ("decode", shares.decode))
    }


def _block_size(parent: Parent, layer: int, kind: BlockKind) -> dict[str, int]:
    """Parameters and bytes of the projections that shrink with the block's units."""
    block, names = parent.block(layer, kind), parent.names(kind)
    modules = [block.get_submodule(name) for name in (*names.rows, names.output)]
    parameters = [parameter for module in modules for parameter in module.parameters()]
    return {
        "params": sum(parameter.numel() for parameter in parameters),
        "bytes": sum(parameter.numel() * parameter.element_size() for parameter in parameters),
    }


def forecast_run(
    path: Path, recipe: Recipe, until: Until, show: Show = silent, *, storage: str | None = None
) -> dict[str, Any]:
    """What `llmprune search` (or, until "export", `compress`) would cost in this directory, whether it fits this
    machine, and which recipe that comes along to take; writes nothing there, and no trial into the storage.

    Of the parent no weight is read: rates are of random weights in its shape (see `models/stand_in.py`).

    Raises what the command itself would raise before its first stage.
    """
    parse_pick(recipe.export.pick)
    for budget in recipe.search.budgets:
        parse_budget(budget)
    directory = _Looked(path)
    if path.exists() and not path.is_dir():
        raise RunDirectoryError(f"cannot use {path} as a run directory: it is a file")
    directory.check_recipe(recipe)
    if until == "export":
        to = Path(recipe.export.to) if recipe.export.to else directory.export
        check_destination(to, force=exported_id(to) is not None)
    if storage is not None:
        # As a search does: a storage that cannot be used is found out first.
        with opened_storage(storage, directory.journal):
            pass
    run = Run(directory, recipe, show, storage)
    ground = outline_ground(run)
    parent, workload, device = ground.parent, ground.workload, device_of(recipe.model)
    sizes = len(sizes_of(recipe, parent)) if is_asked(recipe) and not directory.resized_facts.is_file() else 0
    plan, room = plan_of(parent, recipe, ground.space, workload, device, sizes), Room.of(device, path)
    # A run that is under way has its recipe.
    candidates = [] if directory.recipe.is_file() else candidates_for(parent, recipe.model, device, room)
    with show("timing random weights in the parent's shape"):
        # Compiling the children of a space would take longer than a forecast may.
        asked = {_OWN: asked_of(plan, reach=not workload.compile), **asked_by(candidates)}
        measured = measure_rates(parent, device, asked)
    rates, reach = measured[_OWN]
    done = _done(run, ground)
    rows = [stage.to_json(rates) for stage in forecast_within(room, plan, done, until)]
    total = {name: sum(row[name] for row in rows) for name in ("forward_equivalents", "seconds", "disk_bytes")}
    total["peak_memory_bytes"] = max(row["peak_memory_bytes"] for row in rows)
    whole = parent.shape.architecture
    return {
        "model": parent.source,
        **asdict(served_size(parent.model, parent.shape, whole, workload.gguf_type, workload.cache_type)),
        "workload": workload.to_json(),
        "rates": rates.to_json(),
        "rates_of": _stood_in(parent),
        "reach": reach and reach_to_json(reach),
        "warnings": check_reach(reach, recipe) if reach else [],
        "stages": rows,
        "total": total,
        "fit": fit_plan(plan, parent, device, room, until, done, directory).to_json(),
        "recipes": advise(candidates, measured, device) if candidates else None,
    }


def _stood_in(parent: Parent) -> dict[str, Any]:
    """What rates are of: random weights, in a model of so many of the parent's layers and rows."""
    part, whole = parts_of(parent)[0], whole_of(parent)
    return {
        "weights": "random",
        "layers": part.layers,
        "of_layers": whole.layers,
        "rows": part.rows,
        "of_rows": whole.rows,
    }


class _NotDone(Exception):
    """A stage would have to run."""


class _Looked(RunDirectory):
    """A run directory that is only read: facts are not noted, and a stage that is not done is an exception."""

    def is_done(self, stage: str, input_hash: str, *files: Path) -> bool:
        if not super().is_done(stage, input_hash, *files):
            raise _NotDone(stage)
        return True

    def read_provenance(self) -> dict[str, Any]:
        return self.provenance_to_adopt()

    def note(self, **facts: Any) -> None:
        pass

    def write_front(self, front: Front) -> None:
        pass


def _done(run: Run, ground: Ground) -> Done:
    """How far a run is, asked of its own stages one after the other."""
    done = Done()
    if not run.directory.recipe.is_file():
        return done
    where, rules = run.directory.library, run.recipe.importance
    try:
        tokens = cut_text(run, ground)
        key = library_inputs(ground, tokens)
        done = replace(done, tokens=True, layers=stored_layers(where, rules, ground.space, input_hash=key))
        if done.layers < ground.space.shape.layers:
            # The run would build what is missing.
            return done
        library = load_library(where, rules, ground.space, input_hash=key)
        prepared = score_choices(run, Stock(**vars(ground), tokens=tokens, library=library))
        done = replace(
            done, tables=True, trials=_trials(run, prepared), baseline_layers=_baseline_layers(run, ground, key)
        )
        walk_path(run, prepared, estimates_for(run, prepared))
        done = replace(done, path=True)
        if done.trials < run.recipe.search.trials:
            return done
        with opened_storage(run.storage, run.directory.journal) as storage:
            front = make_front(run, storage, prepared, Judges(run, prepared))
        return replace(done, front=True, checkpoints_left=_checkpoints_left(run, front))
    except (_NotDone, LlmpruneError):
        # What is damaged, the run makes again or refuses; either way it is not done.
        return done


def _trials(run: Run, stock: Stock) -> int:
    """Finished trials, in the storage or in the run's journal.

    The journal is read as it is: opening it for a search would mend its end.
    """
    journal = run.directory.journal
    if run.storage is not None:
        with opened_storage(run.storage, journal) as storage:
            return len(trials_of(storage, study_name(run, stock)))
    if not journal.is_file() or not journal.read_bytes().endswith(b"\n"):
        return 0
    return len(trials_of(JournalStorage(JournalFileBackend(str(journal))), study_name(run, stock)))


def _baseline_layers(run: Run, ground: Ground, input_hash: str) -> dict[str, int]:
    """Finished layers of the libraries that the baselines have of their own."""
    rules = run.recipe.importance
    return {
        own.method: stored_layers(run.directory.library_of(own.method), own, ground.space, input_hash=input_hash)
        for own in own_libraries(run.recipe.front.baselines, rules).values()
    }


def _checkpoints_left(run: Run, front: Front) -> int:
    left = 0
    if run.recipe.front.checkpoints == "all":
        usable = (record for record in front.children if record.usable)
        left += sum(not (run.directory.children / record.id).exists() for record in usable)
    to = Path(run.recipe.export.to) if run.recipe.export.to else run.directory.export
    picked = pick_record(front.children, parse_pick(run.recipe.export.pick))
    return left + int(bool(picked.usable) and exported_id(to) != picked.id)
