"""The clock: what a training loop takes its batches from, and what answers the parent between two steps.

A step is the time from handing out a batch to being asked for the next one. So every library runs its own training
loop, whatever that does, and nothing is re-implemented:

    for batch in gate: ...          the loop asks for a batch; the gate waits until the parent wants a step
"""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.connection import Connection
from time import perf_counter, process_time
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Task
from benchmarks.data import map_rows
from benchmarks.memory import PeakMemory


class Stop(BaseException):
    """The parent has seen enough. No Exception, so that no loop swallows it."""


class Skip(Exception):
    """This subject cannot be measured here; the message says why."""


class Gate:
    def __init__(self, connection: Connection, task: Task) -> None:
        self.connection, self.task = connection, task
        self.device = torch.device(task.device)
        self.rows = map_rows(task.rows_file, task.shape.d_in)
        self.held_out = self.rows[-task.shape.batch :].clone().to(self.device)
        self.buffer = torch.empty_like(self.held_out)
        self.memory = PeakMemory(self.device)
        self.answers: dict[str, Callable[[], Any]] = {"fvu": self._fvu, "memory": self.memory.peak_bytes}
        self.before_step: Callable[[], None] = lambda: None
        """Called before each step, off the clock."""
        self.reconstruct: Callable[[Tensor], Tensor] | None = None
        """Raw rows to raw reconstructions, as in training."""
        self.about: dict[str, Any] = {}
        """What the JSON file says about this subject: settings, versions, parameters."""
        self._preparation = 0
        self._started: tuple[float, float] | None = None
        self._announced = False

    def begin(self) -> None:
        """To be called before the SAE is made: memory counts from here."""
        self.memory.begin()

    def describe(self, parameters: nn.Module | int, **about: Any) -> None:
        count = parameters if isinstance(parameters, int) else sum(p.numel() for p in parameters.parameters())
        self.about |= {"parameters": count, **about}

    def prepare(self, batches: int) -> None:
        """Hand out the next batches at once and untimed: the loop estimates a scale from them."""
        self._preparation = batches

    def batch(self, number: int) -> Tensor:
        """The rows of step `number`, in a buffer that is used again."""
        size = len(self.buffer)
        available = (len(self.rows) - size) // size
        start = number % available * size
        return self.buffer.copy_(self.rows[start : start + size])

    def silent(self) -> Tensor:
        """The latents that are declared silent before each step where an auxiliary loss is measured."""
        d_sae = self.task.shape.d_sae
        order = torch.randperm(d_sae, generator=torch.Generator().manual_seed(self.task.seed))
        return order[: int(self.task.silent_share * d_sae)].to(self.device)

    def __iter__(self) -> Gate:
        return self

    def __next__(self) -> Tensor:
        if self._preparation:
            self._preparation -= 1
            return self.batch(self._preparation)
        self._finish_step()
        while True:
            try:
                command, argument = self.connection.recv()
            except EOFError:
                raise Stop from None
            if command == "step":
                return self._start_step(argument)
            answer = self.answers.get(command)
            self.connection.send((command, answer() if answer else None))

    def _start_step(self, number: int) -> Tensor:
        x = self.batch(number)
        self.before_step()
        self._synchronise()
        self._started = perf_counter(), process_time()
        return x

    def _finish_step(self) -> None:
        if self._started is not None:
            self._synchronise()
            seconds, cpu_seconds = perf_counter() - self._started[0], process_time() - self._started[1]
            self._started = None
            self.connection.send(("step", (seconds, cpu_seconds)))
        elif not self._announced:
            self._announced = True
            threads = torch.get_num_threads()
            self.connection.send(("ready", {"torch": torch.__version__, "threads": threads, **self.about}))

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @torch.no_grad()
    def _fvu(self) -> float | None:
        """Fraction of variance unexplained on held-out rows; takes no part in the peak of memory."""
        if self.reconstruct is None:
            return None
        with self.memory.paused():
            x = self.held_out.double()
            error = x - self.reconstruct(self.held_out.clone()).double()
            return (error.square().sum() / (x - x.mean(0)).square().sum()).item()
