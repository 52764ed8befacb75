"""A model with exits, made of one without: the same tensors in the class whose code has them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.core.errors import UnsupportedModelError
from llmprune.models.modeling_pruned import FAMILIES, PRUNED_PREFIX, Exit, ExitRules, Family
from llmprune.models.placement import is_spread
from llmprune.models.surgery import exits_config, pruned_classes


def family_of(config: Any) -> Family:
    """Of a stock or pruned config."""
    return FAMILIES[config.model_type.removeprefix(PRUNED_PREFIX)]


def final_norm(model: PreTrainedModel) -> torch.nn.Module:
    """What stands between the last layer and the head."""
    family = family_of(model.config)
    return model.get_submodule(f"{family.layers.rpartition('.')[0]}.{family.norm}")


def exits_of(model: PreTrainedModel) -> list[Exit]:
    """Those of a model that has some."""
    return list(model.exits)  # type: ignore[arg-type]


def check_exits(model: PreTrainedModel) -> None:
    """Raises UnsupportedModelError if tokens cannot leave this model early."""
    config = model.config
    if getattr(config, "word_embed_proj_dim", config.hidden_size) != config.hidden_size:
        raise UnsupportedModelError(
            f"exits put the states of a layer before the output head, whose width here is word_embed_proj_dim="
            f"{config.word_embed_proj_dim}, and that of the layers {config.hidden_size}; models without a projection "
            "between the two can have exits"
        )
    if is_spread(model):
        raise UnsupportedModelError("exits are for a model on one device, and this one is spread over several")
    if ExitRules.of(config) is not None:
        raise UnsupportedModelError("this model has exits already; start from the one that they were put into")


def with_exits(trunk: PreTrainedModel, rules: ExitRules, tensors: Mapping[str, Tensor]) -> PreTrainedModel:
    """`trunk` with exits, whose tensors are named as in `modeling_pruned.Exit` behind the number of their layer
    (`15.adapter.weight`). Tensors of the trunk are its own storage; the trunk is untouched.

    Raises UnsupportedModelError as `check_exits` does, ValueError if an exit stands behind no layer but the last.
    """
    check_exits(trunk)
    config = trunk.config
    if rules.layers[-1] >= config.num_hidden_layers:
        raise ValueError(
            f"the last exit stands before the last of {config.num_hidden_layers} layers; got {rules.layers}"
        )
    made = exits_config(config, rules)
    with torch.device("meta"):
        model = cast(PreTrainedModel, pruned_classes(made.model_type.removeprefix(PRUNED_PREFIX))[1](made))
    own = {
        f"exits.{i}.{name.removeprefix(prefix)}": tensor
        for i, layer in enumerate(rules.layers)
        for prefix in [f"{layer}."]
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    model.load_state_dict({**trunk.state_dict(), **own}, strict=True, assign=True)
    model.tie_weights()
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:
            path, _, leaf = name.rpartition(".")
            model.get_submodule(path)._buffers[leaf] = trunk.get_buffer(name).clone()
    model.generation_config = copy.deepcopy(trunk.generation_config)
    return model.eval()  # type: ignore[no-untyped-call, no-any-return]


def untrained_exit(trunk: PreTrainedModel) -> Exit:
    """One whose head reads what the model's would: the final norm of its states."""
    made = Exit(final_norm(trunk), trunk.config.hidden_size).to(trunk.device, trunk.dtype)
    with torch.no_grad():
        torch.nn.init.eye_(made.adapter.weight)
        for tensor in (made.adapter.bias, made.gate.weight, made.gate.bias):
            tensor.zero_()
    return made.requires_grad_(False).eval()
