"""A model's passes over tensors that never move: what a CUDA graph replays, and torch.compile compiles but twice.

Eager torch launches every kernel of a pass from Python. On a GPU, at a small batch, that takes longer than the kernels
do: narrower blocks then save nothing, and only blocks that are gone do. Engines serve captured graphs, so that is what
is timed. A graph holds addresses, and Python's decisions, as they were when it was captured. So token ids and cache
stay where they are, and the position is a number on the device. No pass changes it: to run one twice is to run it once.

transformers' StaticCache would do, but for layers with a sliding window: these count tokens in Python
(`cumulative_length_int`, as of 5.23), which a graph freezes, and shift the whole window with every token.

Legend: B rows of the batch, T tokens of a pass, V vocabulary, H KV heads, S slots of a layer's cache, E head dim.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import Cache, StaticLayer

from llmprune.core.errors import ModelError, shortened

WARM_UPS = 2
"""Runs of a pass before it is captured: what libraries allocate and choose at first must not end up in the graph."""

Pass = Callable[[], torch.Tensor]
"""Runs over tensors that stay where they are, and gives logits (B, T, V): of all tokens, or of a prompt's last."""
Recorder = Callable[[Pass], Pass]
"""Makes a pass what is timed: itself, or a graph of it."""


def as_it_is(run: Pass) -> Pass:
    """Record nothing."""
    return run


def cuda_graphs(device: torch.device) -> Recorder:
    """Capture passes of one model as CUDA graphs, which share their memory: one runs at a time.

    The recorder raises ModelError on a pass that cannot be captured.
    """
    stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()  # type: ignore[no-untyped-call]

    def record(run: Pass) -> Pass:
        graph = torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream(device))
        # Around the capture too: one that fails leaves its stream the current one.
        with torch.cuda.device(device), torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                run()
            try:
                with torch.cuda.graph(graph, pool=pool, stream=stream):
                    logits_BTV = run()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise ModelError(
                    "a pass that is timed as a CUDA graph must not wait for numbers from the GPU, and this model's "
                    f"does, or does what else cannot be captured ({shortened(error)}); time it without graphs: "
                    "workload.graphs=false (bench: --no-graphs)"
                ) from error
        torch.cuda.current_stream(device).wait_stream(stream)

        def replay() -> torch.Tensor:
            graph.replay()
            return logits_BTV

        return replay

    return record


class StaticGeneration:
    """One model in torch, on its way through the workload, over tensors that never move (see `Timed`).

    To be used in inference mode, as all timing is.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        ids_BT: torch.Tensor,
        prompt_tokens: int,
        record: Recorder = as_it_is,
        *,
        compiled: bool = False,
        takes_back: bool = False,
    ) -> None:
        """With `takes_back`, layers with a sliding window keep the whole text: a ring that is full has no place for
        tokens that may have to go again."""
        self._passes, self._record = _Passes(model, ids_BT, prompt_tokens, rings=not takes_back), record
        self._tokens: dict[int, Pass] = {}
        if compiled:
            self._passes.model = torch.compile(model, dynamic=False)
        self._prompt_tokens, self._device = prompt_tokens, ids_BT.device

    def prefill(self) -> float:
        """Seconds to read the prompt."""
        self._passes.position_1.fill_(self._prompt_tokens)
        return self._seconds(self._prompt)

    def decode_step(self) -> float:
        """Seconds to read one token more."""
        return self.read(1)

    def read(self, tokens: int) -> float:
        """Seconds to read so many tokens more in one pass, with logits behind each; several need `takes_back`."""
        if tokens not in self._tokens:
            self._tokens[tokens] = self._record(self._passes.reader_of(tokens))
        seconds = self._seconds(self._tokens[tokens])
        self._passes.position_1.add_(tokens)
        return seconds

    def take_back(self, tokens: int) -> None:
        """Forget the last tokens: their slots are overwritten by the next that are read, and no pass sees them."""
        self._passes.position_1.sub_(tokens)

    @cached_property
    def _prompt(self) -> Pass:
        return self._record(self._passes.read_prompt)

    def _seconds(self, run: Pass) -> float:
        self._wait()
        started = time.perf_counter()
        self.logits_BTV = run()
        """Of the pass that ran last, until the next one."""
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)


class _Passes:
    """A model, its cache, and the tensors that its passes read; apart from what records them, lest they hold each
    other: nothing is collected while models are timed."""

    def __init__(self, model: PreTrainedModel, ids_BT: torch.Tensor, prompt_tokens: int, *, rings: bool) -> None:
        self.model: Any = model
        self.position_1 = torch.full((1,), prompt_tokens, device=ids_BT.device)
        """Of the token that is read next."""
        self._ids_BT = ids_BT
        self._prompt_T = torch.arange(prompt_tokens, device=ids_BT.device)
        self._rings, self._cache = rings, _SlotCache(model, ids_BT.shape[1], rings=rings)
        # The cache takes its shapes from the first pass: not one that is compiled, which would be so once more.
        with torch.inference_mode():
            self.read_prompt()

    def read_prompt(self) -> torch.Tensor:
        return self._read(self._prompt_T, into_empty=True)

    def reader_of(self, tokens: int) -> Pass:
        """A pass over so many tokens from the position on."""
        assert tokens == 1 or not self._rings, "in a ring, a later token would overwrite what an earlier one attends to"
        offsets_T = torch.arange(tokens, device=self.position_1.device)
        return lambda: self._read(self.position_1 + offsets_T, into_empty=False)

    def _read(self, positions_T: torch.Tensor, *, into_empty: bool) -> torch.Tensor:
        self._cache.reading.positions_T, self._cache.reading.into_empty = positions_T, into_empty
        logits_BTV: torch.Tensor = self.model(
            input_ids=self._ids_BT.index_select(1, positions_T),
            position_ids=positions_T[None],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1 if into_empty else len(positions_T),
        ).logits
        return logits_BTV


class _Reading:
    """Which tokens a pass reads, as the layers of a cache have to know."""

    positions_T: torch.Tensor
    into_empty: bool
    """Whether nothing stands in the cache: a prompt attends to itself alone, in the kernels that are made for it."""


class _SlotCache(Cache):
    """A cache for `length` tokens, in the layers that transformers would give the model; those with a sliding window
    are rings as long as it, or hold everything."""

    def __init__(self, model: PreTrainedModel, length: int, *, rings: bool) -> None:
        self.reading = _Reading()
        stock = StaticCache(config=model.config, max_cache_len=length).layers
        super().__init__(
            [
                _Slots(layer, self.reading, layer.max_cache_len if rings else length)
                if isinstance(layer, StaticLayer)
                else layer
                for layer in stock
            ]
        )

    def get_query_offset(self, layer_idx: int = 0) -> torch.Tensor | int:  # type: ignore[override]
        """What masks take for the position of the first token: with it, all slots are seen that hold something.

        In a full ring that is every slot, as if the token stood at its end.
        """
        if self.reading.into_empty:
            return 0
        slots, _ = self.get_mask_sizes(1, layer_idx)
        return self.reading.positions_T[:1].clamp(max=slots - 1)


class _Slots(StaticLayer):  # type: ignore[no-untyped-call]
    """Keys and values (B, H, S, E) of one layer: position p in slot p, or p modulo S where a window slides (a ring)."""

    def __init__(self, stock: StaticLayer, reading: _Reading, slots: int) -> None:
        super().__init__(max_cache_len=slots)
        self.is_sliding, self._reading = stock.is_sliding, reading

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the tokens' keys and values, and return all that they attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        last = slice(-self.max_cache_len, None)
        slots_T = self._reading.positions_T[last]
        if self.is_sliding:
            slots_T = slots_T % self.max_cache_len
        for kept_BHSE, states_BHTE in ((self.keys, key_states), (self.values, value_states)):
            assert kept_BHSE is not None
            kept_BHSE.index_copy_(2, slots_T, states_BHTE[:, :, last])
        if self._reading.into_empty:
            return key_states, value_states
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that `update` returns for so many tokens, and the position of the first."""
        return query_length if self._reading.into_empty else self.max_cache_len, 0

    def get_seq_length(self) -> int:
        """0, always: models ask for it to number tokens, whose positions are given; OPT would have it in Python."""
        return 0
