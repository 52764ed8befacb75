"""What of a checkpoint directory may leave this machine: files still as they were proven, and their company."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmprune.core.errors import PushError
from llmprune.core.files import sha256_file
from llmprune.core.progress import Show, silent
from llmprune.measure.value import schema_problem
from llmprune.models.checkpoint import METADATA_FILE, exits_problem
from llmprune.models.licence import Licence

CARD_FILE = "README.md"
EVALUATION_FILE = "evaluation.json"
PUSH_FILE = "llmprune-push.json"
"""On the Hub only: name and SHA-256 of each file that a push brought. In a download of it, it stays behind."""
VLLM_DIRECTORY = "vllm"
TORCHAO_DIRECTORY = "torchao"
SUBDIRECTORIES = (VLLM_DIRECTORY, TORCHAO_DIRECTORY)
"""Checkpoints of other formats, each with what it was proven as."""
EVALUATIONS_DIRECTORY = "evaluations"
"""Where an evaluation keeps what it has so far; its outcome is in EVALUATION_FILE."""
KEYS = ("hash", "architecture", "proof", "files", "figures", "parent", "provenance", "recipe")
# What a loader reads or runs, so that a file of it beside the proven ones could make another network of them.
PROVEN_SUFFIXES = (".safetensors", ".json", ".py", ".jinja", ".model")
FREE_SUFFIXES = (".md", ".txt", ".gguf", ".svg")
PICTURES = {"front.svg": "The front that it was picked from", "architecture.svg": "What it keeps of each block"}
"""Of a card, by file, with what they show; drawn when a run exports a child."""
FREE_NAMES = ("LICENSE", "LICENCE", "NOTICE")


@dataclass(frozen=True)
class File:
    """A file that goes up: its path in the repository, where it lies, its size."""

    name: str
    path: Path
    bytes: int


@dataclass(frozen=True)
class Contents:
    """A proven checkpoint, with what was added to it: GGUF files, other formats, an evaluation, a card."""

    metadata: Mapping[str, Any]
    """What its `llmprune.json` says."""
    files: tuple[File, ...]

    def file(self, name: str) -> Path | None:
        return next((file.path for file in self.files if file.name == name), None)

    @property
    def gguf_files(self) -> tuple[str, ...]:
        return tuple(file.name for file in self.files if file.name.endswith(".gguf"))

    @property
    def has_vllm(self) -> bool:
        return any(file.name.startswith(f"{VLLM_DIRECTORY}/") for file in self.files)

    @property
    def has_torchao(self) -> bool:
        return any(file.name.startswith(f"{TORCHAO_DIRECTORY}/") for file in self.files)

    @property
    def has_code(self) -> bool:
        """Whether transformers needs `trust_remote_code`."""
        return any(file.name.endswith(".py") and "/" not in file.name for file in self.files)

    @property
    def parent_id(self) -> str | None:
        """The parent's id on the Hub; None if it was a local file or directory."""
        parent = self.metadata["provenance"]["parent"]
        return str(parent["model"]) if parent.get("on_hub") else None

    @property
    def parent_name(self) -> str:
        return str(self.metadata["provenance"]["parent"]["model"])

    @property
    def parent_licence(self) -> Licence | None:
        """What the parent stated when it was loaded; None if nothing was found."""
        stated = self.metadata["provenance"]["parent"].get("licence")
        return Licence.from_json(stated) if stated else None

    @property
    def acknowledged_licence(self) -> str | None:
        """The licence that the recipe acknowledges."""
        licence = self.metadata["recipe"].get("deploy", {}).get("licence")
        return str(licence) if licence else None


def read_contents(directory: Path, show: Show = silent) -> Contents:
    """The checkpoint in `directory`, held to its proof.

    Raises PushError if it has none, if a proven file changed or is gone, or if something lies there that does not
    belong to a checkpoint. Hidden files stay behind.
    """
    if not directory.is_dir():
        raise PushError(f"{directory} is not a directory; llmprune export writes one to push")
    metadata = _read_metadata(directory)
    if problem := exits_problem(directory, metadata, "push"):
        raise PushError(problem)
    if lacking := [key for key in KEYS if not metadata.get(key)]:
        raise PushError(
            f"{directory}/{METADATA_FILE} lacks {', '.join(lacking)}: no proof that these files are the network that "
            "was scored; write it again with llmprune export"
        )
    if problem := schema_problem(metadata["figures"], "write it again with llmprune export"):
        raise PushError(f"{directory / METADATA_FILE} {problem}")
    files = [*_files(directory, metadata["files"], "")]
    for below in (directory / name for name in SUBDIRECTORIES if (directory / name).is_dir()):
        proven = _read_metadata(below).get("files") if (below / METADATA_FILE).is_file() else None
        files += _files(below, proven, f"{below.name}/")
        _check_proof(below, proven or {}, show)
    _check_proof(directory, metadata["files"], show)
    return Contents(metadata, tuple(sorted(files, key=lambda file: file.name)))


def _read_metadata(directory: Path) -> dict[str, Any]:
    path = directory / METADATA_FILE
    if not path.is_file():
        raise PushError(
            f"{directory} holds no {METADATA_FILE}: it is no checkpoint that llmprune export wrote and proved"
        )
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PushError(f"{path} cannot be read ({error}); write it again with llmprune export") from None
    if not isinstance(metadata, dict):
        raise PushError(f"{path} is not an object; write it again with llmprune export")
    return metadata


def _files(directory: Path, proven: Mapping[str, str] | None, prefix: str, below: str = "") -> Iterator[File]:
    """The files of one checkpoint, or of its subdirectory `below`; `proven` are those whose hashes are known, None if
    none are; `prefix` is where the checkpoint stands in the repository."""
    for path in sorted(directory.iterdir()):
        name = below + path.name
        if path.name.startswith(".") or (prefix + name) == PUSH_FILE:
            continue
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise PushError(f"{path} is a link or a device; copy the file here, or take it away")
        if path.is_file():
            _check_kind(path, name, proven)
            yield File(prefix + name, path, path.stat().st_size)
        elif any(known.startswith(f"{name}/") for known in proven or ()):
            yield from _files(path, proven, prefix, f"{name}/")
        elif prefix or name not in (*SUBDIRECTORIES, EVALUATIONS_DIRECTORY):
            raise PushError(f"{path} is a directory that is no part of a checkpoint; move it elsewhere")


def _check_kind(path: Path, name: str, proven: Mapping[str, str] | None) -> None:
    if path.suffix not in (*PROVEN_SUFFIXES, *FREE_SUFFIXES) and path.name not in FREE_NAMES:
        kinds = " ".join((*PROVEN_SUFFIXES, *FREE_SUFFIXES))
        raise PushError(f"{path} is of a kind that is not pushed; a checkpoint is of {kinds}: move it elsewhere")
    known = proven is None or name in proven or name in (METADATA_FILE, EVALUATION_FILE)
    if path.suffix in PROVEN_SUFFIXES and not known:
        raise PushError(
            f"{path} was not there when the checkpoint was proven; take it away, or write the checkpoint again with "
            "llmprune export"
        )


def _check_proof(directory: Path, proven: Mapping[str, str], show: Show) -> None:
    with show(f"checking {directory.name} against its proof") as advance:
        for done, (name, expected) in enumerate(proven.items()):
            advance(done, len(proven))
            path = directory / name
            changed = "is gone" if not path.is_file() else "has changed" if sha256_file(path) != expected else None
            if changed:
                raise PushError(
                    f"{path} {changed} since the checkpoint was proven; write it again with llmprune export"
                )
        advance(len(proven), len(proven))
