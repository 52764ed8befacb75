"""Repairs of a run's children: the text they learn from and are judged by, and where they are found again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transformers import PreTrainedModel

from llmprune.blocks.library import BlockLibrary
from llmprune.choices.architecture import Architecture
from llmprune.core.errors import DataError, ExportError
from llmprune.data.tokens import Split
from llmprune.measure.record import Record, child_id
from llmprune.pipeline.judges import Judges
from llmprune.pipeline.run import Run
from llmprune.recover.held_out import held_out
from llmprune.recover.repair import Repair
from llmprune.search.judging import Finish

SCHEMA = 1
"""Of repairs: what was made under another number is made again."""


def refit_tokens(run: Run, judges: Judges) -> Split:
    """The part of the recovery split, or without one of the calibration split, that a refit is fitted to and repairs
    are judged by."""
    tokens = judges.stock.tokens
    split = tokens["recovery" if "recovery" in tokens.splits else "calibration"]
    share = min(1.0, run.recipe.recover.refit_tokens / split.tokens)
    return split.head(split.first_windows(share))


def judging_text(run: Run, judges: Judges) -> Split:
    """The tokens that repairs are judged by. Raises DataError if there are none."""
    found = held_out(refit_tokens(run, judges))
    if not found.sources:
        raise DataError("a repair is judged by recovery text that is held out; raise data.recovery_tokens")
    return found


def repairs_of(run: Run, record: Record, library: BlockLibrary) -> list[Repair]:
    """What was done to a record's child since it was cut, in order. Raises ExportError if the run no longer has it."""
    return list(_repairs(run, record, library))


def _repairs(run: Run, record: Record, library: BlockLibrary) -> Iterator[Repair]:
    for done, name in enumerate(record.done):
        of = child_id(record.hash, library.hash, record.done[:done])
        path = run.directory.repair_of(of, name.rpartition("-")[0])
        found = Repair.read(path)
        if found is None or found.name != name:
            raise ExportError(
                f"{path} does not hold the repair {name} of {record.id}; delete {run.directory.front} and run llmprune "
                "front again"
            )
        yield found


def finishing(repairs: Sequence[Repair]) -> Finish:
    """Repairs, as what is done to a pruned child before it is judged."""

    def complete(child: PreTrainedModel, architecture: Architecture) -> None:
        for repair in repairs:
            repair.apply(child)

    return Finish(repairs[-1].name, complete, lambda architecture: True)
