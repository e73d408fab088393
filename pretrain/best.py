"""The best probe of a run so far: which checkpoint to keep for it, and when to stop waiting for a better one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

METRIC = "probe/linear"


class Best:
    """Follows the in-loop probe's balanced accuracy."""

    def __init__(self, patience: int, lines: Iterable[Mapping[str, Any]] = (), since: int = 0) -> None:
        """patience: probes without a better one after which it is `enough`; 0: never. lines: what was logged before.
        since: the step until which nobody loses patience: crops are still small, or an objective has not started."""
        self.patience, self.since = patience, since
        self.value, self.step, self.waited = -math.inf, 0, 0
        for line in lines:
            self.better(line["step"], line)

    def better(self, step: int, found: Mapping[str, Any]) -> bool:
        """Take note of a probe; is it the best so far?"""
        if METRIC not in found:
            return False
        if found[METRIC] <= self.value:
            self.waited += step > self.since
            return False
        self.value, self.step, self.waited = found[METRIC], step, 0
        return True

    @property
    def enough(self) -> bool:
        return bool(self.patience) and self.waited >= self.patience
