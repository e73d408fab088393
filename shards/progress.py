"""How far a long task is: a bar where someone watches, else a line now and then, as the log of a cluster wants it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from shards.terminal import Terminal

Tick = Callable[[int, int], None]  # done, of how many
_EVERY = 30.0  # seconds between lines


@contextmanager
def bar(what: str) -> Iterator[Tick]:
    """`with bar("packing") as tick`: call `tick(done, total)`. On stderr, so that the output stays clean."""
    console = Terminal(stderr=True)
    if not console.is_terminal:
        yield _lines(what)
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _lines(what: str, clock: Callable[[], float] = time.monotonic) -> Tick:
    start: list[float] = []  # time, count and total at the first call: what was there already took no time
    said = clock()

    def tick(done: int, total: int) -> None:
        nonlocal said
        now = clock()
        if not start or total != start[2]:  # another total is another part of the task
            start[:] = now, done, total
        if now - said < _EVERY or done <= start[1]:
            return
        said, rate = now, (done - start[1]) / (now - start[0])
        left = (total - done) / rate / 60
        print(f"{what}: {done:,} of {total:,}, {rate:,.1f} a second, {left:,.1f} min left", file=sys.stderr, flush=True)

    return tick
