"""Stopping in good order: somebody asks, the step in hand is finished, all processes stop at the same one."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

RESUME_LATER = 85  # exit code of a run that was asked to stop and can go on
PREEMPTED, ENOUGH = 1, 2  # why a run stops: a signal; the probe has not improved for long

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stop:
    """Signals, and the probe, ask for an orderly stop after the step in hand; a second SIGINT stops at once.

    Processes talk of it in every step, over the host's network and without waiting: the answer to a step's question is
    read a step later. So a stop comes one step after it was asked for, and at the same step everywhere.
    """

    def __init__(self) -> None:
        self.reason = 0  # all processes agree on this one
        self._mine = 0
        self._old: dict[int, Any] = {}
        self._several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._group: Any = dist.new_group(backend="gloo") if self._several else None
        self._asked: tuple[torch.Tensor, Any] | None = None  # the question on its way

    def __enter__(self) -> Stop:
        for number in SIGNALS:
            self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._asked = None  # whoever leaves by an error does not wait for it
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def ask(self, reason: int) -> None:
        self._mine = max(self._mine, reason)

    def share(self) -> None:
        """Once a step, by all processes."""
        if not self._several:
            self.reason = self._mine
            return
        if self._asked:
            answer, work = self._asked
            work.wait()
            self.reason = int(answer.item())
        question = torch.tensor(self._mine)
        self._asked = question, dist.all_reduce(question, dist.ReduceOp.MAX, group=self._group, async_op=True)
        if self.reason:  # nobody asks again, so the last question is waited for
            self._asked[1].wait()
            self._asked = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._mine and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.ask(PREEMPTED)
