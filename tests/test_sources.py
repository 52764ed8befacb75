"""Reading text: every format, and every way in which it can fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmprune.data.sources import HUB_BUFFER_DOCUMENTS, read_documents
from llmprune.errors import DataError
from llmprune.recipe import SourceRecipe


class FakeBuilder:
    base_path = f"hf://datasets/someone/text@{'0123456789' * 4}"

    def __init__(self, stream: Callable[[], Any]) -> None:
        self.stream = stream

    def as_streaming_dataset(self, split: str) -> Any:
        return self.stream()


def fake_hub(monkeypatch: pytest.MonkeyPatch, stream: Callable[[], Any]) -> None:
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: FakeBuilder(stream))


def test_hub_data_sets_are_streamed_shuffled_and_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"body": f"text {number}"} for number in range(50)] + [{"body": None}, {"body": " \n"}]
    fake_hub(monkeypatch, lambda: datasets.Dataset.from_list(rows).to_iterable_dataset())
    source = SourceRecipe(name="hub", dataset="someone/text", text_field="body")
    text = read_documents(source, seed=3)
    documents = list(text.documents)
    in_order = [f"text {number}" for number in range(50)]
    assert documents != in_order and sorted(documents) == sorted(in_order)
    assert documents == list(read_documents(source, seed=3).documents)
    assert text.identity["revision"] == "0123456789" * 4


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (datasets.exceptions.DatasetNotFoundError("doesn't exist"), "there is no Hub data set 'someone/text'"),
        (ConnectionError("no route"), "cannot reach Hub data set 'someone/text'.*no route.*local file"),
        (ValueError("Bad split: trian"), "Bad split: trian; correct its `config`"),
    ],
)
def test_hub_failures(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Any:
        raise error

    def break_off() -> Any:
        yield {"text": "first"}
        raise error

    source = SourceRecipe(name="hub", dataset="someone/text")
    fake_hub(monkeypatch, fail)
    with pytest.raises(DataError, match=message):
        read_documents(source, seed=0)
    fake_hub(monkeypatch, lambda: datasets.IterableDataset.from_generator(break_off))
    with pytest.raises(DataError, match=message):
        list(read_documents(source, seed=0).documents)


def test_local_formats_hold_the_same_documents(tmp_path: Path) -> None:
    texts = ["one\u2028line", "two\n\nparagraphs", "three €"]
    (tmp_path / "d.txt").write_text("\n\n\n".join([*texts, " "]), encoding="utf-8-sig")
    (tmp_path / "d.jsonl").write_text(
        "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in [*texts, ""]) + "\n\n", encoding="utf-8"
    )
    pq.write_table(pa.table({"id": [1, 2, 3, 4], "text": [*texts, None]}), tmp_path / "d.parquet")
    for suffix in ("txt", "jsonl", "parquet"):
        source = SourceRecipe(name="d", path=str(tmp_path / f"d.{suffix}"))
        assert sorted(read_documents(source, seed=0).documents) == sorted(texts)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("gone.txt", None, "cannot read .*gone.txt: No such file"),
        ("t.txt", b"caf\xe9", "must be UTF-8.*re-encode"),
        ("t.jsonl", b'{"text": "\xe9"}', "must be UTF-8.*re-encode"),
        ("t.jsonl", b'{"text": "a"}\n\n{"text": \n', "line 3 is not"),
        ("t.jsonl", b"[1, 2]\n", r"line 1 is \[1, 2\]"),
        ("t.jsonl", b'{"body": "a", "id": 1}\n', r"'text' is not in .*line 1, which has \['body', 'id'\]"),
        ("t.jsonl", b'{"text": ["a"]}\n', r"must hold a string, .*line 1 has \['a'\]"),
        ("t.jsonl", b'{"text": "\\ud800"}\n', "valid Unicode, .*line 1 is not"),
        ("t.parquet", b"PAR1", "not a readable parquet file"),
        ("t.csv", b"a,b", r"is \.txt, \.jsonl or \.parquet, got '\.csv'"),
    ],
)
def test_local_failures(file: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_documents(SourceRecipe(name="mine", path=str(tmp_path / file)), seed=0)
    assert "source 'mine'" in str(caught.value)


def test_parquet_without_the_field_names_its_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"], "id": [1]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"which has \['body', 'id'\]"):
        read_documents(SourceRecipe(name="mine", path=str(tmp_path / "t.parquet")), seed=0)


def test_a_hub_data_set_is_read_no_further_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def endless() -> Any:
        for number in count():
            read.append(number)
            yield {"text": f"text {number}"}

    fake_hub(monkeypatch, lambda: datasets.IterableDataset.from_generator(endless))
    documents = read_documents(SourceRecipe(name="hub", dataset="someone/text"), seed=0).documents
    assert len([next(documents) for _ in range(10)]) == 10
    assert len(read) < HUB_BUFFER_DOCUMENTS + 20
