"""Records: what is written comes back, what another llmprune wrote is refused, and no child is taken for another."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from baselines_tiny import judge_of, library_of, paired_by_size, random_parent, random_split, space_of
from contract import MEASURED_ON_KEYS, QUOTED_KEYS, RECORD_KEYS
from hypothesis import given
from hypothesis import strategies as st
from tiny import record_of, spread

from llmprune.baselines.flap import BIAS
from llmprune.baselines.methods import METHODS
from llmprune.blocks.library import BlockLibrary, build_library
from llmprune.choices.architecture import Architecture
from llmprune.core.budgets import parse_pick, pick_record
from llmprune.core.errors import BudgetError, RunDirectoryError
from llmprune.core.recipe import BaselineName, ImportanceRecipe
from llmprune.measure.quality.perplexity import SourceQuality
from llmprune.measure.record import Front, Quoted, Record, child_id
from llmprune.measure.value import SCHEMA
from llmprune.search import judging

HALF = Architecture.of([(1, 12)] * 3)
RECORD = record_of(HALF, 3.25, 1.5, name="trial-7")

# Logits overflow upwards alone.
figures = st.floats(min_value=-1e300, allow_nan=False)
positive = st.floats(min_value=0, max_value=1e300)
names = st.text(max_size=20)


@st.composite
def quoted(draw: st.DrawFn) -> Quoted:
    source = SourceQuality(*(draw(figures) for _ in range(3)), draw(st.integers(0)))
    return Quoted(
        **{name: draw(figures) for name in ("nats_per_token", "nats_per_byte", "ppl", "ppl_ratio", "nats_lost")},
        per_source={draw(names): source},
        dataset=draw(names),
        seq_len=draw(st.integers(0)),
        tokens=draw(st.integers(0)),
        bos=draw(st.booleans()),
    )


@st.composite
def records(draw: st.DrawFn) -> Record:
    """Records with any figures, and any of the keys that may be missing."""
    layers = draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4))
    drawn = {name: draw(figures) for name in ("nats_per_token", "nats_per_byte", "ppl", "ppl_ratio")}
    sources = {name: SourceQuality(*(draw(figures) for _ in range(3)), 60) for name in draw(st.lists(names))}
    some = {
        "done": draw(st.lists(names, max_size=3).map(tuple)),
        "library": draw(st.none() | names),
        "exportable": draw(st.none() | st.booleans()),
        "usable": draw(st.none() | st.booleans()),
        "test": draw(st.none() | quoted()),
        "unseen": draw(st.none() | quoted()),
    }
    return record_of(
        Architecture.of(layers), 1.0, draw(positive), name=draw(names), per_source=sources, **drawn, **some
    )


@given(records())
def test_a_record_comes_back_bit_for_bit(record: Record) -> None:
    text = json.dumps(record.stored(), allow_nan=False)
    again = Record.read(json.loads(text), "a file", "delete it")
    assert again == record and json.dumps(again.stored(), allow_nan=False) == text
    front = Front(parent=record, children=(record,), baselines=())
    assert Front.from_json(json.loads(json.dumps(front.to_json()))) == front


def test_json_has_the_names_that_scripts_rely_on_and_none_for_what_is_not_there() -> None:
    assert RECORD.to_json().keys() == RECORD_KEYS
    assert RECORD.stored() == {"schema": SCHEMA, **RECORD.to_json()}
    assert RECORD.to_json()["decode_speedup"] == {"median": 1.5, "low": 0.9 * 1.5, "high": 1.1 * 1.5}
    assert RECORD.to_json()["measured_on"].keys() == MEASURED_ON_KEYS
    figures = dict.fromkeys(("nats_per_token", "nats_per_byte", "ppl", "ppl_ratio"), 1.0)
    quote = Quoted(**figures, nats_lost=math.inf, per_source={}, dataset="a", seq_len=8, tokens=7, bos=False)
    told = RECORD.model_copy(update={"test": quote, "usable": False, "exportable": False}).to_json()
    assert told.keys() == RECORD_KEYS | {"test", "usable", "exportable"}
    assert told["test"].keys() == QUOTED_KEYS and told["test"]["nats_lost"] is None and told["usable"] is False


def test_a_figure_is_asked_for_by_the_name_of_its_metric() -> None:
    record = record_of(HALF, 3.0, 1.5, prefill=2.0, prefill_tokens_per_s=spread(80.0))
    assert [record.value(name) for name in ("decode_speedup", "prefill_tokens_per_s", "params")] == [1.5, 80.0, 39.0]
    assert (
        record.is_finite and not record_of(HALF, math.inf, 1.5).is_finite and not record_of(HALF, math.nan, 1).is_finite
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 3}, "FILE is of schema 3, and this llmprune reads schema 2; upgrade llmprune"),
        (
            {"schema": 1},
            r"FILE is damaged, or of an older llmprune \(schema 1, this one reads schema 2\); make it again",
        ),
        ({"schema": None}, r"of an older llmprune \(no schema, this one reads schema 2\); make it again"),
        ({"schema": "2"}, r"of an older llmprune \(schema '2', .*make it again"),
        ({"schema": True}, r"of an older llmprune \(schema True, .*make it again"),
        ({"ppl": "much"}, r"FILE is damaged \(ppl: .*\); make it again"),
        ({"pplx": 1.0}, r"FILE is damaged \(pplx: Extra inputs are not permitted\); make it again"),
        ({"decode_speedup": {"median": 1.0}}, r"FILE is damaged \(decode_speedup.low: Field required\); make it again"),
        ({"architecture": {"layers": 3}}, r"FILE is damaged \(architecture: .*an architecture is.*\); make it again"),
    ],
)
def test_what_is_stored_otherwise_is_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RunDirectoryError, match=message) as caught:
        Record.read({**RECORD.stored(), **change}, "FILE", "make it again")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [None, [], 7, "text", {}, {"schema": 2}])
def test_what_is_no_record_at_all_is_refused(data: Any) -> None:
    with pytest.raises(RunDirectoryError, match=r"FILE is damaged.*make it again"):
        Record.read(data, "FILE", "make it again")


def test_an_id_is_made_of_architecture_library_and_what_was_done() -> None:
    ids = {
        child_id(*made_of)
        for made_of in (
            ("a", "b"),
            ("b", "a"),
            ("a", "c"),
            ("a", "b", ("c",)),
            ("a", "b", ("c", "d")),
            ("a", "b", ("d", "c")),
        )
    }
    assert len(ids) == 6 and all(len(id_) == 16 and int(id_, 16) >= 0 for id_ in ids)
    # Stored in run directories, so that it never changes.
    assert child_id("0" * 16, "1" * 64) == "88858f75707d80b3"


def uniform_children() -> dict[str, Record]:
    """One shape as four methods cut it, and once more from other calibration text; as fast as they are small."""
    parent = random_parent()
    space = space_of(parent)
    libraries: dict[str, BlockLibrary] = {
        name: library_of(parent, space, METHODS[name].importance)
        for name in ("uniform", "magnitude", "wanda-sp", "flap")
    }
    other = random_split("calibration", seed=3)
    libraries["other text"] = build_library(parent, other, ImportanceRecipe(), space)
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judging, "measure_paired", paired_by_size)
        for name, library in libraries.items():
            found[name] = judge_of(parent, library, "validation").judge(HALF, name)
        finish = METHODS["flap"].finish
        assert finish is not None
        with_bias = judge_of(parent, libraries["flap"], "validation", finish(parent, libraries["flap"]))
        found["flap with its bias"] = with_bias.judge(HALF, "flap")
        found["the parent"] = with_bias.parent_record()
    return found


def test_children_of_one_shape_have_ids_of_their_own() -> None:
    found = uniform_children()
    parent = found.pop("the parent")
    assert {record.hash for record in found.values()} == {HALF.hash}
    assert len({record.id for record in found.values()} | {parent.id}) == len(found) + 1 == 7
    assert [name for name, record in found.items() if record.done] == ["flap with its bias"]
    assert found["flap with its bias"].done == (BIAS,) and not parent.done


def test_another_process_gives_the_same_ids() -> None:
    code = "import json, test_record; print(json.dumps({n: r.id for n, r in test_record.uniform_children().items()}))"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    finished = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(finished.stdout) == {name: record.id for name, record in uniform_children().items()}


def test_a_bias_that_a_family_holds_itself_makes_no_other_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "measure_paired", paired_by_size)
    parent = random_parent(biased=True)
    library = library_of(parent, space_of(parent), METHODS["flap"].importance)
    finish: Callable[..., Any] | None = METHODS["flap"].finish
    assert finish is not None
    record = judge_of(parent, library, "validation", finish(parent, library)).judge(HALF, "flap")
    assert not record.done and record.id == child_id(HALF.hash, library.hash)


def named(name: BaselineName, library: str | None = None, done: tuple[str, ...] = ()) -> Record:
    id_ = child_id(HALF.hash, library or "", done)
    return record_of(HALF, 3.0, 1.5, name=name, id=id_, library=library, done=done)


def test_a_pick_names_a_child_by_its_id_or_by_a_hash_that_no_other_has() -> None:
    uniform, magnitude, flap = named("uniform"), named("magnitude", "magnitude"), named("flap", "flap", (BIAS,))
    alone = record_of(Architecture.of([(1, 9)] * 3), 3.0, 1.4)
    again = uniform.model_copy(update={"name": "trial-3"})
    front = [again, uniform, magnitude, flap, alone]
    for wanted in (again, magnitude, flap, alone):
        assert pick_record(front, parse_pick(wanted.id)) is wanted
    assert pick_record(front, parse_pick(alone.hash)) is alone
    assert pick_record([again, uniform], parse_pick(HALF.hash)) is again, "one child, measured twice"
    with pytest.raises(BudgetError) as caught:
        pick_record(front, parse_pick(HALF.hash))
    assert str(caught.value) == (
        f"{HALF.hash} is the architecture of 3 children, pick one by its id: {uniform.id} "
        f"(trial-3, the run's library); {magnitude.id} (magnitude, its own library (magnitude)); {flap.id} "
        "(flap, its own library (flap), flap-bias)"
    )
