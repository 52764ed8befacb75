"""Scores from the middle of a candidate on, held to plain full forward passes of the whole child."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise

import pytest
import torch
from closeness import assert_close
from families import CASES, IDS, LAYERS, Case, Slices, tiny_model, tiny_parent, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprune.choices.architecture import Architecture
from llmprune.choices.dimensions import BlockKind
from llmprune.choices.ffn import FfnChoice
from llmprune.choices.kv_groups import AttentionChoice
from llmprune.core.errors import ArchitectureError, ModelError
from llmprune.data.tokens import SourceTokens, Split
from llmprune.measure.quality.perplexity import score_windows
from llmprune.measure.quality.prefix import PrefixScorer
from llmprune.measure.quality.prefix_states import PrefixStates, last_start, spread, steps_of, without_first_layers
from llmprune.measure.quality.scores import WindowScores
from llmprune.models.parent import Parent, make_parent
from llmprune.models.surgery import prune

SEQ_LEN = 10
BATCH_TOKENS = 2 * SEQ_LEN
WINDOWS = {"news": 3, "code": 2}
ALL_TOKENS = sum(WINDOWS.values()) * SEQ_LEN


def split_of(windows: dict[str, int] = WINDOWS) -> Split:
    sources = {
        name: SourceTokens(tokens(count, SEQ_LEN, seed=seed), torch.full((count,), 30))
        for seed, (name, count) in enumerate(windows.items())
    }
    return Split("search", sources, {"news": 0.25, "code": 0.75}, SEQ_LEN, bos=False)


SPLIT = split_of()
NONE = dict.fromkeys(WINDOWS, 0)


@cache
def parent_of(case_id: str) -> Parent:
    return tiny_parent(CASES[IDS.index(case_id)])


@pytest.fixture
def parent() -> Parent:
    return parent_of("llama-gqa")


def state_bytes(parent: Parent) -> int:
    """What the states of one layer take, for the whole split."""
    return ALL_TOKENS * parent.shape.hidden_size * 4


def scorer_of(parent: Parent, parent_layers: int = 99, candidate_states: int = 99, **changes: object) -> PrefixScorer:
    limits = {
        "parent_bytes": parent_layers * state_bytes(parent),
        "candidate_bytes": candidate_states * state_bytes(parent),
        "batch_tokens": BATCH_TOKENS,
    }
    return PrefixScorer(parent, Slices(parent), SPLIT, **{**limits, **changes})  # type: ignore[arg-type]


@cache
def plain(parent: Parent, architecture: Architecture) -> dict[str, torch.Tensor]:
    """The oracle: every layer of the whole child, in the batches of `scorer_of`."""
    # `score_windows` takes no batch size; the limit on logits sets it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "llmprune.measure.quality.perplexity.LOGITS_BYTES", BATCH_TOKENS * 4 * parent.model.config.vocab_size
        )
        return score_windows(prune(parent, architecture, Slices(parent)), SPLIT)


def assert_same_bits(scores: WindowScores, expected: dict[str, torch.Tensor]) -> None:
    assert scores.nats.keys() == expected.keys()
    for name, nats in expected.items():
        assert scores.nats[name].dtype == torch.float64 and scores.nats[name].device.type == "cpu"
        assert torch.equal(scores.nats[name], nats), name


def changed(parent: Parent, *changes: tuple[int, BlockKind, int]) -> Architecture:
    """The parent with some blocks changed: (layer, kind, units)."""
    architecture = parent.shape.architecture
    for layer, kind, units in changes:
        architecture = architecture.with_choice(
            layer, AttentionChoice(units) if kind == "attention" else FfnChoice(units)
        )
    return architecture


def architectures(parent: Parent) -> Iterator[Architecture]:
    g, f = parent.shape.kv_groups, parent.shape.ffn_width
    fewer = max(1, g - 1)
    yield parent.shape.architecture
    yield changed(parent, (3, "ffn", 17))
    for pairs in (
        [(g, f), (g, f), (g, 13), (fewer, 9)],  # two layers of the parent
        [(g, f), (g, f), (g, 13), (0, 9)],  # and the next one shared with the candidate before
        [(g, f), (g, f), (g, 13), (0, 0)],  # last layer gone
        [(g, f), (g, f), (0, 0), (0, 0)],  # nothing left after the shared layers
        [(g, f), (g, f), (0, 13), (0, f)],  # no attention after the shared layers
        [(g, f), (0, 0), (g, f), (fewer, f)],  # a gap, then the parent's layers at another depth
        [(0, 0), (g, f), (g, f), (g, 5)],  # first layer gone
        [(0, f), (0, 5), (0, f), (fewer, f)],  # nothing shared, and attention in the last layer alone
        [(g, 0), (0, 0), (0, 0), (0, 0)],  # half a layer in all
    ):
        yield Architecture.of(pairs)


@pytest.mark.parametrize("case_id", IDS)
def test_every_shortcut_gives_the_bits_of_a_full_pass(case_id: str) -> None:
    parent = parent_of(case_id)
    scorer = scorer_of(parent)
    for architecture in architectures(parent):
        scorer.remember(architecture)
        assert_same_bits(scorer.score(architecture), plain(parent, architecture))
    assert 0 < scorer.work.candidates + scorer.work.parent < scorer.work.plain


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_sequence_of_candidates_under_any_limits(data: st.DataObject) -> None:
    parent = parent_of("llama-gqa")
    scorer = scorer_of(parent, data.draw(st.integers(0, LAYERS)), data.draw(st.integers(0, 5)))
    # Few choices, so that prefixes meet.
    choice = st.tuples(st.sampled_from([0, 2, 3]), st.sampled_from([0, 17, 40]))
    layers = st.lists(choice, min_size=LAYERS, max_size=LAYERS).filter(lambda pairs: any(groups for groups, _ in pairs))
    for pairs in data.draw(st.lists(layers, min_size=1, max_size=5)):
        architecture = Architecture.of(pairs)
        if data.draw(st.booleans()):
            scorer.remember(architecture)
        counts = {name: data.draw(st.integers(0, count)) for name, count in WINDOWS.items()}
        scores = scorer.score_range(architecture, NONE, counts).joined(
            scorer.score_range(architecture, counts, WINDOWS)
        )
        assert_same_bits(scores, plain(parent, architecture))


def test_the_parent_is_run_once_and_only_if_it_helps(parent: Parent) -> None:
    scorer = scorer_of(parent)
    scorer.score(changed(parent, (0, "ffn", 3)))
    assert scorer.work.parent == 0 and scorer.states_bytes == 0
    scorer.score(changed(parent, (2, "ffn", 3)))
    assert scorer.work.parent == LAYERS * ALL_TOKENS
    assert scorer.work.candidates == (LAYERS + 2) * ALL_TOKENS
    assert scorer.work.plain == 2 * LAYERS * ALL_TOKENS
    scorer.score(parent.shape.architecture)
    scorer.score(changed(parent, (3, "ffn", 3)))
    assert scorer.work.parent == LAYERS * ALL_TOKENS
    assert scorer.work.candidates == (LAYERS + 3) * ALL_TOKENS
    assert scorer.states_bytes == (LAYERS - 1) * state_bytes(parent)


def test_a_candidate_starts_where_a_remembered_one_parts(parent: Parent) -> None:
    incumbent = changed(parent, (0, "ffn", 3), (1, "attention", 1))
    mutants = [incumbent.with_choice(3, FfnChoice(width)) for width in (0, 17, 5)]
    scorer = scorer_of(parent)
    scorer.score(incumbent)
    assert scorer.states_bytes == 0, "nobody asked to keep it"
    scorer.remember(incumbent)
    scorer.score(incumbent)
    assert scorer.states_bytes == (LAYERS - 1) * state_bytes(parent)
    before = scorer.work.candidates
    for mutant in mutants:
        assert_same_bits(scorer.score(mutant), plain(parent, mutant))
    assert scorer.work.candidates - before == len(mutants) * ALL_TOKENS
    assert scorer.states_bytes == (LAYERS - 1) * state_bytes(parent), "mutants are not remembered"
    scorer.forget(incumbent)
    other = changed(parent, (0, "ffn", 9))
    scorer.remember(other)
    scorer.score(other)
    assert scorer.states_bytes == 2 * (LAYERS - 1) * state_bytes(parent)


@pytest.mark.parametrize(("parent_layers", "candidate_states"), [(0, 0), (0, 1), (1, 1), (2, 3), (9, 2)])
def test_memory_stays_within_its_limits(parent: Parent, parent_layers: int, candidate_states: int) -> None:
    scorer = scorer_of(parent, parent_layers, candidate_states)
    for architecture in (*architectures(parent), *reversed(list(architectures(parent)))):
        scorer.remember(architecture)
        assert_same_bits(scorer.score(architecture), plain(parent, architecture))
        limit = min(parent_layers, LAYERS - 1) + candidate_states
        assert scorer.states_bytes <= limit * state_bytes(parent)
    if candidate_states:
        assert scorer.states_bytes > 0


def test_fewer_kept_layers_save_less_and_never_change_a_figure(parent: Parent) -> None:
    done = []
    for parent_layers in range(LAYERS):
        scorer = scorer_of(parent, parent_layers)
        for layer in range(LAYERS):
            scorer.score(changed(parent, (layer, "ffn", 7)))
        done.append(scorer.work.candidates // ALL_TOKENS)
    assert done == [16, 12, 11, 10]


def test_ranges_run_whole_batches_and_nothing_twice(parent: Parent) -> None:
    architecture, scorer = changed(parent, (0, "ffn", 3)), scorer_of(parent)
    assert scorer.batch_windows == 2
    first = {"news": 2, "code": 0}
    scores = scorer.score_range(architecture, NONE, first)
    assert scores.counts == first and scorer.work.candidates == LAYERS * 2 * SEQ_LEN
    scores = scores.joined(scorer.score_range(architecture, first, WINDOWS))
    assert_same_bits(scores, plain(parent, architecture))
    assert scorer.work.candidates == scorer.work.plain == LAYERS * ALL_TOKENS
    assert scorer.score_range(architecture, WINDOWS, WINDOWS).counts == NONE
    assert scorer.work.candidates == scorer.work.plain
    odd = scorer.score_range(architecture, {"news": 1, "code": 1}, {"news": 2, "code": 2})
    assert_same_bits(odd, scores.between({"news": 1, "code": 1}, {"news": 2, "code": 2}).nats)  # type: ignore[arg-type]


def test_another_batch_size_changes_rounding_only(parent: Parent) -> None:
    for architecture in architectures(parent):
        scores = scorer_of(parent, batch_tokens=SEQ_LEN).score(architecture)
        for name, nats in plain(parent, architecture).items():
            assert_close(scores.nats[name], nats)


def test_bfloat16_states_are_kept_as_they_are() -> None:
    parent = make_parent(tiny_model(CASES[0]).bfloat16(), None)
    scorer = scorer_of(parent)
    for architecture in architectures(parent):
        scorer.remember(architecture)
        assert_same_bits(scorer.score(architecture), plain(parent, architecture))
    fewer = scorer_of(parent, parent_layers=1, candidate_states=0)
    fewer.score(changed(parent, (3, "ffn", 3)))
    assert fewer.states_bytes == 2 * state_bytes(parent) // 2, "in two bytes, twice the layers fit"


def test_a_parent_on_several_devices_is_scored_by_full_passes(parent: Parent, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer_before = scorer_of(parent)
    monkeypatch.setattr(parent.model, "hf_device_map", {"model": "cpu", "lm_head": "meta"}, raising=False)
    scorer = scorer_of(parent)
    monkeypatch.undo()
    architecture = changed(parent, (3, "ffn", 3))
    scorer.remember(architecture)
    assert_same_bits(scorer.score(architecture), scorer_before.score(architecture).nats)  # type: ignore[arg-type]
    assert scorer.states_bytes == 0 and scorer.work.candidates == scorer.work.plain


def test_what_is_no_child_is_refused_and_leaves_no_hook(parent: Parent) -> None:
    scorer = scorer_of(parent)
    with pytest.raises(ArchitectureError, match="keeps attention"):
        scorer.score(Architecture.of([(0, 40)] * LAYERS))
    broken = tiny_parent(Case("llama", "broken", CASES[0].values))
    broken.layer(3).get_submodule("mlp.down_proj").weight.fill_(torch.nan)
    with pytest.raises(ModelError, match="NaN in window 0"):
        scorer_of(broken).score(changed(broken, (3, "attention", 1)))
    for module in (*parent.model.modules(), *broken.model.modules()):
        assert not module._forward_pre_hooks


@given(first=st.integers(1, 5), last=st.integers(0, 60), count=st.integers(0, 70))
def test_kept_layers_are_spread_evenly(first: int, last: int, count: int) -> None:
    kept = spread(first, last, count)
    assert len(kept) == max(0, min(count, last - first + 1))
    assert all(first <= layer <= last for layer in kept)
    gaps = [other - one for one, other in pairwise([first - 1, *kept, last + 1])]
    assert not kept or (min(gaps) >= 1 and max(gaps) - min(gaps) <= 1)


def test_prefixes_leave_in_the_order_of_their_use(parent: Parent) -> None:
    steps = steps_of(parent.shape.architecture)
    states = PrefixStates(limit=2)
    for length in (1, 2):
        states.make_room([steps[:length]])
        states.use(steps[:length])[0] = torch.zeros(length)
    assert states.deepest(steps, LAYERS, [0]) == 2
    assert states.deepest(steps, LAYERS, [0, 1]) == 0, "batch 1 is not there"
    states.use(steps[:1])
    states.make_room([steps[:3]])
    assert len(states) == 2 and states.deepest(steps, 2, [0]) == 1
    with pytest.raises(AssertionError, match="3 prefixes, where 2 fit"):
        states.make_room([steps[:length] for length in range(3)])


def test_steps_skip_what_is_gone() -> None:
    architecture = Architecture.of([(3, 40), (0, 0), (1, 0), (0, 7), (0, 0)])
    steps = steps_of(architecture)
    assert [step.layer for step in steps] == [0, 2, 3]
    assert last_start(steps) == 1
    shorter = without_first_layers(architecture, 2)
    assert shorter.kept_layers == (2, 3) and shorter.layers[2:] == architecture.layers[2:]
    assert Counter(layer.is_gone for layer in shorter.layers)[True] == 3


def kl_by_hand(parent: Parent, architecture: Architecture, windows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Over all words, in float64."""
    sums = []
    with torch.inference_mode():
        for window in windows:
            logits = [
                model(input_ids=window[None]).logits[0, :-1].double().log_softmax(-1)
                for model in (parent.model, prune(parent, architecture, Slices(parent)))
            ]
            sums.append((logits[0].exp() * (logits[0] - logits[1])).sum())
    return torch.stack(sums)


@pytest.mark.parametrize("case_id", ["llama-gqa", "granite-gqa", "gemma2-gqa", "gpt2-mha"])
def test_kl_over_the_vocabulary_is_the_full_kl(case_id: str) -> None:
    parent = parent_of(case_id)
    scorer = scorer_of(parent, top_k=10**6)
    for architecture in list(architectures(parent))[:7:2]:
        scores = scorer.score(architecture)
        assert scores.kl is not None
        for name, source in SPLIT.sources.items():
            by_hand = kl_by_hand(parent, architecture, list(source.windows))
            torch.testing.assert_close(scores.kl[name], by_hand, rtol=1e-4, atol=1e-5)
        assert_same_bits(scores, plain(parent, architecture))


def test_kl_over_few_words_is_that_of_both_renormalised(parent: Parent) -> None:
    architecture = changed(parent, (1, "ffn", 7))
    scores = scorer_of(parent, top_k=8).score(architecture)
    child, window = prune(parent, architecture, Slices(parent)), SPLIT.sources["news"].windows[:1]
    with torch.inference_mode():
        theirs, ours = (model(input_ids=window).logits[0, :-1].double() for model in (parent.model, child))
    top = theirs.topk(8).indices
    p, q = (logits.gather(-1, top).softmax(-1) for logits in (theirs, ours))
    assert scores.kl is not None
    assert float(scores.kl["news"][0]) == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-4)


def test_kl_of_the_parent_with_itself_is_nothing(parent: Parent) -> None:
    scorer = scorer_of(parent, top_k=16)
    own = scorer.score(parent.shape.architecture).kl
    assert own is not None and all(not values.any() for values in own.values())
    # The same child by a full pass, not by the shortcut.
    again = scorer_of(parent, parent_layers=0, top_k=16)
    figures = again._run(parent.shape.architecture, steps_of(parent.shape.architecture), [0, 1, 2])
    assert all(found.kl is not None and not found.kl.any() for found in figures)


def test_top_logits_that_do_not_fit_are_refused(parent: Parent) -> None:
    positions = sum(WINDOWS.values()) * (SEQ_LEN - 1)
    scorer_of(parent, top_k=50, top_k_bytes=positions * 50 * 8)
    with pytest.raises(ValueError, match=r"top_k 51 takes .* lower top_k to 50"):
        scorer_of(parent, top_k=51, top_k_bytes=positions * 51 * 8 - 1)
