"""Write a child, or a checkpoint that is there, in further formats: each whole and proven as far as it runs here."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmprune.core.errors import ExportError
from llmprune.core.progress import Show
from llmprune.core.recipe import DeployRecipe, FormatName, GgufType
from llmprune.core.recipe_inputs import ModelRecipe
from llmprune.formats.gguf import write_gguf
from llmprune.formats.layers import layer_sizes, vocabulary_type
from llmprune.formats.limits import check_child
from llmprune.formats.torchao import write_torchao
from llmprune.formats.vllm import write_vllm
from llmprune.models.checkpoint import staging_beside
from llmprune.models.loading import load_model
from llmprune.models.parent import check_config, check_floats
from llmprune.models.surgery import is_stock
from llmprune.publish.contents import TORCHAO_DIRECTORY, VLLM_DIRECTORY
from llmprune.publish.gguf_proof import prove_gguf


def gguf_name(weights: GgufType, *, mixed: bool = False) -> str:
    """Name of the file, as llama.cpp's users know it; it says so if some blocks have types of their own."""
    return f"model-{weights.upper()}{'-mixed' if mixed else ''}.gguf"


def write_formats(
    child: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    rules: DeployRecipe,
    directory: Path,
    *,
    force: bool = False,
) -> list[dict[str, Any]]:
    """Write the formats of `rules` into `directory`, but for the Hugging Face ones; says what each became.

    All are checked before any is written. Raises ExportError if a format cannot hold the child, its place is taken
    (unless `force`), or its proof fails.
    """
    for name in rules.formats:
        check_child(child.config, name, rules)
    written: list[dict[str, Any]] = []
    if "gguf" in rules.formats:
        config = child.config
        mixed = vocabulary_type(config) is not None or any(layer.types for layer in layer_sizes(config))
        path = directory / gguf_name(rules.gguf_type, mixed=mixed)
        if path.exists() and not force:
            raise ExportError(f"{path} is there already; use --force to replace it")
        written.append(_entry("gguf", path, _write_proven_gguf(child, tokenizer, path, rules.gguf_type)))
    if "vllm" in rules.formats:
        path = directory / VLLM_DIRECTORY
        write_vllm(child, tokenizer, path, force=force)
        written.append(_entry("vllm", path, "config and shapes read back; not run"))
    if "torchao" in rules.formats:
        path = directory / TORCHAO_DIRECTORY
        kl = write_torchao(child, tokenizer, path, force=force)
        said = f"the same weights and logits in a fresh process; KL to the child {kl:.1e} nats a token"
        written.append(_entry("torchao", path, said))
    return written


def _entry(name: FormatName, path: Path, proof: str) -> dict[str, Any]:
    return {"format": name, "file": path.name, "proof": proof}


def _write_proven_gguf(
    child: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, path: Path, weights: GgufType
) -> str:
    """Write the file beside its place, hold it to the child in llama.cpp, then move it there."""
    with staging_beside(path) as staging:
        unproven = staging / path.name
        write_gguf(child, tokenizer, unproven, weights)
        if importlib.util.find_spec("xllamacpp") is None:
            said = "not run: llama.cpp is not installed (pip install 'llmprune[llamacpp]')"
        else:
            proof = prove_gguf(child, unproven, weights)
            said = (
                f"run in llama.cpp: KL to transformers {proof.child_kl:.1e} nats a token; "
                f"{proof.contents_kl:.1e} to the equally rounded child, computed in float32"
            )
        unproven.replace(path)
    return said


def convert(model: ModelRecipe, rules: DeployRecipe, to: Path | None, show: Show, *, force: bool) -> dict[str, Any]:
    """Write `rules.formats` of a checkpoint into its own directory, or into `to`; returns what was written.

    Raises UnsupportedModelError or ExportError, before any weight is read, if a format cannot hold the model; and
    ExportError if `to` is missing where the model is no directory, or a place is taken and not to be replaced.
    """
    place = to or Path(model.path)
    if not place.is_dir() and to is None:
        raise ExportError(f"{model.path} is not a directory that files could be added to; name one with --to")

    def holds(config: Any) -> None:
        check_floats(config, origin=model.path)
        if is_stock(config):
            check_config(config, origin=model.path)
        for name in rules.formats:
            check_child(config, name, rules)

    with show("loading"):
        loaded, tokenizer = load_model(model, check=holds)
    with show(f"writing {', '.join(rules.formats)} and proving it"):
        written = write_formats(loaded, tokenizer, rules, place, force=force)
    return {"directory": str(place), "formats": written}
