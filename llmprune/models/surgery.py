"""From a parent and an architecture to a real, smaller child: slices of the parent in the class that will load it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from llmprune.choices.architecture import Architecture, LayerChoice, ParentShape
from llmprune.choices.choice import Choice, Kept
from llmprune.choices.dimensions import BLOCK_KINDS, BlockKind
from llmprune.models import modeling_pruned
from llmprune.models.modeling_pruned import FAMILIES, PRUNED_PREFIX, ExitRules, Family, input_axis
from llmprune.models.parent import Parent, check_choices, config_words, is_norm, shape_of
from llmprune.models.placement import device_map_of, is_spread
from llmprune.models.stored import StoredWeight, remember
from llmprune.models.waiting import brought_home, part_at_home


class InputSquares(NamedTuple):
    """Mean square of every number that enters a parent's block, and of every input of its output projection."""

    entry_D: torch.Tensor
    output_I: torch.Tensor


class Repairs(Protocol):
    """What a block library tells surgery: what a choice keeps, and the output projection after the rest left."""

    def kept(self, layer: int, choice: Choice) -> Kept:
        """What stays of the block's units."""
        ...

    def output(self, layer: int, choice: Choice, weight_DI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight (D, kept inputs) and bias (D,) of the output projection, from the parent's weight (D, I)."""
        ...

    def norm_squares(self, layer: int, name: str) -> torch.Tensor | None:
        """Mean square of every row that enters the norm `name` of the attention block: (rows,). None if unknown."""
        ...

    def input_squares(self, layer: int, kind: BlockKind) -> InputSquares | None:
        """What rounding a block's weights is weighed by; None if unknown."""
        ...

    def head_squares(self) -> torch.Tensor | None:
        """Mean square of every number that enters the output head: what its rounding is weighed by; None if unknown."""
        ...


@dataclass(frozen=True)
class Block:
    """A block of a parent, as choices ask for its tensors (`ParentBlock`)."""

    parent: Parent
    layer: int
    kind: BlockKind
    library: Repairs | None = None
    """What is known of norms over all units; None: nothing."""

    @property
    def shape(self) -> ParentShape:
        return self.parent.shape

    @property
    def layouts(self) -> Mapping[str, str]:
        return self.parent.names(self.kind).rows

    def rows(self, name: str, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        module = self._module(name)
        return {
            f"{name}.{parameter}": _take_rows(module, value.detach(), rows)
            for parameter, value in module.named_parameters()
        }

    def norm_scale(self, name: str, rows: torch.Tensor) -> float:
        if self.library is None or not is_norm(self._module(name)):
            return 1.0
        squares_R = self.library.norm_squares(self.layer, name)
        return 1.0 if squares_R is None else math.sqrt(squares_R[rows].mean() / squares_R.mean())

    def _module(self, name: str) -> nn.Module:
        return self.parent.block(self.layer, self.kind).get_submodule(name)


def prune(parent: Parent, architecture: Architecture, library: Repairs) -> PreTrainedModel:
    """The child that `architecture` describes, in eval mode; the parent is untouched.

    Tensors of unchanged blocks are the parent's own storage (do not train such a child in place: load an exported
    one); those of changed blocks are contiguous copies. A child of a parent that waits lies where that computes, all of
    it its own. The child is an instance of the class that its checkpoint will load as, filled strictly: a missing,
    unexpected or misshapen tensor is an error.

    Raises ArchitectureError if the architecture is not a sub-network of the parent, and UnsupportedModelError if a
    config of the family has no words for a choice.
    """
    parent.shape.check(architecture)
    check_choices(parent, dict.fromkeys(choice for _, choice in architecture.blocks()))
    child = skeleton(parent, architecture)
    tensors, stored = _child_tensors(parent, architecture, library, child)
    child.load_state_dict(tensors, strict=True, assign=True)
    child.tie_weights()
    remember(child, stored)
    _copy_buffers(parent, architecture, child)
    child.generation_config = copy.deepcopy(parent.model.generation_config)
    child.eval()  # type: ignore[no-untyped-call]
    _dispatch_like(parent, architecture, child)
    return child


def skeleton(parent: Parent, architecture: Architecture) -> PreTrainedModel:
    """The child in its class and at its sizes, but without memory: every tensor is on the meta device, in float32."""
    config = child_config(parent.model.config, parent.family, parent.shape, architecture)
    model_class = type(parent.model) if is_stock(config) else pruned_classes(parent.model.config.model_type)[1]
    with torch.device("meta"):
        return cast(PreTrainedModel, model_class(config))


def child_config(config: Any, family: Family, shape: ParentShape, architecture: Architecture) -> Any:
    """The child's config: the parent's stock class if all its layers are alike and that class can say so,
    the family's pruned class with a `per_layer_config` otherwise. The parent's config is untouched."""
    kept = architecture.kept_layers
    choices = [architecture.layers[i] for i in kept]
    values = _stated(config)
    for key, value in values.items():
        # Lists with an entry a layer (layer_types, no_rope_layers, ...) lose the entries of layers that are gone;
        # several end-of-text tokens are a list too.
        if isinstance(value, list) and len(value) == shape.layers and not key.endswith("_token_id"):
            values[key] = [value[i] for i in kept]
    values["num_hidden_layers"] = len(kept)
    if stock_can_say(family, shape, choices):
        values.update(_own_attributes(family, shape, choices[0]))
        child = type(config)(**values)
    else:
        child = _pruned_config(config.model_type, values, shape, choices)
    if architecture.vocabulary.stored:
        child.stored_vocabulary = architecture.vocabulary.stored
    if any(choice.stored for layer in choices for choice in layer.blocks):
        child.stored_types = [{choice.kind: choice.stored for choice in layer.blocks} for layer in choices]
    child.dtype = config.dtype
    child._attn_implementation = config._attn_implementation
    return child


def exits_config(config: Any, rules: ExitRules) -> Any:
    """The config of a model, stock or pruned, with exits: always its family's pruned class, whose code has them."""
    if is_stock(config):
        shape = shape_of(config, FAMILIES[config.model_type])
        layer = LayerChoice(*(shape.full(kind) for kind in BLOCK_KINDS))
        found = _pruned_config(config.model_type, _stated(config), shape, [layer] * config.num_hidden_layers)
    else:
        found = copy.deepcopy(config)
    found.exits = rules.to_json()
    found.dtype = config.dtype
    found._attn_implementation = config._attn_implementation
    return found


def _stated(config: Any) -> dict[str, Any]:
    """What a config says of the model, without what it says of its class and file."""
    values: dict[str, Any] = config.to_dict()
    for key in ("model_type", "architectures", "transformers_version", "quantization_config", "_name_or_path"):
        values.pop(key, None)
    return values


def _pruned_config(
    model_type: str, values: Mapping[str, Any], shape: ParentShape, choices: Sequence[LayerChoice]
) -> Any:
    entries = {str(i): _layer_entry(FAMILIES[model_type], shape, choice) for i, choice in enumerate(choices)}
    return pruned_classes(model_type)[0](**{**values, "head_dim": shape.head_dim, "per_layer_config": entries})


def pruned_classes(model_type: str) -> tuple[Any, Any]:
    """The pruned config and model class of a family, by the stock model type."""
    config_name, model_name = modeling_pruned.pruned_class_names(model_type)
    return getattr(modeling_pruned, config_name), getattr(modeling_pruned, model_name)


def register_pruned_classes() -> None:
    """Teach AutoConfig and AutoModelForCausalLM the pruned classes, so that no remote code is needed to load them."""
    for model_type in FAMILIES:
        config_class, model_class = pruned_classes(model_type)
        transformers.AutoConfig.register(PRUNED_PREFIX + model_type, config_class, exist_ok=True)
        transformers.AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)


def is_stock(config: Any) -> bool:
    """Whether plain transformers loads this config, without a modeling file."""
    return not config.model_type.startswith(PRUNED_PREFIX)


def stock_can_say(family: Family, shape: ParentShape, choices: Sequence[LayerChoice]) -> bool:
    """Whether the family's stock config has words for a model whose layers are these: all alike, nothing left out."""
    entries = [_layer_entry(family, shape, choice) for choice in choices]
    if any(entry != entries[0] or "skip" in entry for entry in entries):
        return False
    heads, of_parent = (own.sizes(shape)["heads"] for own in (choices[0].attention, shape.full("attention")))
    # Whatever a stock class demands of the head count, the parent's own has met.
    return heads == of_parent or (not family.derives_head_dim and shape.hidden_size % heads == 0)


def _own_attributes(family: Family, shape: ParentShape, choice: LayerChoice) -> dict[str, int]:
    """A layer's dimensions under the family's own attribute names; a dropped block keeps the parent's values."""
    names = config_words(family)
    sizes = [size for own in choice.blocks for size in own.sizes(shape).items()]
    return {names[word]: size for word, size in sizes if word in names}


def _layer_entry(family: Family, shape: ParentShape, choice: LayerChoice) -> dict[str, Any]:
    skip = [name for name, own in zip(("attention", "mlp"), choice.blocks, strict=True) if not own.units]
    return {**_own_attributes(family, shape, choice), **({"skip": skip} if skip else {})}


def _parent_name(parent: Parent, architecture: Architecture, name: str) -> tuple[str, int | None, str]:
    """A child's tensor name as (the parent's name, the parent's layer or None, the name within the layer)."""
    prefix = parent.family.layers + "."
    if not name.startswith(prefix):
        return name, None, ""
    index, _, rest = name.removeprefix(prefix).partition(".")
    layer = architecture.kept_layers[int(index)]
    return f"{prefix}{layer}.{rest}", layer, rest


def _child_tensors(
    parent: Parent, architecture: Architecture, library: Repairs, child: PreTrainedModel
) -> tuple[dict[str, torch.Tensor], dict[str, StoredWeight]]:
    """Every tensor of the child, and those of them that are stored in a type of their own, by the child's names."""
    tensors, stored = dict[str, torch.Tensor](), dict[str, StoredWeight]()
    layer_of = {name: _parent_name(parent, architecture, name)[1:] for name in child.state_dict()}
    # Of a parent that waits one part at a time is beside its child.
    for layer in (None, *architecture.kept_layers):
        names = {name: rest for name, (own, rest) in layer_of.items() if own == layer}
        if layer is None:
            values, weights = _outer_tensors(parent, architecture, library, names)
        else:
            values, weights = _layer_tensors(parent, architecture, library, layer, names)
        tensors |= values
        stored |= weights
    return tensors, stored


def _outer_tensors(
    parent: Parent, architecture: Architecture, library: Repairs, names: Iterable[str]
) -> tuple[dict[str, torch.Tensor], dict[str, StoredWeight]]:
    """The child's tensors that are in no layer; their names are the parent's."""
    type_, tensors, stored = architecture.vocabulary.stored, dict[str, torch.Tensor](), dict[str, StoredWeight]()
    of_vocabulary = parent.vocabulary_names() if type_ else []
    with part_at_home(parent.model, parent.outside_layers()):
        whole = parent.model.state_dict()
        for name in names:
            tensors[name] = whole[name]
            if type_ and name in of_vocabulary:
                squares = library.head_squares() if name == of_vocabulary[-1] else None
                stored[name], tensors[name] = parent.rounded_to(name, type_, squares)
    return tensors, stored


def _layer_tensors(
    parent: Parent, architecture: Architecture, library: Repairs, layer: int, names: Mapping[str, str]
) -> tuple[dict[str, torch.Tensor], dict[str, StoredWeight]]:
    """The child's tensors of one of the parent's layers, whose names within the layer are given by the child's."""
    with part_at_home(parent.model, parent.layer(layer).modules()):
        whole = parent.layer(layer).state_dict()
        changed, weights = _changed_tensors(parent, layer, architecture.layers[layer], library)
        tensors = {name: changed[rest] if rest in changed else whole[rest] for name, rest in names.items()}
        return tensors, {name: weights[rest] for name, rest in names.items() if rest in weights}


def _changed_tensors(
    parent: Parent, layer: int, choice: LayerChoice, library: Repairs
) -> tuple[dict[str, torch.Tensor], dict[str, StoredWeight]]:
    """The tensors of a layer whose blocks do not stay as they are, by their name within the layer; and how those are
    stored that have a type of their own."""
    tensors: dict[str, torch.Tensor] = {}
    stored: dict[str, StoredWeight] = {}
    for own in choice.blocks:
        kind = own.kind
        if own.units == 0 or own == parent.shape.full(kind):
            continue
        names, output = parent.names(kind), parent.output_projection(layer, kind)
        prefix = f"{names.module}." if names.module else ""
        block = Block(parent, layer, kind, library)
        changed, rounded = entering_tensors(block, own, library.kept(layer, own.plain))
        tensors |= {f"{prefix}{name}": value for name, value in changed.items()}
        stored |= {f"{prefix}{name}": value for name, value in rounded.items()}
        weight, bias, of_output = output_of(parent, library, layer, own)
        weight = weight if input_axis(output) == 1 else weight.T
        tensors[f"{prefix}{names.output}.weight"] = _like(parent.output_weight(layer, kind), weight)
        if of_output is not None:
            stored[f"{prefix}{names.output}.weight"] = of_output
        if bias is not None:
            tensors[f"{prefix}{names.output}.bias"] = _like(parent.output_weight(layer, kind), bias)
    return tensors, stored


def entering_tensors(block: Block, own: Choice, kept: Kept) -> tuple[dict[str, torch.Tensor], dict[str, StoredWeight]]:
    """The tensors of a block that change, but for the output projection, by their name within the block; and how the
    matrices among them are stored, if they have a type of their own: their numbers are then what the type holds."""
    tensors, stored = own.tensors(block, kept), dict[str, StoredWeight]()
    if own.stored is not None:
        squares = None if block.library is None else block.library.input_squares(block.layer, block.kind)
        for name, value in tensors.items():
            if value.ndim == 2:
                stored[name] = StoredWeight.of(value, own.stored, None if squares is None else squares.entry_D)
    return tensors | {name: weight.numbers_like(tensors[name]) for name, weight in stored.items()}, stored


def output_of(
    parent: Parent, library: Repairs, layer: int, own: Choice
) -> tuple[torch.Tensor, torch.Tensor | None, StoredWeight | None]:
    """Weight (D, inputs) and bias (D,) of the output projection of a choice that keeps something, and how the weight is
    stored if it has a type of its own: its numbers are then what the type holds."""
    weight, bias = parent.output_weight(layer, own.kind), parent.output_bias(layer, own.kind)
    if own.plain != parent.shape.full(own.kind):
        weight, bias = library.output(layer, own.plain, weight)
    if own.stored is None:
        return weight, bias, None
    squares, columns_S = (
        library.input_squares(layer, own.kind),
        own.columns(library.kept(layer, own.plain), parent.shape),
    )
    stored = StoredWeight.of(weight, own.stored, None if squares is None else squares.output_I[columns_S])
    return stored.numbers_like(weight), bias, stored


def _take_rows(module: nn.Module, value: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    axis = 1 - input_axis(module) if value.ndim == 2 else 0
    return value.index_select(axis, rows.to(value.device)).contiguous()


def _like(reference: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return value.to(device=reference.device, dtype=reference.dtype).contiguous()


def _copy_buffers(parent: Parent, architecture: Architecture, child: PreTrainedModel) -> None:
    """Fill what a checkpoint does not hold: rotary frequencies, embedding scales."""
    for name, buffer in list(child.named_buffers()):
        if buffer.is_meta:
            path, _, leaf = name.rpartition(".")
            parent_name = _parent_name(parent, architecture, name)[0]
            child.get_submodule(path)._buffers[leaf] = brought_home(
                parent.model, parent.model.get_buffer(parent_name)
            ).clone()


def _dispatch_like(parent: Parent, architecture: Architecture, child: PreTrainedModel) -> None:
    """A parent spread over several devices has hooks that move activations: give the child the same."""
    if not is_spread(parent.model):
        return
    from accelerate import dispatch_model

    prefix = parent.family.layers + "."
    position = {layer: i for i, layer in enumerate(architecture.kept_layers)}
    child_map: dict[str, Any] = {}
    for name, device in device_map_of(parent.model).items():
        index, _, rest = name.removeprefix(prefix).partition(".")
        if not name.startswith(prefix):
            child_map[name] = device
        elif int(index) in position:
            child_map[f"{prefix}{position[int(index)]}" + (f".{rest}" if rest else "")] = device
    # As transformers dispatches the parent: inputs go where its embedding is, each layer's cache stays beside it.
    dispatch_model(child, child_map, main_device=str(parent.device), skip_keys=child._skip_keys_device_placement)
