"""Where the single results of an evaluation are kept, so that one that was stopped goes on where it was."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmprune.core.errors import RunDirectoryError
from llmprune.core.files import read_json, write_json
from llmprune.evaluation.subjects import Subject, run_of
from llmprune.pipeline.run_directory import hash_of
from llmprune.publish.contents import EVALUATIONS_DIRECTORY

_PACKAGES = ("llmprune", "lm_eval", "transformers", "tokenizers", "datasets", "torch")


class Store:
    """Results by what they depend on, each in a file of its own; nowhere, if there is no place for them."""

    def __init__(self, place: Path | None) -> None:
        self.place, self.found, self.made = place, 0, 0

    def recall(self, kind: str, key: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """The result that is stored under `key`, or else what `make` gives, stored. Raises RunDirectoryError."""
        key = json.loads(json.dumps(key))
        file = None if self.place is None else self.place / f"{kind}-{hash_of(key)[:20]}.json"
        if file is not None and file.is_file():
            stored = read_json(file)
            if not isinstance(stored, dict) or stored.get("key") != key or "result" not in stored:
                raise RunDirectoryError(f"{file} is damaged; delete it and start again")
            self.found += 1
            return stored["result"]
        result = make()
        if file is not None:
            write_json(file, {"key": key, "result": result})
        self.made += 1
        return result


def versions() -> dict[str, str]:
    """Of the packages that figures depend on."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def place_for(subjects: Sequence[Subject], output: Path | None) -> Path | None:
    """Where single results are stored: in the run, beside the output, or in the first checkpoint, in this order."""
    directories = [subject.directory for subject in subjects if subject.role != "parent" and subject.directory]
    for directory in directories:
        if (run := run_of(directory)) is not None:
            return run.evaluations
    if output is not None:
        return output.with_suffix(".evaluations")
    return directories[0] / EVALUATIONS_DIRECTORY if directories else None
