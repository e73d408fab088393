"""The loader as the loop takes it: batches from any position on, and the death of a worker told with its sample."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from multiprocessing import active_children
from typing import Any

import torch
from torch.utils.data import DataLoader, get_worker_info

from hybridssl.types import Batch
from shards.errors import DataError
from shards.index import Index
from shards.stream import SampleDataset

DYING = 2.0  # seconds that a process whose pipe has closed is given to end


class Watched(SampleDataset):
    """Tells, to the process that started the worker, which position it is at."""

    at: torch.Tensor  # int64 [workers, 2], shared: process, position

    def __getitem__(self, position: int) -> tuple[Any, list[dict[str, str]]]:
        here = get_worker_info()
        if here:
            self.at[here.id, 0], self.at[here.id, 1] = os.getpid(), position
        return super().__getitem__(position)


class Batches:
    """The stream as the loop takes it: micro-batches of this rank, to be begun at any global position.

    Raises DataError, with the sample at which it was, where a batch does not come because a worker has died. As a
    context it leaves no worker behind.
    """

    def __init__(self, begin: Callable[[int], DataLoader], index: Index) -> None:
        """begin: a loader from a position on, whose dataset is Watched."""
        self._loader, self.index = begin, index
        self._dataset: Watched | None = None
        self._next: Iterator[Batch] = iter(())
        self._workers: list[Any] = []  # processes

    def begin(self, position: int) -> None:
        """The next batch is that of global `position`."""
        self._next = iter(())  # the workers end with their iterator
        others = {child.pid for child in active_children()}
        loader = self._loader(position)
        self._dataset, self._next = loader.dataset, iter(loader)  # type: ignore[assignment]
        self._workers = [child for child in active_children() if child.pid not in others]
        # torch would raise the death of a worker wherever this process happens to be: amid a checkpoint, or while it
        # leaves a context. Whoever waits for its batch asks whether it lives, so it is told there and nowhere else.
        with suppress(ValueError):  # not the main thread: torch's handler was not set either
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def __next__(self) -> Batch:
        try:
            return next(self._next)
        except (RuntimeError, OSError, EOFError) as error:  # torch's words, or a pipe that closed half-way
            dead = self._dead()
            if not dead:
                raise
            words = "; ".join(f"process {worker.pid}, {_cause(worker.exitcode)}" for worker in dead)
            raise DataError(
                f"a worker of the loader died: {words}. {self.whereabouts([worker.pid for worker in dead])}Out of "
                "memory? Take fewer data.workers, or smaller images (`python -m shards build --short-side`). The same "
                "command goes on from the newest checkpoint"
            ) from error

    def _dead(self) -> list[Any]:
        until = time.monotonic() + DYING
        while self._workers:
            dead = [worker for worker in self._workers if worker.exitcode is not None]
            if dead or time.monotonic() > until:
                return dead
            time.sleep(0.05)
        return []

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self._next = iter(())
        for worker in self._workers:  # one that hangs would hold the exit of this process
            worker.kill()

    def whereabouts(self, pids: Collection[int] = ()) -> str:
        """What the workers (of `pids`, or all of them) read last: a sentence, or nothing."""
        found = []
        for pid, position in self._dataset.at.tolist() if self._dataset is not None else ():
            if position >= 0 and (pid in pids or not pids):
                number = self._dataset.order(position)[1]  # type: ignore[union-attr]
                found.append(f"{self.index.key(number)} of {self.index.shard_of(number)[0]}")
        return f"The loader was at {', '.join(found)}. " if found else ""


def _cause(code: int) -> str:
    """An exit code in words."""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
