"""The sections of a recipe that say what goes in: the parent, and the text."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from llmprune.core.errors import quoted
from llmprune.core.recipe_base import PathText, Section

SplitName = Literal["calibration", "estimate", "search", "validation", "test", "recovery", "unseen"]
SPLIT_NAMES: tuple[SplitName, ...] = get_args(SplitName)
AS_IT_IS: SplitName = "calibration"
"""The split whose text the parent never writes: statistics of blocks are of text that people write."""


class ModelRecipe(Section):
    """The parent: a Hub id, a local directory, or a GGUF file."""

    path: PathText = Field(description="Hub id, local directory, or path of a .gguf file")
    revision: str | None = Field(None, description="branch, tag or commit of a Hub model")
    tokenizer: PathText | None = Field(None, description="Hub id or directory, if not the model's own")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="of weights and arithmetic; auto: the checkpoint's own on a GPU, float32 on a CPU, settled once a "
        "run and recorded",
    )
    device: str = Field(
        "auto",
        description="'auto' (CUDA if there is one, else the CPU), 'cpu', 'cuda', 'cuda:1', or 'cuda:0,cuda:1' to "
        "spread the model over several",
    )
    trust_remote_code: bool = Field(False, description="let the tokenizer's or config's repository run its code")


class SourceRecipe(Section):
    """One domain of text: a Hub data set (`dataset`) or a local file (`path`: .txt, .jsonl or .parquet)."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$", description="how figures of this source are labelled")
    dataset: str | None = Field(None, description="Hub id of a data set")
    config: str | None = Field(None, description="configuration of the Hub data set")
    split: str = Field("train", description="split of the Hub data set")
    revision: str | None = None
    path: PathText | None = Field(None, description="local .txt, .jsonl or .parquet file")
    text_field: str = Field("text", description="column or key that holds a document")
    messages_field: str | None = Field(
        None,
        description="column or key that holds a chat (a list of {role, content}), in place of text_field: rendered "
        "through the tokenizer's chat template",
    )
    separator: str = Field("\n\n\n", min_length=1, description="what stands between two documents of a .txt file")
    weight: float = Field(1.0, gt=0, description="share in the mixture, relative to the other sources")

    @model_validator(mode="after")
    def _one_origin(self) -> SourceRecipe:
        if (self.dataset is None) == (self.path is None):
            raise ValueError("give exactly one of `dataset` (Hub) and `path` (local file)")
        if self.messages_field is not None and (self.path or "").lower().endswith(".txt"):
            raise ValueError(f"messages_field is of .jsonl, .parquet and Hub data sets; {self.path} holds plain text")
        return self

    @property
    def field(self) -> str:
        """The column or key that is read."""
        return self.messages_field or self.text_field


class DataRecipe(Section):
    """Text, and how it is cut: disjoint windows for each split, of `seq_len` tokens, or `unseen_seq_len`."""

    sources: tuple[SourceRecipe, ...] = Field(min_length=1)
    unseen: tuple[SourceRecipe, ...] = Field(
        (),
        description="text of other kinds, which is never calibrated, searched or chosen on: figures of it say what a "
        "child is worth elsewhere",
    )
    seq_len: int = Field(
        1_024,
        ge=8,
        description="tokens a window: short ones hide what attention is for",
    )
    unseen_seq_len: int = Field(1_024, ge=8, description="tokens a window of the unseen text")
    own_text_after: int | None = Field(
        None,
        ge=1,
        description="tokens of a window that stay as they are: what follows them is then the parent's own, as it goes "
        "on with them greedily (calibration text stays); a draft is judged by such text (search.objective=draft)",
    )
    bos: Literal["auto"] | bool = Field(
        "auto",
        description="open every window with the BOS token (it counts towards seq_len, is never scored); auto: if the "
        "tokenizer itself puts it in front of a text",
    )
    calibration_tokens: int = Field(65_536, ge=256, description="for statistics of the blocks")
    estimate_tokens: int = Field(
        16_384,
        ge=64,
        description="for estimates of what a choice costs: least squares flatters itself on the tokens that it was "
        "fitted to",
    )
    search_tokens: int = Field(16_384, ge=64, description="every trial is scored on these")
    validation_tokens: int = Field(16_384, ge=64, description="for choosing on the front")
    test_tokens: int = Field(16_384, ge=64, description="reported once")
    recovery_tokens: int = Field(
        0,
        ge=0,
        description="for repairing a child that was cut, some of them held out to judge by; a distillation needs them, "
        "a refit takes calibration text where there are none",
    )
    unseen_tokens: int = Field(16_384, ge=64, description="reported of the unseen text, if there is some")
    seed: int = 0

    free: ClassVar[frozenset[str]] = frozenset({"recovery_tokens"})

    @model_validator(mode="after")
    def _windows_hold_own_text(self) -> DataRecipe:
        shortest = min(self.seq_len, self.unseen_seq_len) if self.unseen else self.seq_len
        if self.own_text_after is not None and self.own_text_after >= shortest:
            raise ValueError(
                f"own_text_after must leave room for the parent's own text in windows of {shortest} tokens; "
                f"got {self.own_text_after}"
            )
        return self

    @model_validator(mode="after")
    def _names_differ(self) -> DataRecipe:
        names = [source.name for source in (*self.sources, *self.unseen)]
        if len(set(names)) != len(names):
            raise ValueError(
                f"every source needs a name of its own, in sources and unseen together; got {quoted(names)}"
            )
        return self

    @property
    def splits(self) -> tuple[SplitName, ...]:
        """Those that there are: "unseen" only where `unseen` names a source, "recovery" only if it has tokens."""
        return tuple(name for name in SPLIT_NAMES if self.sources_of(name) and self.tokens_of(name))

    def identity(self) -> dict[str, Any]:
        """What the tokens depend on, as JSON values. A key of what is not used is left out: a run that was made before
        there was such a key keeps its tokens."""
        unused = set() if self.unseen else {"unseen", "unseen_seq_len", "unseen_tokens"}
        unused |= set() if self.recovery_tokens else {"recovery_tokens"}
        unused |= {"own_text_after"} if self.own_text_after is None else set()
        data = self.model_dump(mode="json", exclude=unused)
        for source in (*data["sources"], *data.get("unseen", ())):
            if source["messages_field"] is None:
                del source["messages_field"]
        return data

    def sources_of(self, split: SplitName) -> tuple[SourceRecipe, ...]:
        return self.unseen if split == "unseen" else self.sources

    def weights_of(self, split: SplitName) -> dict[str, float]:
        """Share of each source in a split; they sum to 1."""
        total = sum(source.weight for source in self.sources_of(split))
        return {source.name: source.weight / total for source in self.sources_of(split)}

    def tokens_of(self, split: SplitName) -> int:
        return int(getattr(self, f"{split}_tokens"))

    def seq_len_of(self, split: SplitName) -> int:
        return self.unseen_seq_len if split == "unseen" else self.seq_len
