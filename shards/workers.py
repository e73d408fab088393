"""Who does the packing: a shard is one process's task from its files to its tar, and threads share out its files.

Nothing but names and counts goes between processes: sending the images themselves cost as much as checking them. A
process costs three seconds to start, and a fifth of the work holds Python's lock, so four threads fill one (measured).
"""

from __future__ import annotations

import json
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from shards import scan
from shards.errors import DataError
from shards.options import BuildOptions
from shards.pack import Result, pack
from shards.table import Row
from shards.tars import write_tar

_POLL = 0.2  # seconds between looks at what the processes have done
Tick = Callable[[], None]


@dataclass(frozen=True)
class Task:
    """A shard to write."""

    path: Path
    rows: list[Row]
    note: dict[str, Any]  # what is known of the shard beforehand


@dataclass(frozen=True)
class Work:
    """How every shard is written."""

    options: BuildOptions
    drop: frozenset[str]  # keys to leave out
    threads: int


def write_shard(task: Task, work: Work, tick: Tick) -> None:
    """The tar, and then its note; each is whole or not there. `tick` is called after every file."""
    note, pixels = task.note | {"bad": [], "dropped": 0}, []

    def samples() -> Iterator[dict[str, Any]]:
        for result in packed(task.rows, work):
            note["bad"] += result.bad
            note["dropped"] += result.dropped
            for sample in result.samples:
                pixels.append(sample.pixels)
                yield {"__key__": sample.key, **sample.members}
            tick()

    new = task.path.with_name(task.path.name + ".new")
    write_tar(new, samples())
    os.replace(new, task.path)
    note["about"], note["records"] = scan.shard(task.path)
    for record, digest in zip(note["records"], pixels, strict=True):
        record["pixels"] = digest
    write_note(task.path.with_suffix(".json"), note)


def write_note(path: Path, note: dict[str, Any]) -> None:
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(note, ensure_ascii=False), encoding="utf-8")
    os.replace(new, path)


def packed(rows: list[Row], work: Work) -> Iterator[Result]:
    """`pack` of every row, in order; only so many results wait in memory as keep the threads busy."""
    if work.threads == 1:
        yield from (pack(row, work.options, work.drop) for row in rows)
        return
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(work.threads) as pool:
        try:
            for row in rows:
                waiting.append(pool.submit(pack, row, work.options, work.drop))
                if len(waiting) > 4 * work.threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def write_shards(tasks: list[Task], work: Work, processes: int, progress: Callable[[int], None]) -> None:
    """Write all shards; `progress` is told how many files are done. DataError when a process dies."""
    if processes == 1:
        counts = count(1)
        for task in tasks:
            write_shard(task, work, lambda: progress(next(counts)))
        return
    context = get_context("spawn")
    counter, stop = context.Value("q"), context.Event()
    with ProcessPoolExecutor(processes, context, _begin, (work, counter, stop)) as pool:
        try:
            futures = {pool.submit(_in_process, task) for task in tasks}
            while futures:
                ended, futures = wait(futures, timeout=_POLL)
                progress(counter.value)
                for future in ended:
                    future.result()
        except BrokenProcessPool:
            raise DataError(
                "a process that read images was killed, as happens when memory runs out: give the same command again "
                "with fewer --workers; it goes on where it was"
            ) from None
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


_worker: tuple[Work, Any, Any]  # of this process: work, files done by all, whether to stop


def _begin(work: Work, counter: Any, stop: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one; it says stop
    global _worker
    _worker = work, counter, stop


def _in_process(task: Task) -> None:
    work, counter, stop = _worker

    def tick() -> None:
        with counter.get_lock():
            counter.value += 1
        if stop.is_set():
            raise DataError("stopped")

    write_shard(task, work, tick)
