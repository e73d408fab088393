"""Stopping in good order: a signal asks, the step in hand is finished, all processes stop at the same one."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from hybridssl import dist


class StopSignal:
    """SIGINT and SIGTERM ask for an orderly stop after the step in hand; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.asked = False  # all processes agree on this one
        self._mine = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._mine and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._mine = True

    def share(self, now: bool) -> None:
        """All processes stop at the same step, whichever was asked. Several talk of it only when `now`, at log points:
        for the answer the host waits for its device."""
        if now or dist.world_size() == 1:
            self.asked = not dist.all_agree(not self._mine)
