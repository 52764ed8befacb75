"""The section of a recipe that says how a child is repaired."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from llmprune.core.recipe_base import Section


class RecoverRecipe(Section):
    """What gives back some of what the cut took."""

    refit: bool = Field(
        True,
        description="solve the output projections of the front's children again, block by block on the child's own "
        "inputs, and keep that where it helps on held-out tokens",
    )
    refit_tokens: int = Field(32_768, ge=256, description="tokens of the recovery split that take part in a refit")
    baselines: bool = Field(True, description="refit the baselines beside the front as well")
    minutes: float | None = Field(
        None,
        gt=0,
        description="distil the picked child from its parent for about so many minutes; they become a number of tokens "
        "when it begins",
    )
    tokens: int | None = Field(None, ge=1, description="or for so many tokens, in place of minutes")
    learning_rate: float = Field(1e-4, gt=0, description="of the distillation, at its peak")
    windows_a_step: int = Field(2, ge=1, description="windows of recovery text that a step of it learns from")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="of its matrix products; weights and updates are float32; auto: bfloat16 where a step is at least "
        "1.3 times as fast",
    )
    candidates: int = Field(
        1,
        ge=1,
        description="so many children that hold the pick, the best of them, are distilled for a part of the length "
        "first, and the one goes on that is best then",
    )
    stored_logits: int | None = Field(
        None,
        ge=1,
        description="learn from so many of the likeliest tokens of each position, and all others as one; they are "
        "stored, so that the parent runs once for a window",
    )
    lora_rank: int | None = Field(
        None,
        ge=1,
        description="train adapters of this rank beside its linear maps (LoRA), in place of its weights; merged "
        "in the end",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="compute activations again in its backward pass rather than keep them: slower, in less memory",
    )
    shard: bool = Field(
        False,
        description="spread the child's layers, with gradients and moments, over the processes that train it (FSDP); "
        "the parent stays whole on each",
    )
    memory_gb: float = Field(
        4.0, gt=0, description="GiB of hidden states that a refit keeps in memory; more of them lie in files"
    )

    free: ClassVar[frozenset[str]] = frozenset({"memory_gb", "gradient_checkpointing", "shard"})

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gb * 2**30)

    @property
    def distils(self) -> bool:
        return self.minutes is not None or self.tokens is not None

    def part(self, share: float) -> RecoverRecipe:
        """These rules for a share of the length."""
        minutes, tokens = self.minutes and self.minutes * share, self.tokens and max(1, round(self.tokens * share))
        return self.model_copy(update={"minutes": minutes, "tokens": tokens})

    def of_refit(self) -> dict[str, Any]:
        """What figures of a front depend on."""
        return self.model_dump(mode="json", include={"refit", "refit_tokens", "baselines"})

    @model_validator(mode="after")
    def _one_length(self) -> RecoverRecipe:
        if self.minutes is not None and self.tokens is not None:
            raise ValueError(f"give one of minutes and tokens; got minutes={self.minutes:g}, tokens={self.tokens}")
        if self.shard and self.lora_rank is not None:
            raise ValueError(f"shard spreads whole weights, not adapters; got lora_rank={self.lora_rank} besides")
        return self
