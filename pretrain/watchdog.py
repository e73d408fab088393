"""A process that hangs ends itself, and says where: a stuck one would hold its GPUs for days."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType


class Watchdog:
    """Ends the process when no `beat` has come for `timeout` seconds, with the stack of every thread on stderr.

    In here, and in C code that never gives Python a turn as well (faulthandler). `tell` adds a line: what the loader's
    workers are at, say.
    """

    def __init__(self, timeout: float, rank: int, tell: Callable[[], str]) -> None:
        self.timeout, self.rank, self.tell = timeout, rank, tell
        self._last, self._what = time.monotonic(), "start"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self.beat("the first step")
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()  # Python ends a thread that outlives it amid its work, which may abort the process
        faulthandler.cancel_dump_traceback_later()

    def beat(self, what: str) -> None:
        """Still alive, and now at `what`."""
        self._last, self._what = time.monotonic(), what
        # Where Python never gets a turn: a little later than `_watch`, which has more to say.
        faulthandler.dump_traceback_later(self.timeout + max(10.0, 0.1 * self.timeout), exit=True, file=2)

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self.timeout / 4)):
            if time.monotonic() - self._last > self.timeout:
                print(
                    f"error: process {self.rank} has been at {self._what} for {self.timeout:.0f} s and ends itself "
                    f"(timeout={self.timeout / 60:g} minutes). {self.tell()}The same command goes on from the newest "
                    "checkpoint. It is at:",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(file=2)
                os._exit(1)
