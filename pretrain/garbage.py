"""Garbage collection at the same step on all processes: one that stops by itself makes all others wait for it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

EVERY = 50  # steps. A step leaves next to nothing, and what was there before the first is not looked at


@contextmanager
def by_hand() -> Iterator[None]:
    """In here nothing is collected but by `collect`."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def collect(step: int) -> None:
    if step % EVERY == 0:
        gc.collect()
