"""Run a GGUF file in llama.cpp: its logits, its text and its speed.

Shapes: B sequences, T tokens of each, V words of the vocabulary, N windows.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from llmprune.core.errors import ModelError
from llmprune.core.recipe import CacheType
from llmprune.numerics.ggml import TYPES
from llmprune.numerics.llamacpp_library import FLASH_OFF, FLASH_ON, NO_VOCABULARY, library, logged

_PAD = 256
"""llama.cpp rounds the length of a sequence up to this."""
_EVERY_SEQUENCE, _TO_THE_END = -1, -1


class GgufModel:
    """A GGUF file that llama.cpp has loaded on the CPU. Use as a context manager: it frees the memory at the end."""

    def __init__(self, path: Path) -> None:
        """Raises ModelError if llama.cpp is not there, or cannot load the file."""
        self._library = library()
        self.path = path
        params = self._library.llama_model_default_params()
        params.n_gpu_layers = 0
        logged.clear()
        self._model = self._library.llama_model_load_from_file(str(path).encode(), params) if path.is_file() else None
        if not self._model:
            raise ModelError(f"llama.cpp cannot load {path}: {'; '.join(logged) or 'no such file'}")
        self._vocabulary = self._library.llama_model_get_vocab(self._model)
        self.vocab_size: int = self._library.llama_vocab_n_tokens(self._vocabulary)

    def __enter__(self) -> GgufModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the weights; calling it again does nothing. Sessions end before their model."""
        if self._model:
            self._library.llama_model_free(self._model)
            self._model = None

    @property
    def params(self) -> int:
        """Numbers in the file, those of zero blocks among them."""
        return int(self._library.llama_model_n_params(self._model))

    @property
    def bytes(self) -> int:
        """Bytes of the weights."""
        return int(self._library.llama_model_size(self._model))

    @property
    def chat_template(self) -> str | None:
        """The Jinja template that the file carries."""
        text = self._library.llama_model_chat_template(self._model, None)
        return None if text is None else str(text.decode())

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text; with `special`, BOS and the like are added where the file says so, and recognised."""
        if self._library.llama_vocab_type(self._vocabulary) == NO_VOCABULARY:
            # llama.cpp would abort the process.
            raise ModelError(f"llama.cpp cannot tokenize with {self.path}: it has no tokenizer")
        encoded = text.encode()
        room = len(encoded) + 8
        ids = (ctypes.c_int32 * room)()
        count = self._library.llama_tokenize(self._vocabulary, encoded, len(encoded), ids, room, special, special)
        assert count >= 0, "a text has no more tokens than bytes and special tokens"
        return list(ids[:count])

    def is_end(self, token: int) -> bool:
        """Whether generation stops at this token."""
        return bool(self._library.llama_vocab_is_eog(self._vocabulary, token))

    @contextmanager
    def session(
        self, batch: int, tokens: int, threads: int, *, exact: bool = False, cache_type: CacheType = "f16"
    ) -> Iterator[LlamaCppSession]:
        """A cache for `batch` sequences of up to `tokens` tokens, its keys and values in `cache_type`; else llama.cpp's
        defaults hold, as they do for its users. `exact` keeps the cache in f32 and computes attention plainly, as a
        float reference does. Raises ModelError if llama.cpp has no room, or no such cache for the model."""
        params = self._library.llama_context_default_params()
        params.n_seq_max = batch
        params.n_ctx = batch * (-(-tokens // _PAD) * _PAD)
        params.n_batch = batch * tokens
        params.n_ubatch = min(params.n_ubatch, params.n_batch)
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = TYPES["f32" if exact else cache_type].type
        if exact:
            params.flash_attn_type = FLASH_OFF
        elif cache_type != "f16":
            # llama.cpp reads quantised values in no other way.
            params.flash_attn_type = FLASH_ON
        logged.clear()
        context = self._library.llama_init_from_model(self._model, params)
        if not context:
            raise ModelError(f"llama.cpp cannot run {self.path}: {'; '.join(logged)}")
        buffer = self._library.llama_batch_init(params.n_batch, 0, 1)
        try:
            yield LlamaCppSession(self, context, buffer)
        finally:
            self._library.llama_batch_free(buffer)
            self._library.llama_free(context)


class LlamaCppSession:
    """Sequences on their way through a model, with their cache (see `sessions.Session`)."""

    def __init__(self, model: GgufModel, context: Any, buffer: Any) -> None:
        self._library, self._vocab_size = library(), model.vocab_size
        self._context, self._buffer = context, buffer
        self._position, self._path = 0, model.path
        self._with_logits = 0

    def clear(self) -> None:
        """Forget what was read."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), False)
        self._position = 0

    def read(self, ids_BT: Sequence[Sequence[int]], *, all_logits: bool = False) -> float:
        """Read the next T tokens of each sequence in one pass; seconds until the logits are there."""
        self._fill(ids_BT, all_logits=all_logits)
        started = time.perf_counter()
        failed = self._library.llama_decode(self._context, self._buffer)
        self._library.llama_synchronize(self._context)
        seconds = time.perf_counter() - started
        if failed:
            raise ModelError(f"llama.cpp fails on {self._path} ({failed}): {'; '.join(logged)}")
        self._position += len(ids_BT[0])
        self._with_logits = len(ids_BT[0]) if all_logits else 1
        return seconds

    def take_back(self, tokens: int) -> None:
        """Forget the last tokens of each sequence. Raises ModelError if the model's memory cannot."""
        self._position -= tokens
        memory = self._library.llama_get_memory(self._context)
        if tokens and not self._library.llama_memory_seq_rm(memory, _EVERY_SEQUENCE, self._position, _TO_THE_END):
            raise ModelError(f"llama.cpp cannot take tokens back from what {self._path} has read")

    def likeliest(self) -> list[int]:
        """The likeliest next token behind each token of the last pass that has logits, for one sequence."""
        return [int(self._logits(index).argmax()) for index in range(-self._with_logits, 0)]

    def logits(self, index: int = -1) -> np.ndarray[Any, Any]:
        """(V,) float32 logits after token `index` of the last pass, counted over all its sequences; a copy."""
        return self._logits(index).copy()

    def _logits(self, index: int) -> np.ndarray[Any, Any]:
        """Where llama.cpp has them, until the next pass."""
        pointer = self._library.llama_get_logits_ith(self._context, index)
        assert pointer, f"no logits were asked for at token {index}"
        return np.ctypeslib.as_array(pointer, (self._vocab_size,))

    def _fill(self, ids_BT: Sequence[Sequence[int]], *, all_logits: bool) -> None:
        buffer, tokens, i = self._buffer, len(ids_BT[0]), 0
        for sequence, ids_T in enumerate(ids_BT):
            assert len(ids_T) == tokens, "sequences of one pass are equally long"
            for offset, token in enumerate(ids_T):
                buffer.token[i] = token
                buffer.pos[i] = self._position + offset
                buffer.n_seq_id[i] = 1
                buffer.seq_id[i][0] = sequence
                buffer.logits[i] = all_logits or offset == tokens - 1
                i += 1
        buffer.n_tokens = i


def logits_of(
    model: GgufModel, ids_BT: torch.Tensor, threads: int = 1, cache_type: CacheType | None = None
) -> torch.Tensor:
    """(B, T, V) float32 logits of every token, each row a text of its own: as llama.cpp's users have them with such a
    cache, or without one named as exactly as it can."""
    rows, length = ids_BT.shape
    with model.session(1, length, threads, exact=cache_type is None, cache_type=cache_type or "f16") as session:
        logits = np.stack([_row_logits(session, ids_T.tolist()) for ids_T in ids_BT])
    return torch.from_numpy(logits.reshape(rows, length, model.vocab_size))


def window_nats(model: GgufModel, windows_NT: torch.Tensor, threads: int = 1) -> torch.Tensor:
    """Nats of the last T - 1 tokens of each window, summed: (N, T) int64 to (N,) float64, with llama.cpp's defaults."""
    nats = []
    with model.session(1, windows_NT.shape[1], threads) as session:
        for ids_T in windows_NT:
            logits_TV = torch.from_numpy(_row_logits(session, ids_T.tolist()))
            nats.append(functional.cross_entropy(logits_TV[:-1], ids_T[1:], reduction="none").double().sum())
    return torch.stack(nats)


def greedy(
    model: GgufModel, prompt: Sequence[int], new_tokens: int, threads: int = 1, *, exact: bool = False
) -> list[int]:
    """The likeliest next token, `new_tokens` times or until an end of text, which is the last one returned."""
    found: list[int] = []
    with model.session(1, len(prompt) + new_tokens, threads, exact=exact) as session:
        session.read([list(prompt)])
        while len(found) < new_tokens:
            found.append(int(session.logits().argmax()))
            if model.is_end(found[-1]):
                break
            session.read([[found[-1]]])
    return found


def _row_logits(session: LlamaCppSession, ids_T: list[int]) -> np.ndarray[Any, Any]:
    session.clear()
    session.read([ids_T], all_logits=True)
    return np.stack([session.logits(i) for i in range(len(ids_T))])
