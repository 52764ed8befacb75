"""The stages that repair children: what was done to a child is found once, and kept in the run directory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict

import torch
from torch import nn
from transformers import PreTrainedModel

from llmprune.blocks.library import BlockLibrary
from llmprune.choices.architecture import Architecture
from llmprune.core.budgets import Pick, pick_record
from llmprune.core.errors import DataError, ExportError, RecipeError
from llmprune.core.files import read_json, write_json
from llmprune.core.recipe import Recipe
from llmprune.data.tokens import Split
from llmprune.measure.record import Front, Record, child_id
from llmprune.models.surgery import prune
from llmprune.pipeline.judges import Judges
from llmprune.pipeline.run import Run
from llmprune.pipeline.run_directory import hash_of
from llmprune.recover.distillation import Settings, distil, precision_for
from llmprune.recover.held_out import held_out, windows_to_learn_from
from llmprune.recover.repair import Repair
from llmprune.recover.sequential import nats_on_the_way, on_the_way, refit_sequentially
from llmprune.search.front import with_verdicts
from llmprune.search.judging import Finish, quote

REFIT, DISTIL = "refit", "distil"
CHECKING = 0.15
"""Share of a distillation's minutes that may go into looking how well it does."""
SCHEMA = 1
"""Of repairs: what was made under another number is made again."""


def refit_tokens(run: Run, judges: Judges) -> Split:
    """The part of the recovery split, or without one of the calibration split, that a refit is fitted to and repairs
    are judged by."""
    tokens = judges.stock.tokens
    split = tokens["recovery" if "recovery" in tokens.splits else "calibration"]
    share = min(1.0, run.recipe.recover.refit_tokens / split.tokens)
    return split.head(split.first_windows(share))


def refit_child(run: Run, judges: Judges, architecture: Architecture, library: BlockLibrary) -> Repair | None:
    """The sequential refit of a child; None if it does not help on held-out tokens, which is said.

    It is kept in the run directory, and found there for the same child and tokens.
    """
    stock, split = judges.stock, refit_tokens(run, judges)
    of = child_id(architecture.hash, library.hash)
    key = hash_of(of, stock.parent_hash, split.hash, SCHEMA)
    path = run.directory.repair_of(of, REFIT)
    found = Repair.read(path, key)
    if found is None:
        found = _refitted(run, judges, architecture, library, split)
        found.write(path, key)
    if not found.facts["helps"]:
        run.say(
            f"the refit of {of} is left out: on held-out text nothing that was solved is better than the "
            f"{found.facts['nats_before']:.3f} nats a token that the child has"
        )
        return None
    return found


def _refitted(run: Run, judges: Judges, architecture: Architecture, library: BlockLibrary, split: Split) -> Repair:
    parent = judges.stock.parent
    child, judged_by = prune(parent, architecture, library), _held_out(split)
    with run.show("solving output projections on the child's own inputs") as advance:
        solved = refit_sequentially(
            parent,
            child,
            architecture,
            split,
            memory_bytes=run.recipe.recover.memory_bytes,
            scratch=run.directory.path,
            progress=advance,
        )
    with run.show("how far to go to what was solved") as advance:
        nats = nats_on_the_way(child, solved.tensors, judged_by, advance)
    share = min(nats, key=nats.__getitem__)
    blocks = [{**asdict(block), "kinds": list(block.kinds)} for block in solved.blocks]
    facts = {"tokens": split.tokens, "share": share, "nats_before": nats[0.0], "nats_after": nats[share]}
    tensors = on_the_way(child, solved.tensors, share)
    return Repair.of(REFIT, tensors, {**facts, "helps": share > 0, "blocks": blocks})


def _held_out(split: Split) -> Split:
    found = held_out(split)
    if not found.sources:
        raise DataError("a repair is judged by recovery text that is held out; raise data.recovery_tokens")
    return found


def check_recovery(recipe: Recipe) -> None:
    """Raises RecipeError if a recipe says neither minutes nor tokens, or has no text to recover on."""
    if not recipe.recover.distils:
        raise RecipeError("recovery needs recover.minutes or recover.tokens; for example recover.minutes=10")
    if not recipe.data.recovery_tokens:
        raise RecipeError("recovery needs text of its own; for example data.recovery_tokens=262144")


def recover_pick(run: Run, judges: Judges, front: Front, pick: Pick) -> Front:
    """Distil the picked child from its parent, and put what becomes of it in its place on the front, if it is better on
    the validation split; its one-shot form stays.

    A training that was stopped goes on where it was. Raises as `check_recovery` does, and BudgetError if no child holds
    the pick.
    """
    check_recovery(run.recipe)
    record = pick_record(front.children, pick)
    library = judges.stock.library
    if _is_distilled(run, judges, record, library):
        return front
    repair = distil_child(run, judges, record, library)
    finish = finishing([*repairs_of(run, record, library), repair])
    # `again` notes what was done last; the record has the rest.
    judge = judges.judge("validation", run.recipe.front.repeats, finish=finish._replace(name=repair.name))
    recovered = judge.again(record)
    if recovered.nats_per_token >= record.nats_per_token:
        run.say(f"what distillation made of {record.id} is not better on the validation split, and is left out")
        return front
    recovered = quote(recovered.model_copy(update=dict.fromkeys(("test", "unseen"))), judges.quoting(finish=finish))
    before = front.before_repair(record) or record
    one_shot = [*(one for one in front.one_shot if one.id != before.id), before]
    children = tuple(recovered if one.id == record.id else one for one in front.children)
    found = front.model_copy(update={"children": children, "one_shot": tuple(one_shot)})
    found = with_verdicts(found, run.recipe.front.usable_ppl_ratio)
    run.directory.write_front(found)
    return found


def _is_distilled(run: Run, judges: Judges, record: Record, library: BlockLibrary) -> bool:
    """Whether the last that was done to a child is what the recipe asks for."""
    if not record.done:
        return False
    of = child_id(record.hash, library.hash, record.done[:-1])
    found = Repair.read(run.directory.repair_of(of, DISTIL), _inputs(run, judges, of))
    return found is not None and found.name == record.done[-1]


def _inputs(run: Run, judges: Judges, of: str) -> str:
    """Hash of what a distillation of the child with this id depends on."""
    stock = judges.stock
    tokens = [stock.tokens["recovery"].hash, refit_tokens(run, judges).hash]
    return hash_of(of, stock.parent_hash, tokens, run.recipe.recover.decisive(), SCHEMA)


def distil_child(run: Run, judges: Judges, record: Record, library: BlockLibrary) -> Repair:
    """What distillation makes of a child; kept in the run directory, and found there for the same inputs."""
    stock, of_refit = judges.stock, refit_tokens(run, judges)
    judged_by, inputs = _held_out(of_refit), _inputs(run, judges, record.id)
    path = run.directory.repair_of(record.id, DISTIL)
    if (found := Repair.read(path, inputs)) is not None:
        return found
    child = _own(prune(stock.parent, record.architecture, library))
    for repair in repairs_of(run, record, library):
        repair.apply(child)
    child = _own(child)
    windows_WT = windows_to_learn_from(stock.tokens["recovery"], of_refit)
    settings = _settings(run, judges, record, child, windows_WT, judged_by, inputs)
    state = path.with_name(f"{path.stem}-state.safetensors")
    with run.show(f"distilling {record.id} on {settings.tokens:,} tokens, {settings.precision}") as advance:
        course = distil(
            stock.parent.model,
            child,
            windows_WT,
            judged_by,
            settings,
            state,
            hash_of(inputs, asdict(settings)),
            lambda done, total, told: advance(done, total),
        )
    if course.ended:
        run.say(f"distillation ended early, and keeps its best state: {course.ended}")
    tensors = {name: parameter.detach() for name, parameter in child.named_parameters()}
    repair = Repair.of(DISTIL, tensors, {"settings": asdict(settings), "course": asdict(course)})
    repair.write(path, inputs)
    for file in state.parent.glob(f"{state.stem}*"):
        file.unlink()
    return repair


def _own(child: PreTrainedModel) -> PreTrainedModel:
    """The child, its tensors no longer the parent's."""
    for module in child.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().to(torch.float32).clone(), requires_grad=False))
    child.tie_weights()
    return child


def _settings(
    run: Run,
    judges: Judges,
    record: Record,
    child: PreTrainedModel,
    windows_WT: torch.Tensor,
    judged_by: Split,
    inputs: str,
) -> Settings:
    """How long and in which precision: measured once, and kept, so that a training that goes on is the same one."""
    rules, file = run.recipe.recover, run.directory.repair_of(record.id, DISTIL).with_suffix(".json")
    if file.is_file() and (kept := read_json(file)).get("inputs") == inputs:
        return Settings(**kept["settings"])
    with run.show("measuring how fast the child learns"):
        precision, seconds = precision_for(judges.stock.parent.model, child.requires_grad_(True), windows_WT[0])
    if rules.precision != "auto":
        precision = rules.precision
    tokens, checks = rules.tokens, Settings.checks
    if tokens is None:
        assert rules.minutes is not None, "the recipe was checked"
        # A check is a forward pass in float32: half of what learning takes, or less.
        of_check = judged_by.tokens / windows_WT.shape[1] * seconds / 2
        checks = max(2, min(checks, int(CHECKING * 60 * rules.minutes / of_check)))
        left = max(60 * rules.minutes - checks * of_check, 30 * rules.minutes)
        tokens = max(1, round(left / seconds)) * windows_WT.shape[1]
    settings = Settings(tokens, precision, rules.learning_rate, rules.windows_a_step, checks=checks)
    write_json(file, {"inputs": inputs, "settings": asdict(settings)})
    return settings


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
