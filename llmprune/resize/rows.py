"""A model with fewer rows in its vocabulary: for the tokens that are kept it computes what its parent computes."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llmprune.core.errors import UnsupportedModelError, VocabularyError
from llmprune.data.tokens import IntArray
from llmprune.resize.token_ids import NewIds
from llmprune.resize.tokenizers import cut_tokenizer


def cut_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kept: IntArray, *, multiple: int = 1
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Copies of a model and its tokenizer with the tokens `kept` (n,) alone, ascending ids that become 0..n-1.

    Embedding and output head (tied or not, with its bias) keep these rows; config and generation config name tokens by
    their new ids. On tokens that are kept, logits are the parent's at their rows. The number of rows is rounded up to a
    `multiple`: the rows beyond n are the parent's last that are not kept, which no text becomes and which stay as
    unlikely as they were, where rows of zeros would get a logit of 0.

    Raises VocabularyError as `cut_tokenizer` does, and if a token that a config gives a part is not kept;
    UnsupportedModelError if the model has another table with a row a token, or more rows in one than the other.
    """
    cut = cut_tokenizer(tokenizer, kept)
    rows = _rows(model, kept, multiple)
    ids = NewIds(
        {int(old): new for new, old in enumerate(kept)}, frozenset(int(one) for one in tokenizer.get_vocab().values())
    )
    # What is put here is taken instead of a copy, wherever the model refers to it: tied stays tied.
    copies: dict[int, Any] = {id(model.config): ids.config(model.config, len(rows))}
    generation = getattr(model, "generation_config", None)
    copies[id(generation)] = ids.generation_config(generation)
    for parameter in _vocabulary_parameters(model):
        values = parameter.detach().index_select(0, rows.to(parameter.device))
        copies[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
    child = copy.deepcopy(model, copies)
    _tell_modules(child, len(rows), ids)
    return child, cut


def _rows(model: PreTrainedModel, kept: IntArray, multiple: int) -> torch.Tensor:
    """The parent's row of each of the child's."""
    assert multiple >= 1, f"rows are rounded up to a multiple of at least 1, got {multiple}"
    embedding: Any = model.get_input_embeddings()
    rows: int = embedding.num_embeddings
    if len(kept) and int(kept[-1]) >= rows:
        raise VocabularyError(
            f"the model has {rows} embeddings, and a token {int(kept[-1])} is to be kept; leave it out"
        )
    spare = np.setdiff1d(np.arange(rows), kept)[::-1]
    # Where there are too few, rows come again.
    fill = np.resize(spare if len(spare) else kept[-1:], -len(kept) % multiple)
    return torch.from_numpy(np.concatenate([kept, fill]).astype(np.int64))


def _vocabulary_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    """Embedding, head and its bias: the parameters with a row a token."""
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    rows = embedding.num_embeddings
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module is not embedding and module.num_embeddings == rows:
            raise UnsupportedModelError(
                f"only one embedding may have a row a token for a vocabulary to be cut, and {name} is another; "
                "keep all rows"
            )
    if head.weight.shape[0] != rows:
        raise UnsupportedModelError(
            f"embedding and head must have as many rows to have a vocabulary cut, got {rows} and "
            f"{head.weight.shape[0]}; keep all rows"
        )
    bias = getattr(head, "bias", None)
    return [embedding.weight, head.weight, *([bias] if isinstance(bias, nn.Parameter) else [])]


def _tell_modules(child: PreTrainedModel, rows: int, ids: NewIds) -> None:
    """Modules repeat sizes and ids of the config in attributes of their own."""
    embedding: Any = child.get_input_embeddings()
    head: Any = child.get_output_embeddings()  # type: ignore[no-untyped-call]
    old_rows = embedding.num_embeddings
    embedding.num_embeddings = head.out_features = rows
    for module in child.modules():
        own = module.__dict__
        if own.get("vocab_size") == old_rows:
            own["vocab_size"] = rows
        if isinstance(own.get("padding_idx"), int):
            own["padding_idx"] = ids.new.get(own["padding_idx"])
