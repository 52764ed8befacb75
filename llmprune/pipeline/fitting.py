"""Which plan a recipe makes for a parent, whether it fits this machine, and which recipe that comes along to take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmprune.choices.dimensions import BLOCK_KINDS
from llmprune.choices.space import Space
from llmprune.core.errors import LlmpruneError
from llmprune.core.progress import Show
from llmprune.core.recipe import Recipe
from llmprune.core.recipe_files import DEFAULT_RECIPE, GENERAL_RECIPES, LLAMACPP_RECIPE, recipe_path
from llmprune.core.recipe_inputs import ModelRecipe
from llmprune.core.recipe_text import apply_overrides, parse_recipe
from llmprune.core.yaml_text import read_yaml_file
from llmprune.forecast.fit import Fit, Stages, fit_of
from llmprune.forecast.forecast import Until, forecast
from llmprune.forecast.plan import Done, Plan, StageCost
from llmprune.forecast.rates import Asked, Measured, Rates, measure_rates
from llmprune.formats.gguf import tensor_bytes
from llmprune.formats.limits import check_precision
from llmprune.measure.room import Room
from llmprune.measure.speed.throughput import Workload
from llmprune.models.loading import dtype_of
from llmprune.models.parent import Parent, outline_parent
from llmprune.models.sizes import parameter_bytes
from llmprune.models.walk import is_brought, walking_dtype
from llmprune.pipeline.prepare import check_recipe, device_of, space_of
from llmprune.pipeline.run_directory import RunDirectory

UNIFORM = ("space.size=small",)
"""What llama.cpp asks for in families whose layers it has all alike."""
SHORTER = (512, 256)
"""Tokens a window."""


def plan_of(
    parent: Parent, recipe: Recipe, space: Space, workload: Workload, device: torch.device, sizes: int = 0
) -> Plan:
    """All that decides what a run of a parent, which may be an outline, costs on a device, with `sizes` of the whole
    model to measure. Weights are counted in the workload's dtype."""
    dtype: torch.dtype = getattr(torch, workload.dtype)
    gguf = recipe.workload.engine == "llamacpp" or "gguf" in recipe.deploy.formats
    return Plan(
        recipe,
        space,
        workload,
        vocabulary=parent.model.config.get_text_config().vocab_size,
        parent_bytes=parameter_bytes(parent.model) * dtype.itemsize // parent.model.dtype.itemsize,
        dtype_bytes=dtype.itemsize,
        biased=frozenset(kind for kind in BLOCK_KINDS if parent.output_bias(0, kind) is not None),
        gguf_bytes=sum(tensor_bytes(parent.model, recipe.deploy.gguf_type).values()) if gguf else 0,
        whole_sizes=sizes,
        walked=is_brought(dtype, device),
        walking_bytes=walking_dtype(dtype, device).itemsize,
        # One that is spread over several GPUs has no home to come back to.
        can_wait=device.type != "cpu" and "," not in recipe.model.device,
    )


def plan_under(parent: Parent, recipe: Recipe, device: torch.device, sizes: int = 0) -> Plan:
    """The plan that a recipe makes for a parent. Raises LlmpruneError if the recipe can do nothing with it."""
    check_recipe(parent, recipe, device)
    check_precision(parent, recipe)
    dtype = dtype_of(parent.model) if recipe.model.dtype == "auto" else recipe.model.dtype
    workload = Workload.from_recipe(recipe.workload, dtype, str(device), recipe.deploy.gguf_type)
    return plan_of(parent, recipe, space_of(parent, recipe), workload, device, sizes)


def asked_of(plan: Plan, *, reach: bool = False) -> Asked:
    """What a plan wants to know of the parent's speed."""
    windows = max(plan.windows("search").values())
    return Asked(plan.space, plan.workload, windows, plan.recipe.data.seq_len, reach)


def forecast_within(room: Room, plan: Plan, done: Done | None = None, until: Until = "export") -> list[StageCost]:
    """The stages of a plan where there is so much room: a parent waits where it has to."""
    return [stage.within(room.memory_bytes) for stage in forecast(plan, done, until=until)]


def fit_plan(
    plan: Plan,
    parent: Parent,
    device: torch.device,
    room: Room,
    until: Until = "export",
    done: Done | None = None,
    directory: RunDirectory | None = None,
) -> Fit:
    """Hold a plan to what there is; settings that the run `directory` would refuse are not among what helps."""
    known: dict[tuple[str, ...], Stages | None] = {(): forecast_within(room, plan, done, until)}

    def changed(settings: Sequence[str]) -> Stages | None:
        key = tuple(settings)
        if key not in known:
            try:
                recipe = _with(plan.recipe, settings)
                if directory is not None:
                    directory.check_recipe(recipe)
                other = plan_under(parent, recipe, device, plan.whole_sizes)
                known[key] = forecast_within(room, other, done, until)
            except LlmpruneError:
                known[key] = None
        return known[key]

    return fit_of(room, list(_settings(plan)), changed)


def _with(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    data = apply_overrides(recipe.model_dump(mode="json"), list(settings))
    return parse_recipe(data, origin="a recipe with other settings")


def _settings(plan: Plan) -> Iterator[str]:
    """What takes less, beginning with what costs a child the least."""
    recipe = plan.recipe
    if recipe.front.checkpoints != "none":
        yield "front.checkpoints=none"
    yield f"tables.tokens={max(64, recipe.tables.tokens // 4)}"
    yield from (f"data.seq_len={tokens}" for tokens in SHORTER if tokens < recipe.data.seq_len)
    yield f"data.calibration_tokens={max(256, recipe.data.calibration_tokens // 4)}"
    yield from (f"space.ffn_step={times * recipe.space.ffn_step}" for times in (2, 4))
    if plan.dtype_bytes > 2:
        yield "model.dtype=bfloat16"


@dataclass(frozen=True)
class Candidate:
    """A recipe that comes along, with what it makes of a model here, or why it can make nothing of it."""

    recipe: str
    settings: tuple[str, ...] = ()
    """Without which it could not be used."""
    plan: Plan | None = None
    fit: Fit | None = None
    problem: str | None = None

    @property
    def can_be_used(self) -> bool:
        return self.fit is not None and self.fit.can_fit

    def to_json(self, rates: Rates | None) -> dict[str, Any]:
        """Seconds are those of `llmprune compress` with the settings."""
        settings = (*self.settings, *(self.fit.settings if self.fit else ()))
        seconds = sum(stage.seconds(rates) for stage in self.fit.stages) if self.fit and rates else None
        fit = self.fit and self.fit.to_json()
        return {
            "recipe": self.recipe,
            "problem": self.problem,
            "settings": list(settings),
            "seconds": seconds,
            "fit": fit,
        }


def candidates_for(parent: Parent, model: ModelRecipe, device: torch.device, room: Room) -> list[Candidate]:
    """The recipes for any model, as they are or as a model's family asks for."""
    return [_candidate(name, parent, model, device, room) for name in GENERAL_RECIPES]


def _candidate(name: str, parent: Parent, model: ModelRecipe, device: torch.device, room: Room) -> Candidate:
    problems: list[str] = []
    for settings in ((), UNIFORM):
        try:
            data = {**read_yaml_file(recipe_path(name)), "model": model.model_dump(mode="json")}
            recipe = parse_recipe(apply_overrides(data, list(settings)), origin=f"the {name} recipe")
            plan = plan_under(parent, recipe, device)
        except LlmpruneError as error:
            problems.append(str(error))
            continue
        return Candidate(name, settings, plan, fit_plan(plan, parent, device, room))
    return Candidate(name, problem=problems[0])


def asked_by(candidates: Sequence[Candidate]) -> dict[str, Asked]:
    """What those that can be used want to know of the parent's speed, by their recipe."""
    return {one.recipe: asked_of(one.plan) for one in candidates if one.plan is not None and one.can_be_used}


def advise(candidates: Sequence[Candidate], measured: Mapping[str, Measured], device: torch.device) -> dict[str, Any]:
    """Which recipe to use, as JSON: one that fits, as it is if there is one such; of two, llama.cpp's on a CPU, since
    that is what serves models there."""
    rates = {name: one.rates for name, one in measured.items()}
    preferred = LLAMACPP_RECIPE if device.type == "cpu" else DEFAULT_RECIPE
    ranks = [
        (not one.fit.fits, one.recipe != preferred, one.recipe)
        for one in candidates
        if one.fit is not None and one.can_be_used
    ]
    use = min(ranks)[-1] if ranks else None
    rows = [one.to_json(rates.get(one.recipe)) for one in candidates]
    return {"use": use, "recipes": rows}


def advise_on(model: ModelRecipe, out: Path, show: Show) -> dict[str, Any]:
    """Which recipe that comes along fits a model and this machine (see `advise`), with no weight read.

    Raises ModelError as `outline_parent` does.
    """
    with show("measuring which recipe fits this machine"):
        parent, device = outline_parent(model), device_of(model)
        candidates = candidates_for(parent, model, device, Room.of(device, out))
        asked = asked_by(candidates)
        measured = measure_rates(parent, device, asked) if asked else {}
        return advise(candidates, measured, device)
