"""Models that read text piece by piece and keep what they read, in whatever engine; and what of that is timed.

What was read last may be taken back, as speculative decoding does with tokens that were not accepted.

Legend: B texts (rows of the batch), T tokens of a pass, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from llmprune.models.streams import input_device


class Session(Protocol):
    """One model, and its cache of one text or several equally long ones."""

    def clear(self) -> None:
        """Forget what was read."""
        ...

    def read(self, ids_BT: Sequence[Sequence[int]], *, all_logits: bool = False) -> float:
        """Read the next T tokens of each text in one pass; seconds until the logits are there: the last token's, or
        those of all."""
        ...

    def take_back(self, tokens: int) -> None:
        """Forget the last tokens of each text; none is allowed. Not further back than the last call was."""
        ...

    def likeliest(self) -> list[int]:
        """The likeliest next token behind each token of the last pass that has logits, for a batch of one text."""
        ...

    def logits(self, index: int = -1) -> np.ndarray[Any, Any]:
        """(V,) float32 logits of the last pass, counted over all that it has; a copy."""
        ...


class TorchSession:
    """A session in eager torch, to be used in inference mode."""

    def __init__(self, model: PreTrainedModel, *, takes_back: bool = False) -> None:
        """Without `takes_back`, layers with a sliding window forget as they read, and nothing can be taken back."""
        self._model, self._takes_back = model, takes_back
        self.clear()

    def clear(self) -> None:
        """Forget what was read."""
        self._cache = DynamicCache(config=self._model.config)
        if self._takes_back:
            assert all(layer.is_croppable for layer in self._cache.layers), "every family's cache can be cut short"
            # Else a sliding window that is full has lost what would be needed.
            self._cache.activate_past_recording()  # type: ignore[no-untyped-call]

    def read(self, ids_BT: Sequence[Sequence[int]], *, all_logits: bool = False) -> float:
        """Read the next T tokens of each text in one pass; seconds until the logits are there."""
        tokens_BT = torch.tensor(ids_BT, device=input_device(self._model))
        started = time.perf_counter()
        self._logits_BTV = self._model(
            input_ids=tokens_BT,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=tokens_BT.shape[1] if all_logits else 1,
        ).logits
        if self._logits_BTV.device.type != "cpu":
            torch.accelerator.synchronize(self._logits_BTV.device)
        return time.perf_counter() - started

    def take_back(self, tokens: int) -> None:
        """Forget the last tokens of each text."""
        assert self._takes_back or not tokens, "the session was not made to take tokens back"
        if self._takes_back:
            # With 0 too: it is what cuts sliding layers to their window.
            self._cache.crop(-tokens)

    def likeliest(self) -> list[int]:
        """The likeliest next token behind each token of the last pass that has logits."""
        found: list[int] = self._logits_BTV[0].argmax(-1).cpu().tolist()
        return found

    def logits(self, index: int = -1) -> np.ndarray[Any, Any]:
        """(V,) float32 logits of the last pass, counted over all that it has; a copy."""
        logits_V: np.ndarray[Any, Any] = self._logits_BTV.flatten(0, 1)[index].float().cpu().numpy().copy()
        return logits_V


class Timed(Protocol):
    """One model on its way through the workload, in whatever engine."""

    def prefill(self) -> float:
        """Seconds to read the prompt into an empty cache."""
        ...

    def decode_step(self) -> float:
        """Seconds to read one token more."""
        ...

    def read(self, tokens: int) -> float:
        """Seconds to read so many tokens more in one pass, with logits behind each."""
        ...

    def take_back(self, tokens: int) -> None:
        """Forget the last tokens, which are then the next to be read; for runs that were made to."""
        ...


class Generation:
    """A session on its way through the workload's fixed tokens (see `Timed`)."""

    def __init__(self, session: Session, ids_BT: torch.Tensor, prompt_tokens: int) -> None:
        self._session, self._prompt_tokens = session, prompt_tokens
        self._ids_BT: list[list[int]] = ids_BT.cpu().tolist()
        self._position = 0

    def prefill(self) -> float:
        """Seconds to read the prompt into an empty cache."""
        self._session.clear()
        self._position = 0
        return self._pass(self._prompt_tokens, all_logits=False)

    def decode_step(self) -> float:
        """Seconds to read one token more."""
        return self._pass(1, all_logits=False)

    def read(self, tokens: int) -> float:
        """Seconds to read so many tokens more in one pass, with logits behind each."""
        return self._pass(tokens, all_logits=True)

    def take_back(self, tokens: int) -> None:
        """Forget the last tokens."""
        self._session.take_back(tokens)
        self._position -= tokens

    def _pass(self, tokens: int, *, all_logits: bool) -> float:
        ids_BT = [ids_T[self._position : self._position + tokens] for ids_T in self._ids_BT]
        self._position += tokens
        return self._session.read(ids_BT, all_logits=all_logits)
