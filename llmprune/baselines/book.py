"""What a comparison has found so far, on disk: measured children and results, and scores that need not be repeated."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmprune.baselines.ledger import Memo
from llmprune.core.errors import RunDirectoryError
from llmprune.core.files import read_json, write_json
from llmprune.measure.record import Record
from llmprune.measure.value import SCHEMA, schema_problem

SECONDS_BETWEEN_SAVES = 20.0

Entry = dict[str, Any]
"""A method at a target, as `baselines.json` has it."""


@dataclass
class Book:
    """`baselines.json` and, beside it, the scores that methods chose by; each kept with a hash of its inputs."""

    results: Path
    scores: Path
    _entries: dict[str, Entry] = field(default_factory=dict)
    _memos: dict[str, tuple[str, Memo]] = field(default_factory=dict)
    _parent: tuple[str, Record] | None = None
    _saved: float = field(default_factory=time.monotonic)

    @classmethod
    def open(cls, results: Path, scores: Path) -> Book:
        """What is there. Raises RunDirectoryError if a file is damaged."""
        book = cls(results, scores)
        try:
            if results.is_file():
                data = read_json(results)
                if problem := schema_problem(data, "delete it and run llmprune baselines again"):
                    raise RunDirectoryError(f"{results} {problem}")
                book._take(data)
            if scores.is_file():
                for name, ledger in read_json(scores).items():
                    memo = {k: (math.inf if nats is None else nats, s) for k, (nats, s) in ledger["scores"].items()}
                    book._memos[name] = (ledger["input_hash"], memo)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, RunDirectoryError):
                raise
            raise RunDirectoryError(
                f"{results} or {scores} is damaged ({type(error).__name__}: {error}); delete both and start again"
            ) from error
        return book

    def _take(self, data: Any) -> None:
        """Raises KeyError, TypeError or ValueError if it is damaged."""
        if parent := data["parent"]:
            self._parent = (parent["input_hash"], Record.from_json(parent["record"]))
        for entry in data["results"]:
            _measured(entry)  # damage is told now rather than in an hour
            self._entries[_name(entry["method"], entry["at"])] = entry

    def entry(self, method: str, at: float, input_hash: str) -> Entry | None:
        """The result that is there for these inputs."""
        entry = self._entries.get(_name(method, at))
        return entry if entry is not None and entry["input_hash"] == input_hash else None

    def missing(self, method: str, targets: Iterable[float], input_hash: str) -> list[float]:
        """The targets that have no result yet."""
        return [at for at in targets if self.entry(method, at, input_hash) is None]

    def children(self, method: str, input_hash: str) -> list[Record]:
        """Every child that was measured for a method with these inputs, at whatever target."""
        entries = [e for e in self._entries.values() if e["method"] == method and e["input_hash"] == input_hash]
        return list({record.id: record for entry in entries for record in _measured(entry)}.values())

    def put(self, entry: Entry) -> None:
        """Keep a result, on disk."""
        self._entries[_name(entry["method"], entry["at"])] = entry
        self.write()

    def parent(self, input_hash: str) -> Record | None:
        return self._parent[1] if self._parent and self._parent[0] == input_hash else None

    def put_parent(self, record: Record, input_hash: str) -> None:
        self._parent = (input_hash, record)

    def memo(self, name: str, input_hash: str) -> Memo:
        """Scores of a method (at a target), to read and to add to."""
        if self._memos.get(name, ("", {}))[0] != input_hash:
            self._memos[name] = (input_hash, {})
        return self._memos[name][1]

    def scored(self) -> set[str]:
        """Hashes of all architectures that methods have scored to choose among."""
        return {key for _, memo in self._memos.values() for key in memo}

    def save_scores(self) -> None:
        """Write the scores, unless that was done a moment ago: there may be thousands."""
        if time.monotonic() - self._saved > SECONDS_BETWEEN_SAVES:
            self._write_scores()

    def write(self) -> None:
        """Write both files."""
        self._write_scores()
        results = sorted(self._entries.values(), key=lambda entry: (entry["method"], entry["at"]))
        parent = {"input_hash": self._parent[0], "record": self._parent[1].to_json()} if self._parent else {}
        write_json(self.results, {"schema": SCHEMA, "parent": parent, "results": results})

    def _write_scores(self) -> None:
        data = {
            name: {
                "input_hash": input_hash,
                "scores": {k: (None if math.isinf(nats) else nats, seconds) for k, (nats, seconds) in memo.items()},
            }
            for name, (input_hash, memo) in self._memos.items()
        }
        write_json(self.scores, data)
        self._saved = time.monotonic()


def _measured(entry: Entry) -> list[Record]:
    return [Record.from_json(record) for record in entry["measured"]]


def _name(method: str, at: float) -> str:
    return f"{method} at {at:g}"
