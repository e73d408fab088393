"""Schedules: pure functions of progress, the share of the run that is done (0 at the first step, 1 after the last)."""

from __future__ import annotations

import math


def cosine(start: float, end: float, progress: float) -> float:
    """Half a cosine from start to end (Loshchilov & Hutter, 1608.03983, eq. 5, without restarts)."""
    progress = min(max(progress, 0.0), 1.0)
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))


def warmup_cosine(peak: float, final: float, warmup: float, progress: float) -> float:
    """Linear from 0 to peak over the share `warmup` of the run, then a cosine to final (Goyal et al., 1706.02677)."""
    if progress < warmup:
        return peak * progress / warmup
    return cosine(peak, final, (progress - warmup) / max(1.0 - warmup, 1e-12))


def ramp(share: float, progress: float, start: float = 0.0) -> float:
    """0 to 1, linearly over `share` of the run from `start` on; 1 throughout for share 0."""
    return 1.0 if share <= 0 else min(max((progress - start) / share, 0.0), 1.0)


def first_step(share: float, steps: int) -> int:
    """The first step of a run of `steps` whose progress, step / steps, has reached `share`."""
    near = math.floor(share * steps)
    return next(step for step in range(max(near - 1, 0), near + 3) if step / steps >= share)
