"""Scores on disk, so that no architecture is scored twice: not after a restart, and not by two workers.

One small file holds what is known of one architecture on one slice of tokens: the first windows of each source, of
all of them or of as many as a race has come to. Files are replaced as a whole. Of two workers that write one at once
the later stays: at worst the other's windows are scored again.

    scorer = StoredScorer(PrefixScorer(parent, library, split), ScoreStore(run / "scores", library.hash, split))
    scorer.score(architecture)

Shapes: n windows of a source.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from llmprune.choices.architecture import Architecture
from llmprune.core.errors import RunDirectoryError
from llmprune.core.files import atomic_path
from llmprune.data.tokens import Split
from llmprune.measure.quality.prefix import PrefixScorer
from llmprune.measure.quality.scores import Counts, WindowScores

_VERSION = "1"
_FIGURES = ("nats:", "kl:", "hits:")
Figures = dict[str, torch.Tensor]


class ScoreStore:
    """The scores of one library's children on one slice of tokens, one safetensors file each.

    `library_hash` stands for all that a child is made of besides its architecture: parent, repairs and dtype.
    `top_k` is that of the scorer, if it computes KL: without it, files without KL are enough.
    """

    def __init__(self, directory: Path, library_hash: str, split: Split, top_k: int | None = None) -> None:
        self.split, self._top_k, self._hits = split, top_k, split.own_after is not None
        self._key = {"version": _VERSION, "library": library_hash, "split": split.hash, "top_k": str(top_k)}
        name = hashlib.sha256(json.dumps(self._key, sort_keys=True).encode()).hexdigest()[:16]
        self._directory = directory / name

    def path(self, architecture: Architecture) -> Path:
        """The file of an architecture, there or not."""
        return self._directory / f"{architecture.hash}.safetensors"

    def get(self, architecture: Architecture) -> WindowScores | None:
        """What is known of an architecture; None if nothing is, or if the file is corrupt or of another slice.

        Raises RunDirectoryError if a file is there and cannot be read.
        """
        try:
            found = _read(self.path(architecture), {**self._key, "architecture": architecture.canonical_json})
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RunDirectoryError(f"cannot read {self.path(architecture)}: {error.strerror or error}") from error
        if found is None:
            return None
        nats, kl, hits = (
            {name.partition(":")[2]: t for name, t in found.items() if name.startswith(f)} for f in _FIGURES
        )
        scores = WindowScores(nats, kl if self._top_k is not None else None, hits if self._hits else None)
        return scores if self._fits(scores) else None

    def windows(self) -> dict[str, int]:
        """By an architecture's hash, how many windows of it are stored; corrupt files are left out."""
        found = {}
        for path in sorted(self._directory.glob("*.safetensors")):
            with suppress(SafetensorError, OSError), safe_open(path, framework="pt") as file:
                sizes = (file.get_slice(name).get_shape()[0] for name in file.keys() if name.startswith(_FIGURES[0]))  # noqa: SIM118
                found[path.stem] = sum(sizes)
        return found

    def put(self, architecture: Architecture, scores: WindowScores) -> None:
        """Replace what is known of an architecture. Raises RunDirectoryError if it cannot be written."""
        assert self._fits(scores), f"scores of {scores.counts} windows do not fit the split and top_k {self._top_k}"
        tensors = {f"nats:{name}": values.contiguous() for name, values in scores.nats.items()}
        tensors |= {f"kl:{name}": values.contiguous() for name, values in (scores.kl or {}).items()}
        tensors |= {f"hits:{name}": values.contiguous() for name, values in (scores.hits or {}).items()}
        metadata = {**self._key, "architecture": architecture.canonical_json, "sha256": _digest(tensors)}
        with atomic_path(self.path(architecture)) as temporary:
            save_file(tensors, temporary, metadata)

    def _fits(self, scores: WindowScores) -> bool:
        figures = [scores.nats] if scores.kl is None else [scores.nats, scores.kl]
        return (
            self._has_hits_that_fit(scores)
            and (scores.kl is None) == (self._top_k is None)
            and all(
                part.keys() == self.split.sources.keys()
                and all(
                    values.dtype == torch.float64
                    and values.shape == scores.nats[name].shape
                    and values.ndim == 1
                    and len(values) <= len(self.split.sources[name].windows)
                    for name, values in part.items()
                )
                for part in figures
            )
        )

    def _has_hits_that_fit(self, scores: WindowScores) -> bool:
        if scores.hits is None or not self._hits:
            return scores.hits is None and not self._hits
        shapes = {name: (len(values), self.split.seq_len - 1) for name, values in scores.nats.items()}
        return {name: tuple(found.shape) for name, found in scores.hits.items()} == shapes and all(
            found.dtype == torch.bool for found in scores.hits.values()
        )


class StoredScorer:
    """A scorer that asks the store first, and scores and stores what is missing. A WindowScorer itself."""

    def __init__(self, scorer: PrefixScorer, store: ScoreStore) -> None:
        self.scorer, self.store = scorer, store
        self._remembered: Architecture | None = None
        self.found_windows = 0
        """Windows that came from the store."""
        self.scored_windows = 0
        """Windows that did not."""

    @property
    def batch_windows(self) -> int:
        return self.scorer.batch_windows

    def remember(self, architecture: Architecture) -> None:
        """Score it, and keep its hidden states, and no other's, for candidates that begin like it."""
        if self._remembered is not None:
            self.scorer.forget(self._remembered)
        self.scorer.remember(architecture)
        # Even if its figures are in the store: it is the states that are wanted.
        self.scorer.score(architecture)
        self._remembered = architecture

    def hold(self, architecture: Architecture) -> None:
        self.scorer.hold(architecture)

    def let_go(self, architecture: Architecture) -> None:
        self.scorer.let_go(architecture)

    def score(self, architecture: Architecture) -> WindowScores:
        """All windows of the split. Raises as `score_range` does."""
        counts = {name: len(source.windows) for name, source in self.store.split.sources.items()}
        return self.score_range(architecture, dict.fromkeys(counts, 0), counts)

    def score_range(self, architecture: Architecture, start: Counts, stop: Counts) -> WindowScores:
        """The windows from `start[name]` up to `stop[name]`, and in the store all up to there.

        Raises as the scorer does, and RunDirectoryError if the store cannot be read or written.
        """
        known = self.store.get(architecture)
        counts = dict.fromkeys(stop, 0) if known is None else known.counts
        missing = {name: max(0, stop[name] - counts[name]) for name in stop}
        asked = sum(max(0, stop[name] - start[name]) for name in stop)
        if known is None or any(missing.values()):
            upto = {name: max(stop[name], counts[name]) for name in stop}
            new = self.scorer.score_range(architecture, counts, upto)
            known = new if known is None else known.joined(new)
            self.store.put(architecture, known)
        self.scored_windows += sum(missing.values())
        self.found_windows += max(0, asked - sum(missing.values()))
        return known.between(start, stop)


def _read(path: Path, expected: Mapping[str, str]) -> Figures | None:
    """A file's tensors, or None unless it is whole and says that it is what is expected."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict, whatever it looks
    except SafetensorError:
        return None
    digest = metadata.pop("sha256", None)
    return tensors if metadata == dict(expected) and digest == _digest(tensors) else None


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
