"""The formats a child can be written in, and what each of them can hold: known before a search, not after it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from llmprune.choices.architecture import DROPPED, LayerChoice
from llmprune.choices.choice import Choice
from llmprune.choices.dimensions import BLOCK_KINDS
from llmprune.choices.merged import MergedChoice
from llmprune.choices.space import Space
from llmprune.core.errors import ExportError, RecipeError, UnsupportedModelError
from llmprune.core.recipe import DeployRecipe, EngineName, FormatName, Recipe, SpaceSize
from llmprune.formats.gguf_families import GGUF_FAMILIES, gguf_family
from llmprune.formats.gguf_limits import (
    gguf_child_problem,
    gguf_choice_problem,
    gguf_mixes,
    gguf_problem,
    gguf_sizes,
    gguf_types_problem,
)
from llmprune.formats.gguf_tokenizer import tokenizer_problem
from llmprune.formats.layers import layer_sizes, stock_type
from llmprune.formats.torchao import torchao_problem
from llmprune.models.modeling_pruned import ExitRules
from llmprune.models.parent import Parent
from llmprune.models.surgery import is_stock, stock_can_say
from llmprune.numerics.ggml import TYPES

Problem = str | None
"""Why something cannot be held, as a clause that follows a colon; None if it can."""


@dataclass(frozen=True)
class Format:
    """One way to write a child.

    `parent_problem(config, rules)`: why no child of such a parent can be held. `choice_problem(parent, choice, rules)`:
    why a choice cannot, in whatever layer; such choices are left out of the search. `child_problem(config, rules)`: why
    this child cannot. Of a parent with this config, `constant_heads(config)`: whether all layers have the same number
    of query heads; `sizes(config)`: the space sizes whose children it holds.
    """

    name: FormatName
    holds: str
    served_by: str
    parent_problem: Callable[[Any, DeployRecipe], Problem]
    choice_problem: Callable[[Parent, Choice, DeployRecipe], Problem]
    child_problem: Callable[[Any, DeployRecipe], Problem]
    constant_heads: Callable[[Any], bool] = lambda config: False
    sizes: Callable[[Any], tuple[SpaceSize, ...]] = lambda config: ("small", "layer", "medium", "large")
    exits: bool = False
    """Whether tokens can leave its children early."""


def check_parent(parent: Parent, rules: DeployRecipe, size: SpaceSize) -> None:
    """Raises UnsupportedModelError or RecipeError if a format of the recipe can hold no child of this search."""
    for form in (FORMATS[name] for name in rules.formats):
        if problem := form.parent_problem(parent.model.config, rules):
            raise UnsupportedModelError(
                f"deploy.formats names {form.name}, which cannot hold {parent.source}: {problem}"
            )
        if form.name == "gguf" and parent.tokenizer is not None:
            vocab_size = parent.model.config.get_text_config().vocab_size
            if problem := tokenizer_problem(parent.tokenizer, vocab_size):
                raise UnsupportedModelError(
                    f"deploy.formats names gguf, which cannot hold the tokenizer of {parent.source}: {problem}"
                )
        if size not in (sizes := form.sizes(parent.model.config)):
            raise RecipeError(
                f"deploy.formats names {form.name}, which holds {form.holds}: space.size must be {' or '.join(sizes)} "
                f"for {parent.source}; got {size}"
            )


def rounding_warning(recipe: Recipe) -> str | None:
    """What figures of a run leave out, where its files hold fewer than eight bits a number; None if that is nothing."""
    own = recipe.deploy.gguf_type
    written = recipe.workload.engine == "llamacpp" or "gguf" in recipe.deploy.formats
    if not written or TYPES[own].bits >= TYPES["q8_0"].bits:
        return None
    return (
        f"deploy.gguf_type={own} rounds what quality is scored without; to have {own} scored as it is stored, and "
        f"chosen where it pays, use deploy.gguf_type=q8_0 'space.precision=[{own}]'"
    )


def check_precision(parent: Parent, recipe: Recipe) -> None:
    """Raises RecipeError if a recipe lets blocks have types of weights that are no choice: not timed where types count,
    not below the file's own, too wide for the parent's rows, or of rows that a file has the other way round."""
    shape, rules, own = parent.shape, recipe.space.precision, recipe.deploy.gguf_type
    if rules and recipe.workload.engine != "llamacpp":
        raise RecipeError(
            f"space.precision={list(rules)} needs workload.engine=llamacpp, which reads such weights; got "
            f"{recipe.workload.engine}"
        )
    if rules and (problem := gguf_types_problem(parent.model.config)):
        raise RecipeError(f"space.precision={list(rules)} is no choice for {parent.source}: {problem}")
    for type_ in rules:
        if TYPES[type_].bits >= TYPES[own].bits:
            raise RecipeError(
                f"space.precision names {type_}, which is no smaller than deploy.gguf_type={own}; the types are, "
                f"widest first, {', '.join(TYPES)}"
            )
        if shape.hidden_size % TYPES[type_].block:
            fitting = [
                name for name, t in TYPES.items() if shape.hidden_size % t.block == 0 and t.bits < TYPES[own].bits
            ]
            raise RecipeError(
                f"space.precision names {type_}, stored in blocks of {TYPES[type_].block}, which rows of hidden_size "
                f"{shape.hidden_size} are not; use {', '.join(fitting)}"
            )


def merging_helps(parent: Parent, rules: DeployRecipe, size: SpaceSize) -> bool:
    """Whether a format leaves attention nothing but merged KV groups to be pruned by, and the parent can have them."""
    wanted = any(FORMATS[name].constant_heads(parent.model.config) for name in rules.formats)
    return wanted and size != "layer" and parent.family.kv_heads is not None and bool(MergedChoice.of(parent.shape))


def cut(space: Space, parent: Parent, rules: DeployRecipe, engine: EngineName = "torch") -> Space:
    """The space without the choices that one of the recipe's formats cannot hold, nor the engine that times children:
    llama.cpp reads them from GGUF files.

    Raises RecipeError if nothing is left to choose.
    """
    timed: tuple[FormatName, ...] = ("gguf",) if engine == "llamacpp" else ()
    forms = [FORMATS[name] for name in dict.fromkeys((*rules.formats, *timed))]
    problems = {
        choice: problem
        for kind in BLOCK_KINDS
        for choice in space.ladder(kind)[:-1]
        for problem in [next(filter(None, (form.choice_problem(parent, choice, rules) for form in forms)), None)]
        if problem
    }
    if timed and space.size == "small" and not gguf_mixes(parent.model.config):
        # Such a space leaves nothing out: a drop would be timed for the tables alone, and no file holds it.
        problems |= dict.fromkeys(DROPPED.values(), "a block leaves with its layer")
    kept = replace(
        space,
        attention=tuple(choice for choice in space.attention if choice not in problems),
        ffn=tuple(choice for choice in space.ffn if choice not in problems),
    )
    if all(len(decision.options) == 1 for decision in kept.decisions):
        also = f" and workload.engine={engine}" if timed else ""
        raise RecipeError(
            f"deploy.formats={list(rules.formats)}{also} leave nothing of the space to choose: "
            f"{'; '.join(dict.fromkeys(problems.values()))}"
        )
    return kept


def check_child(config: Any, name: FormatName, rules: DeployRecipe) -> None:
    """Raises ExportError, naming the layer, the value and the fix, if a format cannot hold the child of this config."""
    form = FORMATS[name]
    if ExitRules.of(config) is not None:
        check_exits_in([name])
    if problem := form.parent_problem(config, rules) or form.child_problem(config, rules):
        raise ExportError(f"{name} cannot hold this child: {problem}")


def check_exits_in(names: Iterable[FormatName]) -> None:
    """Raises ExportError, naming the format, if one of these has no words for exits."""
    for name in names:
        if not FORMATS[name].exits:
            able = " or ".join(form.name for form in FORMATS.values() if form.exits)
            raise ExportError(
                f"{name} cannot hold a model with exits: what serves it runs all layers for every token; use {able}, "
                "or export the trunk without exits"
            )


def described() -> list[dict[str, Any]]:
    """Every format, for people and as JSON."""
    return [{"format": form.name, "holds": form.holds, "served_by": form.served_by} for form in FORMATS.values()]


def _never(*_: Any) -> Problem:
    return None


def _not_uniform(config: Any, rules: DeployRecipe) -> Problem:
    if is_stock(config):
        return None
    sizes = layer_sizes(config)
    # A pruned class is used where stock attributes cannot say it, even if all layers are alike.
    i = next((i for i, layer in enumerate(sizes) if layer != sizes[0]), 0)
    first = sizes[0]
    return (
        f"its stock class gives all layers the same sizes, with every block there; layer {i} has {sizes[i].heads} "
        f"query heads, {sizes[i].kv_heads} KV heads and FFN width {sizes[i].ffn_width}, layer 0 {first.heads}, "
        f"{first.kv_heads} and {first.ffn_width}; search with deploy.formats=[hf-uniform], or export to hf"
    )


def _no_stock_words(parent: Parent, choice: Choice, rules: DeployRecipe) -> Problem:
    """Of a choice made in every layer; a drop is part of a whole layer's, which is deleted."""
    full = LayerChoice(*(parent.shape.full(kind) for kind in BLOCK_KINDS))
    if choice.units == 0 or stock_can_say(parent.family, parent.shape, [full.with_choice(choice)]):
        return None
    return f"the stock {parent.family.config} has no words for {choice.to_json()} in every layer"


_DECILM_FAMILIES = ("llama",)


def _not_decilm(config: Any, rules: DeployRecipe) -> Problem:
    family = stock_type(config)
    if family not in _DECILM_FAMILIES:
        return f"the DeciLM schema is Llama's, and {family} computes something else; use hf or, where it fits, gguf"
    if config.hidden_act not in ("silu", "swish"):
        return f"a DeciLM FFN is gated by silu, this model's by {config.hidden_act}; use hf"
    return None


def _other_heads(parent: Parent, choice: Choice, rules: DeployRecipe) -> Problem:
    heads = parent.shape.kv_groups * parent.shape.queries_per_group
    kept = choice.sizes(parent.shape).get("heads", heads)
    if kept == heads:
        return None
    return f"vllm wants the parent's {heads} query heads in every layer, and {choice.to_json()} leaves {kept}"


def _mixed_heads(config: Any, rules: DeployRecipe) -> Problem:
    sizes = layer_sizes(config)
    heads = next(layer.heads for layer in sizes if layer.heads)
    for i, layer in enumerate(sizes):
        if layer.heads not in (0, heads):
            return (
                f"it wants the same number of query heads in every layer; layer {i} has {layer.heads}, others {heads}; "
                "search with deploy.formats=[vllm], or export to hf or gguf"
            )
    if config.hidden_size % heads:
        return (
            f"a DeciLM config wants a hidden size that is a multiple of its query heads; this child has {heads} and "
            f"{config.hidden_size}; search with deploy.formats=[vllm], or export to hf or gguf"
        )
    return None


_OWN_ARCHITECTURES = ", ".join(name for name, family in GGUF_FAMILIES.items() if not family.layers_differ)

FORMATS: dict[FormatName, Format] = {
    form.name: form
    for form in (
        Format(
            "hf",
            holds="every child of every supported family; one whose layers differ brings its modeling file along",
            served_by="transformers (trust_remote_code=True where there is a modeling file)",
            parent_problem=_never,
            choice_problem=_never,
            child_problem=_never,
            exits=True,
        ),
        Format(
            "hf-uniform",
            holds="children whose layers are all alike, whole layers left out",
            served_by="everything that serves the parent: it is a stock checkpoint",
            parent_problem=_never,
            choice_problem=_no_stock_words,
            child_problem=_not_uniform,
            sizes=lambda config: ("small", "layer"),
        ),
        Format(
            "gguf",
            holds="children of Llama-shaped families (llama, mistral without a sliding window, qwen2): any heads, any "
            f"blocks; of {_OWN_ARCHITECTURES}: all layers alike, whole layers left out; in any types, whose rows are "
            "multiples of 256 in K-quants and iq4_xs, of 32 in others below f16",
            served_by="llama.cpp and what stands on it (architecture deci, or the family's own)",
            parent_problem=lambda config, rules: gguf_problem(config, rules.gguf_type),
            choice_problem=lambda parent, choice, rules: gguf_choice_problem(
                parent.model.config, parent.shape, choice, rules.gguf_type
            ),
            child_problem=lambda config, rules: gguf_child_problem(config, rules.gguf_type),
            constant_heads=lambda config: gguf_family(config).heads_fill_hidden,
            sizes=gguf_sizes,
        ),
        Format(
            "vllm",
            holds="Llama children with the parent's number of query heads in every layer: KV heads and FFN width vary, "
            "blocks may be left out",
            served_by="vLLM's DeciLMForCausalLM (written by its schema, not run here)",
            parent_problem=_not_decilm,
            choice_problem=_other_heads,
            child_problem=_mixed_heads,
            constant_heads=lambda config: True,
        ),
        Format(
            "torchao",
            holds="every child but GPT-2's, its projections in int8, each row with a scale of its own",
            served_by="transformers with torchao, in the dtype of the child for all else",
            parent_problem=lambda config, rules: torchao_problem(config),
            choice_problem=_never,
            child_problem=_never,
        ),
    )
}
