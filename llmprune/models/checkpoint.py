"""Write a child as a checkpoint that loads elsewhere, and prove in a fresh process that it is the network scored."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.hooks import remove_hook_from_module
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from llmprune.choices.architecture import Architecture
from llmprune.core.errors import ExportError
from llmprune.core.files import sha256_file, write_json
from llmprune.core.memory import return_freed, tells_of_memory
from llmprune.models.expected import Expected, Proof, prove

METADATA_FILE = "llmprune.json"


def check_destination(directory: Path, *, force: bool) -> None:
    """Raises ExportError if writing to `directory` would lose something."""
    if directory.is_file() or directory.is_symlink():
        raise ExportError(f"{directory} is a file; name a directory to export to")
    if directory.is_dir() and any(directory.iterdir()) and not force:
        raise ExportError(f"{directory} exists and is not empty; use --force to replace it, or another --to")
    if directory.is_dir() and force and not (directory / "config.json").is_file() and any(directory.iterdir()):
        raise ExportError(
            f"{directory} does not look like a checkpoint (no config.json); it is not replaced, name another"
        )


def write_checkpoint(
    child: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    architecture: Architecture,
    metadata: Mapping[str, Any],
    directory: Path,
    *,
    force: bool = False,
    further: Callable[[Path], None] = lambda staging: None,
) -> Proof:
    """Save `child`, prove the files, then move them to `directory`: it appears whole and proven, or not at all.

    `metadata` joins the architecture, the proof and the SHA-256 of each file that was proven in `llmprune.json`;
    `further` may add files to the directory before it is moved. Afterwards the child is on the CPU, and its tensors are
    those of the files (see `save_proven`).
    Raises ExportError if the directory is taken, the disk is full, or the proof fails; OutOfMemoryError if there is no
    room for it.
    """
    check_destination(directory, force=force)
    with staging_beside(directory) as staging:
        proof = save_proven(child, tokenizer, staging)
        write_json(
            staging / METADATA_FILE,
            {
                "format": 1,
                "hash": architecture.hash,
                "architecture": architecture.to_json(),
                "proof": proof_facts(proof),
                "files": file_hashes(staging),
                **metadata,
            },
        )
        further(staging)
        move_into_place(staging, directory)
    return proof


def exits_problem(directory: Path, metadata: Mapping[str, Any], command: str) -> str | None:
    """Why a command that tells of children can tell nothing of a checkpoint; None unless tokens leave it early."""
    if "exits" not in metadata:
        return None
    return (
        f"{directory} holds a model with exits, whose figures are in RUN/exits.json and its own {METADATA_FILE}; "
        f"llmprune {command} is for children: name the trunk that the exits were put into"
    )


def proof_facts(proof: Proof) -> dict[str, Any]:
    """JSON of what a checkpoint says of its proof."""
    return {
        "max_logit_difference": proof.max_logit_difference,
        "params": proof.params,
        "stock_class": proof.stock_class,
    }


def save_proven(child: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, directory: Path) -> Proof:
    """Save `child` to a directory that is there, and prove the files in a fresh process.

    By the time that process starts, the child has given up its own tensors: it is on the CPU and its tensors are those
    of the files, mapped into memory, as if it had been loaded from there. Raises ExportError if the proof fails,
    OutOfMemoryError if there is no room for it.
    """
    _to_cpu(child)
    expected = Expected.of(child, tokenizer)
    save_files(child, tokenizer, directory)
    _map_files(child, directory)
    return_freed()
    return prove(expected, directory)


def _to_cpu(child: PreTrainedModel) -> None:
    # A child spread over several devices has hooks that would move activations, and a `to` that only warns.
    remove_hook_from_module(child, recurse=True)
    child.__dict__.pop("hf_device_map", None)
    nn.Module.to(child, "cpu")


def _map_files(child: PreTrainedModel, checkpoint: Path) -> None:
    """Put the tensors of a child's files in place of its own: the same numbers, in pages that every process which maps
    the files has in common, and that the kernel takes back when it needs them."""
    places = child.state_dict()
    for file in checkpoint.glob("*.safetensors"):
        # What does not fit stays as it is, and fails the proof.
        fits = {name: t for name, t in load_file(file).items() if name in places and t.shape == places[name].shape}
        child.load_state_dict(fits, strict=False, assign=True)
    # An output head may be the embedding.
    child.tie_weights()


def save_files(child: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, directory: Path) -> None:
    """The files of a checkpoint, unproven, for everyone to read."""
    was_shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        child.save_pretrained(directory)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        # safetensors makes files that nobody else may read; a server often runs as somebody else.
        mode = (directory / "config.json").stat().st_mode
        for file in _files_below(directory):
            file.chmod(mode)
    finally:
        if was_shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def file_hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of every file in a checkpoint, by its path there."""
    return {file.relative_to(directory).as_posix(): sha256_file(file) for file in _files_below(directory)}


def _files_below(directory: Path) -> list[Path]:
    # A tokenizer with several chat templates has a directory for them.
    return sorted(path for path in directory.rglob("*") if path.is_file())


@contextmanager
def staging_beside(directory: Path) -> Iterator[Path]:
    """A directory beside the destination (one rename away), gone whatever happens."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    except OSError as error:
        raise ExportError(f"cannot write beside {directory}: {error.strerror}") from None
    try:
        staging.chmod(0o755)
        yield staging
    except OSError as error:
        if tells_of_memory(str(error)):
            raise
        raise ExportError(f"writing {directory} failed: {error.strerror or error}; nothing was changed") from error
    except SafetensorError as error:
        # safetensors writes from Rust, and a full disk is not an OSError there.
        if "os error" not in str(error):
            raise
        raise ExportError(f"writing {directory} failed: {error}; nothing was changed") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def move_into_place(staging: Path, directory: Path) -> None:
    """Move the finished checkpoint into place; an old one leaves only once the new one stands."""
    if not directory.exists():
        staging.rename(directory)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{directory.name}.old.", dir=directory.parent))
    directory.rename(old / "checkpoint")
    try:
        staging.rename(directory)
    except OSError:
        (old / "checkpoint").rename(directory)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
