"""Write a child with int8 weights that torchao computes with: half the bytes of bfloat16, in transformers alone.

Every row of a projection has a scale of its own; inputs stay in the child's dtype, embeddings and output head as they
are. The files are safetensors, `quantization_config` in config.json says the rest.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TorchAoConfig

from llmprune.core.files import write_json
from llmprune.formats.layers import stock_type
from llmprune.models.checkpoint import (
    METADATA_FILE,
    check_destination,
    file_hashes,
    move_into_place,
    proof_facts,
    save_files,
    staging_beside,
)
from llmprune.models.expected import Expected, proof_tokens, prove
from llmprune.models.loading import quiet_loading
from llmprune.numerics.divergence import kl_nats

WITHOUT_LINEAR = ("gpt2",)
"""Families whose projections are no nn.Linear, which is all that transformers has torchao quantise."""


def torchao_problem(config: Any) -> str | None:
    """Why no model with this config can be written here; None if it can."""
    if (family := stock_type(config)) in WITHOUT_LINEAR:
        return f"torchao quantises linear layers, and those of {family} are of another class; use hf"
    if importlib.util.find_spec("torchao") is None:
        return "torchao is not installed; pip install 'llmprune[torchao]'"
    return None


def write_torchao(
    child: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, directory: Path, *, force: bool = False
) -> float:
    """Write the child in int8 to `directory`: whole and proven in a fresh process, or not at all; what rounding costs,
    KL in nats a token on random tokens.

    The child stays as it is; it lies on disk a second time meanwhile, and in memory in int8 until that is written.
    Raises ExportError if the directory is taken, or the files are not what was quantised.
    """
    check_destination(directory, force=force)
    with staging_beside(directory) as plain, staging_beside(directory) as staging:
        save_files(child, None, plain)
        expected = _write_quantised(child, plain, tokenizer, staging)
        proof = prove(expected, staging)
        facts = {"format": 1, "proof": proof_facts(proof), "files": file_hashes(staging)}
        write_json(staging / METADATA_FILE, facts)
        move_into_place(staging, directory)
    with torch.inference_mode():
        logits = child(proof_tokens(child).to(child.device)).logits.cpu()
    return kl_nats(logits, expected.inputs["logits"])


def _write_quantised(
    child: PreTrainedModel, plain: Path, tokenizer: PreTrainedTokenizerBase | None, directory: Path
) -> Expected:
    """Write the child with int8 weights, unproven; what its files are to hold is all that stays of it in memory."""
    quantised = _quantised(child, plain)
    save_files(quantised, tokenizer, directory)
    return Expected.of(quantised, tokenizer)


def _quantised(child: PreTrainedModel, plain: Path) -> PreTrainedModel:
    """The child on the CPU with int8 weights, read from its own checkpoint."""
    from torchao.quantization import Int8WeightOnlyConfig  # imported late: it is not always there

    # torchao's own settings for torch.compile would be those of this whole process.
    rules = TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))
    with quiet_loading():
        made: PreTrainedModel = type(child).from_pretrained(plain, quantization_config=rules, dtype=child.dtype)
    return made
