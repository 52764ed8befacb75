"""What a child holds and computes, noted so that its files can be proven when it is no longer in memory.

Files are proven on the CPU, whatever device the child was scored on, and held to what the child computes there. Weights
are held to the bit, and what another device rounds in another way is no property of a checkpoint; but a process that
took the parent's device would need room for a second model there. Both sides compute in the dtype of the files.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import llmprune.models.proof
from llmprune.core.errors import ExportError
from llmprune.models.fresh_process import in_fresh_process
from llmprune.models.proof import digests, generated_with_exits
from llmprune.models.sizes import parameter_count
from llmprune.models.surgery import is_stock

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


@dataclass(frozen=True, eq=False)
class Expected:
    """What the files of a child are held to."""

    inputs: Mapping[str, torch.Tensor]
    """What the fresh process is given: `tokens` PROOF_SHAPE, their float32 `logits` (*PROOF_SHAPE, vocabulary), and
    with a tokenizer `text` as UTF-8 and its `text_ids`."""
    weights: Mapping[str, str]
    """By the name of a tensor, its digest."""
    params: int
    dtype: torch.dtype
    stock_class: bool

    @classmethod
    def of(cls, child: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Expected:
        """Of a child on the CPU."""
        tokens = proof_tokens(child)
        with torch.inference_mode():
            inputs = {"tokens": tokens, "logits": child(tokens).logits.float()}
            if (with_exits := generated_with_exits(child, tokens[:1])) is not None:
                inputs["with_exits"] = with_exits
        if tokenizer is not None:
            ids = tokenizer(PROOF_TEXT, add_special_tokens=False)["input_ids"]
            inputs["text"] = torch.tensor(list(PROOF_TEXT.encode()), dtype=torch.uint8)
            inputs["text_ids"] = torch.tensor(ids, dtype=torch.int64)
        weights = digests(child.state_dict())
        return cls(inputs, weights, parameter_count(child), child.dtype, is_stock(child.config))


def proof_tokens(child: PreTrainedModel) -> torch.Tensor:
    """PROOF_SHAPE random token ids, the same for every child of a vocabulary."""
    return torch.randint(child.config.vocab_size, PROOF_SHAPE, generator=torch.Generator().manual_seed(0))


def prove(expected: Expected, checkpoint: Path) -> Proof:
    """Load `checkpoint` in a fresh process and hold it to what is expected: keys, weights, logits, cached generation.

    Raises ExportError on any difference, OutOfMemoryError if the process has no room.
    """
    with tempfile.TemporaryDirectory() as scratch:
        inputs = Path(scratch) / "inputs.safetensors"
        save_file(dict(expected.inputs), inputs)
        found = in_fresh_process(llmprune.models.proof.__file__, checkpoint, inputs)
    return _judge(found, expected)


def _judge(found: Mapping[str, Any], expected: Expected) -> Proof:
    for rule in ("missing", "unexpected", "mismatched"):
        if found[rule]:
            raise ExportError(f"the reloaded checkpoint has {rule} keys: {', '.join(found[rule][:5])}")
    if found["llmprune_imported"]:
        raise ExportError("the reloaded checkpoint imported llmprune, so it would not load elsewhere")
    if not found["finite"]:
        raise ExportError("the reloaded checkpoint gives NaN or infinite logits; export another child")
    if found["params"] != expected.params:
        raise ExportError(
            f"the reloaded checkpoint has {found['params']:,} parameters, the scored child {expected.params:,}"
        )
    other = sorted(name for name, digest in found["weights"].items() if digest != expected.weights.get(name))
    if other:
        raise ExportError(f"the reloaded checkpoint has other weights than the scored child: {', '.join(other[:5])}")
    largest_logit = float(expected.inputs["logits"].abs().max())
    limit = ROUNDING_STEPS[expected.dtype] * torch.finfo(expected.dtype).eps * largest_logit
    for figure in ("max_logit_difference", "generation_gap"):
        if not found[figure] <= limit:
            raise ExportError(
                f"the reloaded checkpoint differs from the scored child: {figure} {found[figure]:.3g} > {limit:.3g}, "
                f"{ROUNDING_STEPS[expected.dtype]} steps of {expected.dtype} at its largest logit"
            )
    if not found.get("exits_equal", True):
        raise ExportError(
            "the reloaded checkpoint generates other tokens with its exits than the one that was measured"
        )
    if not found.get("tokenizer_equal", True):
        raise ExportError("the reloaded tokenizer gives other token ids than the parent's")
    return Proof(
        max_logit_difference=found["max_logit_difference"],
        generation_gap=found["generation_gap"],
        params=expected.params,
        stock_class=expected.stock_class,
    )
