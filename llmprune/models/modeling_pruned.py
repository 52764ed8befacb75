"""Causal LMs whose layers differ: each layer keeps its own number of heads and FFN channels, or lacks a block.

The widths stand in the config under transformers' own `per_layer_config` schema, in the family's own attribute
names, plus `skip` for blocks that are not there. A pruned class builds the stock model of its family and then
shrinks every layer to what its entry says, so the forward pass is the family's own.

With `exits` in the config, a token may leave behind one of the layers named there, where a small adapter before the
model's own head is confident: `generate(..., exits="early")` takes such tokens, `exits="draft"` has the whole model
verify them, and without that word the model is the one that it is without exits.

This file needs torch and transformers (tested with 5.23) only: it is copied beside the weights of a checkpoint
(`auto_map`), so that the checkpoint loads with `trust_remote_code=True` where llmprune is not installed.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
import transformers
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DummyLayer
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions, CausalLMOutputWithPast

PRUNED_PREFIX = "llmprune_"


@dataclass(frozen=True)
class BlockNames:
    """Where the tensors of one block live, relative to its layer.

    `rows` maps each projection (or norm) whose output rows belong to units to a layout: segments separated by
    "|", each a run of units, each unit the parts named by its letters in turn. For attention a unit is a KV group:
    "q" is the rows of its query heads, "k" and "v" those of its KV head; for the FFN "c" is one channel.
    """

    module: str
    rows: Mapping[str, str]
    output: str
    leave_with_block: tuple[str, ...]
    output_norm: str | None = None
    """The norm that the block's output passes before it is added to the residual stream, if there is one."""


@dataclass(frozen=True)
class Family:
    """One model family as data: names and dimensions, nothing else."""

    config: str
    causal_lm: str
    attention: BlockNames
    ffn: BlockNames
    layers: str = "model.layers"
    norm: str = "norm"
    """The final norm, beside the layers."""
    heads: str = "num_attention_heads"
    kv_heads: str | None = "num_key_value_heads"
    ffn_width: str = "intermediate_size"
    derives_head_dim: bool = False
    residual_scale: str | None = None
    """The config's word for what a block's output is multiplied by before it is added to the residual stream."""
    parallel_residual: str | None = None
    """The config's word for whether both blocks of a layer read the same residual stream."""


_LLAMA = Family(
    config="LlamaConfig",
    causal_lm="LlamaForCausalLM",
    attention=BlockNames("self_attn", {"q_proj": "q", "k_proj": "k", "v_proj": "v"}, "o_proj", ("input_layernorm",)),
    ffn=BlockNames("mlp", {"gate_proj": "c", "up_proj": "c"}, "down_proj", ("post_attention_layernorm",)),
)
_GEMMA2 = replace(
    _LLAMA,
    config="Gemma2Config",
    causal_lm="Gemma2ForCausalLM",
    attention=replace(
        _LLAMA.attention,
        leave_with_block=("input_layernorm", "post_attention_layernorm"),
        output_norm="post_attention_layernorm",
    ),
    ffn=replace(
        _LLAMA.ffn,
        leave_with_block=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
        output_norm="post_feedforward_layernorm",
    ),
)

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": replace(_LLAMA, config="MistralConfig", causal_lm="MistralForCausalLM"),
    "qwen2": replace(_LLAMA, config="Qwen2Config", causal_lm="Qwen2ForCausalLM"),
    "qwen3": replace(_LLAMA, config="Qwen3Config", causal_lm="Qwen3ForCausalLM"),
    "smollm3": replace(_LLAMA, config="SmolLM3Config", causal_lm="SmolLM3ForCausalLM"),
    "granite": replace(
        _LLAMA, config="GraniteConfig", causal_lm="GraniteForCausalLM", residual_scale="residual_multiplier"
    ),
    "gemma2": _GEMMA2,
    "gemma3_text": replace(_GEMMA2, config="Gemma3TextConfig", causal_lm="Gemma3ForCausalLM"),
    "olmo2": replace(
        _LLAMA,
        config="Olmo2Config",
        causal_lm="Olmo2ForCausalLM",
        # OLMo 2 normalises queries and keys over all heads at once, and its layer norms follow the block.
        attention=replace(
            _LLAMA.attention,
            rows={**_LLAMA.attention.rows, "q_norm": "q", "k_norm": "k"},
            leave_with_block=("post_attention_layernorm",),
            output_norm="post_attention_layernorm",
        ),
        ffn=replace(
            _LLAMA.ffn,
            leave_with_block=("post_feedforward_layernorm",),
            output_norm="post_feedforward_layernorm",
        ),
    ),
    "phi3": replace(
        _LLAMA,
        config="Phi3Config",
        causal_lm="Phi3ForCausalLM",
        attention=replace(_LLAMA.attention, rows={"qkv_proj": "q|k|v"}),
        ffn=replace(_LLAMA.ffn, rows={"gate_up_proj": "c|c"}),
        derives_head_dim=True,
    ),
    "gpt_neox": Family(
        config="GPTNeoXConfig",
        causal_lm="GPTNeoXForCausalLM",
        attention=BlockNames("attention", {"query_key_value": "qkv"}, "dense", ("input_layernorm",)),
        ffn=BlockNames("mlp", {"dense_h_to_4h": "c"}, "dense_4h_to_h", ("post_attention_layernorm",)),
        layers="gpt_neox.layers",
        norm="final_layer_norm",
        kv_heads=None,
        derives_head_dim=True,
        parallel_residual="use_parallel_residual",
    ),
    "gpt2": Family(
        config="GPT2Config",
        causal_lm="GPT2LMHeadModel",
        attention=BlockNames("attn", {"c_attn": "q|k|v"}, "c_proj", ("ln_1",)),
        ffn=BlockNames("mlp", {"c_fc": "c"}, "c_proj", ("ln_2",)),
        layers="transformer.h",
        norm="ln_f",
        heads="n_head",
        kv_heads=None,
        ffn_width="n_inner",
        derives_head_dim=True,
    ),
    "opt": Family(
        config="OPTConfig",
        causal_lm="OPTForCausalLM",
        attention=BlockNames(
            "self_attn", {"q_proj": "q", "k_proj": "k", "v_proj": "v"}, "out_proj", ("self_attn_layer_norm",)
        ),
        # OPT's FFN has no module of its own: its projections hang on the layer.
        ffn=BlockNames("", {"fc1": "c"}, "fc2", ("final_layer_norm", "fc1", "activation_fn")),
        layers="model.decoder.layers",
        norm="final_layer_norm",
        kv_heads=None,
        ffn_width="ffn_dim",
        derives_head_dim=True,
    ),
}


def part_rows(queries_per_group: int, head_dim: int) -> dict[str, int]:
    """Rows that each letter of a row layout stands for, in one unit."""
    return {"q": queries_per_group * head_dim, "k": head_dim, "v": head_dim, "c": 1}


def input_axis(module: nn.Module) -> int:
    """Axis of a projection's weight that runs over its inputs: 1 for nn.Linear, 0 for GPT-2's Conv1D."""
    return 0 if isinstance(module, transformers.pytorch_utils.Conv1D) else 1


class NoAttention(nn.Module):
    """An attention block that is not there: it adds nothing to the residual stream and caches nothing."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None


class NoFfn(nn.Module):
    """An FFN block that is not there: it adds nothing to the residual stream."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


class _LayerConfig:
    """A layer's own head counts over the model's config; everything else is read through, so that a later
    change of the model's config (the attention implementation, say) reaches the layer."""

    def __init__(self, config: Any, **own: int) -> None:
        self.__dict__.update(own)
        self._config = config

    def __getattr__(self, name: str) -> Any:
        if name == "_config":  # not there yet while copying
            raise AttributeError(name)
        return getattr(self._config, name)


def _shrink(module: nn.Module, features: int, *, of_input: bool) -> None:
    """Cut a projection, norm or bias to its first `features` inputs or outputs (the weights come later)."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    axis = input_axis(module) if of_input else (1 - input_axis(module) if weight.ndim == 2 else 0)
    module.weight = nn.Parameter(weight.detach().narrow(axis, 0, features).clone(), requires_grad=weight.requires_grad)
    bias = getattr(module, "bias", None)
    if bias is not None and not of_input:
        module.bias = nn.Parameter(bias.detach()[:features].clone(), requires_grad=bias.requires_grad)
    for name in ("in_features", "nx") if of_input else ("out_features", "nf"):
        if hasattr(module, name):
            setattr(module, name, features)


def _shrink_block(layer: nn.Module, names: BlockNames, units: int, parts: Mapping[str, int], output_part: str) -> None:
    block = layer.get_submodule(names.module)
    for name, layout in names.rows.items():
        rows = units * sum(parts[letter] for letter in layout if letter != "|")
        _shrink(block.get_submodule(name), rows, of_input=False)
    _shrink(block.get_submodule(names.output), units * parts[output_part], of_input=True)


def _remove_block(layer: nn.Module, names: BlockNames, nothing: nn.Module) -> None:
    for name in names.leave_with_block:
        setattr(layer, name, nn.Identity())
    setattr(layer, names.module or names.output, nothing)


def _fit_layer(layer: nn.Module, family: Family, config: Any, layer_config: Any) -> None:
    """Shrink one stock layer, built at the parent's widths, to what `layer_config` says."""
    skip = layer_config.skip
    heads = getattr(layer_config, family.heads)
    kv_heads = getattr(layer_config, family.kv_heads) if family.kv_heads else heads
    parts = part_rows(heads // kv_heads, layer_config.head_dim)
    if "attention" in skip:
        _remove_block(layer, family.attention, NoAttention())
    else:
        _shrink_block(layer, family.attention, kv_heads, parts, "q")
        attention = layer.get_submodule(family.attention.module)
        for name, value in {
            "num_heads": heads,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "num_key_value_groups": heads // kv_heads,
            "split_size": heads * layer_config.head_dim,
        }.items():
            if hasattr(attention, name):
                setattr(attention, name, value)
        attention.config = _LayerConfig(config, num_attention_heads=heads, num_key_value_heads=kv_heads)  # type: ignore[assignment]
    if "mlp" in skip:
        _remove_block(layer, family.ffn, NoFfn())
    else:
        _shrink_block(layer, family.ffn, getattr(layer_config, family.ffn_width), parts, "c")


def _fit_cache(model: PreTrainedModel, args: Any, kwargs: Mapping[str, Any]) -> None:
    """Give a bare `DynamicCache()` the config's layers: its own would measure length and mask on layer 0, whose
    attention may not be there."""
    cache = kwargs.get("past_key_values")
    if isinstance(cache, DynamicCache) and not cache.layers:
        cache.layers = DynamicCache(config=model.config).layers
        cache.layer_class_to_replicate = None


def _dense(config: Any) -> Any:
    """The config with the parent's dimensions in every layer."""
    dense = copy.copy(config)
    dense.per_layer_config = None
    return dense


class PrunedConfigMixin:
    """What a pruned config adds to its family's: layers may differ, and some keep no cache."""

    @property
    def kv_sharing_modes(self) -> list[str | None] | None:
        """transformers' word for layers without a cache of their own: without it, a cache whose layer 0 has no
        attention reports length 0 (DynamicCache) or masks wrongly (StaticCache)."""
        if not self.is_heterogeneous:  # type: ignore[attr-defined]
            return None
        layers = self.per_layer_config  # type: ignore[attr-defined]
        return ["reuse" if "attention" in layer.skip else None for layer in layers]

    def validate_architecture(self) -> None:
        """Stock configs demand that the heads divide the hidden size; a pruned layer's need not."""

    def validate_rope(self) -> None:
        """The rotary embedding is the parent's, so it is the parent's head count that it must agree with."""
        super(PrunedConfigMixin, _dense(self)).validate_rope()  # type: ignore[misc]


class PrunedModelMixin:
    """Builds the family's stock model at the parent's widths, then shrinks each layer to its own."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        family = FAMILIES[config.model_type.removeprefix(PRUNED_PREFIX)]
        dense = _dense(config)
        super().__init__(dense, *args, **kwargs)  # type: ignore[call-arg]
        config._attn_implementation_internal = dense._attn_implementation_internal
        assert isinstance(self, PreTrainedModel)
        for module in self.modules():
            if isinstance(module, PreTrainedModel):
                module.config = config
                module.register_forward_pre_hook(_fit_cache, with_kwargs=True)
        for i, layer in enumerate(self.get_submodule(family.layers).children()):
            _fit_layer(layer, family, config, config.per_layer_config[i])
        if (rules := ExitRules.of(config)) is not None:
            norm = _decoder(self).get_submodule(family.norm)
            self.exits = nn.ModuleList(Exit(norm, config.hidden_size) for _ in rules.layers)

    def generate(self, *args: Any, exits: Literal["early", "draft"] | None = None, **kwargs: Any) -> Any:
        """As transformers' own; `exits` says what becomes of tokens that leave early: "early" takes them, "draft" has
        the rest of the model verify them, a batch at a time, so that what is generated is the model's own."""
        generate = super().generate  # type: ignore[misc]
        if exits is None:
            return generate(*args, **kwargs)
        kwargs.setdefault("past_key_values", ExitsCache(self))  # type: ignore[arg-type]
        if exits == "early":
            return generate(*args, **kwargs)
        if exits == "draft":
            return generate(*args, custom_generate=_draft_and_verify, **kwargs)
        raise ValueError(f'exits is "early", "draft" or None; got {exits!r}')

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers looks for the attention code in the source of a class's module; ours is in the family's.
        return True


Criterion = Literal["gate", "top1", "margin", "entropy", "agreement"]
"""What an exit is as confident as: `gate`, a linear probe of the states that promises the whole model's token and costs
no head; of the exit's own distribution the largest probability, its distance from the second, or 1 minus its entropy as
a share of the most that there can be; or the largest probability where the exit before it finds the same token."""


Keys = Literal["propagated", "exact"]
"""What later layers read of a token that has left: keys and values of the states that it left with, or of states that
go through all of them."""


@dataclass(frozen=True)
class ExitRules:
    """Where tokens leave, and when: the config's `exits`."""

    layers: tuple[int, ...]
    """Behind so many layers stands each exit."""
    criterion: Criterion
    thresholds: tuple[float, ...]
    """A token leaves where the confidence is at least this: above 1, never."""
    waiting: int = 16
    """So many tokens that have left may lack what later layers keep of them; the next one goes deeper. Also how many
    are drafted before they are verified."""
    keys: Keys = "propagated"

    def __post_init__(self) -> None:
        if not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 1:
            raise ValueError(f"exits stand behind layers in rising order, from 1 on; got {list(self.layers)}")
        if len(self.thresholds) != len(self.layers):
            raise ValueError(f"each exit has a threshold; got {len(self.thresholds)} for {len(self.layers)} exits")
        if self.criterion not in get_args(Criterion):
            raise ValueError(f"criterion is one of {', '.join(get_args(Criterion))}; got {self.criterion!r}")
        if self.waiting < 1 or self.keys not in get_args(Keys):
            raise ValueError(f"waiting is at least 1, keys propagated or exact; got {self.waiting}, {self.keys!r}")

    @classmethod
    def of(cls, config: Any) -> ExitRules | None:
        """Those of a config; None if it has no exits."""
        found = getattr(config, "exits", None)
        return None if found is None else cls.from_json(found)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ExitRules:
        """Inverse of `to_json`."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


class Exit(nn.Module):
    """What stands between the states behind a layer and the model's own head: a norm and a linear adapter; and the gate
    that says whether it is worth to look."""

    def __init__(self, norm: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.norm = copy.deepcopy(norm)
        self.adapter = nn.Linear(hidden_size, hidden_size)
        self.gate = nn.Linear(hidden_size, 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What the head reads."""
        adapted: torch.Tensor = self.adapter(self.norm(hidden_states))
        return adapted

    def promise(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """How probable it is that the whole model finds this exit's token the likeliest: (...,)."""
        found: torch.Tensor = self.gate(self.norm(hidden_states))[..., 0].float().sigmoid()
        return found


def confidence_of(criterion: Criterion, logits: torch.Tensor, top_before: torch.Tensor | None) -> torch.Tensor:
    """How confident an exit is by its logits (..., V), from 0 to 1: (...,). `top_before` are the likeliest tokens of
    the exit before it."""
    p = logits.float().softmax(-1)
    if criterion == "entropy":
        negative: torch.Tensor = torch.special.xlogy(p, p).sum(-1)
        return 1 + negative / math.log(p.shape[-1])
    if criterion == "margin":
        first, second = p.topk(2, dim=-1).values.unbind(-1)
        return first - second
    top = p.max(-1)
    if criterion == "top1":
        return top.values
    assert criterion == "agreement", "a gate reads no logits"
    return torch.zeros_like(top.values) if top_before is None else top.values * (top.indices == top_before)


def _decoder(model: nn.Module) -> nn.Module:
    """The module that holds the layers and the final norm."""
    path, _, _ = _family(model).layers.rpartition(".")
    return model.get_submodule(path)


def _family(model: Any) -> Family:
    return FAMILIES[model.config.model_type.removeprefix(PRUNED_PREFIX)]


class _Held(nn.Module):
    """In the place of a layer that does not run: it hands on what enters it, or what it was given."""

    states: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states if self.states is None else self.states


class _Stored(Exception):
    """Ends a layer's pass once it has stored keys and values."""


class _KeysAndValues(DynamicCache):
    """Ends the pass of each layer that stores something."""

    def update(self, *args: Any, **kwargs: Any) -> Any:
        super().update(*args, **kwargs)
        raise _Stored


class _UntilStored(nn.Module):
    """A layer as far as its keys and values; the states stay as they are."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        try:
            self.layer(hidden_states, *args, **kwargs)
        except _Stored:
            return hidden_states
        raise AssertionError("a layer with attention stores keys and values")


class _KnownStates(nn.Module):
    """A base model whose last hidden states are known; OPT asks it for its decoder."""

    def __init__(self, states: torch.Tensor) -> None:
        super().__init__()
        self.states = states

    @property
    def decoder(self) -> nn.Module:
        return self

    def forward(self, *_: Any, **__: Any) -> BaseModelOutputWithPastAndCrossAttentions:
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.states)


@contextmanager
def _in_place_of(owner: nn.Module, **modules: nn.Module) -> Iterator[None]:
    """Within it an owner has other submodules; `setattr` would take longer than some passes."""
    own = {name: owner._modules[name] for name in modules}
    owner._modules.update(modules)
    try:
        yield
    finally:
        owner._modules.update(own)


def head_logits(model: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    """The model's own logits of what its head reads, (1, N, D), scaled and capped as its family does: (1, N, V)."""
    with _in_place_of(model, **{model.base_model_prefix: _KnownStates(states)}):
        logits: torch.Tensor = model(inputs_embeds=states, use_cache=False).logits
    return logits


class _Part:
    """Layers of a model that run without the others, on a cache that all parts share."""

    def __init__(self, model: PreTrainedModel, cache: DynamicCache, first: int, stop: int) -> None:
        self._owner = _decoder(model)
        self._model, (_, _, self._name) = model, _family(model).layers.rpartition(".")
        self._norm = {_family(model).norm: nn.Identity()}
        layers = list(self._owner.get_submodule(self._name).children())
        own = range(first, stop)
        self._entry = _Held()
        # What stands before the first layer gives it its states; at the very beginning that is the embedding.
        outside = [self._entry if i == first - 1 else _Held() for i in range(len(layers))]
        stored = [not isinstance(layer, DummyLayer) for layer in cache.layers]
        self._layers = nn.ModuleList(layer if i in own else outside[i] for i, layer in enumerate(layers))
        self._until_stored = nn.ModuleList(
            _UntilStored(layer) if i in own and stored[i] else outside[i] if i not in own else _Held()
            for i, layer in enumerate(layers)
        )
        # Masks and positions are made from the first layers of a cache: let those be of this part.
        attending = [cache.layers[i] for i in own if stored[i]]
        kinds = {type(layer): layer for layer in reversed(attending)}
        others = [kinds.get(type(layer), (attending or [layer])[0]) for layer in cache.layers]
        self._cache, self._keys_and_values = DynamicCache(), _KeysAndValues()
        for view in (self._cache, self._keys_and_values):
            view.layers = [layer if i in own else others[i] for i, layer in enumerate(cache.layers)]

    def run(self, **inputs: torch.Tensor) -> torch.Tensor:
        """States behind the last layer, (1, N, D), of `input_ids` or `states` of N further tokens."""
        return self._pass(self._layers, self._cache, **inputs)

    def store(self, states: torch.Tensor) -> None:
        """Keys and values of further tokens, which all layers read the same states of."""
        self._pass(self._until_stored, self._keys_and_values, states=states)

    def _pass(
        self,
        layers: nn.ModuleList,
        cache: DynamicCache,
        input_ids: torch.Tensor | None = None,
        states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        inputs = {"input_ids": input_ids} if states is None else {"inputs_embeds": states}
        self._entry.states = states
        with _in_place_of(self._owner, **{self._name: layers}, **self._norm):
            found: torch.Tensor = self._model.base_model(
                **inputs, past_key_values=cache, use_cache=True
            ).last_hidden_state
        self._entry.states = None
        return found


class ExitsCache(DynamicCache):
    """Keys and values of one sequence, of which later layers may know fewer tokens than earlier ones, and the states of
    those that wait to be known. A model with exits that is given one decodes with them."""

    is_croppable = False
    """Not by others: `reject` does."""

    def __init__(self, model: PreTrainedModel) -> None:
        rules = ExitRules.of(model.config)
        if rules is None:
            raise ValueError(f"{type(model).__name__} has no exits: its config names none")
        super().__init__(config=model.config)
        self.rules, self.exits = rules, list(model.exits)  # type: ignore[arg-type]
        ends = (0, *rules.layers, len(self.layers))
        self.parts = [_Part(model, self, *ends) for ends in itertools.pairwise(ends)]
        self._model, self._final = model, _decoder(model).get_submodule(_family(model).norm)
        self.waiting: list[torch.Tensor | None] = [None] * len(rules.layers)
        """At each exit the states, (1, n, D), of tokens that the layers behind it do not know."""
        self.left_at: list[int] = []
        """Of each token that was decoded, by which exit it left: as many as there are exits, by none."""
        self._drafted: int | None = None

    def step(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Read one token, (1, 1), as deep as it takes: logits (1, 1, V) of the next."""
        states, top = self.enter(input_ids), None
        for i in range(len(self.exits)):
            if self.count(i) < self.rules.waiting:
                logits, top, leaves = self.offer(i, states, top)
                if leaves:
                    self.wait(i, states)
                    self.left_at.append(i)
                    return self.logits(i, states) if logits is None else logits
            states = self.deepen(i, states)
        self.left_at.append(len(self.exits))
        return head_logits(self._model, self._final(states))

    def enter(self, input_ids: torch.Tensor) -> torch.Tensor:
        """States of further tokens at the first exit."""
        return self.parts[0].run(input_ids=input_ids)

    def offer(
        self, i: int, states: torch.Tensor, top_before: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, bool]:
        """Whether a token leaves by exit `i`: its logits if they were needed to know, the likeliest token by them."""
        criterion, threshold = self.rules.criterion, self.rules.thresholds[i]
        if threshold > 1 and criterion != "agreement":
            return None, None, False
        if criterion == "gate":
            return None, None, bool(self.exits[i].promise(states) >= threshold)
        logits = self.logits(i, states)
        confident = confidence_of(criterion, logits, top_before)
        return logits, logits.argmax(-1), bool(confident >= threshold)

    def logits(self, i: int, states: torch.Tensor) -> torch.Tensor:
        return head_logits(self._model, self.exits[i](states))

    def count(self, i: int) -> int:
        """Tokens that wait at exit `i`."""
        found = self.waiting[i]
        return 0 if found is None else found.shape[1]

    def wait(self, i: int, states: torch.Tensor) -> None:
        before = self.waiting[i]
        self.waiting[i] = states if before is None else torch.cat([before, states], dim=1)

    def deepen(self, i: int, states: torch.Tensor) -> torch.Tensor:
        """Bring tokens, and with them those that wait at exit `i`, to the next exit: their states there."""
        part, waiting, self.waiting[i] = self.parts[i + 1], self.waiting[i], None
        if waiting is None:
            return part.run(states=states)
        if self.rules.keys == "exact":
            found = part.run(states=torch.cat([waiting, states], dim=1))
            waiting, states = found[:, : waiting.shape[1]], found[:, waiting.shape[1] :]
        else:
            part.store(waiting)
            states = part.run(states=states)
        if i + 1 < len(self.waiting):
            self.wait(i + 1, waiting)
        return states

    def read(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Read tokens through all layers, whoever waits with them: logits (1, N, V)."""
        states = self.enter(input_ids)
        for i in range(len(self.exits)):
            states = self.deepen(i, states)
        return head_logits(self._model, self._final(states))

    def draft(self, token: torch.Tensor, most: int) -> tuple[list[torch.Tensor], torch.Tensor]:
        """What the first layers say follows a token (1, 1), while they are confident, and at most so many tokens; and
        the whole model's logits behind the token and each of these, (1, 1 + drafts, V)."""
        states, drafts = [self.enter(token)], list[torch.Tensor]()
        while len(drafts) < most:
            logits, _, leaves = self.offer(0, states[-1], None)
            if not leaves:
                break
            drafts.append((self.logits(0, states[-1]) if logits is None else logits).argmax(-1))
            states.append(self.enter(drafts[-1]))
        self._drafted = len(drafts)
        return drafts, head_logits(self._model, self._final(self.parts[1].run(states=torch.cat(states, dim=1))))

    def settle(self, accepted: int) -> None:
        """Of what was drafted last, if anything was, keep the first `accepted` tokens."""
        if self._drafted is not None:
            self.left_at += [0] * accepted + [1]
            self.crop(accepted - self._drafted)


def _draft_and_verify(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    **model_kwargs: Any,
) -> torch.Tensor:
    """Self-speculative decoding (LayerSkip, arXiv 2404.16710): greedy, and token for token what the model itself gives
    up to the rounding of batches."""
    cache: ExitsCache = model_kwargs["past_key_values"]
    if generation_config.do_sample or generation_config.return_dict_in_generate:
        raise ValueError('exits="draft" is greedy and returns tokens: do_sample and return_dict_in_generate are off')
    if len(cache.exits) != 1:
        raise ValueError(f'exits="draft" drafts at one exit; this model has {len(cache.exits)}, use exits="early"')
    mask = model_kwargs.get("attention_mask")
    logits = model(input_ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    # Layers with a sliding window would forget what comes back when drafts are rejected.
    cache.activate_past_recording()  # type: ignore[no-untyped-call]
    drafts: list[torch.Tensor] = []
    while True:
        for accepted in range(len(drafts) + 1):
            scores = logits_processor(input_ids, logits[:, accepted].float())
            token = scores.argmax(-1, keepdim=True)
            input_ids = torch.cat([input_ids, token], dim=-1)
            if bool(stopping_criteria(input_ids, None).all()):
                return input_ids
            if accepted == len(drafts) or not torch.equal(drafts[accepted], token):
                break
        cache.settle(accepted)
        longest = stopping_criteria.max_length
        room = cache.rules.waiting if longest is None else longest - input_ids.shape[1] - 1
        drafts, logits = cache.draft(token, min(cache.rules.waiting, room))


def _reading_exits(stock: Callable[..., Any]) -> Callable[..., Any]:
    """A family's forward pass that decodes with exits where it is given an `ExitsCache`."""

    @functools.wraps(stock)
    def forward(self: PreTrainedModel, input_ids: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        if not isinstance(cache, ExitsCache):
            return stock(self, input_ids, *args, **kwargs)
        if input_ids is None or input_ids.shape[0] != 1 or (mask is not None and not bool(mask.all())):
            found = "embeddings" if input_ids is None else f"{input_ids.shape[0]}"
            raise ValueError(f"early exits decode the token ids of one sequence without padding; got {found}")
        if cache.get_seq_length() and input_ids.shape[1] == 1:
            logits = cache.step(input_ids)
        elif any(cache.count(i) for i in range(len(cache.exits))):
            logits = cache.read(input_ids)
        else:
            return stock(self, input_ids, *args, **kwargs)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    return forward


def pruned_class_names(model_type: str) -> tuple[str, str]:
    """Names of the pruned config and model classes of a family."""
    family = FAMILIES[model_type]
    return f"Pruned{family.config}", f"Pruned{family.causal_lm}"


def _pruned_classes(model_type: str) -> dict[str, type]:
    family = FAMILIES[model_type]
    config_name, model_name = pruned_class_names(model_type)
    # `strict` collects a class's validators when it decorates it: without it the stock ones would stay in force.
    config_class: type = strict(
        type(
            config_name,
            (PrunedConfigMixin, getattr(transformers, family.config)),
            {"__module__": __name__, "model_type": PRUNED_PREFIX + model_type, "_auto_class": "AutoConfig"},
        )
    )
    model_class = type(
        model_name,
        (PrunedModelMixin, getattr(transformers, family.causal_lm)),
        {
            "__module__": __name__,
            "__annotations__": {"config": config_class},
            "config_class": config_class,
            "_auto_class": "AutoModelForCausalLM",
            "_supports_attention_backend": True,
            "forward": _reading_exits(getattr(transformers, family.causal_lm).forward),
        },
    )
    return {config_name: config_class, model_name: model_class}


def __getattr__(name: str) -> type:
    """Make a family's classes when they are first asked for: importing thirteen families would take seconds."""
    for model_type in FAMILIES:
        if name in pruned_class_names(model_type):
            globals().update(_pruned_classes(model_type))
            return globals()[name]  # type: ignore[no-any-return]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
