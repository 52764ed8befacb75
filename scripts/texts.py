"""Further texts of scripts: files named on a command line, as splits of windows."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from llmprune.core.errors import DataError
from llmprune.core.recipe_inputs import SourceRecipe
from llmprune.data.sources import read_documents
from llmprune.data.tokens import SourceTokens, Split, encode_with_bytes

_WITH_DOCUMENTS = (".jsonl", ".parquet")


def text_splits(
    named: Sequence[str], tokenizer: PreTrainedTokenizerBase, seq_len: int, tokens: int, *, bos: bool
) -> dict[str, Split]:
    """A split for each NAME of "NAME=FILE", in windows of `seq_len` tokens (with BOS in front if `bos`), of at most so
    many tokens. Raises DataError, naming the text, if a file cannot be read or is shorter than a window."""
    files: dict[str, list[Path]] = {}
    for item in named:
        name, equals, pattern = item.partition("=")
        if not name or not equals:
            raise DataError(f"a text is NAME=FILE, got {item!r}")
        found = _files(Path(pattern).expanduser())
        if not found:
            raise DataError(f"text {name!r}: there is no file {pattern}")
        files.setdefault(name, []).extend(found)
    return {name: _split(name, paths, tokenizer, seq_len, tokens, bos) for name, paths in files.items()}


def _files(pattern: Path) -> list[Path]:
    if pattern.is_file():
        return [pattern]
    start = Path(pattern.anchor)
    return sorted(path for path in start.glob(str(pattern.relative_to(start))) if path.is_file())


def _split(
    name: str, paths: list[Path], tokenizer: PreTrainedTokenizerBase, seq_len: int, tokens: int, bos: bool
) -> Split:
    """Documents are joined by EOS; what does not fill a window is left out."""
    fresh, most = seq_len - bos, max(1, tokens // seq_len)
    # So that a limit on tokens takes from all over many files.
    random.Random(0).shuffle(paths)
    ids, token_bytes = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    count = 0
    for document in _documents(name, paths):
        own_ids, own_bytes = encode_with_bytes(document, tokenizer)
        ids.append(np.append(own_ids, tokenizer.eos_token_id))
        token_bytes.append(np.append(own_bytes, 0))
        count += len(ids[-1])
        if count >= most * fresh:
            break
    windows = min(most, count // fresh)
    if windows == 0:
        raise DataError(f"text {name!r} has {count:,} tokens, a window takes {fresh:,}; lower --seq-len, or give more")
    ids_NT, bytes_NT = (np.concatenate(part)[: windows * fresh].reshape(windows, fresh) for part in (ids, token_bytes))
    if bos:
        ids_NT = np.insert(ids_NT, 0, tokenizer.bos_token_id, axis=1)
    scored = bytes_NT if bos else bytes_NT[:, 1:]
    source = SourceTokens(torch.from_numpy(ids_NT), torch.from_numpy(scored.sum(axis=1)))
    return Split("test", {name: source}, {name: 1.0}, seq_len, bos)


def _documents(name: str, paths: list[Path]) -> Iterator[str]:
    for path in paths:
        if path.suffix.lower() in _WITH_DOCUMENTS:
            yield from read_documents(SourceRecipe(name="text", path=str(path)), seed=0).documents
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"text {name!r}: cannot read {path} as UTF-8: {error}") from error
        if text.strip():
            yield text
