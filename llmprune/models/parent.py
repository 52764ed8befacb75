"""The dense model that is pruned: loaded, checked against the family table, never mutated."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmprune.choices.architecture import ParentShape
from llmprune.choices.choice import Choice
from llmprune.choices.dimensions import BLOCK_KINDS, BlockKind, SizeWord
from llmprune.core.errors import RecipeError, UnsupportedModelError, quoted
from llmprune.core.files import expanded
from llmprune.core.recipe import GgufType, Recipe
from llmprune.core.recipe_inputs import ModelRecipe
from llmprune.models.loading import load_model, outline_model
from llmprune.models.modeling_pruned import FAMILIES, PRUNED_PREFIX, BlockNames, Family, input_axis
from llmprune.models.stored import StoredWeight
from llmprune.models.waiting import home_of


@dataclass(frozen=True, eq=False)
class Parent:
    """A dense causal LM with the names and dimensions that pruning needs."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    family: Family
    shape: ParentShape
    source: str
    rounded: dict[tuple[str, GgufType], tuple[StoredWeight, torch.Tensor]] = field(default_factory=dict, repr=False)
    """Matrices outside of layers as types store them, and the numbers that those say: each is rounded once."""

    @property
    def device(self) -> torch.device:
        """Where inputs go, and children are: the device of the embeddings ("meta" of an outline), or that at which a
        parent that waits computes."""
        return home_of(self.model)

    def layer(self, index: int) -> nn.Module:
        return self.model.get_submodule(f"{self.family.layers}.{index}")

    def outside_layers(self) -> list[nn.Module]:
        """The modules that are in no layer."""
        within = {part for index in range(self.shape.layers) for part in self.layer(index).modules()}
        return [module for module in self.model.modules() if module not in within]

    def names(self, kind: BlockKind) -> BlockNames:
        return self.family.attention if kind == "attention" else self.family.ffn

    def block(self, layer: int, kind: BlockKind) -> nn.Module:
        """The module that holds the block's projections (for OPT's FFN, the layer itself)."""
        return self.layer(layer).get_submodule(self.names(kind).module)

    def output_projection(self, layer: int, kind: BlockKind) -> nn.Module:
        return self.block(layer, kind).get_submodule(self.names(kind).output)

    def output_norm(self, layer: int, kind: BlockKind) -> nn.Module | None:
        """The norm between the output projection and the residual stream; None where the projection adds to it."""
        name = self.names(kind).output_norm
        return None if name is None else self.layer(layer).get_submodule(name)

    def adds_to_stream(self, layer: int, kind: BlockKind) -> nn.Module:
        """The module whose output is what the block adds to the residual stream (up to a constant factor)."""
        return self.output_norm(layer, kind) or self.output_projection(layer, kind)

    @property
    def stream_scale(self) -> float:
        """What a block's output is multiplied by before it is added to the residual stream (Granite)."""
        word = self.family.residual_scale
        return 1.0 if word is None else float(getattr(self.model.config, word))

    @property
    def parallel_residual(self) -> bool:
        """Whether both blocks of a layer read the same residual stream (GPT-NeoX)."""
        word = self.family.parallel_residual
        return word is not None and bool(getattr(self.model.config, word))

    def output_weight(self, layer: int, kind: BlockKind) -> torch.Tensor:
        """Weight of the output projection as (D, in), whatever way round the family stores it."""
        projection = self.output_projection(layer, kind)
        weight = projection.weight
        assert isinstance(weight, torch.Tensor)
        return (weight if input_axis(projection) == 1 else weight.T).detach()

    def output_bias(self, layer: int, kind: BlockKind) -> torch.Tensor | None:
        bias = getattr(self.output_projection(layer, kind), "bias", None)
        return None if bias is None else bias.detach()

    def vocabulary_names(self) -> list[str]:
        """What the state calls the matrices with a row a token: the embedding and, if that is another, the head; the
        last multiplies hidden states."""
        model = self.model
        ends = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]  # type: ignore[no-untyped-call]
        # A shared parameter is named once.
        return [name for name, parameter in model.named_parameters() if any(parameter is one for one in ends)]

    def rounded_to(
        self, name: str, type_: GgufType, squares_D: torch.Tensor | None
    ) -> tuple[StoredWeight, torch.Tensor]:
        """A matrix outside of layers as a type stores it, weighed by squares of its inputs, and the numbers that it
        says. Raises ModelError as `StoredWeight.of` does."""
        known = self.rounded.get((name, type_))
        if known is None or known[0].squares_C is not squares_D:
            weight = self.model.get_parameter(name).detach()
            stored = StoredWeight.of(weight, type_, squares_D)
            # Normal tensors, although the caller may be in inference mode: they outlive it.
            with torch.inference_mode(False):
                known = self.rounded[name, type_] = stored, stored.numbers_like(weight)
        return known

    @property
    def hash(self) -> str:
        """SHA-256 over every tensor's name, dtype, shape and bytes: two parents with one hash compute the same."""
        config = json.loads(self.model.config.to_json_string(use_diff=False))
        # Where the files lie, and which version reads them, is no part of what they compute.
        for name in ("_name_or_path", "transformers_version"):
            config.pop(name, None)
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def load_parent(recipe: ModelRecipe) -> Parent:
    """Load the recipe's model and tokenizer as a parent.

    Raises ModelError if it cannot be read, and UnsupportedModelError - before any weight is read - if its
    family, quantisation or layout cannot be pruned.
    """
    model, tokenizer = load_model(recipe, check=partial(check_config, origin=recipe.path))
    return make_parent(model, tokenizer, source=_name_of(recipe))


def outline_parent(recipe: ModelRecipe, *, with_tokenizer: bool = False) -> Parent:
    """The recipe's model as a parent without weights, all its tensors on the meta device: for what shapes say alone.

    Raises as `load_parent` does, but for what is wrong with the weights.
    """
    check = partial(check_config, origin=recipe.path)
    return make_parent(*outline_model(recipe, check=check, with_tokenizer=with_tokenizer), source=_name_of(recipe))


def _name_of(recipe: ModelRecipe) -> str:
    local = expanded(recipe.path)
    return local.resolve().name if local.exists() else recipe.path


def make_parent(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, *, source: str = "") -> Parent:
    """Wrap a model that is already loaded. Raises UnsupportedModelError if it cannot be pruned."""
    check_config(model.config, origin=source or type(model).__name__)
    family = FAMILIES[model.config.model_type]
    # Frozen: nothing of ours trains the parent, and a backward pass through it then costs activations only.
    model.eval().requires_grad_(False)  # type: ignore[no-untyped-call]
    parent = Parent(model, tokenizer, family, shape_of(model.config, family), source)
    _check_weights(parent)
    return parent


def supported_families() -> tuple[str, ...]:
    """The model types that can be pruned."""
    return tuple(sorted(FAMILIES))


def check_config(config: Any, *, origin: str) -> None:
    """Raises UnsupportedModelError, saying what is supported, unless a model with this config can be pruned."""
    model_type = config.model_type
    supported = ", ".join(supported_families())
    if model_type.startswith(PRUNED_PREFIX) or getattr(config, "is_heterogeneous", False):
        raise UnsupportedModelError(f"{origin} is a pruned model already; prune its dense parent instead")
    if any((getattr(config, name, None) or 0) > 1 for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise UnsupportedModelError(
            f"{origin} is a mixture-of-experts model ({model_type}); only dense families can be pruned: {supported}"
        )
    if model_type not in FAMILIES:
        raise UnsupportedModelError(f"{origin} has model type {quoted(model_type)}; supported are: {supported}")
    check_floats(config, origin=origin)
    if model_type == "opt" and not config.do_layer_norm_before:
        raise UnsupportedModelError(
            f"{origin} normalises after the residual (do_layer_norm_before=false), so no block of it can be left "
            "out; the other OPT sizes can be pruned"
        )
    if model_type == "gpt2" and (config.scale_attn_by_inverse_layer_idx or config.add_cross_attention):
        raise UnsupportedModelError(
            f"{origin} scales attention by layer index or has cross-attention; plain GPT-2 models can be pruned"
        )


def check_floats(config: Any, *, origin: str) -> None:
    """Raises UnsupportedModelError if a model with this config has no float weights to prune, or to write again."""
    if (method := _quantisation(config)) not in (None, "gguf"):
        raise UnsupportedModelError(
            f"{origin} is quantised ({method}); float weights are needed: name the unquantised model "
            "(GGUF files are dequantised and work)"
        )


def config_words(family: Family) -> dict[SizeWord, str]:
    """What a family's config can say of a layer, and the attribute that it says it by."""
    words: dict[SizeWord, str] = {"heads": family.heads, "ffn_width": family.ffn_width}
    if family.kv_heads:
        words["kv_heads"] = family.kv_heads
    if not family.derives_head_dim:
        words["head_dim"] = "head_dim"
    return words


def check_choices(parent: Parent, choices: Iterable[Choice]) -> None:
    """Raises UnsupportedModelError unless a config of the family can say these choices."""
    words = config_words(parent.family).keys()
    for choice in choices:
        if problem := choice.config_problem(words):
            raise UnsupportedModelError(f"{parent.source} is a {parent.model.config.model_type} model, {problem}")


def check_lengths(parent: Parent, recipe: Recipe) -> None:
    """Raises RecipeError if the recipe's windows or workload are longer than the model's positions."""
    limit = getattr(parent.model.config, "max_position_embeddings", None)
    lengths = {
        "data.seq_len": recipe.data.seq_len,
        **({"data.unseen_seq_len": recipe.data.unseen_seq_len} if recipe.data.unseen else {}),
        "workload.prompt_tokens + workload.generated_tokens": recipe.workload.prompt_tokens
        + recipe.workload.generated_tokens,
    }
    for name, length in lengths.items():
        if limit is not None and length > limit:
            raise RecipeError(f"{name} must be at most {parent.source}'s {limit} positions; got {length}")


def is_norm(module: nn.Module) -> bool:
    """Whether a module whose rows belong to units is a norm over all of them (OLMo 2's queries and keys), so that what
    is left of it sees another scale than the parent's did."""
    return module.get_parameter("weight").ndim == 1


def _quantisation(config: Any) -> str | None:
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    return str(settings.get("quant_method", "unknown") if isinstance(settings, dict) else settings.quant_method)


def shape_of(config: Any, family: Family) -> ParentShape:
    """The shape of a model whose layers are all as its config says."""
    heads = getattr(config, family.heads)
    kv_heads = getattr(config, family.kv_heads) if family.kv_heads else heads
    head_dim = None if family.derives_head_dim else getattr(config, "head_dim", None)
    return ParentShape(
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        kv_groups=kv_heads,
        queries_per_group=heads // kv_heads,
        head_dim=head_dim or config.hidden_size // heads,
        # GPT-2's n_inner may be unset, and then means four times the hidden size.
        ffn_width=getattr(config, family.ffn_width) or 4 * config.hidden_size,
    )


def _check_weights(parent: Parent) -> None:
    shape = parent.shape
    for layer in range(shape.layers):
        for kind in BLOCK_KINDS:
            found = tuple(parent.output_weight(layer, kind).shape)
            expected = (shape.hidden_size, shape.inputs(shape.full(kind)))
            if found != expected:
                raise UnsupportedModelError(
                    f"{parent.source}: the {kind} output of layer {layer} is {found}, its config implies "
                    f"{expected}; only models whose layers are all alike can be pruned"
                )
