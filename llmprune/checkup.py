"""Judge checkpoints on disk, whoever wrote them: speed side by side, perplexity on a split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmprune.data.store import load_token_splits
from llmprune.data.tokens import Split, build_token_splits
from llmprune.errors import DataError
from llmprune.files import read_json
from llmprune.measure.host import fingerprint
from llmprune.measure.quality import score
from llmprune.measure.throughput import Workload, measure_paired
from llmprune.models.checkpoint import METADATA_FILE
from llmprune.models.loading import load_model
from llmprune.models.sizes import parameter_count
from llmprune.progress import Show
from llmprune.recipe import ModelRecipe, Recipe, SplitName, WorkloadRecipe, parse_recipe
from llmprune.run_directory import RunDirectory


def bench(models: Sequence[ModelRecipe], workload: WorkloadRecipe, show: Show) -> dict[str, Any]:
    """Time checkpoints in one interleaved run; the first is the reference of all speed-ups."""
    with show("loading") as advance:
        loaded = []
        for done, recipe in enumerate(models, start=1):
            loaded.append(load_model(recipe)[0])
            advance(done, len(models))
    vocabulary = loaded[0].config.get_text_config().vocab_size
    for recipe, model in zip(models, loaded, strict=True):
        _check_vocabulary(model, recipe.path, vocabulary - 1)
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


def evaluate(
    model_recipe: ModelRecipe, data: Path | None, split: SplitName, workload: WorkloadRecipe, show: Show
) -> dict[str, Any]:
    """Perplexity of a checkpoint on a split, and its tokens per second.

    `data` is a run directory, whose stored tokens are used, or a recipe; without it, the run that the checkpoint
    lies in, or the recipe that it carries. Raises DataError if there is neither.
    """
    with show("loading"):
        model, tokenizer = load_model(model_recipe)
        tokens = _split(Path(model_recipe.path), tokenizer, data, split)
    with show("scoring") as advance:
        _check_vocabulary(model, model_recipe.path, max(int(s.windows.max()) for s in tokens.sources.values()))
        figures = score(model, tokens, advance).to_json()
    timed = Workload.from_recipe(workload, model_recipe.dtype, str(model.device))
    with show("timing") as advance:
        speed, _ = measure_paired(model, [model], timed, workload.repeats, advance)
    return {
        "model": model_recipe.path,
        "params": parameter_count(model),
        **{key: figures[key] for key in ("nats_per_token", "nats_per_byte", "ppl", "per_source")},
        "prefill_tokens_per_s": asdict(speed.prefill_tokens_per_s),
        "decode_tokens_per_s": asdict(speed.decode_tokens_per_s),
        "measured_on": {
            **{key: figures[key] for key in ("dataset", "split", "seq_len", "tokens", "bos")},
            "workload": timed.to_json(),
            "repeats": workload.repeats,
            "host": fingerprint(),
        },
    }


def _split(checkpoint: Path, tokenizer: PreTrainedTokenizerBase, data: Path | None, split: SplitName) -> Split:
    if data is None:
        data = next((place for place in checkpoint.resolve().parents if RunDirectory(place).tokens.is_file()), None)
    if data is not None and data.is_dir():
        run = RunDirectory(data)
        if not run.tokens.is_file():
            raise DataError(f"{data} holds no tokens.safetensors; name a run directory that llmprune search made")
        return load_token_splits(run.tokens)[split]
    return build_token_splits(_recipe(checkpoint, data).data, tokenizer)[split]


def _recipe(checkpoint: Path, data: Path | None) -> Recipe:
    if data is not None:
        from llmprune.recipe import load_recipe

        return load_recipe(data)
    metadata = checkpoint / METADATA_FILE
    if not metadata.is_file():
        raise DataError(
            f"{checkpoint} does not say what text to evaluate on; name a run directory or a recipe with --data"
        )
    return parse_recipe(read_json(metadata)["recipe"], origin=str(metadata))


def _check_vocabulary(model: PreTrainedModel, path: str, largest_id: int) -> None:
    size = model.config.get_text_config().vocab_size
    if largest_id >= size:
        raise DataError(
            f"{path} has a vocabulary of {size:,} and would be given token id {largest_id:,}: the text was cut, or the "
            "reference made, for another tokenizer"
        )
