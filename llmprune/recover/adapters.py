"""What of a child is trained: all of its weights, or low-rank adapters beside its linear maps (LoRA, arXiv 2106.09685),
which need no gradient and no moments for the weights themselves and are added to them in the end."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

SEED = 0


@contextmanager
def trainable(child: PreTrainedModel, lora_rank: int | None) -> Iterator[None]:
    """Within it, what is trained of the child requires a gradient; at its end nothing does, and adapters are merged.

    The child's tensors must be its own. Adapters begin alike in every process and every time: a training that goes on
    and one that never stopped are the same.
    """
    if lora_rank is None:
        child.requires_grad_(True)
        yield
        child.requires_grad_(False)
        return
    # Imported here: it takes a second that nothing else needs.
    from peft import LoraConfig, get_peft_model

    # GPT-2's maps hold their weights the other way round.
    turned = any(isinstance(module, Conv1D) for module in child.modules())
    rules = LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules="all-linear", fan_in_fan_out=turned)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(SEED)
        # peft asks for an attribute by a name that transformers will give up.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        adapted = get_peft_model(child, rules)
    yield
    adapted.merge_and_unload()
    child.requires_grad_(False)
