"""Is a run collapsing, or learning nothing? Read from its logged lines, with the remedy that fits what is seen.

Asked at every log point by the run itself, and by its report at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

Line = Mapping[str, Any]
FEWEST = 5  # values of a figure before anything is made of it


@dataclass(frozen=True)
class Alarm:
    kind: str  # one alarm of a kind is enough until it has passed
    severe: bool  # the backbone is of no use as it is
    seen: str  # a sentence
    remedy: str  # what usually helps, with the recipe's keys

    def __str__(self) -> str:
        return f"{self.seen} {self.remedy}"


def alarms(lines: Sequence[Line]) -> list[Alarm]:
    """What the last tenth of the logged values (at least five) gives reason to fear, the worst first."""
    return sorted(_found(lines), key=lambda alarm: not alarm.severe)


def thinned(lines: list[Line], most: int = 2000) -> list[Line]:
    """Of the older half every second line where there are more than `most`: a run of weeks logs too many to hold."""
    half = len(lines) // 2
    return [*lines[:half:2], *lines[half:]] if len(lines) > most else lines


def late(lines: Sequence[Line], key: str) -> float:
    """The median of a figure's last tenth; NaN where there is none."""
    values = points(lines, key)
    return median(y for _, y in values[-max(FEWEST, len(values) // 10) :]) if values else math.nan


def points(lines: Sequence[Line], key: str) -> list[tuple[float, float]]:
    """(step, value) of a figure wherever it was logged and is finite."""
    return [(line["step"], line[key]) for line in lines if line.get(key) is not None and math.isfinite(line[key])]


def _found(lines: Sequence[Line]) -> Iterator[Alarm]:
    enough = [key for key in ("prototype_usage", "rankme", "target_entropy") if _count(lines, key) >= FEWEST]
    ceiling = late(lines, "health/max_entropy")
    if "prototype_usage" in enough and late(lines, "health/prototype_usage") < 0.05:
        yield Alarm(
            "usage",
            True,
            "Collapsed: the teacher gives nearly every image the same target.",
            "In a new run: a lower optim.lr and a longer optim.warmup, more objectives.spread.weight, or a higher "
            "teacher_temperature.",
        )
    elif _count(lines, "health/marginal_entropy") >= FEWEST and late(lines, "health/marginal_entropy") < 0.5 * ceiling:
        yield Alarm(
            "marginal",
            True,
            "Collapsing: the mean target is far from using all prototypes alike.",
            "centering=sinkhorn for objectives.dino and objectives.ibot, or a larger batch.size.",
        )
    if "rankme" in enough:
        now, highest = late(lines, "health/rankme"), max(y for _, y in points(lines, "health/rankme"))
        if now < 0.5 * highest:
            yield Alarm(
                "rank",
                now < 0.1 * highest,
                f"Features are losing dimensions: RankMe fell from {highest:.0f} to {now:.0f}.",
                "More objectives.spread.weight or a lower optim.lr; the best checkpoint is the one to export.",
            )
    if "target_entropy" in enough and late(lines, "health/target_entropy") > 0.97 * ceiling:
        yield Alarm(
            "uniform",
            False,
            "Targets are still close to uniform: little is learnt from the images themselves yet.",
            "If that lasts: a lower objectives.dino.teacher_temperature, fewer prototypes, a smaller teacher.momentum.",
        )


def _count(lines: Sequence[Line], key: str) -> int:
    return len(points(lines, key if key.startswith("health/") else f"health/{key}"))
