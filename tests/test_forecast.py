"""What a forecast says is what hooks count on a real (tiny) run; and a dry run writes nothing."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from counting import allocated
from tiny import write_front
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.modules.module import register_module_forward_hook
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import llmprune.models.checkpoint as checkpoint
from llmprune.baselines.given import Given
from llmprune.baselines.methods import METHODS, choose
from llmprune.blocks.solve import solve_layer
from llmprune.blocks.statistics import layer_statistics
from llmprune.choices.architecture import Architecture, ParentShape
from llmprune.choices.space import Space
from llmprune.cli.main import main
from llmprune.core.budgets import parse_pick
from llmprune.core.recipe import ImportanceRecipe, Recipe, TablesRecipe
from llmprune.core.recipe_text import parse_recipe, to_yaml
from llmprune.forecast.forecast import forecast
from llmprune.forecast.plan import Done, Plan, StageCost
from llmprune.forecast.rates import Asked, Rates, measure_rates
from llmprune.forecast.work import solving_bytes
from llmprune.measure.quality.prefix import PrefixScorer
from llmprune.measure.speed.throughput import Speed, Spread, Workload, measure_paired
from llmprune.models.parent import load_parent, outline_parent
from llmprune.pipeline.commands import export, front, search
from llmprune.pipeline.prepare import (
    Stock,
    cut_text,
    lay_ground,
    prepare,
    score_choices,
    solve_blocks,
    stock_up,
    time_reach,
)
from llmprune.pipeline.run import Run
from llmprune.pipeline.run_directory import RunDirectory
from llmprune.pipeline.searching import estimates_for, walk_path
from llmprune.search import judging
from llmprune.tables import block_tables
from llmprune.tables.estimate import estimate_delta_nats
from llmprune.tables.exact import exact_delta_nats

LAYERS = 4
RATES = Rates(1e-3, 1e-3, 1e-2, 1e-3, 1e9, 1e8, 2e9, 0.05, 0.1, 4.0)


def write_model(directory: Path) -> None:
    """A random Llama, and a tokenizer with a token for every byte."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=64,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(directory)  # type: ignore[no-untyped-call]


def make_recipe(root: Path) -> Recipe:
    write_model(root / "parent")
    sources = []
    for name, weight in (("ant", 2.0), ("bee", 1.0)):
        documents = [" ".join([f"{name}{number}"] * 6) for number in range(120)]
        (root / f"{name}.txt").write_text("\n\n\n".join(documents))
        sources.append({"name": name, "path": str(root / f"{name}.txt"), "weight": weight})
    return parse_recipe(
        {
            "model": {"path": str(root / "parent"), "device": "cpu"},
            "data": {
                "sources": sources,
                "seq_len": 16,
                "calibration_tokens": 500,
                "estimate_tokens": 120,
                "search_tokens": 100,
                "validation_tokens": 130,
                "test_tokens": 64,
            },
            "workload": {"batch": 2, "prompt_tokens": 8, "generated_tokens": 4, "threads": 1, "repeats": 1},
            "space": {"ffn_step": 64},
            "recover": {"refit": False},
            "tables": {"tokens": 100, "path_tokens": 70},
            "search": {"sampler": "nsga2", "population": 4, "trials": 3, "targets": [1.2]},
            # These two score nothing before they choose, so their forecast is no upper limit; FLAP has its own library.
            "front": {"size": 1, "repeats": 2, "baselines_at": 1.3, "baselines": ["shortgpt", "flap"]},
            "export": {"pick": "ppl_ratio<=1000"},
        },
        origin="tiny",
    )


@contextmanager
def tokens_counted() -> Iterator[dict[str, int]]:
    """Tokens that are embedded, by any model: each pass embeds its tokens once; and those that layers run."""
    counts = {"tokens": 0, "layers": 0}

    def hook(module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        if isinstance(module, torch.nn.Embedding):
            counts["tokens"] += args[0].numel()
        # Those that are passed by compute nothing.
        if isinstance(module, LlamaDecoderLayer) and "forward" not in vars(module):
            counts["layers"] += output.shape[0] * output.shape[1]

    handle = register_module_forward_hook(hook)
    try:
        yield counts
    finally:
        handle.remove()


def timed_but_by_size(reference: PreTrainedModel, candidates: Sequence[PreTrainedModel], *rest: Any) -> Any:
    """Runs all passes, then says that a model is as fast as it is small: a run of these does not depend on a clock."""
    measure_paired(reference, candidates, *rest)

    def speed(model: PreTrainedModel) -> Speed:
        ratio = sum(p.numel() for p in reference.parameters()) / sum(p.numel() for p in model.parameters())
        return Speed(*(Spread(ratio, ratio, ratio) for _ in range(4)))

    return speed(reference), [speed(model) for model in candidates]


@dataclass(frozen=True)
class Counted:
    """A run of every stage, and the tokens that each embedded."""

    recipe: Recipe
    path: Path
    plan: Plan
    tokens: dict[str, int]
    layers: dict[str, int]
    children: int
    baselines: int


@pytest.fixture(scope="module")
def counted_run(tmp_path_factory: pytest.TempPathFactory) -> Counted:
    root = tmp_path_factory.mktemp("counted")
    recipe, path = make_recipe(root), root / "run"
    tokens: dict[str, int] = {}
    layers: dict[str, int] = {}
    with RunDirectory(path).locked(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(judging, "measure_paired", timed_but_by_size)
        patch.setattr(block_tables, "measure_paired", timed_but_by_size)
        patch.setattr(checkpoint, "prove", lambda *_: checkpoint.Proof(0.0, 0.0, 1, False))
        run = Run.start(path, recipe)
        ground = lay_ground(run)
        time_reach(run, ground)
        splits = cut_text(run, ground)

        def counted(stage: str, work: Callable[[], Any]) -> Any:
            with tokens_counted() as counts:
                made = work()
            tokens[stage], layers[stage] = counts["tokens"], counts["layers"]
            return made

        library = counted("library", lambda: solve_blocks(run, ground, splits))
        stock = Stock(**vars(ground), tokens=splits, library=library)
        prepared = counted("tables", lambda: score_choices(run, stock))
        counted("path", lambda: walk_path(run, prepared, estimates_for(run, prepared)))
        counted("search", lambda: search(run))
        made = counted("front", lambda: front(run))
        write_front(run)
        export(run, parse_pick(recipe.export.pick), run.directory.export)
        size = sum(parameter.numel() for parameter in ground.parent.model.parameters()) * 4
        plan = Plan(recipe, ground.space, ground.workload, 259, size, 4)
    return Counted(recipe, path, plan, tokens, layers, len(made.children), len(made.baselines))


def by_name(stages: Sequence[StageCost]) -> dict[str, StageCost]:
    return {stage.stage: stage for stage in stages}


def all_tokens(stage: StageCost) -> int:
    return stage.forward_tokens + stage.timing.tokens


def test_tokens_of_every_stage_are_those_that_were_run(counted_run: Counted) -> None:
    said, counted = by_name(forecast(counted_run.plan)), counted_run.tokens
    assert all_tokens(said["library"]) == counted["library"]
    assert sum(all_tokens(said[stage]) for stage in ("estimate", "together", "probes")) == counted["tables"]
    assert all_tokens(said["path"]) == counted["path"] > 0
    assert all_tokens(said["search"]) == counted["search"]
    assert (counted_run.children, counted_run.baselines) == (1, 2), "else the forecast of the front is an upper limit"
    # Both scorers are counted with the parent's pass: the run's has had it, the other is not asked.
    assert all_tokens(said["front"]) - 2 * counted_run.plan.tokens("search") == counted["front"]


def test_layers_run_no_more_tokens_than_whole_passes_would(counted_run: Counted) -> None:
    said, counted = by_name(forecast(counted_run.plan)), counted_run.layers
    assert LAYERS * all_tokens(said["library"]) == counted["library"]
    assert LAYERS * all_tokens(said["path"]) == counted["path"]
    for stage in ("search", "front"):
        assert 0 < counted[stage] <= LAYERS * all_tokens(said[stage])


def test_exact_scores_run_the_layers_that_were_forecast(counted_run: Counted) -> None:
    rules = TablesRecipe(tokens=100, exact=("attention", "ffn"))
    recipe = counted_run.recipe.model_copy(update={"tables": rules})
    plan = replace(counted_run.plan, recipe=recipe)
    run = Run.open(counted_run.path)
    stock = stock_up(run)
    calibration = stock.tokens["calibration"]
    split = calibration.head(calibration.first_windows(rules.tokens / calibration.tokens))
    assert split.tokens == plan.exact_tokens
    with tokens_counted() as counts:
        scorer = PrefixScorer(stock.parent, stock.library, split)
        exact_delta_nats(scorer, split, stock.space, plan.exact_choices, lambda done, total: None)
    said = by_name(forecast(plan))["exact"]
    assert len(plan.exact_choices) == said.children == LAYERS * (4 + 4)
    assert said.forward_tokens == -(-counts["layers"] // LAYERS)
    assert "exact" not in by_name(forecast(counted_run.plan))


@pytest.mark.parametrize("sampler", ["slp", "evopress"])
def test_what_guided_samplers_race_is_an_upper_limit(sampler: str, counted_run: Counted, tmp_path: Path) -> None:
    shutil.copytree(counted_run.path, tmp_path / "run")
    (tmp_path / "run" / "study.journal").unlink()
    shutil.rmtree(tmp_path / "run" / "scores")
    rules = counted_run.recipe.search.model_copy(update={"sampler": sampler, "trials": 6})
    recipe = counted_run.recipe.model_copy(update={"search": rules})
    run = Run.start(tmp_path / "run", recipe)
    prepared = prepare(run)
    walk_path(run, prepared, estimates_for(run, prepared))
    with pytest.MonkeyPatch.context() as patch, tokens_counted() as counts:
        patch.setattr(judging, "measure_paired", timed_but_by_size)
        assert search(run).new_trials == 6
    said = by_name(forecast(replace(counted_run.plan, recipe=recipe)))["search"]
    one_each = said.timing.tokens + 6 * counted_run.plan.tokens("search")
    # A race costs more than its winner's pass, whatever it saves.
    assert LAYERS * one_each < counts["layers"] <= LAYERS * all_tokens(said)


def test_no_baseline_scores_more_children_than_it_says(counted_run: Counted) -> None:
    prepared = prepare(Run.open(counted_run.path))
    for name, method in METHODS.items():
        scored: set[Architecture] = set()

        def nats(architectures: Sequence[Architecture], scored: set[Architecture] = scored) -> list[float]:
            scored.update(architectures)
            return [1.0 for _ in architectures]

        if method.finish is None:
            given = Given(prepared.parent, prepared.library, prepared.tables, "decode", 5, 0, nats)
            choose(method, given, 3.0)
            assert len(scored) <= method.most_scored(prepared.space, 5), name
            assert bool(scored) or name not in ("sleb", "blockpruner")


def test_files_are_as_large_as_forecast(counted_run: Counted) -> None:
    said = by_name(forecast(counted_run.plan))
    directory = RunDirectory(counted_run.path)
    stored = sum(file.stat().st_size for file in directory.library.iterdir())
    assert said["library"].disk_bytes == pytest.approx(stored, rel=0.02)
    # The file's header holds the provenance of the text, some kilobytes whatever the tokens.
    assert 0 <= directory.tokens.stat().st_size - said["tokens"].disk_bytes < 8192
    weights = [file for place in (directory.children, directory.export) for file in place.rglob("*.safetensors")]
    assert len(weights) == said["checkpoints"].children
    assert sum(file.stat().st_size for file in weights) <= said["checkpoints"].disk_bytes


@pytest.mark.parametrize(("step", "refit"), [(128, True), (8, True), (128, False)])
def test_solving_a_layer_takes_the_memory_that_was_forecast(step: int, refit: bool, counted_run: Counted) -> None:
    """Few choices: the scratch is most of it. Many: the refits, of which the forecast once knew nothing."""
    parent = load_parent(counted_run.recipe.model)
    space = Space.of(parent.shape, 1, step)
    rules = ImportanceRecipe(refit=refit)
    split = stock_up(Run.open(counted_run.path)).tokens["calibration"]
    ((_, blocks),) = layer_statistics(parent, split, layers=[0])
    with allocated() as memory:
        solve_layer(parent, 0, blocks, rules, space)
    said = solving_bytes(space, rules, 4)
    assert 0.7 * said <= memory.peak_bytes <= said
    if step == 8:
        assert said > 1.5 * 5 * 8 * parent.shape.ffn_width**2, "else nothing is known of the refits"


def test_an_estimate_takes_about_the_memory_that_was_forecast(counted_run: Counted) -> None:
    stock = stock_up(Run.open(counted_run.path))
    parent, split, library = stock.parent, stock.tokens["calibration"], stock.library
    said = by_name(forecast(counted_run.plan))["path"].peak_memory_bytes - counted_run.plan.parent_bytes
    with allocated() as memory:
        estimate_delta_nats(parent, split, library, tokens=counted_run.recipe.tables.path_tokens)
    assert 0.5 * said <= memory.peak_bytes <= 1.5 * said


def test_llama_cpps_files_are_forecast(counted_run: Counted) -> None:
    rules = counted_run.recipe.deploy.model_copy(update={"formats": ("hf", "gguf")})
    recipe = counted_run.recipe.model_copy(update={"deploy": rules})
    engine = replace(counted_run.plan.workload, engine="llamacpp", gguf_type="f16")
    in_torch = by_name(forecast(counted_run.plan))
    served = by_name(forecast(replace(counted_run.plan, recipe=recipe, workload=engine, gguf_bytes=1 << 30)))
    for stage, files in (("library", 0), ("estimate", 0), ("probes", 2), ("path", 1)):
        assert served[stage].peak_memory_bytes - in_torch[stage].peak_memory_bytes == files << 30, stage
    for stage in ("search", "front"):
        assert 1 << 30 < served[stage].peak_memory_bytes - in_torch[stage].peak_memory_bytes <= 2 << 30, stage
    assert served["checkpoints"].disk_bytes - in_torch["checkpoints"].disk_bytes == 1 << 30


def test_what_is_done_costs_nothing(counted_run: Counted) -> None:
    trials = counted_run.recipe.search.trials
    done = Done(True, LAYERS, True, True, trials, {"flap": LAYERS}, front=True, checkpoints_left=0)
    for stage in forecast(counted_run.plan, done):
        assert stage.done and stage.seconds(RATES) == stage.forward_equivalents == stage.disk_bytes == 0
    half = by_name(forecast(counted_run.plan, Done(True, LAYERS // 2)))
    whole = by_name(forecast(counted_run.plan))
    assert half["library"].disk_bytes * 2 == whole["library"].disk_bytes
    assert half["library"].solver.total * 2 == whole["library"].solver.total
    assert half["library"].forward_tokens == whole["library"].forward_tokens, "one pass, for as few layers as may be"


def test_minutes_bound_the_search(counted_run: Counted) -> None:
    rules = counted_run.recipe.search.model_copy(update={"minutes": 0.01})
    plan = replace(counted_run.plan, recipe=counted_run.recipe.model_copy(update={"search": rules}))
    assert by_name(forecast(plan))["search"].seconds(RATES) == pytest.approx(0.6)
    assert [stage.stage for stage in forecast(plan, until="search")][-1] == "search"


def test_a_pool_is_raced_in_every_trial_but_the_parents() -> None:
    for sampler, passes in (("nsga2", 1), ("slp", 6), ("evopress", 16)):
        data = {"sources": [{"name": "x", "path": "x"}]}
        recipe = parse_recipe({"model": {"path": "x"}, "data": data, "search": {"sampler": sampler}}, origin="x")
        shape = ParentShape(4, 64, 2, 2, 16, 128)
        plan = Plan(recipe, Space.of(shape, 1, 64), Workload(1, 128, 32, "bfloat16", 1, "cpu"), 256, 1 << 20, 2)
        said = by_name(forecast(plan))["search"]
        scored, estimated = plan.tokens("search"), 99 * 8192 if sampler == "slp" else 0
        assert said.forward_tokens == (99 * passes + 1) * scored + estimated and said.backward_tokens == estimated
        resumed = by_name(forecast(plan, Done(trials=90)))["search"]
        assert resumed.forward_tokens == (10 * passes + 1) * scored + estimated * 10 // 99


def test_a_forecast_needs_no_model() -> None:
    shape = ParentShape(80, 8192, 8, 8, 128, 28_672)
    recipe = parse_recipe({"model": {"path": "x"}, "data": {"sources": [{"name": "x", "path": "x"}]}}, origin="70B")
    plan = Plan(recipe, Space.of(shape, 1, 2048), Workload(1, 128, 32, "bfloat16", 1, "cpu"), 128_256, 141 << 30, 2)
    library = by_name(forecast(plan))["library"]
    assert library.forward_tokens == plan.tokens("calibration")
    assert library.disk_bytes < 80 * 14 * 2 * 8192 * 28_672


class TestDryRun:
    @pytest.fixture(autouse=True)
    def _command(self, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.capfd, self.monkeypatch = capfd, monkeypatch

    def llmprune(self, *arguments: object) -> tuple[int, str, str]:
        self.monkeypatch.setattr(sys, "argv", ["llmprune", *map(str, arguments)])
        self.capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        assert isinstance(ended.value.code, int)
        return (ended.value.code, *self.capfd.readouterr())

    def test_it_writes_nothing_and_adds_up(self, counted_run: Counted, tmp_path: Path) -> None:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(to_yaml(counted_run.recipe))
        code, out, _ = self.llmprune("search", tmp_path / "run", "--recipe", recipe, "--dry-run", "--json", "--quiet")
        assert code == 0 and [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
        data = json.loads(out)
        said = forecast(counted_run.plan, until="search")
        assert [row["forward_equivalents"] for row in data["stages"]] == [s.forward_equivalents for s in said]
        assert data["total"]["seconds"] == pytest.approx(sum(row["seconds"] for row in data["stages"]))
        assert 0 < data["total"]["seconds"] < 600 and not any(row["done"] for row in data["stages"])

    def test_of_a_finished_run_nothing_is_left(self, counted_run: Counted) -> None:
        before = contents(counted_run.path)
        self.monkeypatch.setattr("llmprune.forecast.rates.process_seconds", lambda: 4.0)
        recipe = counted_run.path / "recipe.yaml"
        command = ("compress", recipe, "--out", counted_run.path, "--dry-run", "--quiet")
        code, out, err = self.llmprune(*command)
        assert code == 0, err
        assert out.count("done") == 9 and "in all" in out
        code, out, _ = self.llmprune(*command, "--json", "search.trials=5")
        assert code == 0
        rows = {row["stage"]: row for row in json.loads(out)["stages"]}
        assert {name for name, row in rows.items() if not row["done"]} == {"search", "front", "checkpoints"}
        timed = 2 * by_name(forecast(counted_run.plan))["search"].timing.tokens / counted_run.recipe.search.trials
        assert rows["search"]["timed_tokens"] == timed
        assert contents(counted_run.path) == before

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (["export.pick=fast"], "a budget is METRIC>=NUMBER"),
            (["search.trails=3"], "search.trails: unknown key"),
            (["data.seq_len=32"], "was made with another data.seq_len"),
            (["space.ffn_step=1000"], "was made with another space.ffn_step"),
        ],
    )
    def test_it_refuses_as_the_command_does(self, changes: list[str], message: str, counted_run: Counted) -> None:
        for command in (["search", counted_run.path], ["search", counted_run.path, "--dry-run"]):
            code, out, err = self.llmprune(*command, *changes, "--quiet")
            assert (code, out) == (2, "") and message in err

    def test_trials_are_counted_where_they_are_kept(self, counted_run: Counted) -> None:
        asked: list[str | None] = []

        @contextmanager
        def empty(url: str | None, journal: Path) -> Iterator[optuna.storages.BaseStorage]:
            asked.append(url)
            yield optuna.storages.InMemoryStorage()

        self.monkeypatch.setattr("llmprune.pipeline.inspection.opened_storage", empty)
        url = "postgresql://me@host/trials"
        code, out, _ = self.llmprune("search", counted_run.path, "--dry-run", "--json", "--quiet", "--storage", url)
        rows = {row["stage"]: row for row in json.loads(out)["stages"]}
        assert code == 0 and set(asked) == {url}
        assert rows["path"]["done"] and not rows["search"]["done"]

    def test_a_storage_that_cannot_be_used_is_found_out_first(self, counted_run: Counted) -> None:
        code, out, err = self.llmprune("search", counted_run.path, "--dry-run", "--quiet", "--storage", "mysql://x/y")
        assert (code, out) == (2, "") and "--storage is postgresql://" in err

    def test_a_file_is_no_run_directory(self, counted_run: Counted) -> None:
        recipe = counted_run.path / "recipe.yaml"
        code, _, err = self.llmprune("compress", recipe, "--out", recipe, "--dry-run", "--quiet")
        assert code == 2 and "cannot use" in err


def test_repairs_are_forecast(counted_run: Counted) -> None:
    plan, rates = counted_run.plan, RATES

    def with_(**recover: Any) -> Plan:
        rules = plan.recipe.recover.model_copy(update=recover)
        return replace(plan, recipe=plan.recipe.model_copy(update={"recover": rules}))

    assert not {"repair", "recover"} & by_name(forecast(with_(refit=False))).keys()
    children = min(plan.recipe.front.size, plan.recipe.search.trials - 1)
    alone = by_name(forecast(with_(refit=True, baselines=False)))["repair"]
    beside = by_name(forecast(with_(refit=True, baselines=True)))["repair"]
    of_one = alone.forward_tokens / children
    assert of_one > 2 * plan.tokens("calibration")
    assert beside.forward_tokens == of_one * (children + len(plan.recipe.front.baselines))
    few, many = (by_name(forecast(with_(tokens=tokens)))["recover"] for tokens in (1000, 3000))
    assert many.seconds(rates) == pytest.approx(3 * few.seconds(rates))
    assert few.peak_memory_bytes > 5 * plan.parent_bytes
    adapted = by_name(forecast(with_(tokens=1000, lora_rank=1)))["recover"]
    assert adapted.peak_memory_bytes < few.peak_memory_bytes and adapted.disk_bytes < few.disk_bytes
    frugal = by_name(forecast(with_(tokens=1000, gradient_checkpointing=True)))["recover"]
    assert frugal.peak_memory_bytes < few.peak_memory_bytes and frugal.seconds(rates) > few.seconds(rates)
    assert by_name(forecast(with_(minutes=2.0)))["recover"].seconds(rates) == 120
    assert by_name(forecast(with_(refit=True), Done(front=True)))["repair"].done


def test_rates_are_measured_on_an_outline(counted_run: Counted) -> None:
    outline = outline_parent(counted_run.recipe.model)
    asked = {"it": Asked(counted_run.plan.space, counted_run.plan.workload, windows=5, seq_len=16)}
    rates, reach = measure_rates(outline, torch.device("cpu"), asked)["it"]
    assert all(value > 0 for value in rates.to_json().values()) and reach is None


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}
