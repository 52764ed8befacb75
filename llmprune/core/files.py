"""Files that are either whole or absent: written beside their place, synced, renamed."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from llmprune.core.errors import RunDirectoryError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` for the body to write one file to; rename it to `path` once it is on disk.

    The directory is made if it is missing. If the body fails, the temporary file is removed and `path` is as before.
    Raises RunDirectoryError, naming `path` and the cause, when the file cannot be written (a full disk, no permission).
    """
    # `.tmp` comes last, so that what a killed run leaves matches no glob for finished files.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        assert temporary.is_file(), f"the body wrote no file for {path}"
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise _cannot_write(path, error.strerror or str(error)) from error
    except SafetensorError as error:
        # safetensors writes from Rust, and a full disk is not an OSError there.
        if "os error" not in str(error):
            raise
        raise _cannot_write(path, str(error)) from error
    finally:
        # Where a file stands in the directory's place, there is nothing to remove, nor a way to ask.
        with suppress(OSError):
            temporary.unlink()


def write_json(path: Path, data: Any) -> None:
    """Write `data` as JSON, atomically. NaN and infinities are a ValueError: no JSON reader need accept them."""
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """The data of a JSON file of a run. Raises RunDirectoryError if it is missing, unreadable or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunDirectoryError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise RunDirectoryError(f"{path} is not JSON ({error}); delete it and start again") from error


def expanded(path: str) -> Path:
    """A path that a user wrote, `~` replaced; as it stands if that is the home of a user that there is not."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def exists(path: str) -> bool:
    """Whether a path that a user wrote names something; False of what can be no path (too long, say)."""
    try:
        return expanded(path).exists()
    except (OSError, ValueError):
        return False


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cannot_write(path: Path, cause: str) -> RunDirectoryError:
    return RunDirectoryError(f"cannot write {path}: {cause}; free space or choose another directory, then start again")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
