"""A run whose children draft for their parent, from the recipe to the command that hands one over."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import Finished, Llmprune
from tiny import paired_by_bytes, tiny_recipe
from transformers import AutoModelForCausalLM, GenerationConfig

from llmprune.core.budgets import parse_pick
from llmprune.core.errors import BudgetError, RecipeError
from llmprune.core.recipe import Recipe
from llmprune.core.recipe_text import parse_recipe
from llmprune.data.tokens import build_token_splits
from llmprune.measure.record import Front
from llmprune.measure.speed.throughput import Spread
from llmprune.measure.speed.verifying import VerifyCosts
from llmprune.models import checkpoint
from llmprune.models.expected import Proof
from llmprune.models.parent import load_parent
from llmprune.pipeline import commands, own_text, prepare
from llmprune.pipeline.run import Run
from llmprune.pipeline.run_directory import RunDirectory, read_front
from llmprune.search import judging
from llmprune.tables import block_tables, reach

PROMPT = 6
CHEAP = VerifyCosts(tuple(Spread(1 + 0.05 * k, 1 + 0.05 * k, 1 + 0.05 * k) for k in range(17)))


def as_drafts(recipe: Recipe) -> Recipe:
    data = recipe.model_dump()
    data["data"]["own_text_after"] = PROMPT
    data["search"] |= {"objective": "draft", "targets": [1.3]}
    data["export"]["pick"] = "draft"
    return parse_recipe(data, origin="drafts")


@pytest.fixture(scope="module")
def drafted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run directory with a front of drafts. Times are made: a model is as fast as it is small."""
    root = tmp_path_factory.mktemp("drafts")
    path = root / "run"
    with (
        RunDirectory(path).locked(),
        patch.object(judging, "measure_paired", paired_by_bytes),
        patch.object(block_tables, "measure_paired", paired_by_bytes),
        patch.object(reach, "measure_paired", paired_by_bytes),
        patch.object(prepare, "verify_costs", return_value=CHEAP),
    ):
        run = Run.start(path, as_drafts(tiny_recipe(root)))
        said: list[str] = []
        run.say = said.append
        commands.search(run)
        commands.front(run)
    assert any("a draft pays from so much agreement on" in line for line in said)
    yield path


def front_of(path: Path) -> Front:
    return read_front(RunDirectory(path))


def test_a_front_of_drafts_is_drawn_by_disagreement(drafted: Path) -> None:
    front = front_of(drafted)
    assert front.parent.agreement is not None and front.parent.agreement.share == 1
    assert front.parent.draft is not None and front.parent.draft.drafted == 0 and not front.parent.usable
    assert front.lookup is not None and front.lookup.speedup >= 1
    assert front.children
    slowest_first = [child.value("disagreement") for child in front.children]
    assert slowest_first == sorted(slowest_first) and 0 <= slowest_first[0] < slowest_first[-1] <= 1
    for child in front.every:
        assert child.agreement is not None and child.draft is not None and child.test is not None
        assert child.test.agreement is not None and child.test.agreement.tokens > 0
        speedups = [
            1 / (rounds * (k / speed + CHEAP.medians[k]) + catch_ups * 0.05 / speed)
            for speed in (child.decode_speedup.median,)
            for k, (rounds, catch_ups) in enumerate(zip(child.agreement.rounds, child.agreement.catch_ups, strict=True))
        ]
        assert child.draft_speedup == pytest.approx(max(speedups)) and child.usable == (max(speedups) > 1)


def test_trials_are_told_disagreement_and_speed(drafted: Path) -> None:
    run = Run.join(drafted)
    from llmprune.report.facts import gather

    facts = gather(run)
    assert facts.phase == "decode" and facts.trials
    assert all(trial.record.draft is not None for trial in facts.trials)


def test_all_text_but_the_calibrations_is_the_parents_own(drafted: Path) -> None:
    from llmprune.data.store import load_token_splits

    splits = load_token_splits(RunDirectory(drafted).tokens)
    assert {name for name, split in splits.splits.items() if split.own_after is None} == {"calibration"}
    assert not RunDirectory(drafted).own_text.exists()


def test_picks_of_drafts(drafted: Path, finished_run: Finished) -> None:
    front = front_of(drafted)
    pick = parse_pick("draft")
    best = max(front.children, key=pick.value_of)
    assert pick.violation(best) <= 0 and best.draft_speedup == max(
        child.value("draft_speedup") for child in front.children
    )
    assert parse_pick("disagreement<=0.5").best == parse_pick("draft, bytes<=1e9").best == "draft_speedup"
    with pytest.raises(BudgetError, match=r"measured of drafts alone, in a run with search\.objective=draft"):
        pick.value_of(front_of(finished_run.path).children[0])
    with pytest.raises(BudgetError, match="draft"):
        parse_pick("draft, prefill")


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"data": {"own_text_after": None}}, r"data\.own_text_after=32"),
        ({"data": {"own_text_after": 16}}, "must leave room for the parent's own text in windows of 16 tokens"),
        ({"space": {"vocabulary": "auto"}}, r"space\.vocabulary would replace"),
        ({"search": {"reward": "mnas-soft", "sampler": "tpe"}}, "reward=front"),
    ],
)
def test_what_cannot_be_a_draft_is_refused_before_the_search(
    finished_run: Finished, changes: dict[str, Any], rule: str
) -> None:
    data = as_drafts(finished_run.recipe).model_dump()
    for section, values in changes.items():
        data[section] |= values
    with pytest.raises(RecipeError, match=rule) as refused:
        parse_recipe(data, origin="drafts")
    assert "got {" not in str(refused.value), "it names the value, not the whole recipe"


def test_a_draft_is_handed_over_with_what_it_gives(drafted: Path, llmprune: Llmprune, tmp_path: Path) -> None:
    with patch.object(checkpoint, "prove", return_value=Proof(0.0, 0.0, 1, False)):
        result = llmprune(
            "draft", drafted, "--to", tmp_path / "draft", "--prompts", 3, "--new-tokens", 8, "--force", "--json"
        )
    assert result.code == 0, result.err
    found = result.json["decoding"]
    assert found["prompts"] == 3 and found["identical"] + found["ties"] == 3 and found["differ"] == 0
    assert found["speedup"]["median"] > 0 and found["tokens_a_round"] >= 1
    assert str(tmp_path / "draft") in result.json["commands"]["transformers"]
    rules = json.loads((tmp_path / "draft" / "generation_config.json").read_text())
    assert rules["num_assistant_tokens"] == found["drafted"] and rules["num_assistant_tokens_schedule"] == "constant"
    # What transformers makes of it, loaded as users load it, is what the parent writes alone.
    parent = AutoModelForCausalLM.from_pretrained(Run.join(drafted).recipe.model.path)
    child = AutoModelForCausalLM.from_pretrained(tmp_path / "draft", trust_remote_code=True)
    ids = torch.tensor([[5, 9, 20, 31]])
    greedy = GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=2)  # type: ignore[no-untyped-call]
    alone = parent.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
    assisted = parent.generate(
        ids, attention_mask=torch.ones_like(ids), generation_config=greedy, assistant_model=child
    )
    assert torch.equal(alone, assisted)


def test_a_run_of_other_children_has_no_drafts(finished_run: Finished, llmprune: Llmprune) -> None:
    result = llmprune("draft", finished_run.path)
    assert result.code == 2 and "--recipe draft" in result.err


def test_report_and_card_speak_of_drafts(drafted: Path, llmprune: Llmprune, tmp_path: Path) -> None:
    assert llmprune("report", drafted, "--to", tmp_path / "report.html", "--figures", tmp_path / "figures").code == 0
    page = (tmp_path / "report.html").read_text()
    assert "differ, test" in page and "parent with it (drafted)" in page and "test_differs" in page
    assert (tmp_path / "figures" / "front.svg").stat().st_size > 1000


def test_a_parent_that_was_stopped_writes_on_where_it_was(
    finished_run: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.start(tmp_path / "run", as_drafts(finished_run.recipe))
    parent = load_parent(run.recipe.model)
    assert parent.tokenizer is not None
    splits = build_token_splits(run.recipe.data, parent.tokenizer)
    monkeypatch.setattr(own_text, "windows_together", lambda length: 4)
    real, made = own_text.own_windows, list[int]()

    def until(most: int) -> None:
        def write(model: Any, windows_NT: torch.Tensor, prompt_tokens: int) -> torch.Tensor:
            if len(made) == most:
                raise KeyboardInterrupt
            made.append(len(windows_NT))
            return real(model, windows_NT, prompt_tokens)

        monkeypatch.setattr(own_text, "own_windows", write)

    until(2)
    with pytest.raises(KeyboardInterrupt):
        own_text.in_parents_words(run, parent, splits, PROMPT)
    until(99)
    found = own_text.in_parents_words(run, parent, splits, PROMPT)
    windows = sum(
        len(s.windows) for name, split in splits.splits.items() if name != "calibration" for s in split.sources.values()
    )
    assert sum(made) == windows and len(made) == -(-windows // 4)
    # Nothing was mixed up: each window goes on from its own beginning, as it would alone.
    for name, split in splits.splits.items():
        for source, before in split.sources.items():
            if name != "calibration":
                alone = real(parent.model, before.windows, PROMPT)
                assert torch.equal(found[name].sources[source].windows, alone)
