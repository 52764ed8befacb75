"""What a run directory knows of itself, read from its files alone: no model is loaded, and a search may be at work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import optuna
from optuna.storages import BaseStorage

from llmprune.core.errors import RunDirectoryError
from llmprune.core.files import read_json
from llmprune.core.recipe import Phase, Recipe
from llmprune.exits.record import ExitsFound
from llmprune.measure.record import Front, Record
from llmprune.models.checkpoint import METADATA_FILE
from llmprune.pipeline.exits import read_exits
from llmprune.pipeline.exports import exported_id
from llmprune.pipeline.run import Run
from llmprune.pipeline.run_directory import RunDirectory, read_front
from llmprune.pipeline.searching import trials_of
from llmprune.publish.contents import EVALUATION_FILE
from llmprune.publish.evaluations import Evaluation, read_evaluation
from llmprune.recover.repair import DISTIL, Repair
from llmprune.search.trial_records import record_of
from llmprune.search.workers.reaping import WARM_START
from llmprune.search.workers.storage import opened_storage
from llmprune.search.workers.studies import studies_of_run
from llmprune.tables.block_tables import BlockTables


@dataclass(frozen=True)
class Judged:
    """A finished trial."""

    number: int
    started_as: str
    """Label of the starting point that it was; empty for what the sampler proposed."""
    minutes: float
    """From the start of the study's first trial to its own end."""
    record: Record


@dataclass(frozen=True)
class Curve:
    """How the distillation of a child went."""

    child: str
    """Id of the child before it."""
    checks: Sequence[tuple[int, float]]
    """Tokens learnt from, and nats a token on held-out text then."""
    seconds: float
    ended: str


@dataclass(frozen=True)
class Facts:
    """All that a report tells; what the run has not come to yet is empty."""

    name: str
    recipe: Recipe
    provenance: Mapping[str, Any]
    tables: BlockTables | None
    trials: Sequence[Judged]
    front: Front | None
    curves: Sequence[Curve]
    evaluation: Evaluation | None
    samples: Sequence[Mapping[str, str]]
    """How the exported child and its parent go on with prompts."""
    exits: ExitsFound | None

    @property
    def phase(self) -> Phase:
        """What the search makes faster: decode or prefill."""
        return self.recipe.search.phase


def gather(run: Run) -> Facts:
    """Read a run's files. Raises RunDirectoryError on a damaged one, StorageError if its trials cannot be read, and
    PushError if the evaluation in its export is another's."""
    directory = run.directory
    front = read_front(directory) if directory.front.is_file() else None
    return Facts(
        directory.path.resolve().name,
        run.recipe,
        directory.read_provenance(),
        BlockTables.read(read_json(directory.tables)) if directory.tables.is_file() else None,
        _trials(run),
        front,
        list(_curves(directory)),
        _evaluation(directory),
        _samples(directory),
        read_exits(directory) if directory.exits.is_file() else None,
    )


def _trials(run: Run) -> list[Judged]:
    study = run.directory.read_provenance().get("study")
    if study is None or (run.storage is None and not run.directory.journal.is_file()):
        return []
    with opened_storage(run.storage, run.directory.journal) as storage:
        names = [found.name for found in studies_of_run(storage, study["run"])]
        return sorted((j for name in names for j in _judged(storage, name)), key=lambda judged: judged.minutes)


def _judged(storage: BaseStorage, name: str) -> Iterator[Judged]:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    trials = trials_of(storage, name)
    began = min((t.datetime_start for t in trials if t.datetime_start), default=datetime.min)
    for trial in trials:
        ended = trial.datetime_complete or began
        label = str(trial.user_attrs.get(WARM_START, ""))
        yield Judged(trial.number, label, (ended - began).total_seconds() / 60, record_of(trial))


def _curves(directory: RunDirectory) -> Iterator[Curve]:
    for path in sorted(directory.path.glob(f"repairs/*-{DISTIL}.safetensors")):
        try:
            course = Repair.facts_in(path)["course"]
            checks = [(int(tokens), float(nats)) for tokens, nats in course["checks"]]
            yield Curve(path.stem.partition("-")[0], checks, float(course["seconds"]), str(course["ended"]))
        except (KeyError, TypeError, ValueError) as error:
            raise RunDirectoryError(f"{path} is damaged ({type(error).__name__}); delete it") from error


def _samples(directory: RunDirectory) -> list[Mapping[str, str]]:
    if not exported_id(directory.export):
        return []
    found = read_json(directory.export / METADATA_FILE).get("samples", [])
    return [{name: str(sample[name]) for name in ("prompt", "parent", "child")} for sample in found]


def _evaluation(directory: RunDirectory) -> Evaluation | None:
    """Of the exported child, if it lies there."""
    file, exported = directory.export / EVALUATION_FILE, exported_id(directory.export)
    return read_evaluation(file, exported) if exported and file.is_file() else None
