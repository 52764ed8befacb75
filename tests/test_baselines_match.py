"""Children at one measured speed: what is interpolated, which children are measured for it, what is kept on disk."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from baselines_tiny import FLAP, given_of, judge_of, library_of, paired_by_size, random_parent, space_of
from contract import QUOTED_KEYS, RECORD_KEYS
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import record_of

from llmprune.baselines.book import Book
from llmprune.baselines.contest import Entrant, choose_beside, compare, compete, front_entries
from llmprune.baselines.flap import BIAS
from llmprune.baselines.given import Aim, Nats, along
from llmprune.baselines.ledger import Ledger
from llmprune.baselines.match import AT, CLOSE, close_in, settle
from llmprune.baselines.methods import METHODS
from llmprune.blocks.library import BlockLibrary
from llmprune.choices.architecture import Architecture
from llmprune.core.errors import ModelError, RunDirectoryError
from llmprune.core.progress import silent
from llmprune.core.recipe import BaselineName
from llmprune.core.recipe_inputs import SplitName
from llmprune.measure.record import Front, Record
from llmprune.measure.value import SCHEMA
from llmprune.models.parent import Parent
from llmprune.search import judging

SPEED = "decode_speedup"


def record(speedup: float, nats: float) -> Record:
    return record_of(Architecture.of([(1, round(1000 * speedup))]), nats, speedup)


PARENT = record(1.0, 3.0)


def test_nats_are_linear_in_the_logarithm_of_the_speed_up() -> None:
    records = [PARENT, *(record(s, 3.0 + 0.7 * math.log(s) / math.log(2)) for s in (1.1, 1.4, 2.2, 3.0))]
    for target in (1.25, 1.3, 1.7, 2.0, 2.6):
        found = settle(records, 3.0, SPEED, target)
        assert found is not None and found.is_interpolated
        assert found.nats_lost == pytest.approx(0.7 * math.log2(target))
        low, high = found.children
        assert low.value(SPEED) < target < high.value(SPEED)


def test_a_child_within_1_percent_is_not_interpolated() -> None:
    found = settle([PARENT, record(1.49, 3.4), record(1.512, 9.0), record(1.6, 3.5)], 3.0, SPEED, 1.5)
    assert found is not None and not found.is_interpolated and found.nats_lost == pytest.approx(0.4)


def test_a_faster_child_that_loses_less_is_what_a_method_loses() -> None:
    slower, at, better = record(1.2, 3.1), record(1.5, 3.9), record(1.8, 3.3)
    found = settle([PARENT, slower, at, better, record(2.0, 3.6)], 3.0, SPEED, 1.5)
    assert found is not None and found.children == (better,) and found.nats_lost == pytest.approx(0.3)
    found = settle([PARENT, slower, record(1.6, 3.9), better], 3.0, SPEED, 1.5)
    assert found is not None and found.children == (better,) and not found.is_interpolated


def test_the_parent_is_a_child_too_and_nothing_is_out_of_its_own_reach() -> None:
    found = settle([PARENT, record(1.44, 3.4)], 3.0, SPEED, 1.2)
    assert found is not None and found.nats_lost == pytest.approx(0.2) and found.children[0] is PARENT
    assert settle([PARENT, record(1.44, 3.4)], 3.0, SPEED, 1.5) is None
    assert settle([], 3.0, SPEED, 1.5) is None


def ladder(estimates: list[float]) -> dict[Architecture, float]:
    """As many different architectures, the parent first, with these estimated speed-ups."""
    return {Architecture.of([(1, i)]): speedup for i, speedup in enumerate([1.0, *estimates])}


@settings(deadline=None, max_examples=200)
@given(
    steps=st.lists(st.floats(1.001, 1.6), min_size=0, max_size=40),
    bias=st.floats(0.6, 1.5),
    noise=st.lists(st.floats(0.97, 1.03), min_size=41, max_size=41),
    targets=st.lists(st.sampled_from([1.1, 1.25, 1.5, 2.0]), min_size=1, max_size=3, unique=True),
    shape=st.sampled_from(["path", "exact"]),
)
def test_measuring_ends_with_a_child_at_the_target_or_one_on_each_side(
    steps: list[float], bias: float, noise: list[float], targets: list[float], shape: str
) -> None:
    estimates = ladder([math.prod(steps[: i + 1]) for i in range(len(steps))])
    true = {a: max(0.5, s**bias * noise[i]) for i, (a, s) in enumerate(estimates.items())}
    whole = next(iter(estimates))
    measured = {whole: 1.0}

    def solved(wanted: float) -> Architecture | None:
        return next((architecture for architecture, speed in estimates.items() if speed >= wanted), None)

    aim: Aim = along(iter(estimates), estimates.__getitem__) if shape == "path" else solved

    def measure(architecture: Architecture) -> float:
        assert architecture not in measured, "nothing is measured twice"
        return true[architecture]

    for target in sorted(targets):
        before = len(measured)
        close_in(aim, estimates.__getitem__, measure, target, measured)
        speeds = measured.values()
        reached = max(speeds) > target or any(abs(s / target - 1) <= AT for s in speeds)
        assert reached or max(true[a] for a in list(estimates)[-1:]) <= target * (1 + AT)
        assert min(speeds) <= target
        if shape == "path" and len(steps) == 40 and reached and max(steps) < 1.02:
            near = any(abs(s / target - 1) <= AT for s in speeds)
            above = min(s for s in speeds if s > target) if not near else target
            below = max(s for s in speeds if s <= target)
            assert near or above / below <= (1 + CLOSE) ** 2
        assert len(measured) - before <= 41


def test_a_wrong_table_is_corrected_in_a_few_children() -> None:
    estimates = ladder([1.01**i for i in range(1, 200)])
    measured = {next(iter(estimates)): 1.0}
    aim = along(iter(estimates), estimates.__getitem__)
    close_in(aim, estimates.__getitem__, lambda a: estimates[a] ** 0.8, 1.5, measured)
    found = sorted(measured.values())
    above = next(i for i, speed in enumerate(found) if speed > 1.5)
    assert len(measured) <= 4 and found[above] / found[above - 1] <= 1 + CLOSE


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of children as they are timed, by their size."""
    seen: list[str] = []
    judge = judging.Judge.judge

    def watched(self: judging.Judge, architecture: Architecture, name: str) -> Any:
        seen.append(name)
        return judge(self, architecture, name)

    monkeypatch.setattr(judging, "measure_paired", paired_by_size)
    monkeypatch.setattr(judging.Judge, "judge", watched)
    yield seen


@cache
def parent_of() -> Parent:
    return random_parent()


@cache
def library_named(name: BaselineName) -> BlockLibrary:
    return library_of(parent_of(), space_of(parent_of()), METHODS[name].importance)


def entrant_of(name: BaselineName) -> Entrant:
    parent, method, library = parent_of(), METHODS[name], library_named(name)
    finish = method.finish(parent, library) if method.finish else None

    def given_to(nats: Nats) -> Any:
        return given_of(parent, library, nats)

    names: tuple[SplitName, ...] = ("search", "validation", "test")
    chooser, judge, quoting = (judge_of(parent, library, split, finish) for split in names)
    return Entrant(name, given_to, chooser, judge, [quoting], preparation_tokens=96)


def contest(book: Book, name: BaselineName, targets: list[float], key: str = "k") -> list[Any]:
    entrant = entrant_of(name)
    parent = judging.quote(entrant.judge.parent_record(), entrant.quoting)
    entries = []
    for entry in compete(entrant, targets, parent, SPEED, book, key, silent):
        book.put(entry)
        entries.append(entry)
    return entries


def open_book(directory: Path) -> Book:
    return Book.open(directory / "baselines.json", directory / "baseline-scores.json")


@pytest.mark.parametrize("name", ["blockpruner", "flap", "uniform", "milp", "random"])
def test_what_is_there_is_not_measured_or_scored_again(tmp_path: Path, timed: list[str], name: BaselineName) -> None:
    first = contest(open_book(tmp_path), name, [1.15, 1.3])
    count = len(timed)
    assert 0 < count == len({child["id"] for entry in first for child in entry["measured"]})
    whole = json.loads((tmp_path / "baselines.json").read_text())
    stored = whole["results"]
    assert list(whole) == ["schema", "parent", "results"] and whole["schema"] == SCHEMA
    assert [(e["method"], e["at"]) for e in stored] == [(name, 1.15), (name, 1.3)]
    book = open_book(tmp_path)
    assert book.missing(name, [1.15, 1.3, 1.5], "k") == [1.5] and book.missing(name, [1.15], "other") == [1.15]
    # A target is lost: what was scored for it is not, nor are the children that another target has.
    lost = {**whole, "results": stored[:1]}
    (tmp_path / "baselines.json").write_text(json.dumps(lost))
    again = contest(open_book(tmp_path), name, [1.3])[0]
    assert len(timed) - count == len(
        {child["id"] for child in first[1]["measured"]} - {child["id"] for child in first[0]["measured"]}
    )
    assert steady(again) == steady(first[1])
    count = len(timed)
    assert [steady(e) for e in contest(open_book(tmp_path), name, [1.15, 1.3])] == [steady(e) for e in first]
    assert len(timed) == count
    # Alone and with other inputs, a target costs and gives what it does beside the others.
    alone = contest(open_book(tmp_path), name, [1.3], key="other")[0]
    assert steady(alone) == steady(again)


def steady(entry: Any) -> Any:
    """What of an entry is no time."""
    effort = {key: value for key, value in entry["effort"].items() if key != "minutes"}
    return {**{key: entry[key] for key in ("nats_lost", "interpolated", "why")}, "effort": effort}


def test_a_target_that_is_there_asks_no_entrant(tmp_path: Path, timed: list[str]) -> None:
    found = contest(open_book(tmp_path), "shortgpt", [1.2, 1.4])

    def refuse(name: BaselineName) -> Entrant:
        raise AssertionError(f"{name} is there")

    parent = Record.from_json(found[0]["children"][0])
    again = compare(open_book(tmp_path), refuse, {"shortgpt": "k"}, [1.2, 1.4], parent, SPEED, silent)
    assert json.dumps(again) == json.dumps(found)
    with pytest.raises(AssertionError, match="shortgpt is there"):
        compare(open_book(tmp_path), refuse, {"shortgpt": "k"}, [1.2, 1.6], parent, SPEED, silent)


def test_effort_counts_every_evaluation_and_adds_up_along_a_path(tmp_path: Path, timed: list[str]) -> None:
    early, late = contest(open_book(tmp_path), "blockpruner", [1.15, 1.6])
    steps = [6, 11, 15, 18, 20]
    assert early["effort"]["evaluations"] in steps and late["effort"]["evaluations"] in steps
    assert early["effort"]["evaluations"] < late["effort"]["evaluations"]
    assert late["effort"]["evaluation_tokens"] == late["effort"]["evaluations"] * 96
    assert late["effort"]["forward_equivalents"] == late["effort"]["evaluations"] + 1
    assert 0 < early["effort"]["minutes"] < late["effort"]["minutes"]


def test_an_entry_holds_its_children_whole(tmp_path: Path, timed: list[str]) -> None:
    (entry,) = contest(open_book(tmp_path), "flap", [1.3])
    assert entry["nats_lost"] is not None and entry["why"] is None and entry["input_hash"] == "k"
    for child in entry["children"]:
        assert child.keys() >= RECORD_KEYS
        assert child["test"].keys() == QUOTED_KEYS
        if child["name"] != "parent":
            assert (child["exportable"], child["library"], child["done"]) == (False, "flap", [BIAS])


@pytest.mark.parametrize("name", ["flap", "milp", "uniform"])
def test_what_is_quoted_of_an_entry_mixes_its_children_in_the_same_shares(
    tmp_path: Path, timed: list[str], name: BaselineName
) -> None:
    for entry in contest(open_book(tmp_path), name, [1.1, 1.22]):
        speeds = [child[SPEED]["median"] for child in entry["children"]]
        shares = [1.0]
        if entry["interpolated"]:
            share = math.log(entry["at"] / speeds[0]) / math.log(speeds[1] / speeds[0])
            shares = [1 - share, share]
        mixed = sum(s * child["test"]["nats_lost"] for s, child in zip(shares, entry["children"], strict=True))
        assert entry["test"]["nats_lost"] == pytest.approx(mixed, abs=1e-9)
        assert entry["test"]["nats_lost"] != entry["nats_lost"] and "unseen" not in entry


def test_out_of_reach_says_so(tmp_path: Path, timed: list[str]) -> None:
    for name in ("uniform", "flap", "sleb", "milp", "random"):
        (entry,) = contest(open_book(tmp_path), name, [40.0])  # type: ignore[arg-type]
        assert entry["nats_lost"] is None and entry["children"] == []
        assert entry["why"].startswith("out of reach: the fastest child that was measured has ")
    assert {e["at"] for e in json.loads((tmp_path / "baselines.json").read_text())["results"]} == {40.0}


def test_a_child_that_computes_nothing_is_told_and_does_not_end_the_contest(
    tmp_path: Path, timed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging.Judge, "judge", lambda *_: (_ for _ in ()).throw(ModelError("logits must be numbers")))
    entries = contest(open_book(tmp_path), "shortgpt", [1.3, 1.5])
    assert [entry["why"] for entry in entries] == ["logits must be numbers"] * 2


def test_scores_that_are_no_numbers_are_kept(tmp_path: Path) -> None:
    parent = random_parent()
    library, book = library_of(parent, space_of(parent)), open_book(tmp_path)

    def fails(architecture: Architecture) -> Any:
        raise ModelError("NaN")

    split = judge_of(parent, library, "search").split
    ledger = Ledger(fails, split, book.memo("sleb", "k"), book.save_scores)
    assert ledger.nats([parent.shape.architecture]) == [math.inf]
    book.write()
    known = Ledger(fails, split, open_book(tmp_path).memo("sleb", "k"))
    assert known.nats([parent.shape.architecture]) == [math.inf] and known.effort(0)["evaluations"] == 1


@pytest.mark.parametrize(
    "text",
    [
        *('{"results": []}', "[]", "{", '{"schema": 2, "results": []}', '{"schema": 2, "parent": {"record": 3}}'),
        '{"schema": 2, "parent": {}, "results": [{"at": 2}]}',
        '{"schema": 2, "parent": {}, "results": [{"method": "milp", "at": 2, "measured": [{"name": "milp"}]}]}',
    ],
)
def test_a_damaged_book_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "baselines.json").write_text(text)
    with pytest.raises(RunDirectoryError, match=r"baselines\.json .*delete"):
        open_book(tmp_path)


def test_beside_a_front_stands_what_reaches_its_speed() -> None:
    entrants = [entrant_of(name) for name in ("uniform", "shortgpt", "random")]
    chosen = choose_beside(entrants, 1.4, silent)
    assert [entrant.name for entrant in chosen] == ["uniform", "shortgpt", "random"]
    for entrant, architecture in chosen.items():
        assert entrant.given(lambda _: []).speedup(architecture) >= 0.98 * 1.4
    assert choose_beside(entrants, 40.0, silent) == {}


def test_the_front_stands_in_the_same_table() -> None:
    children = [record(1.2, 3.1), record(1.5, 3.3), record(1.9, 3.8)]
    front = Front(parent=PARENT, children=tuple(children), baselines=())
    entries = front_entries(front, SPEED, [1.2, 1.7, 2.5], {"minutes": 1.0})
    assert [entry["method"] for entry in entries] == ["llmprune"] * 3
    share = math.log(1.7 / 1.5) / math.log(1.9 / 1.5)
    assert [entry["nats_lost"] for entry in entries[:2]] == pytest.approx([0.1, 0.3 + 0.5 * share])
    assert entries[2]["why"] == "out of reach: no child of the front is as fast"


def test_flap_is_the_library_its_table_names() -> None:
    assert METHODS["flap"].importance == FLAP
