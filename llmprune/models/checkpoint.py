"""Write a child as a checkpoint that loads elsewhere, and prove in a fresh process that it is the network scored."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

import llmprune.models.proof
from llmprune.choices.architecture import Architecture
from llmprune.core.errors import ExportError
from llmprune.core.files import sha256_file, write_json
from llmprune.models.placement import is_spread
from llmprune.models.proof import digests
from llmprune.models.sizes import parameter_count
from llmprune.models.surgery import is_stock

METADATA_FILE = "llmprune.json"
PROOF_TEXT = "The quick brown fox, 3.14 — naïve façade; 漢字.\n\tdef f(x): return x ** 2"
PROOF_SHAPE = (2, 24)
ROUNDING_STEPS = {torch.float32: 64, torch.bfloat16: 4, torch.float16: 4}
"""How far the largest logit may be off, in its own steps: half precision rounds once after each sum, which is itself
taken in float32; in float32 the order of the sums counts. Weights are held to the bit, so this is about all else."""


@dataclass(frozen=True)
class Proof:
    """What a fresh process found: see `models/proof.py`."""

    max_logit_difference: float
    generation_gap: float
    params: int
    stock_class: bool


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
    `further` may add files to the directory before it is moved.
    Raises ExportError if the directory is taken, the disk is full, or the proof fails.
    """
    check_destination(directory, force=force)
    with staging_beside(directory) as staging:
        save_files(child, tokenizer, staging)
        proof = prove(child, tokenizer, staging)
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


def proof_facts(proof: Proof) -> dict[str, Any]:
    """JSON of what a checkpoint says of its proof."""
    return {
        "max_logit_difference": proof.max_logit_difference,
        "params": proof.params,
        "stock_class": proof.stock_class,
    }


def prove(child: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, checkpoint: Path) -> Proof:
    """Load `checkpoint` in a fresh process and hold it to `child`: keys, weights, logits, cached generation.

    Raises ExportError on any difference.
    """
    with tempfile.TemporaryDirectory() as scratch:
        inputs = Path(scratch) / "inputs.safetensors"
        given = _proof_inputs(child, tokenizer)
        save_file(given, inputs)
        # What one device did not hold here, it does not hold there.
        device = "auto" if is_spread(child) else child.device
        found = in_fresh_process(llmprune.models.proof.__file__, checkpoint, inputs, device)
    return _judge(found, child, largest_logit=float(given["logits"].abs().max()))


def in_fresh_process(script: str, checkpoint: Path, *arguments: object) -> dict[str, Any]:
    """What a script of ours, run as a stranger's interpreter would, prints of a checkpoint as its last line: JSON.

    Raises ExportError if it fails.
    """
    with tempfile.TemporaryDirectory() as modules:
        environment = {
            **os.environ,
            # A module cache of its own: neither reads nor leaves code in the user's.
            "HF_MODULES_CACHE": modules,
            "HF_HUB_OFFLINE": "1",
            "PYTHONWARNINGS": "ignore",
        }
        finished = run_script(script, [str(checkpoint), *map(str, arguments)], environment)
    if finished.returncode != 0:
        last = (finished.stderr.strip().splitlines() or ["no output"])[-1]
        raise ExportError(f"the checkpoint does not load in a fresh process: {last}")
    found: dict[str, Any] = json.loads(finished.stdout.strip().splitlines()[-1])
    return found


def run_script(
    script: str, arguments: Sequence[str], environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a script in an interpreter of its own, which finds no module beside it."""
    return subprocess.run(
        [sys.executable, "-P", script, *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def proof_tokens(child: PreTrainedModel) -> torch.Tensor:
    """PROOF_SHAPE random token ids, the same for every child of a vocabulary."""
    return torch.randint(child.config.vocab_size, PROOF_SHAPE, generator=torch.Generator().manual_seed(0))


def _proof_inputs(child: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, torch.Tensor]:
    tokens = proof_tokens(child)
    with torch.inference_mode():
        logits = child(tokens.to(child.device)).logits.float().cpu()
    inputs = {"tokens": tokens, "logits": logits}
    if tokenizer is not None:
        ids = tokenizer(PROOF_TEXT, add_special_tokens=False)["input_ids"]
        inputs["text"] = torch.tensor(list(PROOF_TEXT.encode()), dtype=torch.uint8)
        inputs["text_ids"] = torch.tensor(ids, dtype=torch.int64)
    return inputs


def _judge(found: Mapping[str, Any], child: PreTrainedModel, *, largest_logit: float) -> Proof:
    for rule in ("missing", "unexpected", "mismatched"):
        if found[rule]:
            raise ExportError(f"the reloaded checkpoint has {rule} keys: {', '.join(found[rule][:5])}")
    if found["llmprune_imported"]:
        raise ExportError("the reloaded checkpoint imported llmprune, so it would not load elsewhere")
    if not found["finite"]:
        raise ExportError("the reloaded checkpoint gives NaN or infinite logits; export another child")
    params = parameter_count(child)
    if found["params"] != params:
        raise ExportError(f"the reloaded checkpoint has {found['params']:,} parameters, the scored child {params:,}")
    expected = digests(child.state_dict())
    if other := sorted(name for name, digest in found["weights"].items() if digest != expected.get(name)):
        raise ExportError(f"the reloaded checkpoint has other weights than the scored child: {', '.join(other[:5])}")
    limit = ROUNDING_STEPS[child.dtype] * torch.finfo(child.dtype).eps * largest_logit
    for figure in ("max_logit_difference", "generation_gap"):
        if not found[figure] <= limit:
            raise ExportError(
                f"the reloaded checkpoint differs from the scored child: {figure} {found[figure]:.3g} > {limit:.3g}, "
                f"{ROUNDING_STEPS[child.dtype]} steps of {child.dtype} at its largest logit"
            )
    if not found.get("tokenizer_equal", True):
        raise ExportError("the reloaded tokenizer gives other token ids than the parent's")
    return Proof(
        max_logit_difference=found["max_logit_difference"],
        generation_gap=found["generation_gap"],
        params=params,
        stock_class=is_stock(child.config),
    )


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
