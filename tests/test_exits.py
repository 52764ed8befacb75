"""Tokens that leave early, held to oracles: the trunk without exits, its own greedy text, and a pass over a whole text
in which positions that have left keep their states."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from exits_tiny import GENERATED, NEVER, decoded, random_exits, trunks_choice
from families import CASES, IDS, Slices, tiny_model, tiny_parent, tokens, two_sources
from torch.nn import functional
from transformers import PreTrainedModel

from llmprune.choices.ffn import FfnChoice
from llmprune.choices.kv_groups import AttentionChoice
from llmprune.core.errors import ExportError, UnsupportedModelError
from llmprune.core.recipe import FORMAT_NAMES, DeployRecipe
from llmprune.core.recipe_exits import CRITERIA
from llmprune.exits.measuring import score_exits
from llmprune.exits.policy import follow, left_at
from llmprune.formats.limits import check_child
from llmprune.models.checkpoint import write_checkpoint
from llmprune.models.exits import with_exits
from llmprune.models.expected import Expected, prove
from llmprune.models.modeling_pruned import Criterion, ExitRules, ExitsCache, confidence_of
from llmprune.models.surgery import prune

# One of each family, and one with a sliding window.
FIRST = {case.model_type: name for name, case in reversed(list(zip(IDS, CASES, strict=True)))}
ANATOMIES = [*FIRST.values(), "mistral-sliding"]
THREE = ["llama-gqa", "olmo2-gqa", "gpt_neox-parallel"]


def trunk_of(name: str) -> PreTrainedModel:
    return tiny_model(CASES[IDS.index(name)]).requires_grad_(False)


def pruned_trunk(name: str) -> PreTrainedModel:
    """A child whose first layer has no attention, and so keeps no cache, and another no FFN."""
    parent = tiny_parent(CASES[IDS.index(name)])
    choices = [(0, AttentionChoice(0)), (2, FfnChoice(0)), (3, FfnChoice(16))]
    return prune(parent, parent.shape.architecture.with_choices(choices), Slices(parent))


def generated(model: Any, count: int = 8, **kwargs: Any) -> torch.Tensor:
    found: torch.Tensor = model.generate(tokens(1, 9), max_new_tokens=count, **GENERATED, **kwargs)
    return found


@pytest.mark.parametrize("name", ANATOMIES)
def test_without_the_word_it_is_the_trunk_and_where_none_leaves_too(name: str) -> None:
    trunk = trunk_of(name)
    model = with_exits(trunk, ExitRules((1, 3), "top1", (NEVER, NEVER)), random_exits(trunk))
    assert torch.equal(model(tokens()).logits, trunk(tokens()).logits)
    wanted = generated(trunk)
    assert torch.equal(generated(model), wanted)
    assert torch.equal(generated(model, exits="early"), wanted)


@pytest.mark.parametrize("name", ANATOMIES)
def test_what_is_drafted_and_verified_is_the_trunks_own_text(name: str) -> None:
    trunk = trunk_of(name)
    rules = trunks_choice(trunk, ExitRules((2,), "top1", (NEVER,), waiting=3, keys="exact"))
    # All are drafted, most are wrong; and where a gate says so.
    for own in (ExitRules((2,), "top1", (0.0,), waiting=3, keys="exact"), rules):
        model = with_exits(trunk, own, random_exits(trunk))
        cache = ExitsCache(model)
        found = generated(model, exits="draft", past_key_values=cache)
        assert torch.equal(found, generated(trunk))
        assert set(cache.left_at) <= {0, 1} and len(cache.left_at) >= 3


@pytest.mark.parametrize("keys", ["exact", "propagated"])
@pytest.mark.parametrize("name", [*THREE, "gemma3_text-gqa", "mistral-sliding", "pruned"])
def test_generation_is_what_a_pass_over_the_text_says(name: str, keys: Any) -> None:
    """Token by token, with keys and values stored late and in batches, against one pass over the window."""
    trunk = pruned_trunk("llama-gqa") if name == "pruned" else trunk_of(name)
    criterion: Criterion = "gate" if name == "olmo2-gqa" else "top1"
    rules = trunks_choice(trunk, ExitRules((1, 2), criterion, (NEVER, NEVER), waiting=2, keys=keys))
    model, split = with_exits(trunk, rules, random_exits(trunk)), two_sources(20)
    scored = score_exits(model, split, prompt_tokens=1)
    depths = set()
    for source, of_source in split.sources.items():
        nats = torch.zeros(())
        left = left_at(scored.scans[source])
        for window_T, left_N in zip(of_source.windows, left, strict=True):
            logits_TV, cache = decoded(model, window_T)
            # The first token is a prompt, and the last predicts nothing.
            assert cache.left_at[:-1] == left_N[1:].tolist()
            nats += functional.cross_entropy(logits_TV[:-1], window_T[1:], reduction="sum")
            depths |= set(cache.left_at)
        per_token = float(nats) / (of_source.windows.shape[0] * 19)
        assert scored.quality.per_source[source].nats_per_token == pytest.approx(per_token, abs=2e-5)
    assert depths == {0, 1, 2}
    assert sum(scored.depths) == pytest.approx(1)


def test_exact_keys_leave_later_tokens_as_they_were() -> None:
    """Whoever left before: a token that goes through all layers has the trunk's logits."""
    trunk, window_T = trunk_of("llama-gqa"), tokens(1, 20)[0]
    rules = trunks_choice(trunk, ExitRules((1, 3), "margin", (NEVER, NEVER), waiting=3, keys="exact"))
    logits_TV, cache = decoded(with_exits(trunk, rules, random_exits(trunk)), window_T)
    wanted_TV = trunk(window_T[None]).logits[0]
    whole = [0, *(t for t, left in enumerate(cache.left_at, start=1) if left == 2)]
    assert 2 < len(whole) < 20
    torch.testing.assert_close(logits_TV[whole], wanted_TV[whole], atol=1e-4, rtol=1e-4)


def test_a_chat_goes_on_behind_tokens_that_wait() -> None:
    trunk, ids = trunk_of("llama-gqa"), tokens(1, 12)
    model = with_exits(trunk, ExitRules((2,), "top1", (0.0,), waiting=9, keys="exact"), random_exits(trunk))
    cache = ExitsCache(model)
    with torch.inference_mode():
        for part in (ids[:, :4], ids[:, 4:5], ids[:, 5:6], ids[:, 6:]):
            logits = model(part, past_key_values=cache, use_cache=True).logits
    assert cache.left_at == [0, 0] and cache.count(0) == 0
    torch.testing.assert_close(logits[0], trunk(ids).logits[0, 6:], atol=1e-4, rtol=1e-4)


def test_agreement_is_with_the_exit_before() -> None:
    trunk = trunk_of("llama-gqa")
    model = with_exits(trunk, ExitRules((1, 2), "agreement", (0.0001, 0.0001)), random_exits(trunk))
    _, cache = decoded(model, tokens(1, 20)[0])
    assert 0 not in cache.left_at and 2 in cache.left_at


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name != "gate"])
def test_confidence_is_between_0_and_1(criterion: Criterion) -> None:
    logits = torch.randn(50, 30) * torch.logspace(-3, 2, 50)[:, None]
    found = confidence_of(criterion, logits, logits.argmax(-1))
    assert bool((found >= -1e-6).all()) and bool((found <= 1 + 1e-6).all())
    sure = confidence_of(criterion, torch.tensor([[100.0, 0.0, 0.0]]), torch.tensor([0]))
    assert float(sure) == pytest.approx(1)


def test_a_checkpoint_is_proven_with_its_exits(tmp_path: Any) -> None:
    parent = tiny_parent(CASES[IDS.index("llama-gqa")])
    rules = trunks_choice(parent.model, ExitRules((1, 3), "top1", (NEVER, NEVER), waiting=2))
    model = with_exits(parent.model, rules, random_exits(parent.model))
    wanted = generated(model, exits="early")
    write_checkpoint(model, None, parent.shape.architecture, {}, tmp_path / "exits")
    assert sorted(path.name for path in (tmp_path / "exits").glob("*.py")) == ["modeling_pruned.py"]
    loaded: Any = type(model).from_pretrained(tmp_path / "exits")
    assert ExitRules.of(loaded.config) == rules
    assert torch.equal(generated(loaded, exits="early"), wanted)
    assert torch.equal(generated(loaded), generated(parent.model))


def test_a_checkpoint_whose_exits_say_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    trunk = trunk_of("llama-gqa")
    expected = Expected.of(with_exits(trunk, ExitRules((1,), "top1", (0.0,), waiting=2), random_exits(trunk)), None)
    assert expected.inputs["with_exits"].shape == (1, 32)
    found = {
        **dict.fromkeys(("missing", "unexpected", "mismatched"), ()),
        **dict.fromkeys(("max_logit_difference", "generation_gap"), 0.0),
        **{"finite": True, "llmprune_imported": False, "params": expected.params, "weights": expected.weights},
    }
    for equal in (True, False):
        told = {**found, "exits_equal": equal}
        monkeypatch.setattr("llmprune.models.expected.in_fresh_process", lambda *_, told=told: told)
        with nullcontext() if equal else pytest.raises(ExportError, match="other tokens with its exits"):
            prove(expected, Path())


@pytest.mark.parametrize("form", FORMAT_NAMES)
def test_formats_without_words_for_exits_refuse_by_name(form: Any) -> None:
    trunk = trunk_of("llama-gqa")
    config = with_exits(trunk, ExitRules((1,), "gate", (0.5,)), random_exits(trunk)).config
    if form == "hf":
        check_child(config, form, DeployRecipe())
        return
    with pytest.raises(ExportError, match=f"{form} cannot hold a model with exits"):
        check_child(config, form, DeployRecipe())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"layers": (2, 1)}, "rising order"),
        ({"layers": ()}, "rising order"),
        ({"thresholds": (0.5,)}, "1 for 2 exits"),
        ({"criterion": "luck"}, "got 'luck'"),
        ({"waiting": 0}, "at least 1"),
        ({"keys": "none"}, "'none'"),
    ],
)
def test_rules_that_say_nothing_are_refused(changed: Any, said: str) -> None:
    sound: dict[str, Any] = {"layers": (1, 2), "criterion": "top1", "thresholds": (0.5, 0.5)}
    with pytest.raises(ValueError, match=said):
        ExitRules(**{**sound, **changed})


def test_what_cannot_have_exits_is_refused() -> None:
    opt = trunk_of("opt-projected")
    with pytest.raises(UnsupportedModelError, match="word_embed_proj_dim=32"):
        with_exits(opt, ExitRules((1,), "gate", (0.5,)), {})
    trunk = trunk_of("llama-gqa")
    with pytest.raises(ValueError, match="before the last of 4 layers"):
        with_exits(trunk, ExitRules((4,), "gate", (0.5,)), {})
    model: Any = with_exits(trunk, ExitRules((1, 2), "gate", (0.5, 0.5)), random_exits(trunk))
    with pytest.raises(UnsupportedModelError, match="has exits already"):
        with_exits(model, ExitRules((1,), "gate", (0.5,)), {})
    for kwargs, said in (({"exits": "late"}, "'late'"), ({"exits": "draft"}, "one exit; this model has 2")):
        with pytest.raises(ValueError, match=said):
            generated(model, **kwargs)
    with pytest.raises(ValueError, match="one sequence"):
        model(tokens(2, 3), past_key_values=ExitsCache(model), use_cache=True)
    with pytest.raises(ValueError, match="no exits"):
        ExitsCache(trunk)


def test_the_scan_of_one_exit_feeds_the_next() -> None:
    """By hand: at most two wait, and those who waited come along to the next exit."""
    first = torch.tensor([[0.9, 0.9, 0.9, 0.9, 0.1, 0.9]])
    second = torch.tensor([[0.9, 0.9, 0.9, 0.1, 0.9, 0.9]])
    one, other = follow(ExitRules((1, 2), "top1", (0.5, 0.5), waiting=2), [first, second])
    assert one.leaves.tolist() == [[True, True, False, True, False, True]]
    assert one.brought.tolist() == [[0, 0, 2, 0, 1, 0]]
    # Two came along with the third token: the room is full, and it goes on with both.
    assert other.leaves.tolist() == [[False, False, False, False, True, False]]
    assert other.brought.tolist() == [[0, 0, 2, 0, 0, 0]]
    assert left_at([one, other]).tolist() == [[0, 0, 2, 0, 1, 0]]
