"""Token splits on disk: one safetensors file whose header says what the tensors are, and proves it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from llmprune.core.errors import RunDirectoryError
from llmprune.core.files import atomic_path
from llmprune.core.recipe_inputs import SplitName
from llmprune.data.tokens import SourceTokens, Split, TokenSplits

_VERSION = 2


def save_token_splits(splits: TokenSplits, path: Path) -> None:
    """Write all splits to one file, atomically, as int32 with their hashes. Raises RunDirectoryError."""
    tensors: dict[str, torch.Tensor] = {}
    for name, split in splits.splits.items():
        for source, tokens in split.sources.items():
            tensors[f"{name}/{source}/windows"] = tokens.windows.to(torch.int32)
            tensors[f"{name}/{source}/bytes"] = tokens.bytes.to(torch.int32)
            if tokens.own is not None:
                tensors[f"{name}/{source}/own"] = tokens.own.to(torch.int32)
    header = json.dumps(
        {
            "version": _VERSION,
            "provenance": splits.provenance,
            "splits": [
                {
                    "name": name,
                    "weights": split.weights,
                    "seq_len": split.seq_len,
                    "bos": split.bos,
                    "hash": split.hash,
                    **({} if split.own_after is None else {"own_after": split.own_after}),
                }
                for name, split in splits.splits.items()
            ],
        }
    )
    metadata = {"llmprune_tokens": header, "header_sha256": _sha256(header)}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata)


def load_token_splits(path: Path) -> TokenSplits:
    """Inverse of `save_token_splits`; every split is held to the hash it was saved with. Raises RunDirectoryError."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = file.keys()
            tensors = {name: file.get_tensor(name).to(torch.int64) for name in names}
    except OSError as error:
        raise RunDirectoryError(f"cannot read the tokens in {path}: {error}; build them first") from error
    except SafetensorError as error:
        raise _corrupt(path, str(error)) from error
    text = metadata.get("llmprune_tokens", "")
    if metadata.get("header_sha256") != _sha256(text):
        raise _corrupt(path, "its header is not the one that was saved")
    header = json.loads(text)
    if header["version"] not in (1, _VERSION):
        raise _corrupt(path, f"it has version {header['version']}, this llmprune reads up to {_VERSION}")
    # Version 1 says the length of windows, and BOS, once for all splits.
    of_all = {key: header[key] for key in ("seq_len", "bos") if key in header}
    vocabulary = header["provenance"].get("tokenizer", {}).get("vocabulary")
    splits = {entry["name"]: _split({**of_all, **entry}, tensors, path, vocabulary) for entry in header["splits"]}
    return TokenSplits(splits, header["provenance"])


def _split(entry: dict[str, Any], tensors: dict[str, torch.Tensor], path: Path, vocabulary: int | None) -> Split:
    name: SplitName = entry["name"]
    try:
        sources = {
            source: SourceTokens(
                tensors[f"{name}/{source}/windows"],
                tensors[f"{name}/{source}/bytes"],
                tensors[f"{name}/{source}/own"] if "own_after" in entry else None,
            )
            for source in entry["weights"]
        }
    except KeyError as error:
        raise _corrupt(path, f"it lacks the tensor {error}") from error
    own_after = entry.get("own_after")
    split = Split(name, sources, entry["weights"], entry["seq_len"], entry["bos"], vocabulary, own_after)
    if split.hash != entry["hash"]:
        raise _corrupt(path, f"split {name!r} does not have the hash it was saved with")
    return split


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _corrupt(path: Path, cause: str) -> RunDirectoryError:
    return RunDirectoryError(f"{path} is not a whole file of token splits: {cause}; delete it and start again")
