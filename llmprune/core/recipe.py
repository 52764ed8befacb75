"""A recipe: one YAML file that says everything about a run."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, field_validator, model_validator

from llmprune.core.budgets import Axes
from llmprune.core.errors import quoted
from llmprune.core.recipe_base import PathText, Section
from llmprune.core.recipe_exits import ExitsRecipe
from llmprune.core.recipe_inputs import DataRecipe, ModelRecipe, SourceRecipe
from llmprune.core.recipe_recover import RecoverRecipe

Phase = Literal["decode", "prefill"]
Objective = Literal["decode", "prefill", "draft"]
SpaceSize = Literal["small", "layer", "medium", "large"]
SamplerName = Literal["slp", "evopress", "linas", "nsga2", "nsga3", "tpe", "gp", "random"]
OPTUNA_SAMPLERS: tuple[SamplerName, ...] = ("nsga2", "nsga3", "tpe", "gp", "random")
BaselineName = Literal[
    "uniform",
    "uniform-depth",
    "magnitude",
    "wanda-sp",
    "flap",
    "shortgpt",
    "sleb",
    "blockpruner",
    "bits",
    "milp",
    "random",
]
BASELINE_NAMES: tuple[BaselineName, ...] = get_args(BaselineName)
FormatName = Literal["hf", "hf-uniform", "gguf", "vllm", "torchao"]
FORMAT_NAMES: tuple[FormatName, ...] = get_args(FormatName)
GgufType = Literal[
    "f32", "f16", "q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0", "iq4_nl", "iq4_xs", "q3_k", "q2_k"
]
EngineName = Literal["torch", "llamacpp"]
CacheType = Literal["f16", "q8_0"]


class WorkloadRecipe(Section):
    """What is timed: the speed at which the child will be used."""

    batch: int = Field(1, ge=1)
    prompt_tokens: int = Field(128, ge=1)
    generated_tokens: int = Field(32, ge=2, description="decoded one by one, behind the prompt")
    threads: int | None = Field(None, ge=1, description="CPU threads; default: torch's own choice")
    repeats: int = Field(3, ge=1, description="interleaved parent/child repeats a trial")
    compile: bool = Field(
        False,
        description="time models as torch.compile makes them, with a static cache; every child is compiled, which "
        "takes minutes",
    )
    graphs: Literal["auto"] | bool = Field(
        "auto",
        description="time torch's passes as captured CUDA graphs with a static cache, as engines serve; auto: on a "
        "CUDA device. Without them a GPU at a small batch waits for Python, and narrower blocks seem to save nothing",
    )
    engine: EngineName = Field(
        "torch",
        description="what runs the timed models: torch on the model's device, or llama.cpp on the CPU, which reads "
        "them from GGUF files of deploy.gguf_type (quality is torch's either way)",
    )

    cache_type: CacheType = Field(
        "f16", description="how llama.cpp stores the KV cache; quality is torch's, without it"
    )

    @model_validator(mode="after")
    def _what_is_one_engines(self) -> WorkloadRecipe:
        if self.compile and self.engine != "torch":
            raise ValueError(f"compile is torch's; leave it out with engine={self.engine}")
        if self.graphs is True and self.engine != "torch":
            raise ValueError(f"graphs=true is torch's; leave it out with engine={self.engine}")
        if self.cache_type != "f16" and self.engine != "llamacpp":
            raise ValueError(f"cache_type={self.cache_type} is llama.cpp's; leave it out with engine={self.engine}")
        return self


class ImportanceRecipe(Section):
    """In which order units leave a block, and whether the rest is re-solved."""

    method: Literal["obs", "magnitude", "wanda-sp", "flap"] = "obs"
    refit: bool = Field(True, description="re-solve the output projection by least squares")
    damp: float = Field(0.01, gt=0, description="ridge, as a share of the mean diagonal of X^T X")

    retired: ClassVar[frozenset[str]] = frozenset({"memory_gb"})


class TablesRecipe(Section):
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
        description="share of a choice's score that is what the choice costs in the median layer: the more of it, "
        "the less is taken from a few blocks alone, and the less a search trusts few tokens",
    )
    together: int = Field(
        3,
        ge=0,
        le=16,
        description="choices of each kind that are made in all layers at once, to hold the sums of scores to what that "
        "really costs; 0 takes the sums as they are",
    )
    path_tokens: int = Field(
        8_192, ge=64, description="tokens of the estimate split of each estimate along the path of seeds, and of slp's"
    )
    path_step: float = Field(1.06, gt=1, description="factor in speed-up between two estimates along the path")


def _is_size(value: Any) -> bool:
    return type(value) in (int, float) and (value >= 1 if type(value) is int else 0 < value < 1)


class SpaceRecipe(Section):
    """Which choices a search may make."""

    size: SpaceSize = Field(
        "medium",
        description="small: one KV group count and FFN width for all layers; layer: each layer whole or gone; "
        "medium: KV groups and FFN width block by block; large: query heads a KV group besides",
    )
    kv_groups_step: int | float = Field(
        0.125, description="KV groups between two choices: a count, or a share of the parent's"
    )
    ffn_step: int | float = Field(
        0.125,
        description="channels between two choices: a count, or a share of the parent's, rounded to a multiple of 64 if "
        "it is more",
    )
    drop: bool = Field(True, description="may whole blocks be dropped")
    merge_kv: bool = Field(
        False,
        description="may an attention keep all query heads on fewer KV heads, each the mean of several; always where "
        "deploy.formats leave attention no other way to shrink",
    )
    precision: tuple[GgufType, ...] = Field(
        (),
        description="types below deploy.gguf_type that a block's weights may be stored in, whatever stays of it, and "
        "embedding and output head; timed in llama.cpp",
    )
    vocabulary: Literal["auto"] | tuple[int | float, ...] = Field(
        (),
        description="rows of embedding and output head that may stay, as counts or shares of the parent's, or auto; "
        "one is chosen before blocks are searched (see `vocabulary.most_loss`)",
    )
    hidden_size: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (), description="widths that the residual stream may have, chosen among in the same way"
    )

    @field_validator("kv_groups_step", "ffn_step", mode="before")
    @classmethod
    def _step(cls, value: Any) -> Any:
        if not _is_size(value):
            raise ValueError("give a count from 1 on, or a share of the parent's between 0 and 1")
        return value

    @field_validator("vocabulary", mode="before")
    @classmethod
    def _sizes(cls, value: Any) -> Any:
        """One rule, and one error, where the union of types would give one for each."""
        listed = isinstance(value, list | tuple) and all(map(_is_size, value))
        if not listed and value != "auto":
            raise ValueError("name auto, or a list of rows or of shares of them, such as [32000, 0.5]")
        return tuple(value) if listed else value


class VocabularyRecipe(Section):
    """Which tokens a smaller vocabulary keeps, and what sizes of the whole model may cost; any text can be written in
    all vocabularies."""

    keep_text: tuple[SourceRecipe, ...] = Field(
        (), description="text that must stay cheap beside data.sources: tokens that it needs are kept as well"
    )
    most_loss: float = Field(
        0.01,
        ge=0,
        description="of space.vocabulary and space.hidden_size the fastest in bytes of text a second is taken whose "
        "nats a byte on the validation text are at most this share more than the parent's; if none is faster, the "
        "parent's own stays",
    )


class SearchRecipe(Section):
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
    objective: Objective = Field(
        "decode",
        description="which measured speed is the second objective; draft: a child that drafts for its parent "
        "(speculative decoding), by how seldom it disagrees with the parent and its speed in decode",
    )
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

    @property
    def phase(self) -> Phase:
        """Whose measured speed-up is the second objective."""
        return "decode" if self.objective == "draft" else self.objective

    @property
    def axes(self) -> Axes:
        """The figures of a record that are the two objectives."""
        return Axes("disagreement" if self.objective == "draft" else "nats_per_token", f"{self.phase}_speedup")

    @model_validator(mode="after")
    def _no_reward_of_a_draft(self) -> SearchRecipe:
        if self.objective == "draft" and self.reward != "front":
            raise ValueError(f"a draft is searched with reward=front; got reward={self.reward}")
        return self

    @model_validator(mode="after")
    def _one_target_of_a_reward(self) -> SearchRecipe:
        if self.reward != "front" and (len(self.targets) != 1 or self.sampler not in OPTUNA_SAMPLERS):
            raise ValueError(
                f"reward={self.reward} rewards one target with one of Optuna's samplers "
                f"({', '.join(OPTUNA_SAMPLERS)}); got targets={quoted(list(self.targets))}, sampler={self.sampler}"
            )
        return self


class FrontRecipe(Section):
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


class BaselinesRecipe(Section):
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


class ExportRecipe(Section):
    """Which child `compress` exports, and where to."""

    pick: str = Field("decode_speedup>=1.3", description="e.g. 'decode_speedup>=1.5', 'ppl_ratio<=1.2', or an id")
    to: PathText | None = Field(None, description="directory; default RUN/export")
    prompts: tuple[str, ...] = Field(
        ("Once upon a time", "The capital of France is", "def is_prime(n):"),
        description="what the exported child and its parent go on with, side by side in report and model card",
    )


class DeployRecipe(Section):
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


class Recipe(Section):
    """Everything about a run."""

    model: ModelRecipe
    data: DataRecipe
    workload: WorkloadRecipe = WorkloadRecipe()
    importance: ImportanceRecipe = ImportanceRecipe()
    tables: TablesRecipe = TablesRecipe()
    space: SpaceRecipe = SpaceRecipe()
    vocabulary: VocabularyRecipe = VocabularyRecipe()
    search: SearchRecipe = SearchRecipe()
    recover: RecoverRecipe = RecoverRecipe()
    front: FrontRecipe = FrontRecipe()
    baselines: BaselinesRecipe = BaselinesRecipe()
    exits: ExitsRecipe = ExitsRecipe()
    export: ExportRecipe = ExportRecipe()
    deploy: DeployRecipe = DeployRecipe()

    @model_validator(mode="after")
    def _what_a_draft_needs(self) -> Recipe:
        if self.search.objective != "draft":
            return self
        if self.data.own_text_after is None:
            raise ValueError(
                "search.objective=draft judges children on what the parent itself writes; say behind how many tokens "
                "of a window that begins (data.own_text_after=32); got none"
            )
        if self.space.vocabulary or self.space.hidden_size:
            asked = "vocabulary" if self.space.vocabulary else "hidden_size"
            raise ValueError(
                f"a draft proposes its parent's tokens and is verified by the whole parent, which space.{asked} would "
                f"replace; got {asked}={quoted(getattr(self.space, asked))}, leave it out"
            )
        return self
