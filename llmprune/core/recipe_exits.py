"""The section of a recipe that says where tokens may leave a model early."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from llmprune.core.recipe_base import Section

CriterionName = Literal["gate", "top1", "margin", "entropy", "agreement"]
CRITERIA: tuple[CriterionName, ...] = get_args(CriterionName)


class ExitsRecipe(Section):
    """What `llmprune exits` searches: after which layers a token may leave, how sure of it an exit has to be, and in
    which trunk (the parent, or a child of the front)."""

    layers: Literal["auto"] | tuple[Annotated[int, Field(ge=1)], ...] = Field(
        "auto",
        description="layers behind which an exit may stand, counted from 1; auto: five, from two fifths to nine tenths "
        "of the trunk's depth",
    )
    criteria: tuple[CriterionName, ...] = Field(
        CRITERIA,
        min_length=1,
        description="how sure an exit is: a gate (a probe of the states, which costs no output head), or top1, margin, "
        "entropy, agreement with the exit before, of its own logits",
    )
    trunks: int = Field(
        2, ge=1, description="how many models get exits: the parent, then usable children of the front, fastest first"
    )
    minutes: float = Field(10.0, gt=0, description="that the exits of one trunk are trained for, all of them at once")
    trials: int = Field(2_000, ge=1, description="rules that are scored from stored figures, milliseconds each")
    budgets: tuple[str, ...] = Field(
        (),
        description="hard limits such as 'decode_speedup>=1.1' (the mean token), 'worst_token_speedup>=0.8' (the "
        "dearest token that the rules allow) or 'ppl_ratio<=1.2'",
    )
    size: int = Field(4, ge=1, description="how many of the estimated front are measured")
    repeats: int = Field(5, ge=1, description="how often each part is timed, and how many prompts are decoded")
    seed: int = 0
