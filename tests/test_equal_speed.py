"""The instrument that holds a search's child to other methods at its own speed."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import equal_speed
import pytest
import torch
from conftest import Finished
from texts import text_splits
from tiny import numbered_documents, paired_by_bytes, tiny_tokenizer, write_jsonl

from llmprune.choices.architecture import Architecture
from llmprune.core.errors import DataError


def child(width: int) -> Architecture:
    return Architecture.of([(2, width)] * 3)


def ladder(speeds: dict[int, float]) -> tuple[Callable[[float], Architecture | None], Callable[[Architecture], float]]:
    """A method that offers the widths of `speeds`, whose estimates are 4% too high."""
    estimated = {width: 1.04 * speed for width, speed in speeds.items()}

    def aim(wanted: float) -> Architecture | None:
        return child(min(estimated, key=lambda width: abs(estimated[width] - wanted)))

    return aim, lambda architecture: speeds[architecture.layers[0].ffn.ffn_width]


def test_neighbours_are_the_nearest_clear_ones_on_both_sides() -> None:
    aim, measure = ladder({32: 1.0, 28: 1.1, 24: 1.2, 20: 1.296, 16: 1.4, 12: 1.6})
    assert equal_speed.neighbours(aim, measure, 1.3) == (child(24), child(16)), "1.296 is too near to be on a side"
    aim, measure = ladder({32: 1.0, 20: 1.25})
    assert equal_speed.neighbours(aim, measure, 1.3) is None
    assert equal_speed.neighbours(lambda wanted: None, measure, 1.3) is None


def test_what_is_between_is_linear_in_the_logarithm_of_speed() -> None:
    share = equal_speed.share_between(1.2, 1.5, 1.3)
    assert share == pytest.approx(math.log(1.3 / 1.2) / math.log(1.5 / 1.2))
    assert equal_speed.share_between(1.2, 1.5, 1.1) < 0 < 1 < equal_speed.share_between(1.2, 1.5, 1.6)
    found = equal_speed.interpolated({"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([3.0, 6.0])}, 0.25)
    assert found["a"].tolist() == [1.5, 3.0]


def test_texts_are_cut_into_windows(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.py").write_text("x = 1\n" * 40)
    (tmp_path / "deep" / "b.py").write_text("y = 2\n" * 40)
    (tmp_path / "empty.py").write_text("\n")
    write_jsonl(tmp_path / "talk.jsonl", numbered_documents("talk", 20))
    named = [f"code={tmp_path}/**/*.py", f"talk={tmp_path}/talk.jsonl"]
    for bos in (False, True):
        splits = text_splits(named, tokenizer, 16, 160, bos=bos)
        assert list(splits) == ["code", "talk"]
        for name, split in splits.items():
            windows = split.sources[name].windows
            assert windows.shape == (10, 16) and split.seq_len == 16 and split.bos == bos
            assert bool((windows[:, 0] == tokenizer.bos_token_id).all()) == bos
    whole = text_splits(named[:1], tokenizer, 16, 10**6, bos=False)["code"].sources["code"]
    ids = whole.windows.flatten().tolist()
    assert tokenizer.eos_token_id in ids, "two documents"
    texts = {"x = 1\n" * 40, "y = 2\n" * 40}
    assert {tokenizer.decode(part) for part in (ids[: ids.index(1)],)} <= texts
    # Bytes of all that is scored.
    scored = sum(len(tokenizer.decode(window[1:].tolist(), skip_special_tokens=True)) for window in whole.windows)
    assert int(whole.bytes.sum()) == scored


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("code", "a text is NAME=FILE"),
        ("code=nowhere/*.py", "there is no file nowhere"),
        ("code={place}/short.txt", "has 4 tokens, a window takes 16|has [0-9]+ tokens, a window takes 16"),
        ("code={place}/latin.txt", "cannot read .*latin.txt as UTF-8"),
    ],
)
def test_texts_that_cannot_be_used_are_refused(named: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("abc")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(DataError, match=message):
        text_splits([named.format(place=tmp_path)], tiny_tokenizer(), 16, 160, bos=False)


def test_a_run_is_compared_in_one_interleaved_measurement(
    finished_run: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []

    def counted(reference: Any, candidates: Sequence[Any], *rest: Any) -> Any:
        calls.append(len(candidates))
        return paired_by_bytes(reference, candidates)

    monkeypatch.setattr(equal_speed, "measure_paired", counted)
    shutil.copytree(finished_run.path, tmp_path / "run")
    (tmp_path / "more.txt").write_text(" ".join(numbered_documents("cow", 20)))
    arguments = [str(tmp_path / "run"), "--text", f"more={tmp_path}/more.txt", "--seq-len", "32", "--repeats", "2"]
    monkeypatch.setattr(sys, "argv", ["equal_speed.py", *arguments, "--json"])
    equal_speed.main()
    result = json.loads(capsys.readouterr().out)
    methods = [row["method"] for row in result["methods"]]
    assert {*methods, *result["out_of_reach"]} == {"uniform", "shortgpt"} and methods
    assert calls[-1] == 1 + 2 * len(methods) == len(result["models"]), "all in one measurement"
    assert set(calls[:-1]) == {1}
    for row in result["methods"]:
        assert row["slower"]["speedup"] < result["speedup"] < row["faster"]["speedup"] and row["bracketed"]
    assert [(row["text"], row["seq_len"]) for row in result["texts"]] == [
        ("validation", 16),
        ("test", 16),
        ("more", 32),
    ]
    for row in result["texts"]:
        for rival, placed in zip(row["methods"], result["methods"], strict=True):
            between = (1 - placed["share"]) * rival["nats_lost_slower"] + placed["share"] * rival["nats_lost_faster"]
            assert rival["nats_lost"] == pytest.approx(between, abs=1e-9)
            less = rival["child_less_method"]
            assert less["difference"] == pytest.approx(row["nats_lost"] - rival["nats_lost"], abs=1e-9)
            assert less["low"] <= less["difference"] <= less["high"]
    cells = [str(cell) for column in equal_speed.table(result).columns for cell in column.cells]
    assert f"{result['texts'][0]['nats_lost']:+.3f}" in cells
    monkeypatch.setattr(sys, "argv", ["equal_speed.py", *arguments, "--seq-len", "4096"])
    with pytest.raises(SystemExit, match="--seq-len must be from 2 to the model's 128 positions"):
        equal_speed.main()
