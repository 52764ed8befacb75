"""What a judge does to a child, and how often."""

from __future__ import annotations

from dataclasses import replace

import pytest
from baselines_tiny import judge_of, library_of, paired_by_size, random_parent, space_of
from transformers import PreTrainedModel

from llmprune.choices.architecture import Architecture
from llmprune.measure.quality.likeness import ParentsLogits
from llmprune.measure.quality.perplexity import score
from llmprune.models.surgery import prune
from llmprune.search import judging
from llmprune.search.judging import Finish

MIXED = Architecture.of([(1, 12), (2, 8), (1, 24)])


def test_a_child_that_is_repaired_is_made_once_for_its_figures_and_its_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[PreTrainedModel] = []
    parent = random_parent()
    library = library_of(parent, space_of(parent))
    finish = Finish("noted", lambda child, architecture: made.append(child), lambda architecture: True)
    judge = judge_of(parent, library, "test", finish)
    monkeypatch.setattr(judging, "measure_paired", paired_by_size)
    record = judge.judge(MIXED, "child")
    assert len(made) == 1
    assert record.nats_per_token == score(prune(parent, MIXED, library), judge.split).nats_per_token
    quoted = replace(judge, parents_logits=ParentsLogits(parent.model, judge.split)).quoted(MIXED)
    assert len(made) == 2 and quoted.likeness is not None
    assert quoted.nats_per_token == record.nats_per_token
