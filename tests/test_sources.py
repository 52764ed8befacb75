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
from tiny import tiny_tokenizer

from llmprune.core.errors import DataError
from llmprune.core.recipe_inputs import SourceRecipe
from llmprune.data.chat import chat_renderer
from llmprune.data.sources import HUB_BUFFER_DOCUMENTS, read_documents


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
        ("t.jsonl", b'{"text": ["a"]}\n', r"'text' of .*line 1: it must hold a string, got \['a'\]"),
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


TURNS = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"


def chats(path: Path, rows: list[Any]) -> SourceRecipe:
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")
    return SourceRecipe(name="chat", path=str(path), messages_field="messages")


def rendered(source: SourceRecipe, template: str | None) -> list[str]:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return list(read_documents(source, seed=0, render=lambda: chat_renderer(tokenizer)).documents)


def test_messages_are_rendered_through_the_chat_template(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "one €"}, {"role": "assistant", "content": "two"}]
    source = chats(tmp_path / "c.jsonl", [talk, None])
    assert rendered(source, TURNS) == ["<s>user: one €</s><s>assistant: two</s>"], "a BOS of every turn stays"
    once = "<s>" + TURNS.replace("<s>", "")
    assert rendered(source, once) == ["user: one €</s>assistant: two</s>"], "a BOS of the text is the window's"
    pq.write_table(pa.table({"id": [1], "messages": [talk]}), tmp_path / "c.parquet")
    stored = SourceRecipe(name="chat", path=str(tmp_path / "c.parquet"), messages_field="messages")
    assert rendered(stored, TURNS) == rendered(source, TURNS)


@pytest.mark.parametrize(
    ("messages", "template", "message"),
    [
        ([{"role": "user", "content": "a"}], None, "messages are rendered through .* this tokenizer has none"),
        ("hello", TURNS, r"line 1: messages must be a list of \{role, content\}, got 'hello'"),
        ([], TURNS, r"messages must be a list of .*, got \[\]"),
        (["hello"], TURNS, "every message must have a role and a content, both strings; got 'hello'"),
        ([{"role": "user"}], TURNS, "every message must have a role and a content"),
        ([{"role": "user", "content": ["a"]}], TURNS, "every message must have a role and a content"),
        ([{"role": "x", "content": "a"}], "{{ raise_exception('no role x') }}", "template refuses .*: no role x"),
    ],
)
def test_messages_that_cannot_be_rendered(messages: Any, template: str | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"source 'chat': .*{message}"):
        rendered(chats(tmp_path / "c.jsonl", [messages]), template)


def test_rows_without_messages_name_what_they_have(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": "a"}\n')
    source = SourceRecipe(name="chat", path=str(tmp_path / "c.jsonl"), messages_field="messages")
    with pytest.raises(DataError, match=r"messages_field 'messages' is not in .* which has \['text'\]"):
        rendered(source, TURNS)


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
