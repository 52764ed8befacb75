"""A parent that waits in CPU memory while its children are scored and timed: the same figures, with room for one of
them. The GPU is a stand-in that computes on the CPU and counts what lies on it (two_gpus.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import miniature_cuda
import pytest
import torch
from baselines_tiny import WORKLOAD, judge_of, library_of, random_parent, space_of
from families import CASES, COMMON, GROUPED, IDS, Case, Slices, tiny_model, tiny_parent, tokens
from test_prefix import BATCH_TOKENS, SPLIT
from test_spread import GPUS, spread_parent
from tiny import tiny_tokenizer
from transformers import PreTrainedModel
from two_gpus import Memory, two_gpus

from llmprune.baselines.flap import compensation
from llmprune.choices.architecture import Architecture
from llmprune.choices.vocabulary import VocabularyChoice
from llmprune.measure.quality.likeness import ParentsLogits
from llmprune.measure.quality.perplexity import score
from llmprune.measure.quality.prefix import PrefixScorer
from llmprune.measure.quality.scores import WindowScores
from llmprune.measure.speed import throughput
from llmprune.measure.speed.sessions import Generation, TorchSession
from llmprune.measure.speed.throughput import PREFILL_PAIRS, Workload, measure_paired
from llmprune.measure.speed.visits import Seconds, in_visits
from llmprune.models import samples as module_of_samples
from llmprune.models import waiting
from llmprune.models.at_hand import Place, bring
from llmprune.models.parent import Parent
from llmprune.models.surgery import prune
from llmprune.models.waiting import at_home, come_home, home_of, wait, waits, with_children, with_room
from llmprune.recover.sequential import refit_sequentially
from llmprune.search.judging import Finish, Judge
from llmprune.tables.block_tables import speedups_of
from llmprune.tables.reach import measure_reach

GPU = torch.device("cuda:0")
CUT = Architecture.of([(3, 24), (2, 23), (1, 9), (3, 17)])
LATER = Architecture.of([(3, 40), (3, 40), (1, 9), (3, 17)])
"""It begins like the parent."""
A_FEW_FREQUENCIES = 16
"""Bytes that Phi-3's long rope has outside of its buffers."""
ONE_EACH = ["llama-gqa", "gemma2-gqa", "opt-projected", "gpt_neox-parallel", "gpt2-mha", "phi3-gqa"]


def at_gpu(parent: Parent) -> Parent:
    bring(parent.model.modules(), Place(GPU))
    return parent


def gpu_parent(case_id: str = "llama-gqa") -> Parent:
    return at_gpu(tiny_parent(CASES[IDS.index(case_id)]))


def weight_bytes(model: PreTrainedModel) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


@pytest.fixture
def gpu() -> Iterator[Memory]:
    """With room for anything, until a test limits it."""
    with two_gpus() as memory:
        yield memory


def devices_of(model: PreTrainedModel) -> set[str]:
    return {str(tensor.device) for tensor in (*model.parameters(), *model.buffers())}


@pytest.mark.parametrize("case_id", IDS)
def test_a_model_comes_and_goes_as_it_is(case_id: str, gpu: Memory) -> None:
    parent, ids = gpu_parent(case_id), tokens(2, 12)
    before, taken = dict(parent.model.named_parameters()), gpu.used
    with torch.inference_mode():
        expected = parent.model(ids.to(GPU)).logits.cpu()
    for _ in range(2):
        wait(parent.model)
        del before
        assert gpu.used <= A_FEW_FREQUENCIES and devices_of(parent.model) == {"cpu"}
        assert waits(parent.model) and parent.device == home_of(parent.model) == GPU
        before = dict(parent.model.named_parameters())
        with at_home(parent.model), torch.inference_mode():
            assert not waits(parent.model) and devices_of(parent.model) == {"cuda:0"}
            assert gpu.used <= taken + A_FEW_FREQUENCIES, "tied weights come once"
            assert torch.equal(parent.model(ids.to(GPU)).logits.cpu(), expected)
        assert waits(parent.model) and gpu.used <= A_FEW_FREQUENCIES
        assert all(one is before[name] for name, one in parent.model.named_parameters()), "nothing is copied back"
    come_home(parent.model)
    assert not waits(parent.model) and devices_of(parent.model) == {"cuda:0"} and gpu.used >= taken


@pytest.mark.parametrize("case_id", ONE_EACH)
def test_a_child_of_a_parent_that_waits_is_cut_at_home_one_layer_at_a_time(case_id: str, gpu: Memory) -> None:
    parent = gpu_parent(case_id)
    shape = parent.shape
    narrow = [(min(shape.kv_groups, groups), min(shape.ffn_width, width)) for groups, width in [(2, 23), (1, 9)]]
    architecture = Architecture.of([narrow[0], (0, 0), narrow[1], (shape.kv_groups, shape.ffn_width)])
    expected = {name: tensor.cpu() for name, tensor in prune(parent, architecture, Slices(parent)).state_dict().items()}
    wait(parent.model)
    gpu.peak = gpu.used
    child = prune(parent, architecture, Slices(parent))
    assert devices_of(child) == {"cuda:0"} and devices_of(parent.model) == {"cpu"}
    found = child.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].cpu(), tensor) for name, tensor in expected.items())
    one_layer = sum(p.nbytes for p in parent.layer(0).parameters())
    assert gpu.peak <= gpu.used + one_layer, "the whole parent is never there"
    with torch.inference_mode():
        child(tokens(1, 8).to(GPU))


def test_types_of_the_vocabulary_are_of_the_same_numbers(gpu: Memory) -> None:
    pytest.importorskip("xllamacpp")
    # Rows are stored in blocks of 32.
    parent = at_gpu(tiny_parent(Case("llama", "wide", {**COMMON, **GROUPED, "hidden_size": 96})))
    architecture = replace(CUT, vocabulary=VocabularyChoice("q8_0"))
    expected = {name: t.cpu() for name, t in prune(parent, architecture, Slices(parent)).state_dict().items()}
    parent.rounded.clear()
    wait(parent.model)
    found = prune(parent, architecture, Slices(parent)).state_dict()
    assert all(torch.equal(found[name].cpu(), tensor) for name, tensor in expected.items())


Scored = Callable[[PrefixScorer], list[WindowScores]]


def one_after_another(scorer: PrefixScorer) -> list[WindowScores]:
    return [scorer.score(one) for one in (scorer.parent.shape.architecture, CUT, LATER)]


def children_first(scorer: PrefixScorer) -> list[WindowScores]:
    return [scorer.score(one) for one in (LATER, CUT, scorer.parent.shape.architecture)]


def as_in_a_race(scorer: PrefixScorer) -> list[WindowScores]:
    """Held from slice to slice, and with states of one that is remembered."""
    scorer.remember(LATER)
    scorer.hold(CUT)
    first, second = {"news": 0, "code": 0}, {"news": 2, "code": 1}
    whole = {"news": 3, "code": 2}
    return [scorer.score_range(one, *counts) for counts in ((first, second), (second, whole)) for one in (CUT, LATER)]


def same(found: list[WindowScores], expected: list[WindowScores]) -> bool:
    pairs = list(zip(found, expected, strict=True))
    nats = all(torch.equal(one.nats[name], values) for one, other in pairs for name, values in other.nats.items())
    return nats and all(
        torch.equal((one.kl or {})[name], values) for one, other in pairs for name, values in (other.kl or {}).items()
    )


@pytest.mark.parametrize("top_k", [None, 8])
@pytest.mark.parametrize("scored", [one_after_another, children_first, as_in_a_race])
def test_scores_are_the_same_bits_with_room_for_one_of_both(scored: Scored, top_k: int | None) -> None:
    def scorer(parent: Parent) -> PrefixScorer:
        return PrefixScorer(parent, Slices(parent), SPLIT, batch_tokens=BATCH_TOKENS, top_k=top_k)

    alone = scored(scorer(tiny_parent(CASES[IDS.index("llama-gqa")])))
    with two_gpus() as gpu:
        roomy = gpu_parent()
        assert same(scored(scorer(roomy)), alone) and not waits(roomy.model)
        needed = gpu.peak
    with two_gpus(needed) as gpu:
        parent = gpu_parent()
        assert same(scored(scorer(parent)), alone) and not waits(parent.model), "nobody waits where both fit"
    with two_gpus() as gpu:
        parent = gpu_parent()
        wait(parent.model)
        assert same(scored(scorer(parent)), alone)
        least = gpu.peak
        # Of both together not even the weights would fit.
        assert least < min(needed, weight_bytes(parent.model) + weight_bytes(prune(parent, CUT, Slices(parent))))
    with two_gpus(least):
        parent = gpu_parent()
        assert same(scored(scorer(parent)), alone)
        assert waits(parent.model) and devices_of(parent.model) == {"cpu"}


@pytest.mark.usefixtures("gpu")
def test_where_both_fit_nothing_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        pytest.fail("weights were moved")

    parent = gpu_parent()
    before = dict(parent.model.named_parameters())
    for module in (waiting, throughput):
        for name in ("bring", "at_hand", "in_visits"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, never)
    one_after_another(PrefixScorer(parent, Slices(parent), SPLIT))
    child = prune(parent, LATER, Slices(parent))
    shared = {p.data_ptr() for p in parent.model.parameters()}
    assert sum(p.data_ptr() in shared for p in child.parameters()) > 10, "of what is as it was, the parent's storage"
    measure_paired(parent.model, [child], replace(WORKLOAD, device="cuda:0"), repeats=1)
    assert all(one is before[name] for name, one in parent.model.named_parameters())


def judges(parent: Parent, finish: Finish | None = None) -> Judge:
    judge = judge_of(parent, library_of(tiny_parent(CASES[0]), space_of(parent)), "test", finish)
    workload = replace(WORKLOAD, device=str(parent.device))
    return replace(judge, workload=workload, parents_logits=ParentsLogits(parent.model, judge.split))


@pytest.mark.parametrize("repaired", [False, True], ids=["as it was cut", "repaired"])
def test_a_judge_says_the_same_with_room_for_one_of_both(repaired: bool) -> None:
    finish = Finish("noted", lambda child, architecture: None, lambda architecture: True) if repaired else None
    mixed = Architecture.of([(3, 24), (2, 20), (1, 8), (3, 16)])

    def said(judge: Judge) -> list[Any]:
        record, parent = judge.judge(mixed, "child"), judge.parent_record()
        quality = {"nats_per_token", "ppl", "ppl_ratio", "per_source", "params", "bytes", "id", "done"}
        return [
            judge.quoted(mixed),
            *(one.model_dump(include=quality) for one in (record, parent)),
            *([judge.again(record).model_dump(include=quality)] if repaired else []),
            judge.quality(mixed),
        ]

    expected = said(judges(tiny_parent(CASES[0]), finish))
    with two_gpus() as gpu:
        parent = gpu_parent()
        assert said(judges(parent, finish)) == expected and not waits(parent.model)
        needed = gpu.peak
    with two_gpus() as gpu:
        parent = gpu_parent()
        wait(parent.model)
        assert said(judges(parent, finish)) == expected
        least = gpu.peak
        assert least < needed
    with two_gpus(least):
        parent = gpu_parent()
        assert said(judges(parent, finish)) == expected and waits(parent.model)


def test_tables_and_reach_are_measured_with_room_for_one_of_both() -> None:
    with two_gpus() as gpu:
        parent = gpu_parent()
        gpu.limit = int(1.2 * gpu.used)
        workload = Workload(1, 4, 2, "float32", 1, "cuda:0")
        assert speedups_of(parent, CUT, Slices(parent), workload, 2).keys() == {"decode", "prefill"}  # type: ignore[arg-type]
        assert waits(parent.model)
        come_home(parent.model)
        assert measure_reach(parent, space_of(parent), workload)["decode"].fastest > 0
        assert waits(parent.model)


def test_a_refit_needs_the_parent_one_layer_at_a_time() -> None:
    split = replace(SPLIT, name="recovery")
    parent = tiny_parent(CASES[IDS.index("gemma2-gqa")])
    expected = refit_sequentially(parent, prune(parent, CUT, Slices(parent)), CUT, split)
    with two_gpus() as gpu:
        parent = gpu_parent("gemma2-gqa")
        wait(parent.model)
        child = prune(parent, CUT, Slices(parent))
        found = refit_sequentially(parent, child, CUT, split)
        assert gpu.peak < weight_bytes(child) + weight_bytes(parent.model)
    assert found.blocks == expected.blocks and any(block.ridge is not None for block in found.blocks)
    assert all(torch.equal(found.tensors[name].cpu(), tensor) for name, tensor in expected.tensors.items())


@pytest.mark.usefixtures("gpu")
def test_biases_of_flap_are_where_the_child_is() -> None:
    parent = random_parent()
    library = library_of(parent, space_of(parent), None)
    mixed = Architecture.of([(1, 12), (2, 20), (1, 24)])
    at_gpu(parent)
    wait(parent.model)
    child = prune(parent, mixed, library)
    with pytest.MonkeyPatch.context() as patch:
        zeros = torch.zeros(48, dtype=torch.float64)
        patch.setattr(type(library), "fluctuation", lambda self, layer, kind: (zeros, zeros[:24]))
        compensation(parent, library).complete(child, mixed)
    assert devices_of(child) == {"cuda:0"}


def test_whole_models_are_timed_in_turns_and_paired_by_number() -> None:
    with two_gpus() as gpu:
        parent = gpu_parent()
        child = prune(parent, CUT, Slices(parent))
        wait(parent.model)
        wait(child)
        of = {id(parent.model): 0, id(child): 1}
        told: list[tuple[int, int]] = []
        seen: list[tuple[int, int]] = []

        def visit(model: PreTrainedModel, repeats: int) -> Seconds:
            assert gpu.used == weight_bytes(model), "it is alone"
            seen.append((of[id(model)], repeats))
            first = 10 * sum(count for place, count in seen[:-1] if place == of[id(model)])
            return Seconds([first + 1.0 * i for i in range(repeats)], [float(len(seen))] * repeats)

        (own,) = in_visits(parent.model, [child], 3, visit, lambda *done: told.append(done))
    assert seen == [(0, 1), (1, 2), (0, 2), (1, 1)], "who was last stays"
    assert own == (Seconds([0, 10, 11], [1, 3, 3]), Seconds([0, 1, 20], [2, 2, 4]))
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


@pytest.mark.usefixtures("gpu")
def test_visits_are_measured_as_passes_side_by_side_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """With passes whose seconds depend on model and position alone, speeds are the same to the last bit."""
    parent = gpu_parent()
    children = [prune(parent, one, Slices(parent)) for one in (CUT, LATER)]
    weights = {id(model): weight_bytes(model) for model in (parent.model, *children)}
    ran: list[int] = []

    def seconds(run: Generation, count: int, *, all_logits: bool) -> float:
        assert isinstance(run._session, TorchSession)
        model = run._session._model
        ran.append(id(model))
        assert devices_of(model) == {"cuda:0"}
        run._position = run._position + count
        return weights[id(model)] * (1 + run._position / 7)

    monkeypatch.setattr(Generation, "_pass", seconds)
    workload, told = Workload(2, 6, 5, "float32", 1, "cuda:0"), list[tuple[int, int]]()
    expected = measure_paired(parent.model, children, workload, 3)
    passes, ran[:] = len(ran), []
    wait(parent.model)
    assert measure_paired(parent.model, children, workload, 3, lambda *done: told.append(done)) == expected
    assert told[-1] == (6, 6)
    warm_ups = 3 * (2 * 4 - 3)
    assert len(ran) == passes + warm_ups, "as many passes, and one warm-up a visit"
    assert len(ran) > 2 * 2 * 3 * (PREFILL_PAIRS + 5)
    assert all(map(waits, (parent.model, *children)))


def test_graphs_are_captured_anew_for_every_visit(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = miniature_cuda.install(monkeypatch)
    monkeypatch.setattr(throughput, "waits", lambda model: True)
    reference, candidate = tiny_model(CASES[0]), tiny_model(CASES[0], seed=1)
    workload = Workload(2, 6, 4, "float32", 1, "cpu", graphs=True)
    _, (speed,) = measure_paired(reference, [candidate], workload, repeats=3)
    assert len(graphs) == 4 * 2, "a prompt and a step each"
    assert speed.decode_speedup.median > 0
    own, _ = measure_paired(reference, [reference], workload, repeats=1)
    assert own.decode_speedup.median == 1


@pytest.mark.parametrize("parent_waits", [True, False])
def test_samples_are_of_one_model_at_a_time(parent_waits: bool, gpu: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = gpu_parent()
    if parent_waits:
        wait(parent.model)
    child, seen = prune(parent, CUT, Slices(parent)), list[tuple[set[str], bool]]()

    def continuations(model: PreTrainedModel, *_: Any) -> list[str]:
        seen.append((devices_of(model), gpu.used == weight_bytes(model)))
        return ["so"]

    monkeypatch.setattr(module_of_samples, "continuations", continuations)
    found = module_of_samples.samples(parent.model, child, tiny_tokenizer(), ["And"])
    assert found == [{"prompt": "And", "parent": "so", "child": "so"}]
    assert seen == [({"cuda:0"}, parent_waits)] * 2
    assert waits(child) == parent_waits


def raising(times: int) -> Callable[[], int]:
    calls: list[int] = []

    def work() -> int:
        calls.append(1)
        if len(calls) <= times:
            raise torch.OutOfMemoryError("no room")
        return len(calls)

    return work


def test_who_waits_and_who_does_not(gpu: Memory) -> None:
    parent = gpu_parent()
    assert with_children(parent.model, raising(0)) == 1 and not waits(parent.model)
    assert with_children(parent.model, raising(1)) == 2 and waits(parent.model)
    work = raising(9)
    with pytest.raises(torch.OutOfMemoryError):
        with_children(parent.model, work)
    asked: list[torch.device | None] = []
    with_room(parent.model, asked.append)
    assert asked == [GPU] and waits(parent.model), "it waits already: its layers come at once"
    come_home(parent.model)

    def walked(device: torch.device | None) -> str:
        if device is None:
            raise torch.OutOfMemoryError("no room")
        assert waits(parent.model) and device == GPU and gpu.used == 0
        return "walked"

    assert with_room(parent.model, walked) == "walked"
    assert not waits(parent.model), "a walk's lack of room says nothing of a child's"
    for other in (tiny_parent(CASES[0]), spread_parent("llama-gqa", GPUS)):  # type: ignore[arg-type]
        with pytest.raises(torch.OutOfMemoryError):
            with_children(other.model, raising(1))
        assert not waits(other.model)


def test_a_model_that_does_not_fit_even_alone_is_left_as_it_was(gpu: Memory) -> None:
    parent = gpu_parent()
    wait(parent.model)
    before = dict(parent.model.named_parameters())
    gpu.limit = 100_000
    with pytest.raises(torch.OutOfMemoryError), at_home(parent.model):
        pytest.fail("there was no room")
    assert waits(parent.model) and gpu.used == 0
    assert all(one is before[name] for name, one in parent.model.named_parameters())


@pytest.mark.usefixtures("gpu")
def test_a_child_that_waited_computes_the_same() -> None:
    parent = gpu_parent()
    child = prune(parent, CUT, Slices(parent))
    expected = score(child, SPLIT)
    wait(child)
    with at_home(child):
        assert score(child, SPLIT) == expected
