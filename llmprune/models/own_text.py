"""What a model itself goes on with: the text on which a draft has to agree with it.

Shapes: N windows of T tokens, P of them the prompt.
"""

from __future__ import annotations

import torch
from transformers import DynamicCache, PreTrainedModel

from llmprune.core.progress import Advance
from llmprune.models.streams import input_device

BATCH_TOKENS = 8192
"""Tokens of the windows that are written together: at a small batch each would wait for the weights alone."""


def ends_of(model: PreTrainedModel) -> frozenset[int]:
    """Token ids at which generation ends; none if the model names none."""
    ends = model.generation_config.eos_token_id if model.generation_config else None
    return frozenset([ends] if isinstance(ends, int) else ends or ())


@torch.inference_mode()
def own_windows(
    model: PreTrainedModel, windows_NT: torch.Tensor, prompt_tokens: int, progress: Advance = lambda done, total: None
) -> torch.Tensor:
    """The windows with what the model likeliest goes on with behind their first P tokens: (N, T) int64 on the CPU.

    Greedy, without the penalties that a generation config may name, and past an end of text: what follows one is not to
    be scored. `progress` counts windows.
    """
    count, length = windows_NT.shape
    assert 0 < prompt_tokens < length, f"a prompt of {prompt_tokens} tokens in windows of {length}"
    written: list[torch.Tensor] = []
    for prompts_BP in torch.split(windows_NT[:, :prompt_tokens], max(1, BATCH_TOKENS // length)):
        cache = DynamicCache(config=model.config)
        tokens = [prompts_BP.to(input_device(model))]
        for _ in range(length - prompt_tokens):
            logits_B1V = model(input_ids=tokens[-1], past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            tokens.append(logits_B1V.argmax(-1).to(tokens[0].device))
        written.append(torch.cat(tokens, dim=1).cpu())
        progress(sum(map(len, written)), count)
    return torch.cat(written)
