"""Sizes of the whole model: each measured on the same text, one taken, and everything after it stands on that one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from conftest import Llmprune
from tiny import paired_by_bytes, small_data_recipe, tiny_recipe, tiny_tokenizer, write_jsonl
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llmprune.core.errors import RecipeError, RunDirectoryError
from llmprune.core.recipe import Recipe
from llmprune.core.recipe_text import apply_overrides, parse_recipe, to_yaml
from llmprune.data.documents import read_texts
from llmprune.data.tokens import build_token_splits
from llmprune.measure.quality.text_nats import OfText, encoded, pieces_of, text_nats
from llmprune.measure.resized import Resized, Rung, described, fastest
from llmprune.measure.speed.throughput import Speed, Spread
from llmprune.models.licence import Licence
from llmprune.models.parent import load_parent
from llmprune.pipeline import resizing
from llmprune.pipeline.commands import compress
from llmprune.pipeline.prepare import lay_ground
from llmprune.pipeline.resizing import read_resized, rows_of, sizes_of
from llmprune.pipeline.run import Run
from llmprune.publish.card import model_card
from llmprune.publish.contents import read_contents
from llmprune.report.facts import gather
from llmprune.report.page import page


@pytest.fixture(autouse=True)
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is as fast as it is small."""
    monkeypatch.setattr(resizing, "measure_paired", paired_by_bytes)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return changed(tiny_recipe(tmp_path), "space.vocabulary=[280,270]", "vocabulary.most_loss=5")


def changed(recipe: Recipe, *overrides: str) -> Recipe:
    return parse_recipe(apply_overrides(recipe.model_dump(mode="json"), list(overrides)), origin="changed")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """A run that stands on a smaller vocabulary, from its search to its export."""
    root = tmp_path_factory.mktemp("resized")
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(resizing, "measure_paired", paired_by_bytes)
        run = Run.start(
            root / "run", changed(tiny_recipe(root), "space.vocabulary=[280,270]", "vocabulary.most_loss=5")
        )
        run.say = said.append
        result = compress(run, run.directory.export)
    yield Finished(run, result, said)


class Finished(NamedTuple):
    run: Run
    result: dict[str, Any]
    said: list[str]


def one(speed: float) -> Spread:
    return Spread(speed, speed, speed)


def rung(rows: int, speed: float, nats: float, tokens: int) -> Rung:
    text = OfText(bytes=1000, tokens=tokens, nats_per_byte=nats)
    texts = {"validation": {"prose": text}}
    speeds = {"decode_speedup": one(speed), "prefill_speedup": one(1.0)}
    return Rung(rows=rows, hidden_size=64, params=rows, bytes=rows, texts=texts, **speeds)


def resized(*rungs: Rung) -> Resized:
    whole = rung(1000, 1.0, 0.5, 200)
    return Resized(whole=whole, rungs=rungs, taken=whole.size, shares={"prose": 1.0}, workload={})


def test_sizes_are_counts_or_shares_and_smaller_than_the_parents() -> None:
    assert rows_of([0.5, 30_000], 49_152, 300) == [30_000, 24_576]
    automatic = rows_of("auto", 49_152, 5_000)
    assert automatic[0] == 36_864 and automatic[-1] >= 5_000 and all(rows % 256 == 0 for rows in automatic)
    for wrong in (49_152, 60_000, 200):
        with pytest.raises(RecipeError, match=f"space.vocabulary must be from 300 rows.*got {wrong:,}"):
            rows_of([wrong], 49_152, 300)


def test_speed_is_of_text_and_the_fastest_within_the_loss_is_taken() -> None:
    half, quarter = rung(500, 1.2, 0.504, 210), rung(250, 1.5, 0.52, 240)
    found = resized(half, quarter)
    assert found.text_speedup(half, "decode") == pytest.approx(1.2 * 200 / 210)
    assert found.loss(quarter) == pytest.approx(0.04)
    assert fastest(found, "decode", 0.01) is half
    assert fastest(found, "decode", 0.05) is quarter
    assert fastest(found, "decode", 0.001) is found.whole
    # More tokens of the same text are slower where a token takes as long.
    assert fastest(found, "prefill", 0.05) is found.whole
    assert "hidden size stay: none of 500 rows, 250 rows is faster" in described(found, "decode")
    taken = described(found.model_copy(update={"taken": half.size}), "decode")
    assert taken.startswith("500 rows of 1,000 rows x hidden size 64 taken: 1.14x bytes of text a second in decode")
    assert "+0.8% nats a byte, +5.0% tokens" in taken


def test_text_is_scored_to_its_last_byte_behind_an_end_of_text(tmp_path: Path) -> None:
    parent = load_parent(tiny_recipe(tmp_path).model)
    tokenizer = parent.tokenizer
    assert tokenizer is not None
    texts = ["ant1é bee2é " * 20, "été"]
    pieces = pieces_of(texts, [tokenizer], 16)
    assert "".join(pieces) == "".join(texts) and len(pieces) > 2
    assert all(len(encoded(piece, tokenizer)) < 16 for piece in pieces)
    assert "".join(pieces_of(texts, [tokenizer], 16, most_bytes=10)) in texts[0]
    found = text_nats(parent.model, tokenizer, pieces)
    expected = 0.0
    for piece in pieces:
        ids = torch.tensor([[1, *encoded(piece, tokenizer)]])
        logits = parent.model(ids).logits
        expected += float(functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum"))
    assert found.nats_per_byte * found.bytes == pytest.approx(expected, rel=1e-5)
    assert found.bytes == sum(len(text.encode()) for text in texts)
    assert found.tokens == sum(len(encoded(piece, tokenizer)) for piece in pieces)


def test_nothing_is_counted_on_text_that_is_judged_by(tmp_path: Path) -> None:
    texts = [f"document {number} says {number * 7919} and no more" for number in range(80)]
    recipe, tokenizer = small_data_recipe(write_jsonl(tmp_path / "prose.jsonl", texts)), tiny_tokenizer()
    splits = build_token_splits(recipe, tokenizer)
    documents = read_texts(recipe, tokenizer, splits)
    judged = {text for name in ("search", "validation", "test", "estimate") for text in documents.splits[name]["prose"]}
    assert judged and not judged & set(documents.free["prose"])
    assert judged | set(documents.free["prose"]) == set(texts)
    for name in ("validation", "test"):
        first = tokenizer.decode(splits[name].sources["prose"].windows[0])
        assert documents.splits[name]["prose"][0].startswith(first[:10])


def test_a_run_stands_on_the_vocabulary_that_was_taken(finished: Finished) -> None:
    run, result, said = finished
    whole = load_parent(run.recipe.model)
    assert whole.tokenizer is not None
    facts = read_resized(run.directory)
    assert facts is not None and facts.taken == (270, 24) and [r.rows for r in facts.rungs] == [280, 270]
    assert any(line.startswith("270 rows of 300 rows x hidden size 24 taken") for line in said)
    assert set(facts.chosen.texts) == {"validation", "test"} == set(facts.whole.texts)
    # The parent at the rows that stay, exactly.
    parent = AutoModelForCausalLM.from_pretrained(run.directory.resized)
    tokenizer = AutoTokenizer.from_pretrained(run.directory.resized)
    assert parent.config.vocab_size == 270 == len(tokenizer)
    vocabulary, own = whole.tokenizer.get_vocab(), tokenizer.get_vocab()
    old = torch.tensor([vocabulary[token] for token, _ in sorted(own.items(), key=lambda item: item[1])])
    ids = torch.arange(3, 40)[None]
    assert torch.equal(parent(ids).logits, whole.model(old[ids]).logits[..., old])
    # Children and their text have it too.
    child = AutoModelForCausalLM.from_pretrained(run.directory.export, trust_remote_code=True)
    assert child.config.vocab_size == 270
    text = "ant7é, été → 漢字 🙂\x00"
    child_tokenizer = AutoTokenizer.from_pretrained(run.directory.export)
    assert child_tokenizer.decode(child_tokenizer(text)["input_ids"]) == text
    assert result["parent"]["params"] < facts.whole.params
    assert result["resized"]["taken"] == [270, 24]


def test_table_report_and_card_say_what_was_taken(finished: Finished, llmprune: Llmprune) -> None:
    run = finished.run
    shown = " ".join(llmprune("front", run.directory.path).out.split())
    assert "The parent has 270 rows of 300 rows x hidden size 24" in shown
    html = page(gather(run))
    assert "Whole-model sizes" in html and "<b>taken</b>" in html and "text a second, over the whole parent" in html
    contents = read_contents(run.directory.export)
    card = model_card(contents, "user/child", Licence("mit"))
    assert "Parent and child of the figures above have 270 of the original 300 rows" in card
    assert "| 270 (taken) | 24 | " in card
    front, facts = finished.result, read_resized(run.directory)
    assert facts is not None
    picked = next(child for child in front["children"] if child["id"] == front["exported"]["id"])
    lost = picked["test"]["nats_per_byte"] - front["parent"]["test"]["nats_per_byte"]
    before, after = facts.nats_per_byte(facts.whole, "test"), facts.nats_per_byte(facts.chosen, "test")
    together = 100 * ((after + lost) / before - 1)
    assert f"its nats a byte are {together:+.1f}% on test, both cuts together" in card
    assert f"{together:+.1f}%" in html


def test_a_child_is_read_beside_the_parent_it_was_cut_from(
    finished: Finished, llmprune: Llmprune, tmp_path: Path
) -> None:
    run, path = finished.run, finished.run.directory.path
    evaluated = llmprune("eval", path, "--json")
    assert evaluated.code == 0, evaluated.err
    parent = next(model for model in evaluated.json["models"] if model["role"] == "parent")
    assert parent["model"] == str(run.directory.resized)
    assert llmprune("compare", path).code == 0
    # The whole parent's ids mean other text.
    refused = llmprune("eval", path, "--parent", run.recipe.model.path)
    assert refused.code == 2
    assert "has a tokenizer of 300 tokens, and the text was cut by one of 270" in " ".join(refused.err.split())
    # Far from its run, a child knows no parent of its vocabulary.
    shutil.copytree(run.directory.export, tmp_path / "child")
    alone = llmprune("eval", tmp_path / "child", "--data", path)
    assert alone.code == 0 and "no comparison with the parent" in alone.err


def test_what_was_taken_stays_and_is_not_measured_again(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = lay_ground(Run.start(tmp_path / "run", recipe))
    assert first.parent.model.config.vocab_size == 270

    def no_more(*_: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(resizing, "measure_paired", no_more)
    run = Run.open(tmp_path / "run")
    again = lay_ground(run)
    assert again.parent_hash == first.parent_hash == again.parent.hash
    assert lay_ground(Run.join(tmp_path / "run")).parent_hash == first.parent_hash
    (tmp_path / "run" / "resized.json").unlink()
    with pytest.raises(RunDirectoryError, match=r"resized.json is missing; copy it"):
        lay_ground(Run.join(tmp_path / "run"))
    (tmp_path / "run" / "resized.json").write_text('{"schema": 2, "rows": 1}')
    with pytest.raises(RunDirectoryError, match=r"resized.json is damaged .*delete it, and it is measured again"):
        lay_ground(Run.open(tmp_path / "run"))


def test_all_rows_stay_where_none_is_faster(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(reference: Any, candidates: Any, *rest: Any) -> tuple[Speed, list[Speed]]:
        own, (speed,) = paired_by_bytes(reference, candidates, *rest)
        return own, [replace(speed, decode_speedup=one(0.99))]

    monkeypatch.setattr(resizing, "measure_paired", slow)
    run = Run.start(tmp_path / "run", recipe)
    ground = lay_ground(run)
    facts = read_resized(run.directory)
    assert facts is not None and facts.is_whole and len(facts.rungs) == 2
    assert ground.parent.model.config.vocab_size == 300 and not run.directory.resized.exists()
    assert ground.parent_hash == ground.parent.hash


def test_text_to_keep_keeps_its_tokens(tmp_path: Path) -> None:
    plain = changed(tiny_recipe(tmp_path), "space.vocabulary=[275]", "vocabulary.most_loss=50")
    further = write_jsonl(tmp_path / "boats.jsonl", ["The river was wide and slow, and the boats were older. " * 4] * 3)
    keeping = plain.model_copy(update={"vocabulary": plain.vocabulary.model_copy(update={"keep_text": (further,)})})
    found = []
    for name, recipe in (("plain", plain), ("keeping", keeping)):
        run = Run.start(tmp_path / name, recipe)
        lay_ground(run)
        facts = read_resized(run.directory)
        assert facts is not None
        tokenizer = AutoTokenizer.from_pretrained(run.directory.resized)
        found.append(len(tokenizer("The river was wide and slow, and the boats were older.")["input_ids"]))
    assert found[1] < found[0]
    assert facts.chosen.kept_text["boats"] >= facts.whole.kept_text["boats"] > 0
    assert set(facts.more_tokens(facts.chosen)) == {"ant", "bee", "boats"}


def wide_recipe(root: Path) -> Recipe:
    """The tiny recipe with a parent whose hidden size can be cut."""
    recipe = tiny_recipe(root)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = LlamaConfig(vocab_size=300, num_key_value_heads=2, head_dim=6, max_position_embeddings=128, **sizes, **ids)
    LlamaForCausalLM(config).save_pretrained(recipe.model.path)
    return changed(recipe, "vocabulary.most_loss=50")


def test_hidden_sizes_are_measured_beside_vocabularies(tmp_path: Path) -> None:
    recipe = changed(wide_recipe(tmp_path), "space.hidden_size=[32]", "space.vocabulary=[262]")
    run = Run.start(tmp_path / "run", recipe)
    ground = lay_ground(run)
    facts = read_resized(run.directory)
    assert facts is not None
    assert [r.size for r in facts.rungs] == [(262, 64), (300, 32), (262, 32)]
    assert facts.taken == (262, 32) and ground.parent.shape.hidden_size == 32
    assert ground.parent.model.config.vocab_size == 262
    # The text is as many tokens in one vocabulary, whatever the hidden size.
    tokens = {r.size: facts.tokens_per_byte(r) for r in facts.every}
    assert tokens[262, 32] == tokens[262, 64] and tokens[300, 32] == tokens[300, 64]


def wrong(recipe: Recipe) -> Iterator[tuple[str, str]]:
    yield "space.vocabulary=[100]", "space.vocabulary must be from 259 rows"
    yield "space.vocabulary=[300]", "to below the parent's 300; got 300"
    for value in ("most", "24576", "[0]", "[1.5]", "[true]"):
        yield f"space.vocabulary={value}", "name auto, or a list of rows or of shares of them, such as [32000, 0.5]"
    yield "space.hidden_size=[40]", "hidden_size must be a multiple of 32, got 40; use 32"
    yield "space.hidden_size=[128]", "space.hidden_size must be below parent's 64; got 128"


def test_what_cannot_be_cut_is_refused_before_anything_is_measured(
    tmp_path: Path, llmprune: Llmprune, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = wide_recipe(tmp_path)
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml(recipe))
    monkeypatch.setattr(resizing, "build_token_splits", None)
    for override, told in wrong(recipe):
        refused = llmprune("compress", file, "--out", tmp_path / "run", override)
        assert refused.code == 2 and told in " ".join(refused.err.split()), refused.err
        assert refused.err.count("error:") == 1


def test_a_family_without_a_head_dim_keeps_its_hidden_size(tmp_path: Path) -> None:
    from families import CASES, tiny_model

    from llmprune.models.parent import make_parent

    case = next(case for case in CASES if case.model_type == "gpt2")
    parent = make_parent(tiny_model(case), tiny_tokenizer())
    recipe = changed(tiny_recipe(tmp_path), "space.hidden_size=[32]")
    with pytest.raises(RecipeError, match="has no field head_dim"):
        sizes_of(recipe, parent)


def test_a_forecast_measures_no_sizes(recipe: Recipe, tmp_path: Path, llmprune: Llmprune) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    dry = llmprune("compress", file, "--out", tmp_path / "run", "--dry-run", "--json")
    assert dry.code == 0, dry.err
    assert not (tmp_path / "run").exists()
    sizes, tokens = dry.json["stages"][:2]
    assert (sizes["stage"], tokens["stage"]) == ("sizes", "tokens")
    # The parent and two vocabularies on the validation split, the parent and one of them on test.
    assert sizes["forward_tokens"] == 3 * 64 + 2 * 64 and sizes["timed_tokens"] > 0 and sizes["disk_bytes"] > 0


def test_a_forecast_knows_what_a_resized_run_has_done(finished: Finished, tmp_path: Path, llmprune: Llmprune) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.run.directory.path, run)
    for weights in (run / "resized").glob("*.safetensors"):
        weights.unlink()
    dry = llmprune("search", run, "--dry-run", "--json", "--quiet")
    assert dry.code == 0, dry.err
    assert all(stage["done"] for stage in dry.json["stages"]) and dry.json["rates_of"]["of_rows"] < 300


def test_inspect_says_what_the_vocabulary_takes(recipe: Recipe, llmprune: Llmprune) -> None:
    quick = ("--prompt-tokens", 4, "--generated-tokens", 2, "--repeats", 1)
    found = llmprune("inspect", recipe.model.path, *quick, "--json").json
    held, totals = found["vocabulary"], found["totals"]["decode"]
    assert (held["rows"], held["params"]) == (300, 300 * 24)
    assert totals["vocabulary"] == held["decode_share"] > 0
    # The head is a part of what lies outside of blocks.
    assert sum(totals.values()) <= 1 + totals["vocabulary"] and found["outside_blocks"]["decode"] < 1
    told = " ".join(llmprune("inspect", recipe.model.path, *quick).out.split())
    assert "decode time goes to" in told and "300 rows of embedding and head are 37% of the parameters" in told
