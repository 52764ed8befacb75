"""Read models from the Hub, a directory or a GGUF file: complete, or not at all."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_gguf_pytorch_utils,
)
from transformers.utils import logging as transformers_logging

from llmprune.core.errors import ModelError, UnsupportedModelError, quoted, shortened
from llmprune.core.files import exists, expanded
from llmprune.core.memory import tells_of_memory
from llmprune.core.recipe_inputs import ModelRecipe
from llmprune.data.bos import opening_with_bos
from llmprune.models.placement import check_spread, gpus_to_spread_over, resolve_device, room_on

_PRE_TOKENIZERS_WITH_BOS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2")
"""With these, llama.cpp puts BOS in front of a text unless the file says otherwise; transformers would not."""


def load_model(
    recipe: ModelRecipe, *, check: Callable[[Any], None] = lambda config: None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal LM - a Hub id, a directory or a GGUF file - and its tokenizer, in eval mode on its device, or
    spread over several (`gpus_to_spread_over`).

    Weights are read from safetensors (or GGUF, dequantised) only; `dtype_of` says in which dtype, where the recipe
    leaves it open. `check` sees the config before any weight is read, and may refuse it. Raises ModelError.
    """
    source = _Source.of(recipe)
    config = source.config()
    check(config)
    device = resolve_device(recipe.device)
    dtype = _asked_dtype(recipe, device)
    gpus = gpus_to_spread_over(recipe.device, config, dtype)
    with _readable_errors(recipe.path), quiet_loading():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.place,
            dtype=dtype,
            trust_remote_code=recipe.trust_remote_code,
            use_safetensors=None if source.is_gguf else True,
            device_map="auto" if gpus else None,
            max_memory=room_on(gpus) or None,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **source.where,
        )
        model, info = loaded
        _check_complete(info, recipe.path)
        _check_dtype(model, recipe.path)
    tokenizer = source.tokenizer()
    if source.is_gguf:
        _forget_quantisation(model)
    check_spread(model, recipe.path)
    return (model if gpus else model.to(device)).eval(), tokenizer


def outline_model(
    recipe: ModelRecipe, *, check: Callable[[Any], None] = lambda config: None, with_tokenizer: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The model that `load_model` would load, without its weights: every tensor is on the meta device, in the dtype
    that it would have; its tokenizer, if that is asked for.

    Of a Hub id config.json is fetched, and what a tokenizer has. Raises ModelError, also on a config that does not say
    the dtype that `auto` would be.
    """
    source = _Source.of(recipe)
    config = source.config()
    check(config)
    dtype = _asked_dtype(recipe, resolve_device(recipe.device))
    if dtype == "auto":
        dtype = getattr(torch, stored_dtype(recipe))
    with _readable_errors(recipe.path), quiet_loading(), torch.device("meta"):
        made: Any = AutoModelForCausalLM
        model: PreTrainedModel = made.from_config(
            config, dtype=dtype, trust_remote_code=recipe.trust_remote_code
        ).eval()
    _check_dtype(model, recipe.path)
    return model, source.tokenizer() if with_tokenizer else None


@dataclass(frozen=True)
class _Source:
    """Where a recipe's model lies, as transformers is told of it."""

    recipe: ModelRecipe
    place: str
    where: Mapping[str, str]
    is_gguf: bool
    unsaid_bos: bool
    """Whether llama.cpp opens texts with BOS although the GGUF file does not say so."""

    @classmethod
    def of(cls, recipe: ModelRecipe) -> _Source:
        """Raises ModelError if there is no such place, or transformers cannot read the GGUF file there."""
        place, gguf_file = locate(recipe.path)
        where = {"revision": recipe.revision} if recipe.revision else {}
        if gguf_file is None:
            return cls(recipe, place, where, is_gguf=False, unsaid_bos=False)
        unsaid_bos = _check_gguf(Path(place) / gguf_file)
        return cls(recipe, place, {**where, "gguf_file": gguf_file}, is_gguf=True, unsaid_bos=unsaid_bos)

    def config(self) -> Any:
        with _readable_errors(self.recipe.path), quiet_loading():
            return AutoConfig.from_pretrained(self.place, trust_remote_code=self.recipe.trust_remote_code, **self.where)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        own = self.recipe.tokenizer
        with _readable_errors(self.recipe.path), quiet_loading():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                own or self.place, trust_remote_code=self.recipe.trust_remote_code, **({} if own else self.where)
            )
        return opening_with_bos(tokenizer, True) if self.unsaid_bos and not own else tokenizer


def dtype_of(model: PreTrainedModel) -> str:
    """A loaded model's dtype as recipes name it, such as "bfloat16"."""
    return str(model.dtype).removeprefix("torch.")


def _asked_dtype(recipe: ModelRecipe, device: torch.device) -> torch.dtype | str:
    """What from_pretrained is asked for: "auto" there is the checkpoint's own, by its config or else its weights."""
    if recipe.dtype == "auto":
        # A CPU computes 16-bit floats more slowly than float32, if at all.
        return torch.float32 if device.type == "cpu" else "auto"
    dtype = getattr(torch, recipe.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _check_dtype(model: PreTrainedModel, path: str) -> None:
    known = ("float32", "bfloat16", "float16")
    if (found := dtype_of(model)) not in known:
        raise ModelError(f"{path} is stored in {found}; name the dtype to read it in: model.dtype={' or '.join(known)}")


def stored_dtype(recipe: ModelRecipe) -> str:
    """The dtype that a checkpoint is in, by its config; that of a GGUF file is float32, to which it is dequantised.

    Raises ModelError if the checkpoint cannot be found, or does not say.
    """
    if locate(recipe.path)[1]:
        return "float32"
    config = _Source.of(recipe).config()
    dtype = config.dtype or config.get_text_config().dtype
    if dtype is None:
        raise ModelError(f"{recipe.path} does not say its dtype in config.json; name one with --dtype")
    return str(dtype).removeprefix("torch.")


def locate(path: str) -> tuple[str, str | None]:
    """A place for from_pretrained, and the GGUF file in it if the path names one. Raises ModelError."""
    if path.endswith(".gguf"):
        file = expanded(path)
        if not file.is_file():
            raise ModelError(f"model.path {shortened(path)} is not a file")
        return str(file.parent), file.name
    local = expanded(path)
    if path.startswith((".", "/", "~")) or exists(path):
        if not local.is_dir():
            raise ModelError(f"model.path {shortened(path)} is not a directory with a config.json, nor a .gguf file")
        if not (local / "config.json").is_file():
            raise ModelError(
                f"model.path {shortened(path)} holds no config.json; name a transformers checkpoint or a .gguf file"
            )
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


def _check_gguf(file: Path) -> bool:
    """Refuse what transformers cannot read. Returns whether llama.cpp opens texts with BOS although it is not said."""
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
        raise UnsupportedModelError(
            f"{file} has GGUF architecture {quoted(architecture)}; transformers reads: {readable}"
        )
    scaling = reader.get_field(f"{architecture}.rope.scaling.type")
    dropped = [tensor.name for tensor in reader.tensors if tensor.name.startswith(("rope_freqs.", "rope_factors_"))]
    if scaling and scaling.contents() != "none":
        dropped.append(f"rope.scaling.type={scaling.contents()}")
    if dropped:
        raise UnsupportedModelError(
            f"{file} scales its rotary embedding ({', '.join(dropped)}), which transformers leaves out when it reads "
            "GGUF: the model would be another; name the safetensors model instead"
        )
    pre_tokenizer = reader.get_field("tokenizer.ggml.pre")
    is_said = reader.get_field("tokenizer.ggml.add_bos_token") is not None
    return not is_said and pre_tokenizer is not None and pre_tokenizer.contents() in _PRE_TOKENIZERS_WITH_BOS


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
        if isinstance(error, ModelError) or tells_of_memory(f"{type(error).__name__}: {error}"):
            raise
        cause = " ".join(str(error).split()).rstrip(".")
        if "trust_remote_code" in cause:
            raise ModelError(
                f"{shortened(path)} brings code of its own; set model.trust_remote_code=true only if you trust it"
            ) from None
        raise ModelError(
            f"cannot load model {shortened(path)}: {cause:.400}. Give a Hub id, a directory with config.json and "
            "safetensors weights (convert .bin files first), or a .gguf file"
        ) from error


@contextmanager
def quiet_loading() -> Iterator[None]:
    """transformers draws its own bars on stderr while loading; ours are the only ones a run shows."""
    was_shown = transformers_logging.is_progress_bar_enabled()
    gguf_logger = logging.getLogger(modeling_gguf_pytorch_utils.__name__)
    gguf_reader: Any = modeling_gguf_pytorch_utils
    level, bar = gguf_logger.level, gguf_reader.tqdm
    # The GGUF reader's bar does not ask transformers' setting.
    gguf_reader.tqdm = partial(bar, disable=True)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    gguf_logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        gguf_reader.tqdm = bar
        gguf_logger.setLevel(level)
        if was_shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
