"""Time checkpoints on disk, whoever wrote them, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from llmprune.errors import DataError
from llmprune.measure.host import fingerprint
from llmprune.measure.throughput import Workload, measure_paired
from llmprune.models.loading import load_model
from llmprune.models.sizes import parameter_count
from llmprune.progress import Show
from llmprune.recipe import ModelRecipe, WorkloadRecipe


def bench(models: Sequence[ModelRecipe], workload: WorkloadRecipe, show: Show) -> dict[str, Any]:
    """Time checkpoints in one interleaved run; the first is the reference of all speed-ups."""
    with show("loading") as advance:
        loaded = []
        for done, recipe in enumerate(models, start=1):
            loaded.append(load_model(recipe)[0])
            advance(done, len(models))
    vocabulary = loaded[0].config.get_text_config().vocab_size
    for recipe, model in zip(models, loaded, strict=True):
        check_vocabulary(model, recipe.path, vocabulary - 1)
    timed = Workload.from_recipe(workload, models[0].dtype, str(loaded[0].device))
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


def check_vocabulary(model: PreTrainedModel, path: str, largest_id: int) -> None:
    """Raises DataError if a model has no embedding for a token id."""
    size = model.config.get_text_config().vocab_size
    if largest_id >= size:
        raise DataError(
            f"{path} has a vocabulary of {size:,} and would be given token id {largest_id:,}: the text was cut, or the "
            "reference made, for another tokenizer"
        )
