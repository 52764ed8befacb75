"""How alike parent and child are, by hand and by the parent's largest logits; and what both say."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import Finished
from test_comparing import models, split_of
from tiny import tiny_tokenizer
from torch.nn import functional
from transformers import PreTrainedModel

from llmprune.measure.quality.likeness import ParentsLogits
from llmprune.models.samples import continuations, samples
from llmprune.pipeline.run import Run
from llmprune.pipeline.run_directory import read_front

__all__ = ["models"]


def test_it_is_that_of_whole_logits(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    parent, child = models
    split, kl, same = split_of(3, 2), 0.0, 0.0
    for name, source in split.sources.items():
        with torch.inference_mode():
            own, other = (model(source.windows).logits[:, :-1].float().log_softmax(-1) for model in models)
        each = functional.kl_div(other, own, log_target=True, reduction="none").sum(-1)
        kl += split.weights[name] * float(each.mean())
        same += split.weights[name] * float((own.argmax(-1) == other.argmax(-1)).float().mean())
    # The tiny vocabulary is smaller than what is kept of a position.
    found = ParentsLogits(parent, split).beside(child)
    assert (found.kl, found.same_top) == (pytest.approx(kl, rel=1e-4), pytest.approx(same))
    of_itself = ParentsLogits(parent, split).beside(parent)
    assert (of_itself.kl, of_itself.same_top) == (pytest.approx(0, abs=1e-5), 1.0)


def test_a_front_quotes_it_of_children_on_the_test_split(finished_run: Finished) -> None:
    front = read_front(Run.join(finished_run.path).directory)
    assert front.parent.test is not None and front.parent.test.likeness is None
    for record in (*front.children, *front.baselines):
        assert record.test is not None and record.test.likeness is not None
        assert 0 <= record.test.likeness.same_top <= 1 and 0 <= record.test.likeness.kl < math.inf


def test_a_continuation_is_the_likeliest(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    tokenizer, (parent, child) = tiny_tokenizer(), models
    (found,) = samples(parent, child, tokenizer, ["ant bee"])
    ids = tokenizer("ant bee", return_tensors="pt")["input_ids"]
    for _ in range(4):
        with torch.inference_mode():
            ids = torch.cat([ids, parent(ids).logits[:, -1:].argmax(-1)], 1)
    begun = tokenizer.decode(ids[0, -4:].tolist(), skip_special_tokens=True)
    assert found["prompt"] == "ant bee" and found["parent"].startswith(begun.strip()[:3])
    assert continuations(child, tokenizer, ["ant bee"]) == [found["child"]]
