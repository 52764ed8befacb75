"""A recipe: one YAML file that says everything about a run."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from llmprune.core.errors import quoted

SplitName = Literal["calibration", "estimate", "search", "validation", "test", "unseen"]
SPLIT_NAMES: tuple[SplitName, ...] = get_args(SplitName)
Objective = Literal["decode", "prefill"]
SpaceSize = Literal["small", "layer", "medium", "large"]
SamplerName = Literal["slp", "evopress", "linas", "nsga2", "nsga3", "tpe", "gp", "random"]
OPTUNA_SAMPLERS: tuple[SamplerName, ...] = ("nsga2", "nsga3", "tpe", "gp", "random")
BaselineName = Literal["uniform", "magnitude", "wanda-sp", "flap", "shortgpt", "sleb", "blockpruner", "milp", "random"]
BASELINE_NAMES: tuple[BaselineName, ...] = get_args(BaselineName)
FormatName = Literal["hf", "hf-uniform", "gguf", "vllm"]
FORMAT_NAMES: tuple[FormatName, ...] = get_args(FormatName)
GgufType = Literal["f32", "f16", "q8_0"]
EngineName = Literal["torch", "llamacpp"]


def _no_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("a path holds no NUL character")
    return text


PathText = Annotated[str, AfterValidator(_no_nul)]


class _Strict(BaseModel):
    # Strict, lest `trials: true` is 1 and `trust_remote_code: "yes"` is true; integers still do for floats.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    free: ClassVar[frozenset[str]] = frozenset()
    """Keys that no figure depends on: they may change in a run that exists."""

    @model_validator(mode="before")
    @classmethod
    def _lists_are_tuples(cls, data: Any) -> Any:
        """YAML and JSON have no tuples."""
        if not isinstance(data, dict):
            return data
        return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}

    def decisive(self) -> dict[str, Any]:
        """All other keys, as JSON values."""
        return self.model_dump(mode="json", exclude=set(self.free))


class ModelRecipe(_Strict):
    """The parent: a Hub id, a local directory, or a GGUF file."""

    path: PathText = Field(description="Hub id, local directory, or path of a .gguf file")
    revision: str | None = Field(None, description="branch, tag or commit of a Hub model")
    tokenizer: PathText | None = Field(None, description="Hub id or directory, if not the model's own")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="of weights and arithmetic; auto: the checkpoint's own on a GPU, float32 on a CPU, settled once a "
        "run and recorded",
    )
    device: str = Field("auto", description="'auto' (CUDA if there is one, else the CPU), 'cpu', 'cuda', 'cuda:1'")
    trust_remote_code: bool = Field(False, description="let the tokenizer's or config's repository run its code")


class SourceRecipe(_Strict):
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


class DataRecipe(_Strict):
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
    unseen_tokens: int = Field(16_384, ge=64, description="reported of the unseen text, if there is some")
    seed: int = 0

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
        """Those that there are: "unseen" only where `unseen` names a source."""
        return tuple(name for name in SPLIT_NAMES if self.sources_of(name))

    def identity(self) -> dict[str, Any]:
        """What the tokens depend on, as JSON values. A key of what is not used is left out: a run that was made before
        there was such a key keeps its tokens."""
        unused = set() if self.unseen else {"unseen", "unseen_seq_len", "unseen_tokens"}
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


class WorkloadRecipe(_Strict):
    """What is timed: the speed at which the child will be used."""

    batch: int = Field(1, ge=1)
    prompt_tokens: int = Field(128, ge=1)
    generated_tokens: int = Field(32, ge=2)
    threads: int | None = Field(None, ge=1, description="CPU threads; default: torch's own choice")
    repeats: int = Field(3, ge=1, description="interleaved parent/child repeats a trial")
    compile: bool = Field(
        False,
        description="time models as torch.compile makes them, with a static cache; every child is compiled, which "
        "takes minutes",
    )
    engine: EngineName = Field(
        "torch",
        description="what runs the timed models: torch on the model's device, or llama.cpp on the CPU, which reads "
        "them from GGUF files of deploy.gguf_type (quality is torch's either way)",
    )

    @model_validator(mode="after")
    def _only_torch_compiles(self) -> WorkloadRecipe:
        if self.compile and self.engine != "torch":
            raise ValueError(f"compile is torch's; leave it out with engine={self.engine}")
        return self


class ImportanceRecipe(_Strict):
    """In which order units leave a block, and whether the rest is re-solved."""

    method: Literal["obs", "magnitude", "wanda-sp", "flap"] = "obs"
    refit: bool = Field(True, description="re-solve the output projection by least squares")
    damp: float = Field(0.01, gt=0, description="ridge, as a share of the mean diagonal of X^T X")
    memory_gb: float = Field(
        2.0,
        gt=0,
        description="GiB that the statistics of one pass may take; with more of it, fewer passes over the calibration "
        "text, with the same result",
    )

    free: ClassVar[frozenset[str]] = frozenset({"memory_gb"})

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gb * 2**30)


class TablesRecipe(_Strict):
    """What each choice costs in nats and saves in time, put alone into the parent."""

    tokens: int = Field(16_384, ge=64, description="tokens of the estimate split that choices are scored on")
    exact: tuple[Literal["attention", "ffn", "drops"], ...] = Field(
        (),
        description="blocks (or whole-block drops) scored by putting each choice into the parent, in place of the "
        "estimate from one backward pass",
    )
    caution: float = Field(
        0.0,
        ge=0,
        description="standard deviations between the sources' own scores that are added to their mean: what one kind "
        "of text misses much more than another is left alone",
    )
    shrinkage: float = Field(
        0.75,
        ge=0,
        le=1,
        description="share of a choice's score that is what the choice costs in the layers on average: the more of it, "
        "the less is taken from a few blocks alone, and the less a search trusts few tokens",
    )
    path_tokens: int = Field(
        8_192, ge=64, description="tokens of the estimate split of each estimate along the path of seeds, and of slp's"
    )
    path_step: float = Field(1.06, gt=1, description="factor in speed-up between two estimates along the path")


class SpaceRecipe(_Strict):
    """Which choices a search may make."""

    size: SpaceSize = Field(
        "medium",
        description="small: one KV group count and FFN width for all layers; layer: each layer whole or gone; "
        "medium: KV groups and FFN width block by block; large: query heads a KV group besides",
    )
    kv_groups_step: int = Field(1, ge=1)
    ffn_step: int = Field(256, ge=1)
    drop: bool = Field(True, description="may whole blocks be dropped")
    merge_kv: bool = Field(
        False,
        description="may an attention keep all query heads on fewer KV heads, each the mean of several; always where "
        "deploy.formats leave attention no other way to shrink",
    )


class SearchRecipe(_Strict):
    """How architectures are proposed, and when to stop."""

    sampler: SamplerName = Field(
        "slp",
        description="Optuna's own (nsga2 nsga3 tpe gp random), or guided towards the targets by the tables: slp solves "
        "the knapsack anew at the best child so far, linas searches on predictors, evopress trades rungs at equal time",
    )
    reward: Literal["front", "mnas-soft", "mnas-hard"] = Field(
        "front",
        description="front: two objectives, quality and speed; mnas-soft, mnas-hard: MnasNet's scalar reward for the "
        "one target, for Optuna's single-objective search",
    )
    objective: Objective = Field("decode", description="which measured speed is the second objective")
    budgets: tuple[str, ...] = Field(
        (),
        description="constraints such as 'decode_speedup>=1.3' or 'params<=1e8'; a trial that breaks one is kept, "
        "but ranks behind all that hold them",
    )
    targets: tuple[Annotated[float, Field(gt=1)], ...] = Field(
        (1.15, 1.3, 1.5, 2.0),
        min_length=1,
        description="speed-ups that the seeds and the guided samplers aim at, in turn",
    )
    population: int = Field(
        12, ge=2, description="population of the evolutionary samplers; seeds fill the first one before chance does"
    )
    trials: int = Field(100, ge=1, description="stop after this many finished trials")
    minutes: float | None = Field(None, gt=0, description="or after this many minutes, whichever comes first")
    seed: int = 0

    @model_validator(mode="after")
    def _one_target_of_a_reward(self) -> SearchRecipe:
        if self.reward != "front" and (len(self.targets) != 1 or self.sampler not in OPTUNA_SAMPLERS):
            raise ValueError(
                f"reward={self.reward} rewards one target with one of Optuna's samplers "
                f"({', '.join(OPTUNA_SAMPLERS)}); got targets={quoted(list(self.targets))}, sampler={self.sampler}"
            )
        return self


class FrontRecipe(_Strict):
    """What is re-measured once the search is over."""

    size: int = Field(6, ge=1, description="how many children at most")
    repeats: int = Field(9, ge=1, description="interleaved parent/child repeats a child")
    baselines_at: float = Field(
        1.3, gt=1, description="measured speed-up at which the baselines stand beside the front"
    )
    baselines: tuple[BaselineName, ...] = Field(
        ("uniform", "shortgpt", "random"), description="which baselines; some score hundreds of children to choose one"
    )
    random_draws: int | None = Field(
        None, ge=0, description="random architectures drawn at a speed; default: as many as the search had trials"
    )
    usable_ppl_ratio: float = Field(
        10.0,
        gt=1,
        description="a child with more than so many times the parent's perplexity on the validation split is marked as "
        "unusable, and exported by force only",
    )
    checkpoints: Literal["all", "none"] = Field(
        "all", description="write every usable child of the front to RUN/children/HASH"
    )

    free: ClassVar[frozenset[str]] = frozenset({"usable_ppl_ratio", "checkpoints"})


class BaselinesRecipe(_Strict):
    """What `llmprune baselines` compares."""

    methods: tuple[BaselineName, ...] = Field(BASELINE_NAMES, min_length=1)
    at: tuple[Annotated[float, Field(gt=1)], ...] = Field(
        (1.25, 1.5, 2.0), min_length=1, description="measured speed-ups at which nats lost are compared"
    )
    greedy_tokens: int | None = Field(
        None,
        ge=64,
        description="search tokens that sleb and blockpruner choose each step by: they score every block at every "
        "step; default: all",
    )


class ExportRecipe(_Strict):
    """Which child `compress` exports, and where to."""

    pick: str = Field("decode_speedup>=1.3", description="e.g. 'decode_speedup>=1.5', 'ppl_ratio<=1.2', or an id")
    to: PathText | None = Field(None, description="directory; default RUN/export")


class DeployRecipe(_Strict):
    """Where the child will be served, and on what terms."""

    formats: tuple[FormatName, ...] = Field(
        ("hf",),
        min_length=1,
        description="the search proposes only what all of these can hold; `llmprune formats` states their limits",
    )
    gguf_type: GgufType = Field("f16", description="how gguf stores the weights of projections and embeddings")
    licence: str | None = Field(
        None,
        description="SPDX or Hub name of the parent's licence (apache-2.0, llama3.2, ...): naming it says that you "
        "know its terms; `llmprune push` asks for it",
    )

    free: ClassVar[frozenset[str]] = frozenset({"licence"})


class Recipe(_Strict):
    """Everything about a run."""

    model: ModelRecipe
    data: DataRecipe
    workload: WorkloadRecipe = WorkloadRecipe()
    importance: ImportanceRecipe = ImportanceRecipe()
    tables: TablesRecipe = TablesRecipe()
    space: SpaceRecipe = SpaceRecipe()
    search: SearchRecipe = SearchRecipe()
    front: FrontRecipe = FrontRecipe()
    baselines: BaselinesRecipe = BaselinesRecipe()
    export: ExportRecipe = ExportRecipe()
    deploy: DeployRecipe = DeployRecipe()
