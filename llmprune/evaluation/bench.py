"""Time checkpoints on disk, whoever wrote them, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmprune.core.errors import DataError, ModelError
from llmprune.core.progress import Show
from llmprune.core.recipe import CacheType, GgufType, WorkloadRecipe
from llmprune.core.recipe_inputs import ModelRecipe
from llmprune.data.tokens import Split
from llmprune.formats.gguf_limits import gguf_child_problem, gguf_problem
from llmprune.measure.speed.host import fingerprint
from llmprune.measure.speed.llamacpp_engine import cache_problem
from llmprune.measure.speed.throughput import Workload, check_compiler, measure_paired
from llmprune.models.loading import dtype_of, load_model
from llmprune.models.placement import resolve_device
from llmprune.models.sizes import parameter_count
from llmprune.numerics.llamacpp_library import library


def bench(
    models: Sequence[ModelRecipe], workload: WorkloadRecipe, show: Show, *, gguf_type: GgufType = "f16"
) -> dict[str, Any]:
    """Time checkpoints in one interleaved run; the first is the reference of all speed-ups.

    Raises ModelError, before any weight is read, if the workload's engine or compiler cannot run them; and if they come
    in different dtypes.
    """
    if workload.compile:
        check_compiler(resolve_device(models[0].device))
    in_llamacpp = workload.engine == "llamacpp"
    with show("loading") as advance:
        loaded = []
        for done, recipe in enumerate(models, start=1):
            runs = partial(_check_engine, recipe.path, gguf_type, workload.cache_type) if in_llamacpp else _any
            loaded.append(load_model(recipe, check=runs)[0])
            advance(done, len(models))
    vocabulary = loaded[0].config.get_text_config().vocab_size
    for recipe, model in zip(models, loaded, strict=True):
        check_vocabulary(model, recipe.path, vocabulary - 1)
    dtypes = {recipe.path: dtype_of(model) for recipe, model in zip(models, loaded, strict=True)}
    if len({*dtypes.values()}) > 1:
        listed = ", ".join(f"{path} in {found}" for path, found in dtypes.items())
        raise ModelError(f"models side by side must be in one dtype, but there are {listed}; name one with --dtype")
    timed = Workload.from_recipe(workload, dtype_of(loaded[0]), str(loaded[0].device), gguf_type)
    with show("timing") as advance:
        # A lone checkpoint is timed against itself: its tokens per second are what is asked for.
        reference, others = measure_paired(loaded[0], loaded[1:] or loaded[:1], timed, workload.repeats, advance)
    speeds = [reference, *others][: len(loaded)]
    return {
        "models": [
            {"model": recipe.path, "params": parameter_count(model), **speed.to_json()}
            for recipe, model, speed in zip(models, loaded, speeds, strict=True)
        ],
        "measured_on": {"workload": timed.to_json(), "repeats": workload.repeats, "host": fingerprint()},
    }


def _any(config: Any) -> None:
    """torch runs them all."""


def _check_engine(path: str, gguf_type: GgufType, cache_type: CacheType, config: Any) -> None:
    library()
    problem = gguf_problem(config, gguf_type) or gguf_child_problem(config, gguf_type)
    if problem := problem or cache_problem(config, cache_type):
        raise ModelError(f"llama.cpp cannot run {path}: {problem}")


def check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str, text: Split) -> None:
    """Raises DataError if token ids of a text mean something else to a model, as far as sizes tell."""
    check_vocabulary(model, path, max(int(source.windows.max()) for source in text.sources.values()))
    if text.vocabulary not in (None, len(tokenizer)):
        raise DataError(
            f"{path} has a tokenizer of {len(tokenizer):,} tokens, and the text was cut by one of {text.vocabulary:,}: "
            "nats a token of two vocabularies do not compare; leave one of the models out, or name --data for each"
        )


def check_vocabulary(model: PreTrainedModel, path: str, largest_id: int) -> None:
    """Raises DataError if a model has no embedding for a token id."""
    size = model.config.get_text_config().vocab_size
    if largest_id >= size:
        raise DataError(
            f"{path} has a vocabulary of {size:,} and would be given token id {largest_id:,}: the text was cut, or the "
            "reference made, for another tokenizer"
        )
