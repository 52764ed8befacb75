"""Load a checkpoint as a stranger would, and report what came out. Run as a script, in a process of its own.

Imports torch and transformers only: what it proves is that the checkpoint needs nothing else.
On the CPU, where the files are memory-mapped: no weight is copied, and no other process's device is taken.
Usage: python proof.py CHECKPOINT INPUTS.safetensors; prints one JSON object.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging

GENERATED_TOKENS = 8


def stored_tensors(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a state dict; of a quantised one its parts, such as numbers and scales."""
    for name, tensor in tensors.items():
        if hasattr(tensor, "__tensor_flatten__"):
            parts, _ = tensor.__tensor_flatten__()
            yield from ((f"{name}.{part}", getattr(tensor, part)) for part in parts)
        else:
            yield name, tensor


def digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """SHA-256 of every tensor: of its dtype, its shape and its bytes."""
    found = {}
    for name, tensor in stored_tensors(tensors):
        digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        found[name] = digest.hexdigest()
    return found


def generated_with_exits(model: Any, tokens: torch.Tensor) -> torch.Tensor | None:
    """What tokens that leave early make of a text; None of a model that has no exits."""
    if not getattr(model.config, "exits", None):
        return None
    rules = GenerationConfig(  # type: ignore[no-untyped-call]
        pad_token_id=0, max_new_tokens=GENERATED_TOKENS, do_sample=False
    )
    own, model.generation_config = model.generation_config, rules
    try:
        found: torch.Tensor = model.generate(tokens, attention_mask=torch.ones_like(tokens), exits="early")
    finally:
        model.generation_config = own
    return found


def main(checkpoint: str, inputs: str) -> None:
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with open(f"{checkpoint}/config.json", encoding="utf-8") as file:  # noqa: PTH123 - no pathlib needed here
        has_code = "auto_map" in json.load(file)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint, trust_remote_code=has_code, dtype="auto", use_safetensors=True, output_loading_info=True
    )
    model, info = loaded
    expected = load_file(inputs)
    tokens, logits = expected["tokens"], expected["logits"]
    with torch.inference_mode():
        found = model(tokens).logits.float()
        # Nothing but the cache is to be proven: the checkpoint's own settings may penalise repetition, or stop at EOS.
        model.generation_config = GenerationConfig(pad_token_id=0)  # type: ignore[no-untyped-call]
        greedy = model.generate(
            tokens[:1], attention_mask=torch.ones_like(tokens[:1]), max_new_tokens=GENERATED_TOKENS, do_sample=False
        )
        uncached = model(greedy).logits[0, tokens.shape[1] - 1 : -1]
        with_exits = generated_with_exits(model, tokens[:1])
    chosen = greedy[0, tokens.shape[1] :]
    result = {
        "weights": digests(model.state_dict()),
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "mismatched": [str(key) for key in info["mismatched_keys"]],
        "finite": bool(found.isfinite().all()),
        "max_logit_difference": float((found - logits).abs().max()),
        # How far below the best uncached logit each token of cached generation stood: 0 up to rounding.
        "generation_gap": float((uncached.max(-1).values - uncached.gather(1, chosen[:, None])[:, 0]).max()),
        "params": sum(p.numel() for p in {id(p): p for p in model.parameters()}.values()),
        "llmprune_imported": "llmprune" in sys.modules,
    }
    if with_exits is not None:
        result["exits_equal"] = with_exits.tolist() == expected["with_exits"].tolist()
    if "text" in expected:
        text = bytes(expected["text"].tolist()).decode()
        # The tokenizer has no code of its own, but AutoTokenizer reads the config, and asks on stdin if that has.
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=has_code)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        result["tokenizer_equal"] = ids == expected["text_ids"].tolist()
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
