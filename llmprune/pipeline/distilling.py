"""Distilling one child of a run: what that depends on, how long it goes on, and where it is kept."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from llmprune.blocks.library import BlockLibrary
from llmprune.core.errors import RecipeError
from llmprune.core.files import read_json, write_json
from llmprune.core.recipe import Recipe
from llmprune.core.recipe_recover import RecoverRecipe
from llmprune.data.tokens import Split
from llmprune.measure.record import Record, child_id
from llmprune.models.surgery import prune
from llmprune.pipeline.judges import Judges
from llmprune.pipeline.repairs import SCHEMA, judging_text, refit_tokens, repairs_of
from llmprune.pipeline.run import Run
from llmprune.pipeline.run_directory import hash_of
from llmprune.recover.adapters import trainable
from llmprune.recover.distillation import Settings, distil, precision_for, seconds_of_window
from llmprune.recover.held_out import windows_to_learn_from
from llmprune.recover.repair import DISTIL, Repair, with_own_tensors
from llmprune.recover.sharding import shard_layers, whole
from llmprune.recover.step_memory import recomputed
from llmprune.recover.student import Precision, in_precision
from llmprune.recover.teacher import LiveTeacher, StoredTeacher, Teacher
from llmprune.recover.team import ALONE, Team

SHORT = 256
"""Tokens that precisions are compared on."""
CHECKING = 0.15
"""Share of a distillation's minutes that may go into looking how well it does."""


def check_recovery(recipe: Recipe, team: Team = ALONE) -> None:
    """Raises RecipeError if a recipe says neither minutes nor tokens, has no text to recover on, gives the processes
    that train together too little to do, or is to be spread over a single one."""
    rules = recipe.recover
    if not rules.distils:
        raise RecipeError("recovery needs recover.minutes or recover.tokens; for example recover.minutes=10")
    if not recipe.data.recovery_tokens:
        raise RecipeError("recovery needs text of its own; for example data.recovery_tokens=262144")
    if rules.windows_a_step % team.size:
        raise RecipeError(
            f"recover.windows_a_step={rules.windows_a_step} cannot be shared by {team.size} processes; give a multiple "
            f"of {team.size}"
        )
    if rules.shard and team.size == 1:
        raise RecipeError(
            "recover.shard spreads a child over several processes, and this is one; start them with torchrun "
            "--nproc_per_node 2 -m llmprune recover RUN"
        )


@dataclass(frozen=True)
class Lesson:
    """What a distillation of one child is given."""

    run: Run
    judges: Judges
    record: Record
    library: BlockLibrary
    rules: RecoverRecipe
    team: Team = ALONE

    @property
    def path(self) -> Path:
        """Where its result is kept; its state and settings lie beside it until it is done."""
        return self.run.directory.repair_of(self.record.id, DISTIL)

    @cached_property
    def inputs(self) -> str:
        return _inputs(self.run, self.judges, self.record.id, self.rules)

    @cached_property
    def judged_by(self) -> Split:
        return judging_text(self.run, self.judges)

    @cached_property
    def windows_WT(self) -> Tensor:
        return windows_to_learn_from(self.judges.stock.tokens["recovery"], refit_tokens(self.run, self.judges))

    def teacher(self, precision: Precision) -> Teacher:
        """What it learns from; stored logits serve every child of the run that learns from the same windows."""
        stock, kept, (windows, length) = self.judges.stock, self.rules.stored_logits, self.windows_WT.shape
        parent = in_precision(stock.parent.model, precision)
        if kept is None:
            return LiveTeacher(parent)
        tokens = [stock.tokens["recovery"].hash, refit_tokens(self.run, self.judges).hash]
        key = hash_of(stock.parent_hash, tokens, kept, precision)
        file = self.run.directory.teacher / f"{key[:16]}-{self.team.rank}"
        return StoredTeacher(parent, windows, length - 1, kept, file)

    def child(self) -> PreTrainedModel:
        """The child as it is so far; its tensors are its own."""
        child = with_own_tensors(prune(self.judges.stock.parent, self.record.architecture, self.library))
        for repair in repairs_of(self.run, self.record, self.library):
            repair.apply(child)
        return with_own_tensors(child)


def _inputs(run: Run, judges: Judges, of: str, rules: RecoverRecipe) -> str:
    """Hash of what a distillation of the child with this id depends on."""
    stock = judges.stock
    tokens = [stock.tokens["recovery"].hash, refit_tokens(run, judges).hash]
    return hash_of(of, stock.parent_hash, tokens, rules.decisive(), SCHEMA)


def distilled(run: Run, judges: Judges, record: Record, library: BlockLibrary, rules: RecoverRecipe) -> int | None:
    """The tokens that a child was distilled on, if that was the last that was done to it, and as it is asked for."""
    if not record.done:
        return None
    of = child_id(record.hash, library.hash, record.done[:-1])
    found = Repair.read(run.directory.repair_of(of, DISTIL), _inputs(run, judges, of, rules))
    return found.facts["settings"]["tokens"] if found is not None and found.name == record.done[-1] else None


def distil_child(lesson: Lesson) -> Repair:
    """What distillation makes of a child; kept in the run directory, and found there for the same inputs."""
    run, rules, team, path = lesson.run, lesson.rules, lesson.team, lesson.path
    if team.agreed(lambda: Repair.read(path, lesson.inputs) is not None):
        found = Repair.read(path, lesson.inputs)
        assert found is not None, "the first process saw it"
        return found
    child = lesson.child()
    state = path.with_name(f"{path.stem}-state.safetensors")
    with trainable(child, rules.lora_rank), recomputed(child) if rules.gradient_checkpointing else nullcontext():
        if rules.shard:
            layers = child.get_submodule(lesson.judges.stock.parent.family.layers)
            shard_layers(layers.children(), child.device, team)
        settings = _settings(lesson, child)
        together = f", by {team.size} processes" if team.size > 1 else ""
        told = f"distilling {lesson.record.id} on {settings.tokens:,} tokens, {settings.precision}{together}"
        with run.show(told) as advance:
            course = distil(
                lesson.teacher(settings.precision),
                child,
                lesson.windows_WT,
                lesson.judged_by,
                settings,
                state,
                hash_of(lesson.inputs, asdict(settings)),
                lambda done, total, told: advance(done, total),
                team,
            )
    if course.ended:
        run.say(f"distillation ended early, and keeps its best state: {course.ended}")
    tensors = {name: whole(parameter) for name, parameter in child.named_parameters()}
    repair = Repair.of(DISTIL, tensors, {"settings": asdict(settings), "course": asdict(course)})
    if team.leads:
        repair.write(path, lesson.inputs)
        for file in state.parent.glob(f"{state.stem}*"):
            file.unlink()
    return repair


def _settings(lesson: Lesson, child: PreTrainedModel) -> Settings:
    """How long and in which precision: measured once, and kept, so that a training that goes on is the same one."""
    run, rules, team, file = lesson.run, lesson.rules, lesson.team, lesson.path.with_suffix(".json")
    kept = team.agreed(lambda: read_json(file) if file.is_file() else {})
    if kept.get("inputs") == lesson.inputs:
        return Settings(**kept["settings"])
    with run.show("measuring how fast the child learns"):
        measured = _rates(lesson, child)
    # The others measured at the same time: that is how fast they learn beside each other.
    precision, new, known = team.agreed(lambda: measured)
    tokens, checks = rules.tokens, Settings.checks
    if tokens is None:
        assert rules.minutes is not None, "the recipe was checked"
        windows, length = lesson.windows_WT.shape
        # A check is a forward pass: a third of what learning takes, or less.
        of_check = lesson.judged_by.tokens / length * new / 3
        checks = max(2, min(checks, int(CHECKING * 60 * rules.minutes / of_check)))
        left = max(60 * rules.minutes - checks * of_check, 30 * rules.minutes)
        first = min(windows / team.size, left / new)
        tokens = max(1, round(first + (left - first * new) / known)) * length * team.size
    settings = Settings(tokens, precision, rules.learning_rate, rules.windows_a_step, checks=checks)
    if team.leads:
        write_json(file, {"inputs": lesson.inputs, "settings": asdict(settings)})
    return settings


def _rates(lesson: Lesson, child: PreTrainedModel) -> tuple[Precision, float, float]:
    """The precision, and seconds of a window that is new and of one whose logits are stored."""
    rules, window_T = lesson.rules, lesson.windows_WT[0]
    parent = lesson.judges.stock.parent.model
    # Which precision is faster shows on a few tokens.
    few_T = window_T[:SHORT]
    precision = precision_for(parent, child, few_T) if rules.precision == "auto" else rules.precision
    new = seconds_of_window(LiveTeacher(in_precision(parent, precision)), child, window_T, precision)
    # Each of several processes stores what it sees itself, so a window is seldom known to all.
    alone = rules.stored_logits is not None and lesson.team.size == 1
    return precision, new, seconds_of_window(lesson.teacher(precision), child, window_T, precision) if alone else new
