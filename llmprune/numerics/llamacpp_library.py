"""llama.cpp's C functions, from the shared library that PyPI's `xllamacpp` brings (an optional dependency).

Parameters are passed by value as C structs, whose fields change with llama.cpp's versions. So one version of the
package is accepted, whose structs are written down here, and the defaults that it fills in are compared with those
that its source states before anything is run.
"""

from __future__ import annotations

import ctypes
from collections import deque
from functools import cache
from typing import Any

from llmprune.core.errors import ModelError

VERSION = "2026.10.11549"
"""Of xllamacpp: the one whose structs are below."""

FLASH_OFF, FLASH_ON = 0, 1
NO_VOCABULARY = 0

_LOGGED_ERROR = 4
_LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class ModelParams(ctypes.Structure):
    """llama_model_params."""

    _fields_ = [
        ("devices", ctypes.c_void_p),
        ("tensor_buft_overrides", ctypes.c_void_p),
        ("n_gpu_layers", ctypes.c_int32),
        ("split_mode", ctypes.c_int),
        ("load_mode", ctypes.c_int),
        ("lazy_mode", ctypes.c_int),
        ("main_gpu", ctypes.c_int32),
        ("tensor_split", ctypes.c_void_p),
        ("progress_callback", ctypes.c_void_p),
        ("progress_callback_user_data", ctypes.c_void_p),
        ("kv_overrides", ctypes.c_void_p),
        ("vocab_only", ctypes.c_bool),
        ("check_tensors", ctypes.c_bool),
        ("use_extra_bufts", ctypes.c_bool),
        ("no_host", ctypes.c_bool),
        ("no_alloc", ctypes.c_bool),
        ("load_mtp", ctypes.c_bool),
    ]


class ContextParams(ctypes.Structure):
    """llama_context_params."""

    _fields_ = [
        ("n_ctx", ctypes.c_uint32),
        ("n_batch", ctypes.c_uint32),
        ("n_ubatch", ctypes.c_uint32),
        ("n_seq_max", ctypes.c_uint32),
        ("n_rs_seq", ctypes.c_uint32),
        ("n_outputs_max", ctypes.c_uint32),
        ("n_outputs_max_per_seq", ctypes.c_uint32),
        ("n_threads", ctypes.c_int32),
        ("n_threads_batch", ctypes.c_int32),
        ("ctx_type", ctypes.c_int),
        ("rope_scaling_type", ctypes.c_int),
        ("pooling_type", ctypes.c_int),
        ("attention_type", ctypes.c_int),
        ("flash_attn_type", ctypes.c_int),
        ("rope_freq_base", ctypes.c_float),
        ("rope_freq_scale", ctypes.c_float),
        ("yarn_ext_factor", ctypes.c_float),
        ("yarn_attn_factor", ctypes.c_float),
        ("yarn_beta_fast", ctypes.c_float),
        ("yarn_beta_slow", ctypes.c_float),
        ("yarn_orig_ctx", ctypes.c_uint32),
        ("defrag_thold", ctypes.c_float),
        ("cb_eval", ctypes.c_void_p),
        ("cb_eval_user_data", ctypes.c_void_p),
        ("type_k", ctypes.c_int),
        ("type_v", ctypes.c_int),
        ("moe_cache_size", ctypes.c_size_t),
        ("abort_callback", ctypes.c_void_p),
        ("abort_callback_data", ctypes.c_void_p),
        ("embeddings", ctypes.c_bool),
        ("offload_kqv", ctypes.c_bool),
        ("no_perf", ctypes.c_bool),
        ("op_offload", ctypes.c_bool),
        ("swa_full", ctypes.c_bool),
        ("kv_unified", ctypes.c_bool),
        ("samplers", ctypes.c_void_p),
        ("n_samplers", ctypes.c_size_t),
        ("ctx_other", ctypes.c_void_p),
    ]


class Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


_HANDLE = ctypes.c_void_p
_FLOATS = ctypes.POINTER(ctypes.c_float)
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [_LogCallback, ctypes.c_void_p]),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_load_from_file": (_HANDLE, [ctypes.c_char_p, ModelParams]),
    "llama_model_free": (None, [_HANDLE]),
    "llama_model_get_vocab": (_HANDLE, [_HANDLE]),
    "llama_model_chat_template": (ctypes.c_char_p, [_HANDLE, ctypes.c_char_p]),
    "llama_model_n_params": (ctypes.c_uint64, [_HANDLE]),
    "llama_model_size": (ctypes.c_uint64, [_HANDLE]),
    "llama_vocab_type": (ctypes.c_int, [_HANDLE]),
    "llama_vocab_n_tokens": (ctypes.c_int32, [_HANDLE]),
    "llama_vocab_is_eog": (ctypes.c_bool, [_HANDLE, ctypes.c_int32]),
    "llama_tokenize": (
        ctypes.c_int32,
        [
            _HANDLE,
            ctypes.c_char_p,
            ctypes.c_int32,
            ctypes.POINTER(ctypes.c_int32),
            ctypes.c_int32,
            ctypes.c_bool,
            ctypes.c_bool,
        ],
    ),
    "llama_init_from_model": (_HANDLE, [_HANDLE, ContextParams]),
    "llama_free": (None, [_HANDLE]),
    "llama_get_memory": (_HANDLE, [_HANDLE]),
    "llama_memory_clear": (None, [_HANDLE, ctypes.c_bool]),
    "llama_memory_seq_rm": (ctypes.c_bool, [_HANDLE, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32]),
    "llama_batch_init": (Batch, [ctypes.c_int32, ctypes.c_int32, ctypes.c_int32]),
    "llama_batch_free": (None, [Batch]),
    "llama_decode": (ctypes.c_int32, [_HANDLE, Batch]),
    "llama_synchronize": (None, [_HANDLE]),
    "llama_get_logits_ith": (_FLOATS, [_HANDLE, ctypes.c_int32]),
    "ggml_quantize_chunk": (
        ctypes.c_size_t,
        [ctypes.c_int, _FLOATS, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, _FLOATS],
    ),
}

_MODEL_DEFAULTS = {"n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "lazy_mode": 1, "use_extra_bufts": True}
_CONTEXT_DEFAULTS = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "n_outputs_max_per_seq": 1,
    "flash_attn_type": -1,
    "yarn_beta_slow": -1.0,
    "type_k": 1,
    "type_v": 1,
    "offload_kqv": True,
    "swa_full": True,
    "kv_unified": False,
}

logged: deque[str] = deque(maxlen=50)
"""Errors that llama.cpp logged last; its log goes nowhere else."""


@cache
def library() -> Any:
    """The loaded library, its functions typed. Raises ModelError, saying what to install, if it cannot be used."""
    try:
        import xllamacpp
    except ImportError as error:
        raise ModelError(
            f"llama.cpp is needed and not there ({error}); pip install 'llmprune[llamacpp]', or use engine torch"
        ) from None
    if xllamacpp.__version__ != VERSION:
        raise ModelError(
            f"llama.cpp is used through xllamacpp {VERSION}, whose structs are known, got {xllamacpp.__version__}; "
            f"pip install xllamacpp=={VERSION}"
        )
    loaded = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    loaded.llama_log_set(_on_log, None)
    for params, defaults in (
        (loaded.llama_model_default_params(), _MODEL_DEFAULTS),
        (loaded.llama_context_default_params(), _CONTEXT_DEFAULTS),
    ):
        found = {name: getattr(params, name) for name in defaults}
        if found != defaults:
            raise ModelError(
                f"xllamacpp {VERSION} fills in {found} where its llama.cpp states {defaults}: this build of it cannot "
                "be trusted; use engine torch"
            )
    loaded.llama_backend_init()
    return loaded


def _keep_errors(level: int, text: bytes, _: Any) -> None:
    if level == _LOGGED_ERROR:
        logged.append(text.decode(errors="replace").strip())


# llama.cpp keeps a pointer to it for as long as the process lives.
_on_log = _LogCallback(_keep_errors)
