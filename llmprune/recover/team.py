"""The processes that train one child together, as torchrun, or `accelerate launch` on GPUs, starts them: each learns
from its share of a step's windows, all take the same step, and the first one decides and writes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, reduce
from torch import nn
from torch.distributed.tensor import DTensor

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """One process among those that train together."""

    rank: int = 0
    size: int = 1
    device: str | None = None
    """Where this process computes, such as "cuda:1"; None leaves that to the recipe."""

    @classmethod
    def of_launch(cls, device: str) -> Team:
        """The team that this process was started in; `device` is what the recipe names."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return ALONE
        on_cpu = device == "cpu" or not torch.cuda.is_available()
        with warnings.catch_warnings():
            # That it shares the cores out among its processes, as it should.
            warnings.filterwarnings("ignore", message="OMP_NUM_THREADS")
            state = PartialState(cpu=on_cpu)
        return cls(state.process_index, state.num_processes, "cpu" if on_cpu else str(state.device))

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, rows: Sequence[int]) -> Sequence[int]:
        """Those of a step's windows that this process learns from."""
        return rows[self.rank :: self.size]

    def add_up(self, weights: Iterable[nn.Parameter]) -> None:
        """Make every gradient the sum of all processes' gradients."""
        for weight in weights if self.size > 1 else ():
            # What is spread over the processes is summed already.
            if weight.grad is not None and not isinstance(weight.grad, DTensor):
                weight.grad = reduce(weight.grad, "sum")

    def total(self, value: float) -> float:
        """The sum of what every process found."""
        if self.size == 1:
            return value
        return float(reduce(torch.tensor(value, dtype=torch.float64, device=self.device), "sum"))

    def agreed(self, find: Callable[[], T]) -> T:
        """What the first process finds, on all of them."""
        if self.size == 1:
            return find()
        told: list[Any] = broadcast_object_list([find() if self.leads else None])
        found: T = told[0]
        return found

    def together(self, find: Callable[[], T]) -> T:
        """What all find together, since each may have a part of the model only; as the first process has it."""
        found = find()
        return self.agreed(lambda: found)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            PartialState().wait_for_everyone()

    def after_the_first(self, make: Callable[[], T]) -> T:
        """What each process makes, or finds that the first one has made: the others wait for it."""
        if self.leads:
            made = make()
            self.wait()
            return made
        self.wait()
        return make()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        # A process that ends while others still speak to it would be an error there; after one, nobody waits.
        if self.size > 1:
            if error is None:
                self.wait()
            PartialState().destroy_process_group()


ALONE = Team()
