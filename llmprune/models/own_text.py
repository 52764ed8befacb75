"""What a model itself goes on with: the text on which a draft has to agree with it.

Shapes: N windows of T tokens, P of them the prompt.
"""

from __future__ import annotations

import torch
from transformers import DynamicCache, PreTrainedModel

from llmprune.models.streams import input_device

BATCH_TOKENS = 16_384
"""Tokens of the windows that are written together: at a small batch each would wait for the weights alone."""


def ends_of(model: PreTrainedModel) -> frozenset[int]:
    """Token ids at which generation ends; none if the model names none."""
    ends = model.generation_config.eos_token_id if model.generation_config else None
    return frozenset([ends] if isinstance(ends, int) else ends or ())


def windows_together(length: int) -> int:
    """How many windows of so many tokens are written at once."""
    return max(1, BATCH_TOKENS // length)


@torch.inference_mode()
def own_windows(model: PreTrainedModel, windows_NT: torch.Tensor, prompt_tokens: int) -> torch.Tensor:
    """The windows with what the model likeliest goes on with behind their first P tokens: (N, T) int64 on the CPU.

    Greedy, without the penalties that a generation config may name, and past an end of text: what follows one is not to
    be scored.
    """
    length = windows_NT.shape[1]
    assert 0 < prompt_tokens < length, f"a prompt of {prompt_tokens} tokens in windows of {length}"
    cache = DynamicCache(config=model.config)
    tokens = [windows_NT[:, :prompt_tokens].to(input_device(model))]
    for _ in range(length - prompt_tokens):
        logits_N1V = model(input_ids=tokens[-1], past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        tokens.append(logits_N1V.argmax(-1).to(tokens[0].device))
    return torch.cat(tokens, dim=1).cpu()
