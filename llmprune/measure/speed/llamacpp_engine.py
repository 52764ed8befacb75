"""llama.cpp as the engine that models are timed in: each is written as a GGUF file, loaded, and run in turns.

Files go to the system's temporary directory and are unlinked as soon as llama.cpp has them mapped, so that nothing is
left of a process that is killed. The parent is written once in the life of the process, however many children it is
timed beside.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from llmprune.core.errors import RecipeError
from llmprune.core.recipe import CacheType, GgufType, SpaceSize
from llmprune.formats.gguf import write_gguf
from llmprune.formats.gguf_limits import gguf_problem, gguf_sizes
from llmprune.formats.layers import head_dim_of
from llmprune.measure.speed.llamacpp import GgufModel, LlamaCppSession
from llmprune.models.parent import Parent
from llmprune.numerics.ggml import TYPES
from llmprune.numerics.llamacpp_library import library

_kept: weakref.WeakKeyDictionary[PreTrainedModel, dict[GgufType, GgufModel]] = weakref.WeakKeyDictionary()
"""References that were loaded, for as long as their model lives."""


@contextmanager
def loaded_sessions(
    models: Sequence[PreTrainedModel],
    batch: int,
    tokens: int,
    weights: GgufType,
    threads: int,
    cache_type: CacheType = "f16",
) -> Iterator[list[LlamaCppSession]]:
    """A session of each model, the first of which stays loaded for the next call; the others are freed at the end.

    Raises ExportError if one cannot be a GGUF file, ModelError if llama.cpp is not there or fails.
    """
    library()
    reference = models[0]
    with ExitStack() as stack:
        loaded = {reference: _kept_file(reference, weights)}
        for model in models:
            if model not in loaded:
                loaded[model] = stack.enter_context(_loaded(model, weights))
        yield [
            stack.enter_context(loaded[model].session(batch, tokens, threads, cache_type=cache_type))
            for model in models
        ]


def check_engine(parent: Parent, weights: GgufType, size: SpaceSize, cache_type: CacheType) -> None:
    """Raises ModelError unless llama.cpp is there, RecipeError unless it can run children of the parent from a space of
    this size, with such a cache."""
    library()
    if problem := gguf_problem(parent.model.config, weights):
        raise RecipeError(f"workload.engine=llamacpp times models from GGUF files; {parent.source} has none: {problem}")
    if size not in (sizes := gguf_sizes(parent.model.config)):
        raise RecipeError(
            f"workload.engine=llamacpp times models from GGUF files, which hold children of {parent.source} whose "
            f"layers are all alike: space.size must be {' or '.join(sizes)}; got {size}"
        )
    if problem := cache_problem(parent.model.config, cache_type):
        raise RecipeError(f"llama.cpp cannot run {parent.source}: {problem}")


def cache_problem(config: Any, cache_type: CacheType) -> str | None:
    """Why llama.cpp cannot keep keys and values of a model with this config in a type; None if it can. A head is stored
    by itself, so it is whole blocks."""
    head_dim, block = head_dim_of(config), TYPES[cache_type].block
    if head_dim % block == 0:
        return None
    return f"head_dim must be a multiple of {block} for workload.cache_type={cache_type}, got {head_dim}; use f16"


def _kept_file(model: PreTrainedModel, weights: GgufType) -> GgufModel:
    files = _kept.setdefault(model, {})
    if weights not in files:
        files[weights] = _loaded(model, weights)
        weakref.finalize(model, files[weights].close)
    return files[weights]


def _loaded(model: PreTrainedModel, weights: GgufType) -> GgufModel:
    # llama.cpp has mapped the file when it returns, so it may lose its name.
    with tempfile.TemporaryDirectory(prefix="llmprune-gguf-") as directory:
        path = Path(directory) / "model.gguf"
        write_gguf(model, None, path, weights)
        return GgufModel(path)
