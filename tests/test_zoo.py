"""The zoo and its bench: the pieces by hand, and two families trained for a moment and searched."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import bench_families
import numpy as np
import pytest
import torch
import zoo
import zoo_checks
import zoo_models
import zoo_training
from family_sections import (
    Recording,
    Sizes,
    agreement,
    bootstrap_interval,
    choices_by_kind,
    is_usable,
    never_worse,
    rank_correlation,
)
from rich.console import Console
from rich.table import Table
from tiny import tiny_space

from llmprune.choices.ffn import FfnChoice
from llmprune.choices.kv_groups import AttentionChoice
from llmprune.core.progress import silent
from llmprune.data.tokens import SourceTokens, Split
from llmprune.measure.quality.scores import WindowScores
from llmprune.models.modeling_pruned import FAMILIES
from llmprune.models.parent import make_parent
from llmprune.tables.exact import BROKEN

FEW_STEPS = zoo_training.Schedule(steps=2)
SMALL = Sizes(
    calibration_tokens=4096,
    search_tokens=1024,
    validation_tokens=1024,
    table_tokens=512,
    ffn_step=192,
    prompt_tokens=16,
    repeats=1,
    trials=2,
    targets=(1.15,),
    learnt_tokens=512,
    choices_a_kind=4,
)


def split_of(windows: torch.Tensor, **weights: float) -> Split:
    sources = {name: SourceTokens(windows, torch.full((len(windows),), windows.shape[1] - 1)) for name in weights}
    return Split("test", sources, weights, windows.shape[1], False)


def write_assets(directory: Path) -> Path:
    """Text of both sources, with a copy of a document in each."""
    words = ("river", "boat", "lamp", "quay", "bridge", "winter", "carts", "horse")
    for number, name in enumerate(zoo_models.SOURCES):
        texts = [" ".join(words[(i * 7 + j * j + number) % 8] for j in range(120)) + f" {name} {i}" for i in range(200)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in [*texts, texts[0]])
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def small_zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two families, hardly trained: a pre-norm and a post-norm one."""
    root = tmp_path_factory.mktemp("zoo")
    text_hash = zoo_models.split_text(write_assets(root / "assets"), root / "text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo_training, "EMBEDDINGS", replace(zoo_training.EMBEDDINGS, steps=2, windows=2))
        patch.setattr(zoo, "TEST_TOKENS", 1024)
        for family in ("llama", "gemma2"):
            zoo.grow(family, root, FEW_STEPS, text_hash, silent)
    return root


def drawn(table: Table) -> str:
    console = Console(width=220, record=True, file=StringIO())
    console.print(table)
    return console.export_text()


def test_there_is_a_model_of_every_family() -> None:
    assert set(zoo_models.VALUES) == set(FAMILIES)


@pytest.mark.parametrize("family", zoo_models.VALUES)
def test_models_are_deep_and_grouped_enough(family: str) -> None:
    shape = make_parent(zoo_models.new_model(family), None).shape
    assert shape.layers >= 8 and shape.kv_groups >= 4 and 16 <= shape.head_dim <= 32
    assert 3 <= shape.ffn_width / shape.hidden_size <= 4
    assert (shape.queries_per_group > 1) == (FAMILIES[family].kv_heads is not None)


def test_what_sets_a_family_apart_is_there() -> None:
    granite, gemma = zoo_models.VALUES["granite"], zoo_models.new_model("gemma2").config
    names = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
    assert all(granite[name] != 1 for name in names)
    assert gemma._attn_implementation == "eager" and gemma.attn_logit_softcapping and gemma.final_logit_softcapping
    assert (
        set(gemma.layer_types) == {"sliding_attention", "full_attention"}
        and gemma.sliding_window < gemma.max_position_embeddings
    )
    qwen, neox = (make_parent(zoo_models.new_model(name), None) for name in ("qwen2", "gpt_neox"))
    assert qwen.block(0, "attention").get_submodule("q_proj").bias is not None
    assert neox.model.config.use_parallel_residual and neox.output_bias(0, "ffn") is not None


def test_a_byte_is_a_token(tmp_path: Path) -> None:
    tokenizer = zoo_models.byte_tokenizer()
    text = "Ein naïver Café-Gast, 3 €\n\n  und mehr: \x07 日本"
    ids = tokenizer(text)["input_ids"]
    assert len(tokenizer) == zoo_models.VOCABULARY and len(ids) == len(text.encode())
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    assert loaded.decode(ids) == text and loaded("a</s>")["input_ids"][-1] == loaded.eos_token_id == 1


def test_no_document_is_on_both_sides(tmp_path: Path) -> None:
    first = zoo_models.split_text(write_assets(tmp_path / "assets"), tmp_path / "text")
    held_out, train = (
        [
            text
            for name in zoo_models.SOURCES
            for text in zoo_models.documents(tmp_path / "text" / side / f"{name}.jsonl")
        ]
        for side in ("held_out", "train")
    )
    assert len(held_out) == 80 and len(train) == 320 and not set(held_out) & set(train)
    assert zoo_models.split_text(tmp_path / "assets", tmp_path / "text") == first


def test_the_bigram_is_counted() -> None:
    train_T = torch.tensor([0, 1, 0, 1, 0, 2])
    split = split_of(torch.tensor([[0, 1, 0], [2, 0, 1]]), prose=1.0)
    nats_N = zoo_checks.bigram_windows(train_T, split, 3)["prose"]
    after_0, after_1, after_2 = 3 + 3 * 0.1, 2 + 3 * 0.1, 3 * 0.1
    first = -math.log(2.1 / after_0) - math.log(2.1 / after_1)
    second = -math.log(0.1 / after_2) - math.log(2.1 / after_0)
    assert nats_N.tolist() == pytest.approx([first, second], rel=1e-12)


def test_a_paired_difference_has_the_standard_error_of_its_windows() -> None:
    split = split_of(torch.zeros(4, 6, dtype=torch.int64), a=0.25, b=0.75)
    base = {name: torch.tensor([10.0, 20.0, 30.0, 40.0]) for name in "ab"}
    changed = {
        "a": base["a"] + torch.tensor([5.0, 5.0, 5.0, 5.0]),
        "b": base["b"] + torch.tensor([0.0, 10.0, 0.0, 10.0]),
    }
    mean, error = zoo_checks.paired(split, changed, base)
    assert mean == pytest.approx(0.25 * 1 + 0.75 * 1)
    assert error == pytest.approx(0.75 * np.std([0, 2, 0, 2], ddof=1) / 2)


def test_the_rate_falls_and_the_clock_can_end_it() -> None:
    schedule = zoo_training.Schedule()
    assert schedule.rate(0, 0.0) < schedule.rate(schedule.warm_up_steps, 0.0) == schedule.learning_rate
    assert schedule.rate(500, 1.0) == pytest.approx(0.05 * schedule.learning_rate)
    model, steps = zoo_models.new_model("llama"), list[int]()
    hurried = zoo_training.Schedule(steps=1000, minutes=0.01)
    zoo_training._learn(model, torch.randint(3, 259, (2000,)), hurried, 0, lambda done, total: steps.append(done))
    assert 0 < len(steps) < 1000


def test_rank_correlation_and_its_interval() -> None:
    generator = np.random.default_rng(1)
    first = generator.normal(size=60)
    noisy = first + generator.normal(size=60)
    low, high = bootstrap_interval(first, noisy)
    assert low is not None and high is not None
    assert low < rank_correlation(first, noisy) < high and 0.1 < high - low < 0.6  # type: ignore[operator]
    assert rank_correlation(first, -first) == pytest.approx(-1) and bootstrap_interval(first, -first) == pytest.approx(
        (-1, -1)
    )
    assert rank_correlation(first, np.zeros(60)) is None and bootstrap_interval(first, np.zeros(60)) == (None, None)
    assert rank_correlation(first[:2], first[:2]) is None and bootstrap_interval(first[:0], first[:0]) == (None, None)


def row(estimated: float, exact: float, error: float | None = 0.01) -> dict[str, Any]:
    usable = is_usable(estimated, exact, error)
    return {"estimated_nats": estimated, "exact_nats": exact, "standard_error": error, "usable": usable}


def test_a_broken_choice_is_counted_and_in_no_figure() -> None:
    good = [row(0.1, 0.2), row(0.3, 0.5), row(0.4, 0.6), row(0.02, 0.01)]
    found = agreement(good)
    broken = agreement([*good, row(0.1, BROKEN), row(math.inf, 0.5), row(math.nan, 0.5), row(0.1, 0.5, None)])
    assert found["n"] == 4 and found["unusable"] == 0 and found["spearman"] == pytest.approx(1)
    assert found["median_difference_nats"] == pytest.approx(-0.15)
    # The fourth is one standard error from nothing.
    assert found["n_ratio"] == 3 and found["median_ratio"] == pytest.approx(0.6)
    assert broken == {**found, "unusable": 4}
    assert agreement([])["spearman"] is None


def test_choices_of_a_kind_are_no_drops_and_not_the_parents() -> None:
    space = tiny_space(layers=3, kv_groups=4, ffn_width=64)
    kinds = choices_by_kind(space, 5)
    assert [len(keys) for keys in kinds.values()] == [5, 5, 6]
    assert all(isinstance(c, FfnChoice) and 0 < c.units < 64 for _, c in kinds["widths"])
    assert all(isinstance(c, AttentionChoice) and 0 < c.units < 4 for _, c in kinds["kv groups"])
    assert all(choice.units == 0 for _, choice in kinds["drops"]) and kinds == choices_by_kind(space, 5)


def test_a_recording_keeps_what_it_passes_on() -> None:
    class Scorer:
        def score(self, architecture: Any) -> WindowScores:
            return WindowScores({"a": torch.ones(2)})

    architecture, recording = tiny_space().shape.architecture, Recording(Scorer())
    assert recording.score(architecture) is recording.seen[architecture]


def result(method: str, at: float, nats_lost: float | None) -> dict[str, Any]:
    return {"method": method, "at": at, "nats_lost": nats_lost, "interpolated": True, "why": None}


@pytest.mark.parametrize(
    "own, uniform, expected",
    [(0.1, 0.2, True), (0.3, 0.2, False), (0.2009, 0.2, True), (None, 0.2, False), (None, None, True)],
)
def test_never_worse(own: float | None, uniform: float | None, expected: bool) -> None:
    same = [result("llmprune", 1.2, 0.1), result("random", 1.2, 0.5)]
    assert never_worse([*same, result("llmprune", 1.4, own), result("uniform", 1.4, uniform)]) is expected


def test_tables_hold_every_family_and_say_what_failed() -> None:
    rows = [result("llmprune", 1.2, 0.125), result("uniform", 1.2, None), result("random", 1.2, 0.5)]
    timed = {"children": [{}] * 3, "median_absolute_error": 0.021, "median_error": -0.013}
    kinds = {"drops": {**agreement([row(0.1, 0.2), row(0.3, 0.5), row(0.4, 0.6), row(0.1, BROKEN)])}}
    found = {
        "llama": {
            "scores": {"tokens": 4096, "kinds": kinds},
            "times": timed,
            "search": {"trials": 9, "results": rows, "never_worse": True},
        },
        "opt": {"scores": {"failed": "ModelError: no"}, "search": {"failed": "BudgetError: nothing"}},
    }
    scores, search = drawn(bench_families.scores_table(found)), drawn(bench_families.search_table(found))
    assert "1.00" in scores and "4,096 held-out tokens" in scores and "ModelError: no" in scores
    assert "~+0.125" in search and "2.1%, -1.3% (3)" in search and "BudgetError: nothing" in search and "yes" in search


def test_a_trained_model_is_a_checkpoint_and_is_not_trained_again(
    small_zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = json.loads((small_zoo / "gemma2" / zoo.FACTS).read_text(encoding="utf-8"))
    assert len(facts["drops"]) == 16 and facts["tokens"] == 4 * 255 and not facts["good"]
    assert facts["nats_below_bigram"] == pytest.approx(facts["bigram_nats_per_byte"] - facts["nats_per_byte"])
    monkeypatch.setattr(zoo_training, "EMBEDDINGS", replace(zoo_training.EMBEDDINGS, steps=2, windows=2))
    monkeypatch.setattr(zoo, "train", None)
    text_hash = zoo_models.split_text(small_zoo / "assets", small_zoo / "text")
    assert zoo.grow("gemma2", small_zoo, FEW_STEPS, text_hash, silent) == facts
    assert "gemma2" in drawn(zoo.table([facts]))


@pytest.mark.parametrize("family", ["gemma2"])
def test_a_whole_search_is_benched(small_zoo: Path, tmp_path: Path, family: str) -> None:
    found = bench_families.bench(
        family, small_zoo, tmp_path / family, ["scores", "times", "search", "repair"], SMALL, silent
    )
    kinds = found["scores"]["kinds"]
    assert {name: entry["n"] + entry["unusable"] for name, entry in kinds.items()} == {
        "widths": 4,
        "kv groups": 4,
        "drops": 16,
    }
    assert found["scores"]["tokens"] == 1024 and len(found["scores"]["choices"]) == 24
    assert found["times"]["children"] and found["search"]["trials"] >= 2
    assert list(found["repair"]["nats_lost"]) == ["one_shot", "refit", "distilled"]
    assert found["repair"]["learnt_tokens"] >= SMALL.learnt_tokens
    assert {entry["method"] for entry in found["search"]["results"]} == {"llmprune", "uniform", "random"}
    again = bench_families.bench(
        family, small_zoo, tmp_path / family, ["scores", "times", "search", "repair"], SMALL, silent
    )
    assert again == found
    drawn(bench_families.scores_table({family: found}))
    drawn(bench_families.search_table({family: found}))


def test_what_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["zoo.py", "--family", "opt", "--text", str(tmp_path)])
    assert zoo.main() == 2 and "wikipedia.jsonl, web.jsonl" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["bench_families.py", "--family", "opt", "--zoo", str(tmp_path)])
    assert bench_families.main() == 2 and "scripts/zoo.py --family opt" in capsys.readouterr().err
