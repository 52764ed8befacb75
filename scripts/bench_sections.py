"""The sections of `bench_search.py`: each measures one part of the search on a finished run, and returns JSON."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import optuna
from scipy.stats import spearmanr

from llmprune.choices.architecture import Architecture
from llmprune.core.recipe import SamplerName
from llmprune.data.tokens import Split
from llmprune.measure.quality.perplexity import quality_from_windows, score, score_windows
from llmprune.measure.quality.prefix import PrefixScorer
from llmprune.measure.quality.racing import mixture_samples, race, race_batch
from llmprune.measure.quality.scores import WindowScores
from llmprune.models.surgery import prune
from llmprune.pipeline.judges import Judges
from llmprune.pipeline.prepare import Prepared
from llmprune.pipeline.run import Run
from llmprune.pipeline.searching import estimates_for, guide_for, walk_path
from llmprune.search.guidance import Seed
from llmprune.search.samplers.evopress import level_switch
from llmprune.search.samplers.guide import Guide
from llmprune.search.samplers.ladders import as_indices
from llmprune.search.study import open_study, run_study
from llmprune.tables.allocate import Near
from llmprune.tables.block_tables import speedups_of
from llmprune.tables.draw import random_architecture
from llmprune.tables.estimate import estimate_delta_nats

SCORED_TOKENS = 2048
TOP_K = 512
CHOICES_A_KIND = 40
MIXED_CHILDREN = 8
CANDIDATES = 12
SAMPLER_TOKENS = 1024
SAMPLER_TRIALS = 10
COLD_TRIALS = 200
PATIENT_TRIALS = 100
TARGET = 1.5
SAMPLERS: tuple[SamplerName, ...] = ("slp", "evopress", "linas", "nsga2", "nsga3", "tpe", "gp", "random")
PATIENT: tuple[SamplerName, ...] = ("linas", "nsga2", "nsga3", "tpe", "random")
"""Not gp, which takes ten seconds and more to propose one of some sixty numbers."""


def guided(run: Run, prepared: Prepared) -> tuple[list[Seed], Guide]:
    """The path's seeds, and what guides the sampler."""
    estimates = estimates_for(run, prepared)
    guide = guide_for(run, prepared, Judges(run, prepared), estimates)
    assert guide is not None, "the recipe's sampler is a guided one"
    return walk_path(run, prepared, estimates), guide


def head(split: Split, tokens: int) -> Split:
    return split.head(split.first_windows(min(1.0, tokens / split.tokens)))


def scores(run: Run, prepared: Prepared) -> dict[str, Any]:
    """Spearman of the estimate with the exact replace-one-block score on the same tokens, as KL to the parent (which
    is Puzzle's score) and as nats lost (which for mild choices is mostly noise); and the cost of both."""
    split, space, generator = head(prepared.tokens["search"], SCORED_TOKENS), prepared.space, random.Random(0)
    layers = range(space.shape.layers)
    groups = {
        "ffn": [(i, c) for i in layers for c in space.ffn[:-1]],
        "kv groups": [(i, c) for i in layers for c in space.attention[:-1] if c.units],
        "attention drops": [(i, space.attention[0]) for i in layers],
    }
    sampled = {name: generator.sample(keys, min(CHOICES_A_KIND, len(keys))) for name, keys in groups.items()}
    forward_s = seconds_of(lambda: score(prepared.parent.model, split))
    began = time.monotonic()
    estimate = estimate_delta_nats(prepared.parent, split, prepared.library, tokens=split.tokens)
    estimate_s, began = time.monotonic() - began, time.monotonic()
    wanted = sorted((key for keys in sampled.values() for key in keys), key=lambda key: key[0])
    scorer = PrefixScorer(prepared.parent, prepared.library, split, top_k=TOP_K)
    base = nats_of(split, scorer.score(space.shape.architecture))
    nats, kl = {}, {}
    with run.show("exact scores") as advance:
        for done, (layer, choice) in enumerate(wanted):
            advance(done, len(wanted))
            found = scorer.score(space.shape.architecture.with_choice(layer, choice))
            nats[layer, choice] = nats_of(split, found) - base
            kl[layer, choice] = sum(float(values.sum()) for values in (found.kl or {}).values())
    exact_s = time.monotonic() - began

    def ranks(exact: Mapping[Any, float]) -> dict[str, float]:
        rows = {**sampled, "all": wanted}
        return {n: float(spearmanr([estimate[k] for k in ks], [exact[k] for k in ks])[0]) for n, ks in rows.items()}

    return {
        "tokens": split.tokens,
        "choices": {name: len(keys) for name, keys in sampled.items()},
        "spearman_with_exact_kl": ranks(kl),
        "spearman_with_exact_nats": ranks(nats),
        "choices_in_library": len(estimate),
        "estimate_seconds_in_forwards": estimate_s / forward_s,
        "exact_seconds_in_forwards_a_choice": exact_s / forward_s / len(wanted),
        "exact_layer_passes_saved": scorer.work.saved,
    }


def costs(run: Run, prepared: Prepared) -> dict[str, Any]:
    """Relative error of the table's time for mixed children that it was not made from, drawn at estimated speed-ups of
    the run's objective."""
    table, generator = prepared.tables.costs, random.Random(1)
    errors: dict[str, list[float]] = {"decode": [], "prefill": []}
    children = []
    with run.show("timing mixed children") as advance:
        for i, speedup in enumerate(np.linspace(1.15, 2.0, MIXED_CHILDREN)):
            advance(i, MIXED_CHILDREN)
            mixed = random_architecture(table, run.recipe.search.phase, float(speedup), generator)
            if mixed is None:
                # Not every parent has so much to save.
                continue
            repeats = run.recipe.workload.repeats
            measured = speedups_of(prepared.parent, mixed, prepared.library, prepared.workload, repeats)
            for phase, found in errors.items():
                found.append(table.relative_time(mixed, phase) * measured[phase] - 1)
            children.append({"estimated": {p: table.speedup(mixed, p) for p in errors}, "measured": measured})
    return {
        "children": children,
        "median_absolute_error": {p: statistics.median(map(abs, found)) for p, found in errors.items()},
        "median_error": {p: statistics.median(found) for p, found in errors.items()},
    }


@dataclass
class Plain:
    """Scores children by full passes, as if nothing were known of the parent."""

    prepared: Prepared
    split: Split

    @property
    def batch_windows(self) -> int:
        return race_batch(self.split)

    def hold(self, architecture: Architecture) -> None:
        """Nothing is kept."""

    def let_go(self, architecture: Architecture) -> None:
        """Nothing was kept."""

    def score_range(
        self, architecture: Architecture, start: Mapping[str, int], stop: Mapping[str, int]
    ) -> WindowScores:
        child = prune(self.prepared.parent, architecture, self.prepared.library)
        sources = {
            name: replace(s, windows=s.windows[start[name] : stop[name]], bytes=s.bytes[start[name] : stop[name]])
            for name, s in self.split.sources.items()
        }
        return WindowScores(score_windows(child, replace(self.split, sources=sources)))


def evaluation(run: Run, prepared: Prepared) -> dict[str, Any]:
    """Candidates decided per minute, kept or rejected against an incumbent, and how often the verdict is the same."""
    split, (path, guide) = prepared.tokens["search"], guided(run, prepared)
    incumbent = dict(path)[f"path-{TARGET:g}x"]
    start, generator = np.array(guide.space.indices(incumbent)), np.random.default_rng(0)
    needed = float(guide.ladders.saving(start))
    # Half from the knapsack at the incumbent, where the search looks, half level switches.
    allocator = replace(guide.allocator, delta_nats=guide.estimate(incumbent))
    wanted: dict[str, float] = {guide.phase: 1.0 / (1.0 - needed)}
    pool = allocator.pool(wanted, count=CANDIDATES // 2 + 1, distance=2, near=Near(incumbent, 8))
    candidates: dict[Architecture, None] = dict.fromkeys([a for a in pool if a != incumbent][: CANDIDATES // 2])
    while len(candidates) < CANDIDATES:
        switched = level_switch(start, guide.ladders, needed, generator)
        if switched is not None:
            candidates[guide.space.architecture(as_indices(switched))] = None
    of_incumbent = WindowScores(score_windows(prune(prepared.parent, incumbent, prepared.library), split))
    plain = Plain(prepared, split)
    prefix, by_kl = (prefix_scorer(prepared, split, incumbent, k) for k in (None, TOP_K))
    kl_of_incumbent = by_kl.score(incumbent)
    nats = nats_of(split, of_incumbent)

    def decided(
        scorer: Any, group: Sequence[Architecture], shares: Sequence[float], figure: Any = "nats"
    ) -> list[bool]:
        reference = kl_of_incumbent if figure == "kl" else of_incumbent
        raced = race(scorer, split, group, incumbent=reference, figure=figure, shares=shares, survivors=0)
        return [r.kept and r.scores is not None and nats_of(split, r.scores) < nats for r in raced]

    growing, whole = (1 / 8, 1 / 4, 1 / 2, 1.0), (1.0,)
    ways: dict[str, Callable[[Sequence[Architecture]], list[bool]]] = {
        "plain full passes": lambda group: decided(plain, group, whole),
        "prefix reuse": lambda group: decided(prefix, group, whole),
        "racing": lambda group: decided(plain, group, growing),
        "prefix reuse and racing": lambda group: decided(prefix, group, growing),
        "prefix reuse and racing by top-K KL": lambda group: decided(by_kl, group, growing, "kl"),
    }
    seconds, verdicts = dict.fromkeys(ways, 0.0), {name: list[bool]() for name in ways}
    every = list(candidates)
    # One of each kind in turn.
    groups = [every[i :: CANDIDATES // 4] for i in range(CANDIDATES // 4)]
    with run.show("deciding candidates") as advance:
        for i, group in enumerate(groups):
            advance(i, len(groups))
            for name, way in ways.items():
                began = time.monotonic()
                verdicts[name] += way(group)
                seconds[name] += time.monotonic() - began
    truth, base = verdicts["plain full passes"], seconds["plain full passes"]
    child = prune(prepared.parent, incumbent, prepared.library)
    whole = prepared.parent.model
    sliced = seconds_of(lambda: score_windows(child, split)), seconds_of(lambda: score_windows(whole, split))
    return {
        "tokens": split.tokens,
        "candidates": CANDIDATES,
        "kept": sum(truth),
        "ways": {
            name: {
                "decided_per_minute": 60 * CANDIDATES / seconds[name],
                "times_plain": base / seconds[name],
                "same_verdict": sum(a == b for a, b in zip(truth, verdicts[name], strict=True)),
            }
            for name in ways
        },
        # Seconds of a masked candidate are the parent's own.
        "sliced_child_against_masked_parent": sliced[1] / sliced[0],
        "masked_full_pass_seconds": sliced[1],
        "layer_passes_saved_by_prefix": prefix.work.saved,
    }


def prefix_scorer(prepared: Prepared, split: Split, incumbent: Architecture, top_k: int | None) -> PrefixScorer:
    """Has the parent's and the incumbent's states already, as in a search that goes on."""
    batch = race_batch(split) * split.seq_len
    scorer = PrefixScorer(prepared.parent, prepared.library, split, top_k=top_k, batch_tokens=batch)
    scorer.remember(incumbent)
    scorer.score(incumbent)
    return scorer


def nats_of(split: Split, found: WindowScores) -> float:
    return float(mixture_samples({n: v.numpy() for n, v in found.nats.items()}, split.weights).sum())


@dataclass
class Untimed:
    """A judge that scores, and takes the table's word for speed: samplers differ in what they propose."""

    prepared: Prepared
    split: Split
    scorer: PrefixScorer
    seen: list[tuple[float, float, Architecture]]

    def judge(self, architecture: Architecture, name: str) -> dict[str, Any]:
        quality = quality_from_windows(self.split, self.scorer.score(architecture).nats)
        speeds = {p: self.prepared.tables.costs.speedup(architecture, p) for p in ("decode", "prefill")}
        self.seen.append((speeds["decode"], quality.nats_per_token, architecture))
        return {
            "name": name,
            "hash": architecture.hash,
            "architecture": architecture.to_json(),
            "nats_per_token": quality.nats_per_token,
            "ppl": quality.ppl,
            **{f"{p}_speedup": {"median": s, "low": s, "high": s} for p, s in speeds.items()},
        }

    def best(self, trials: int | None = None) -> tuple[float, Architecture]:
        """Least nats among the first trials that hold the target."""
        return min(((n, a) for s, n, a in self.seen[:trials] if s >= 0.99 * TARGET), key=lambda pair: pair[0])


@dataclass
class Contest:
    """Samplers on one slice of tokens, from the parent and the path's seed, or from chance alone."""

    run: Run
    prepared: Prepared

    def __post_init__(self) -> None:
        self.path, self.guide = guided(self.run, self.prepared)
        self.split = head(self.prepared.tokens["search"], SAMPLER_TOKENS)
        self.held_out = head(self.prepared.tokens["validation"], 4 * SAMPLER_TOKENS)
        self._scorer = PrefixScorer(self.prepared.parent, self.prepared.library, self.split)
        self._check = PrefixScorer(self.prepared.parent, self.prepared.library, self.held_out)
        whole = self.prepared.space.shape.architecture
        self.base, self._base_out = self._nats(self._scorer, whole), self._nats(self._check, whole)

    def searched(self, sampler: SamplerName, trials: int, *, seeded: bool = True) -> tuple[Untimed, float]:
        """What the judge saw, and minutes."""
        rules = self.run.recipe.search.model_copy(update={"sampler": sampler, "trials": trials, "targets": (TARGET,)})
        guide = replace(self.guide, targets=(TARGET,), race=self._winner)
        study = open_study(optuna.storages.InMemoryStorage(), sampler, rules, guide)
        labels = ("parent", f"path-{TARGET:g}x")
        whole = self.prepared.space.shape.architecture
        starts = [("parent", whole), *((n, a) for n, a in self.path if n in labels)] if seeded else []
        judge, began = Untimed(self.prepared, self.split, self._scorer, []), time.monotonic()
        with self.run.show(f"{trials} trials of {sampler}") as advance:
            run_study(study, judge, rules, self.prepared.space, starts, lambda done, _: advance(len(done), trials))  # type: ignore[arg-type]
        return judge, (time.monotonic() - began) / 60

    def row(self, sampler: SamplerName, trials: int) -> tuple[dict[str, Any], Untimed]:
        judge, minutes = self.searched(sampler, trials)
        nats, architecture = judge.best()
        lost_out = self._nats(self._check, architecture) - self._base_out
        lost = {"nats_lost": nats - self.base, "nats_lost_held_out": lost_out}
        return {**lost, "minutes": minutes, "trials": trials}, judge

    def tokens(self) -> dict[str, Any]:
        return {"target": TARGET, "tokens": self.split.tokens, "held_out_tokens": self.held_out.tokens}

    def _winner(self, candidates: Sequence[Architecture]) -> Architecture:
        raced = [r for r in race(self._scorer, self.split, candidates) if r.kept and r.scores is not None]
        return min(raced, key=lambda r: nats_of(self.split, r.scores)).architecture  # type: ignore[arg-type]

    @staticmethod
    def _nats(scorer: PrefixScorer, architecture: Architecture) -> float:
        return quality_from_windows(scorer.split, scorer.score(architecture).nats).nats_per_token


def samplers(run: Run, prepared: Prepared) -> dict[str, Any]:
    """For each sampler from the same seeds: nats lost at TARGET (estimated speed) after some trials, and minutes; and
    how many trials it takes to what NSGA-II has after COLD_TRIALS from random starts."""
    contest = Contest(run, prepared)
    cold, cold_minutes = contest.searched("nsga2", COLD_TRIALS, seeded=False)
    goal = cold.best()[0]
    rows: dict[str, Any] = {}
    for name in SAMPLERS:
        rows[name], judge = contest.row(name, SAMPLER_TRIALS)
        held = [i for i, (s, n, _) in enumerate(judge.seen, 1) if s >= 0.99 * TARGET and n <= goal]
        rows[name]["trials_to_cold_nsga2"] = held[0] if held else None
    return {
        **contest.tokens(),
        "trials": SAMPLER_TRIALS,
        "samplers": rows,
        "cold_nsga2": {"trials": COLD_TRIALS, "nats_lost": goal - contest.base, "minutes": cold_minutes},
    }


def patience(run: Run, prepared: Prepared) -> dict[str, Any]:
    """Those samplers that score one child a trial, with so many trials that they have scored as many children, and
    taken about as long, as those that race several have in SAMPLER_TRIALS."""
    contest = Contest(run, prepared)
    rows = {name: contest.row(name, PATIENT_TRIALS)[0] for name in PATIENT}
    return {**contest.tokens(), "trials": PATIENT_TRIALS, "samplers": rows}


def seconds_of(work: Callable[[], Any], times: int = 3) -> float:
    """Median seconds, after one pass that is not counted."""
    work()
    taken = []
    for _ in range(times):
        began = time.monotonic()
        work()
        taken.append(time.monotonic() - began)
    return statistics.median(taken)
