"""The dense model that is pruned: loaded, checked against the family table, never mutated."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from llmprune.architecture import BlockKind, ParentShape
from llmprune.errors import ModelError, UnsupportedModelError
from llmprune.models.modeling_pruned import FAMILIES, PRUNED_PREFIX, BlockNames, Family, input_axis
from llmprune.recipe import ModelRecipe


@dataclass(frozen=True, eq=False)
class Parent:
    """A dense causal LM with the names and dimensions that pruning needs."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    family: Family
    shape: ParentShape
    source: str

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the embeddings."""
        return self.model.get_input_embeddings().weight.device  # type: ignore[return-value]

    def layer(self, index: int) -> nn.Module:
        return self.model.get_submodule(f"{self.family.layers}.{index}")

    def names(self, kind: BlockKind) -> BlockNames:
        return self.family.attention if kind == "attention" else self.family.ffn

    def block(self, layer: int, kind: BlockKind) -> nn.Module:
        """The module that holds the block's projections (for OPT's FFN, the layer itself)."""
        return self.layer(layer).get_submodule(self.names(kind).module)

    def output_projection(self, layer: int, kind: BlockKind) -> nn.Module:
        return self.block(layer, kind).get_submodule(self.names(kind).output)

    def output_weight(self, layer: int, kind: BlockKind) -> torch.Tensor:
        """Weight of the output projection as (D, in), whatever way round the family stores it."""
        projection = self.output_projection(layer, kind)
        weight = projection.weight
        assert isinstance(weight, torch.Tensor)
        return (weight if input_axis(projection) == 1 else weight.T).detach()

    def output_bias(self, layer: int, kind: BlockKind) -> torch.Tensor | None:
        bias = getattr(self.output_projection(layer, kind), "bias", None)
        return None if bias is None else bias.detach()

    @property
    def hash(self) -> str:
        """SHA-256 over every tensor's name, dtype, shape and bytes: two parents with one hash compute the same."""
        digest = hashlib.sha256(self.model.config.to_json_string(use_diff=False).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def load_parent(recipe: ModelRecipe) -> Parent:
    """Load the recipe's model and tokenizer as a parent.

    Raises ModelError if it cannot be read, and UnsupportedModelError - before any weight is read - if its
    family, quantisation or layout cannot be pruned.
    """
    model, tokenizer = load_model(recipe, to_prune=True)
    source = Path(recipe.path).name if recipe.path.endswith(".gguf") else recipe.path
    return make_parent(model, tokenizer, source=source)


def load_model(recipe: ModelRecipe, *, to_prune: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal LM - a Hub id, a directory or a GGUF file - and its tokenizer, in eval mode on its device.

    Weights are read from safetensors (or GGUF) only. Raises ModelError; with `to_prune`, UnsupportedModelError before
    any weight is read.
    """
    place, gguf_file = _locate(recipe.path)
    where: dict[str, Any] = {"revision": recipe.revision} if recipe.revision else {}
    if gguf_file:
        _check_gguf(Path(place) / gguf_file)
        where["gguf_file"] = gguf_file
    with _readable_errors(recipe.path), _quiet_loading():
        config = AutoConfig.from_pretrained(place, trust_remote_code=recipe.trust_remote_code, **where)
    if to_prune:
        check_config(config, origin=recipe.path, dequantised=gguf_file is not None)
    device = resolve_device(recipe.device)
    spread = recipe.device == "auto" and torch.cuda.device_count() > 1
    with _readable_errors(recipe.path), _quiet_loading():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place,
            dtype=getattr(torch, recipe.dtype),
            trust_remote_code=recipe.trust_remote_code,
            use_safetensors=None if gguf_file else True,
            device_map="auto" if spread else None,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **where,
        )
        model, info = loaded
        _check_complete(info, recipe.path)
        tokenizer = AutoTokenizer.from_pretrained(
            recipe.tokenizer or place,
            trust_remote_code=recipe.trust_remote_code,
            **({} if recipe.tokenizer else where),
        )
    if gguf_file:
        _forget_quantisation(model)
    return (model if spread else model.to(device)).eval(), tokenizer


def make_parent(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, *, source: str = "") -> Parent:
    """Wrap a model that is already loaded. Raises UnsupportedModelError if it cannot be pruned."""
    check_config(model.config, origin=source or type(model).__name__)
    family = FAMILIES[model.config.model_type]
    # Frozen: nothing of ours trains the parent, and a backward pass through it then costs activations only.
    model.eval().requires_grad_(False)  # type: ignore[no-untyped-call]
    parent = Parent(model, tokenizer, family, _shape_of(model.config, family), source)
    _check_weights(parent)
    return parent


def supported_families() -> tuple[str, ...]:
    """The model types that can be pruned."""
    return tuple(sorted(FAMILIES))


def resolve_device(name: str) -> torch.device:
    """The device a recipe names. Raises ModelError if torch cannot use it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).splitlines()[0]
        raise ModelError(f"model.device {name!r} cannot be used here ({first_line}); use cpu or auto") from None
    return device


def check_config(config: Any, *, origin: str, dequantised: bool = False) -> None:
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
        raise UnsupportedModelError(f"{origin} has model type {model_type!r}; supported are: {supported}")
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is not None and not dequantised:
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation.quant_method
        raise UnsupportedModelError(
            f"{origin} is quantised ({method}); pruning needs float weights: name the unquantised model "
            "(GGUF files are dequantised and work)"
        )
    if model_type == "opt" and not config.do_layer_norm_before:
        raise UnsupportedModelError(
            f"{origin} normalises after the residual (do_layer_norm_before=false), so no block of it can be left "
            "out; the other OPT sizes can be pruned"
        )
    if model_type == "gpt2" and (config.scale_attn_by_inverse_layer_idx or config.add_cross_attention):
        raise UnsupportedModelError(
            f"{origin} scales attention by layer index or has cross-attention; plain GPT-2 models can be pruned"
        )


def _shape_of(config: Any, family: Family) -> ParentShape:
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
    expected = {"attention": shape.kv_groups * shape.queries_per_group * shape.head_dim, "ffn": shape.ffn_width}
    for layer in range(shape.layers):
        for kind in ("attention", "ffn"):
            found = tuple(parent.output_weight(layer, kind).shape)
            if found != (shape.hidden_size, expected[kind]):
                raise UnsupportedModelError(
                    f"{parent.source}: the {kind} output of layer {layer} is {found}, its config implies "
                    f"{(shape.hidden_size, expected[kind])}; only models whose layers are all alike can be pruned"
                )


def _locate(path: str) -> tuple[str, str | None]:
    """A place for from_pretrained, and the GGUF file in it if the path names one."""
    if path.endswith(".gguf"):
        file = Path(path).expanduser()
        if not file.is_file():
            raise ModelError(f"model.path {path} is not a file")
        return str(file.parent), file.name
    local = Path(path).expanduser()
    if path.startswith((".", "/", "~")) or local.exists():
        if not local.is_dir():
            raise ModelError(f"model.path {path} is not a directory with a config.json, nor a .gguf file")
        if not (local / "config.json").is_file():
            raise ModelError(f"model.path {path} holds no config.json; name a transformers checkpoint or a .gguf file")
        return str(local), None
    return path, None


def _check_complete(info: Mapping[str, Any], path: str) -> None:
    """Where a tensor is missing or misshapen, transformers warns and goes on with random numbers."""
    misshapen = [f"{name} {list(found)} for {list(expected)}" for name, found, expected in info["mismatched_keys"]]
    for problem, tensors in (("lacks", sorted(info["missing_keys"])), ("misshapes", sorted(misshapen))):
        if tensors:
            raise ModelError(
                f"{path} {problem} {len(tensors)} tensors that its config implies ({', '.join(tensors[:3])}, ...); "
                "name a complete checkpoint"
            )


def _check_gguf(file: Path) -> None:
    from gguf import GGUFReader
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    try:
        reader = GGUFReader(file)
        field = reader.get_field("general.architecture")
    except (ValueError, IndexError, OSError) as error:
        raise ModelError(f"{file} is not a readable GGUF file: {error}") from None
    architecture = str(field.contents()) if field else "none"
    if architecture not in GGUF_SUPPORTED_ARCHITECTURES:
        readable = ", ".join(sorted(GGUF_SUPPORTED_ARCHITECTURES))
        raise UnsupportedModelError(f"{file} has GGUF architecture {architecture!r}; transformers reads: {readable}")
    scaling = reader.get_field(f"{architecture}.rope.scaling.type")
    dropped = [tensor.name for tensor in reader.tensors if tensor.name.startswith(("rope_freqs.", "rope_factors_"))]
    if scaling and scaling.contents() != "none":
        dropped.append(f"rope.scaling.type={scaling.contents()}")
    if dropped:
        raise UnsupportedModelError(
            f"{file} scales its rotary embedding ({', '.join(dropped)}), which transformers leaves out when it reads "
            "GGUF: the model would be another; name the safetensors model instead"
        )


def _forget_quantisation(model: PreTrainedModel) -> None:
    # transformers dequantises a GGUF file and still calls the model quantised, which forbids saving and casting.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        if name in model.__dict__:
            delattr(model, name)


@contextmanager
def _readable_errors(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        if isinstance(error, ModelError):
            raise
        cause = " ".join(str(error).split())
        if "trust_remote_code" in cause:
            raise ModelError(
                f"{path} brings code of its own; set model.trust_remote_code=true only if you trust it"
            ) from None
        raise ModelError(
            f"cannot load model {path}: {cause:.400}. Give a Hub id, a directory with config.json and safetensors "
            "weights (convert .bin files first), or a .gguf file"
        ) from error


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """transformers draws its own bars on stderr while loading; ours are the only ones a run shows."""
    was_shown = transformers_logging.is_progress_bar_enabled()
    gguf_logger = logging.getLogger("transformers.modeling_gguf_pytorch_utils")
    level = gguf_logger.level
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    gguf_logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        gguf_logger.setLevel(level)
        if was_shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
