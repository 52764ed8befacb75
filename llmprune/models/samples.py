"""How a child and its parent go on with the same words: what people ask for before they look at a figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmprune.models.waiting import at_home, wait, waits

NEW_TOKENS = 32


def samples(
    parent: PreTrainedModel, child: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> list[dict[str, str]]:
    """Each prompt with the likeliest continuation of either, NEW_TOKENS long or to an end of text. If the parent waits,
    for want of room for both, so does the child from now on."""
    if waits(parent):
        wait(child)
    found = []
    for model in (parent, child):
        with at_home(model):
            found.append(continuations(model, tokenizer, prompts))
    return [
        {"prompt": prompt, "parent": parents, "child": childs}
        for prompt, parents, childs in zip(prompts, *found, strict=True)
    ]


def continuations(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
    """Greedy, without the penalties that a model's own generation config may name."""
    ends = model.generation_config.eos_token_id if model.generation_config else None
    rules = GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=ends, pad_token_id=0, max_new_tokens=NEW_TOKENS, do_sample=False
    )
    texts = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        assert isinstance(ids, torch.Tensor)
        ids = ids.to(model.device)
        own: Any = model
        with torch.inference_mode():
            whole = own.generate(ids, attention_mask=torch.ones_like(ids), generation_config=rules)
        texts.append(str(tokenizer.decode(whole[0, ids.shape[1] :].tolist(), skip_special_tokens=True)))
    return texts
