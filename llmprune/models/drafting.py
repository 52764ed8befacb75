"""What transformers reads of a draft's own settings when it is another model's assistant."""

from __future__ import annotations

from transformers import PreTrainedModel


def note_drafting(child: PreTrainedModel, drafted: int) -> None:
    """Have a child draft so many tokens a round, always, whatever it makes of its own chances: what was measured.

    transformers' own way is to change their number as it goes, and to stop early where the draft is unsure.
    """
    rules = child.generation_config
    assert rules is not None, "a pruned child has its parent's"
    rules.num_assistant_tokens = max(1, drafted)
    rules.num_assistant_tokens_schedule = "constant"
    rules.assistant_confidence_threshold = 0.0
