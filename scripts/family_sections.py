"""The sections of `bench_families.py`: each measures one part of the search on one model, and returns JSON."""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from bench_sections import costs
from scipy.stats import rankdata, spearmanr
from zoo_checks import BATCH_TOKENS, paired
from zoo_models import held_out_data

from llmprune.choices.architecture import Architecture
from llmprune.choices.choice import Choice
from llmprune.choices.space import Space
from llmprune.core.recipe import BaselinesRecipe, Recipe
from llmprune.core.recipe_inputs import ModelRecipe
from llmprune.measure.quality.perplexity import score
from llmprune.measure.quality.prefix import PrefixScorer
from llmprune.measure.quality.scores import SplitScorer, WindowScores
from llmprune.models.surgery import prune
from llmprune.pipeline.commands import baselines, front, search
from llmprune.pipeline.judges import Judges
from llmprune.pipeline.prepare import prepare, stock_up
from llmprune.pipeline.recovery import refit_child
from llmprune.pipeline.run import Run
from llmprune.recover.adapters import trainable
from llmprune.recover.distillation import Settings, distil
from llmprune.recover.held_out import held_out, windows_to_learn_from
from llmprune.recover.repair import with_own_tensors
from llmprune.recover.teacher import LiveTeacher
from llmprune.tables.estimate import estimate_delta_nats
from llmprune.tables.exact import BROKEN, exact_delta_nats

RESAMPLES = 2000
CLEAR_STANDARD_ERRORS = 5.0
"""From here on an exact score is no noise, and a ratio to it says something."""

ALIKE = 0.001
"""Nats a token: where all methods lose next to nothing, a hundredth in speed decides between them."""

LEARNING_RATE = 3e-4
"""A fraction of what the zoo was trained with."""

Key = tuple[int, Choice]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Sizes:
    """How much is measured. What a search is given is little: models are small, and there are many."""

    calibration_tokens: int = 16_384
    search_tokens: int = 8_192
    validation_tokens: int = 32_768
    table_tokens: int = 4_096
    ffn_step: int = 64
    prompt_tokens: int = 128
    repeats: int = 3
    trials: int = 10
    targets: tuple[float, ...] = (1.4, 1.8)
    choices_a_kind: int = 24
    learnt_tokens: int = 65_536


def recipe_of(model: Path, text: Path, sizes: Sizes) -> Recipe:
    """A search for prefill at batch 8: decoding so small a model would time Python."""
    data = held_out_data(
        text,
        calibration_tokens=sizes.calibration_tokens,
        search_tokens=sizes.search_tokens,
        validation_tokens=sizes.validation_tokens,
        test_tokens=256,
    )
    return Recipe.model_validate(
        {
            "model": ModelRecipe(path=str(model), device="cpu").model_dump(),
            "data": data.model_dump(),
            "workload": {
                "batch": 8,
                "prompt_tokens": sizes.prompt_tokens,
                "generated_tokens": 2,
                "threads": 1,
                "repeats": sizes.repeats,
            },
            "tables": {"tokens": sizes.table_tokens, "path_tokens": sizes.table_tokens, "path_step": 1.08},
            "space": {"kv_groups_step": 1, "ffn_step": sizes.ffn_step},
            "search": {"objective": "prefill", "targets": sizes.targets, "trials": sizes.trials},
            # Methods are compared one-shot; what a refit gives is a section of its own.
            "recover": {"refit": False},
            "front": {
                "repeats": 2 * sizes.repeats,
                "baselines_at": sizes.targets[0],
                "baselines": [],
                "checkpoints": "none",
            },
            "export": {"pick": f"prefill_speedup>={sizes.targets[0]}"},
        }
    )


@dataclass
class Recording:
    """A scorer that keeps the window scores it gives, for standard errors."""

    scorer: SplitScorer
    seen: dict[Architecture, WindowScores] = field(default_factory=dict)

    def score(self, architecture: Architecture) -> WindowScores:
        self.seen[architecture] = self.scorer.score(architecture)
        return self.seen[architecture]


def scores(run: Run, sizes: Sizes) -> dict[str, Any]:
    """Estimated against exact nats lost for widths, KV groups and drops, both on the same validation tokens."""
    stock = stock_up(run)
    split, space = stock.tokens["validation"], stock.space
    kinds = choices_by_kind(space, sizes.choices_a_kind)
    wanted = [key for keys in kinds.values() for key in keys]
    with run.show("estimated scores") as advance:
        estimated = estimate_delta_nats(stock.parent, split, stock.library, tokens=split.tokens, progress=advance)
    recording, whole = (
        Recording(PrefixScorer(stock.parent, stock.library, split, batch_tokens=BATCH_TOKENS)),
        space.shape.architecture,
    )
    with run.show("exact scores") as advance:
        exact = exact_delta_nats(recording, split, space, wanted, advance)
    base = recording.seen[whole].nats
    found = []
    for name, keys in kinds.items():
        for layer, choice in keys:
            row: dict[str, Any] = {"kind": name, "layer": layer, "block": choice.kind, **choice.to_json()}
            seen = recording.seen.get(whole.with_choice(layer, choice))
            row |= {"estimated_nats": estimated[layer, choice], "exact_nats": exact[layer, choice]}
            row["standard_error"] = paired(split, seen.nats, base)[1] if seen else None
            row["usable"] = is_usable(row["estimated_nats"], row["exact_nats"], row["standard_error"])
            found.append(row)
    return {
        "tokens": split.tokens,
        "windows": sum(len(source.windows) for source in split.sources.values()),
        "kinds": {name: agreement([row for row in found if row["kind"] == name]) for name in kinds},
        "choices": [{k: _finite_or_none(v) for k, v in row.items()} for row in found],
    }


def choices_by_kind(space: Space, most: int) -> dict[str, list[Key]]:
    """At most so many choices of each kind, drawn at random; of drops, all."""
    layers, generator = range(space.shape.layers), random.Random(0)
    kinds: dict[str, list[Key]] = {
        "widths": [(i, c) for i in layers for c in space.ffn[:-1] if c.units],
        "kv groups": [(i, c) for i in layers for c in space.attention[:-1] if c.units],
    }
    drawn = {name: generator.sample(keys, min(most, len(keys))) for name, keys in kinds.items()}
    drops: list[Key] = [(i, ladder[0]) for i in layers for ladder in (space.attention, space.ffn)]
    return {**drawn, "drops": [(i, c) for i, c in drops if c.units == 0]}


def is_usable(estimated: float, exact: float, error: float | None) -> bool:
    """Whether both scores are those of a model that computes something: what is not is counted apart."""
    return math.isfinite(estimated) and exact < BROKEN and error is not None and math.isfinite(error)


def agreement(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rank correlation with its 95% interval, and bias, of the usable rows; and how many were not."""
    usable = [row for row in rows if row["usable"]]
    estimated, exact, error = (
        np.array([row[k] for row in usable], dtype=np.float64)
        for k in ("estimated_nats", "exact_nats", "standard_error")
    )
    clear = exact >= CLEAR_STANDARD_ERRORS * error
    low, high = bootstrap_interval(estimated, exact)
    return {
        "n": len(usable),
        "unusable": len(rows) - len(usable),
        "spearman": rank_correlation(estimated, exact),
        "spearman_low": low,
        "spearman_high": high,
        "median_difference_nats": _median(estimated - exact),
        "median_ratio": _median(estimated[clear] / exact[clear]),
        "n_ratio": int(clear.sum()),
        "median_exact_nats": _median(exact),
        "median_standard_errors": _median(np.divide(exact, error, out=np.zeros_like(exact), where=error > 0)),
    }


def rank_correlation(first: FloatArray, second: FloatArray) -> float | None:
    """Spearman's; None where it is not defined: fewer than three pairs, or one side all alike."""
    if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(spearmanr(first, second)[0])


def bootstrap_interval(
    first: FloatArray, second: FloatArray, resamples: int = RESAMPLES
) -> tuple[float, float] | tuple[None, None]:
    """95% percentile interval of the rank correlation, pairs drawn anew; resamples that have none are left out."""
    if rank_correlation(first, second) is None:
        return None, None
    drawn = np.random.default_rng(0).integers(len(first), size=(resamples, len(first)))
    first_RN, second_RN = (rankdata(values[drawn], axis=1) for values in (first, second))
    first_RN, second_RN = (ranks - ranks.mean(axis=1, keepdims=True) for ranks in (first_RN, second_RN))
    scale_R = np.sqrt((first_RN**2).sum(axis=1) * (second_RN**2).sum(axis=1))
    found = (first_RN * second_RN).sum(axis=1)[scale_R > 0] / scale_R[scale_R > 0]
    low, high = np.percentile(found, (2.5, 97.5))
    return float(low), float(high)


def times(run: Run, sizes: Sizes) -> dict[str, Any]:
    """Predicted against measured time of mixed children, of prefill alone."""
    found = costs(run, prepare(run))
    return {
        "children": [
            {"predicted_speedup": c["estimated"]["prefill"], "measured_speedup": c["measured"]["prefill"]}
            for c in found["children"]
        ],
        "median_absolute_error": found["median_absolute_error"]["prefill"],
        "median_error": found["median_error"]["prefill"],
    }


def contest(run: Run, sizes: Sizes) -> dict[str, Any]:
    """Nats a token that the search's child loses beside random and uniform, at equal measured speed-ups."""
    outcome = search(run)
    measured = front(run)
    rules = BaselinesRecipe(methods=("uniform", "random"), at=sizes.targets)
    entries = baselines(run, rules).results
    rows = [{key: entry[key] for key in ("method", "at", "nats_lost", "interpolated", "why")} for entry in entries]
    return {
        "trials": outcome.finished_trials,
        "tokens": measured.parent.measured_on.tokens,
        "parent_nats_per_token": measured.parent.nats_per_token,
        "results": rows,
        "never_worse": never_worse(rows),
    }


def repair(run: Run, sizes: Sizes) -> dict[str, Any]:
    """Nats a token that a child with half of every block loses on validation tokens: one-shot, after its refit, and
    after a distillation of that on the same calibration tokens."""
    stock = stock_up(run)
    split, shape = stock.tokens["validation"], stock.space.shape
    half = [ladder[len(ladder) // 2] for ladder in (stock.space.attention, stock.space.ffn)]
    architecture = shape.architecture.with_choices((layer, choice) for layer in range(shape.layers) for choice in half)
    judges = Judges(run, stock)
    found = refit_child(run, judges, architecture, stock.library)
    child = with_own_tensors(prune(stock.parent, architecture, stock.library))
    nats = {"parent": score(stock.parent.model, split), "one_shot": score(child, split)}
    if found is not None:
        found.apply(child)
        child = with_own_tensors(child)
    nats["refit"] = score(child, split)
    calibration = stock.tokens["calibration"]
    settings = Settings(sizes.learnt_tokens, "float32", LEARNING_RATE)
    with tempfile.TemporaryDirectory() as directory, trainable(child, None):
        state = Path(directory) / "state.safetensors"
        windows_WT = windows_to_learn_from(calibration, calibration)
        course = distil(LiveTeacher(stock.parent.model), child, windows_WT, held_out(calibration), settings, state, "")
    nats["distilled"] = score(child, split)
    base = nats.pop("parent").nats_per_token
    return {
        "tokens": split.tokens,
        "kept": [choice.label for choice in half],
        "nats_lost": {name: quality.nats_per_token - base for name, quality in nats.items()},
        "share": 0.0 if found is None else found.facts["share"],
        "learnt_tokens": course.tokens,
        "ended": course.ended,
    }


def never_worse(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the search loses no more than any other method at each speed, but for ALIKE; what it does not reach, it
    loses if another method does reach it."""
    own = {row["at"]: row["nats_lost"] for row in rows if row["method"] == "llmprune"}
    others = [row for row in rows if row["method"] != "llmprune" and row["nats_lost"] is not None]
    return all((mine := own.get(row["at"])) is not None and mine <= row["nats_lost"] + ALIKE for row in others)


def _median(values: FloatArray) -> float | None:
    return float(np.median(values)) if len(values) else None


def _finite_or_none(value: Any) -> Any:
    """JSON has no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


SECTIONS: dict[str, Callable[[Run, Sizes], dict[str, Any]]] = {
    "scores": scores,
    "times": times,
    "search": contest,
    "repair": repair,
}
