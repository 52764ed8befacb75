"""Where text comes from: local files and Hub data sets, as one shuffled stream of documents for each source."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmprune.core.errors import DataError, quoted, shortened
from llmprune.core.files import expanded, sha256_file
from llmprune.core.recipe_inputs import SourceRecipe
from llmprune.data.chat import Render

HUB_BUFFER_DOCUMENTS = 1_000
"""How many documents of a Hub data set are held while shuffling: each has to be downloaded first."""

_Row = tuple[str, Mapping[str, Any]]
"""Where a row stands ("line 7"), and its fields."""


@dataclass(frozen=True, slots=True)
class SourceText:
    """The documents of a source, shuffled, stripped and never empty; they can be read once."""

    documents: Iterator[str]
    identity: Mapping[str, str | None]
    """What was read, without machine paths: file name and SHA-256, or Hub id, config, split and commit."""


def read_documents(source: SourceRecipe, *, seed: int, render: Callable[[], Render] | None = None) -> SourceText:
    """Open a source and shuffle its documents; `render()` gives what turns messages into text, if the source has them.

    A local file is shuffled as a whole; a Hub data set is streamed, through a buffer of `HUB_BUFFER_DOCUMENTS`.
    Raises DataError, here or while the documents are read, if the source cannot be reached, decoded or parsed.
    """
    text_of = _reader(source, render)
    if source.path is None:
        rows, identity = _open_hub(source, seed)
        return SourceText(_texts(rows, source, text_of), identity)
    path = expanded(source.path)
    try:
        identity = {"file": path.name, "sha256": sha256_file(path)}
        documents = list(_file_documents(path, source, text_of))
    except OSError as error:
        raise _fault(
            source, f"cannot read {shortened(path)}: {shortened(error.strerror or error)}; correct its `path`"
        ) from error
    random.Random(seed).shuffle(documents)
    return SourceText(iter(documents), identity)


def _reader(source: SourceRecipe, render: Callable[[], Render] | None) -> Render:
    """What makes a text of a row's field, and raises ValueError if it cannot. Raises DataError."""
    if source.messages_field is None:
        return _string
    assert render is not None, "messages need something that renders them"
    try:
        return render()
    except ValueError as error:
        raise _fault(source, str(error)) from error


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"it must hold a string, got {value!r:.80}; name another")
    return value


def _file_documents(path: Path, source: SourceRecipe, text_of: Render) -> Iterator[str]:
    match path.suffix.lower():
        case ".txt":
            return (text for part in _decoded(path, source).split(source.separator) if (text := part.strip()))
        case ".jsonl":
            return _texts(_json_rows(path, source), source, text_of)
        case ".parquet":
            return _texts(_parquet_rows(path, source), source, text_of)
        case suffix:
            raise _fault(
                source,
                f"a local source is .txt, .jsonl or .parquet, got {quoted(suffix)} ({shortened(path)}); convert it",
            )


def _decoded(path: Path, source: SourceRecipe) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise _fault(source, f"text must be UTF-8, but {path} is not: {shortened(error)}; re-encode it") from error


def _json_rows(path: Path, source: SourceRecipe) -> Iterator[_Row]:
    rule = "every line of a .jsonl file is one JSON object"
    # Split at "\n" alone: str.splitlines also breaks at U+2028, which JSON strings may hold.
    for number, line in enumerate(_decoded(path, source).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{shortened(path)} line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _fault(source, f"{rule}; {where} is not: {shortened(error)}; mend it") from error
        if not isinstance(row, dict):
            raise _fault(source, f"{rule}; {where} is {quoted(row)}")
        yield where, row


def _parquet_rows(path: Path, source: SourceRecipe) -> Iterator[_Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if source.field not in names:
                raise _no_field(source, str(path), names)
            number = 0
            for batch in file.iter_batches(columns=[source.field]):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{shortened(path)} row {number}", row
    except pa.ArrowInvalid as error:
        raise _fault(source, f"{path} is not a readable parquet file: {shortened(error)}; write it again") from error


def _open_hub(source: SourceRecipe, seed: int) -> tuple[Iterator[_Row], dict[str, str | None]]:
    import datasets

    try:
        builder = datasets.load_dataset_builder(source.dataset, source.config, revision=source.revision)
        stream = builder.as_streaming_dataset(split=source.split)
        shuffled = stream.shuffle(seed=seed, buffer_size=HUB_BUFFER_DOCUMENTS)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise _hub_fault(source, error) from error
    # The builder pins the branch to the commit it found: the one record of what is really read.
    commit = re.search(r"@([0-9a-f]{40})(?:/|$)", str(builder.base_path))
    identity = {
        "dataset": source.dataset,
        "config": source.config,
        "split": source.split,
        "revision": commit.group(1) if commit else source.revision,
    }
    return _hub_rows(shuffled, source), identity


def _hub_rows(stream: Iterable[Mapping[str, Any]], source: SourceRecipe) -> Iterator[_Row]:
    import datasets

    rows = iter(stream)
    number = 0
    while True:
        try:
            row = next(rows, None)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            raise _hub_fault(source, error) from error
        if row is None:
            return
        number += 1
        yield f"{source.dataset} document {number}", row


def _texts(rows: Iterator[_Row], source: SourceRecipe, text_of: Render) -> Iterator[str]:
    """The text of every row, stripped; rows that hold none are skipped."""
    for where, row in rows:
        if source.field not in row:
            raise _no_field(source, where, list(row))
        if row[source.field] is None:
            continue
        try:
            value = text_of(row[source.field])
        except ValueError as error:
            raise _fault(source, f"{_named(source)} of {where}: {shortened(error)}") from error
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise _fault(
                source, f"text must be valid Unicode, {where} is not: {shortened(error)}; mend or drop it"
            ) from error
        if text := value.strip():
            yield text


def _named(source: SourceRecipe) -> str:
    return f"{'text_field' if source.messages_field is None else 'messages_field'} {source.field!r}"


def _fault(source: SourceRecipe, problem: str) -> DataError:
    return DataError(f"source {quoted(source.name)}: {problem}")


def _no_field(source: SourceRecipe, where: str, names: list[str]) -> DataError:
    return _fault(source, f"{_named(source)} is not in {where}, which has {quoted(names)}; name one of those")


def _hub_fault(source: SourceRecipe, error: Exception) -> DataError:
    hub = f"Hub data set {quoted(source.dataset)} (config {quoted(source.config)}, split {quoted(source.split)})"
    if isinstance(error, FileNotFoundError):
        return _fault(
            source,
            f"there is no {hub} that you can read: {shortened(error)}; correct it, or log in with `hf auth login`",
        )
    if isinstance(error, OSError):
        return _fault(
            source, f"cannot reach {hub}: {shortened(error)}; check the network, or give a local file as `path`"
        )
    return _fault(source, f"cannot read {hub}: {shortened(error)}; correct its `config`, `split` or `revision`")
