"""Write a child, or a checkpoint that is there, in further formats: each whole and proven as far as it runs here."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmprune.deploy.contents import VLLM_DIRECTORY
from llmprune.deploy.formats import check_child
from llmprune.deploy.gguf import write_gguf
from llmprune.deploy.vllm import write_vllm
from llmprune.errors import ExportError
from llmprune.measure.llamacpp import GgufModel, logits_of
from llmprune.models.checkpoint import PROOF_SHAPE
from llmprune.models.loading import load_model
from llmprune.models.parent import check_config
from llmprune.models.surgery import is_stock
from llmprune.progress import Show
from llmprune.recipe import DeployRecipe, FormatName, GgufType, ModelRecipe

MAX_KL: dict[GgufType, float] = {"f32": 1e-5, "f16": 1e-3, "q8_0": 0.05}
"""Nats a token between transformers and llama.cpp: what rounding of the weights alone makes is far below."""


def gguf_name(weights: GgufType) -> str:
    """Name of the file, as llama.cpp's users know it."""
    return f"model-{weights.upper()}.gguf"


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
        path = directory / gguf_name(rules.gguf_type)
        if path.exists() and not force:
            raise ExportError(f"{path} is there already; use --force to replace it")
        written.append(_entry("gguf", path, _write_proven_gguf(child, tokenizer, path, rules.gguf_type)))
    if "vllm" in rules.formats:
        path = directory / VLLM_DIRECTORY
        write_vllm(child, tokenizer, path, force=force)
        written.append(_entry("vllm", path, "config and shapes read back; not run"))
    return written


def _entry(name: FormatName, path: Path, proof: str) -> dict[str, Any]:
    return {"format": name, "file": path.name, "proof": proof}


def _write_proven_gguf(
    child: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, path: Path, weights: GgufType
) -> str:
    """Write the file under a name of its own, hold it to the child in llama.cpp, then rename it."""
    if importlib.util.find_spec("xllamacpp") is None:
        write_gguf(child, tokenizer, path, weights)
        return "not run: llama.cpp is not installed (pip install 'llmprune[llamacpp]')"
    unproven = path.with_name(f".{path.name}.unproven.gguf")
    try:
        write_gguf(child, tokenizer, unproven, weights)
        kl = _kl_in_llamacpp(child, unproven)
        # llama.cpp computes in float32 what a child of half precision rounds after every step.
        limit = MAX_KL[weights] if child.dtype == torch.float32 else max(MAX_KL[weights], MAX_KL["f16"])
        if not kl <= limit:
            raise ExportError(
                f"llama.cpp computes something else from {path.name}: KL {kl:.2g} nats a token > {limit:g}; it is not "
                "written"
            )
        unproven.replace(path)
    finally:
        unproven.unlink(missing_ok=True)
    return f"run in llama.cpp: KL to transformers {kl:.1e} nats a token"


@torch.inference_mode()
def _kl_in_llamacpp(child: PreTrainedModel, path: Path) -> float:
    """Mean KL of what llama.cpp predicts to what the child does, on random tokens."""
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(child.config.vocab_size, PROOF_SHAPE, generator=generator)
    expected = child(ids_BT.to(child.device)).logits.double().cpu().log_softmax(-1)
    with GgufModel(path) as model:
        found = logits_of(model, ids_BT).double().log_softmax(-1)
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def convert(model: ModelRecipe, rules: DeployRecipe, to: Path | None, show: Show, *, force: bool) -> dict[str, Any]:
    """Write `rules.formats` of a checkpoint into its own directory, or into `to`; returns what was written.

    Raises UnsupportedModelError or ExportError, before any weight is read, if a format cannot hold the model; and
    ExportError if `to` is missing where the model is no directory, or a place is taken and not to be replaced.
    """
    place = to or Path(model.path)
    if not place.is_dir() and to is None:
        raise ExportError(f"{model.path} is not a directory that files could be added to; name one with --to")

    def holds(config: Any) -> None:
        if is_stock(config):
            check_config(config, origin=model.path)
        for name in rules.formats:
            check_child(config, name, rules)

    with show("loading"):
        loaded, tokenizer = load_model(model, check=holds)
    with show(f"writing {', '.join(rules.formats)} and proving it"):
        written = write_formats(loaded, tokenizer, rules, place, force=force)
    return {"directory": str(place), "formats": written}
