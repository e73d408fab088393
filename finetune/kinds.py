"""What kind of question a labelled set asks, and so by which metrics it is judged and by which one val chooses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from finetune import metrics
from finetune.metrics import Metric
from hybridssl.errors import UserError

Array = np.ndarray
NAMES = ("one-of", "multi-label", "grades")


@dataclass(frozen=True)
class Kind:
    """name: one-of (one class an image) | multi-label | grades (one-of, and the classes are in order)."""

    name: str
    select_by: str
    metrics: dict[str, Metric] = field(repr=False)
    positive: tuple[str, ...] = ()  # the classes that count as disease, for sensitivity and specificity

    @property
    def multi_label(self) -> bool:
        return self.name == "multi-label"

    def point(self, y: Array, scores: Array) -> float:
        """The metric that chooses, on the data as they are. y int [N] or uint8 [N, K], scores [N, K]."""
        return float(self.metrics[self.select_by](y, scores, np.ones((1, len(y))))[0])

    def as_dict(self) -> dict[str, Any]:
        return {"kind": self.name, "select_by": self.select_by, "positive": list(self.positive)}


def choose(name: str, classes: Sequence[str], positive: Sequence[str] = ()) -> Kind:
    """The kind by its name, over `classes` in the order of the scores. UserError for an unknown positive class."""
    if name not in NAMES:
        raise UserError(f"a result on {name} has no class scores: this is for {', '.join(NAMES)}")
    missing = [c for c in positive if c not in classes]
    if missing:
        raise UserError(f"--positive {' '.join(missing)}: no such class here; there are {', '.join(classes)}")
    if name == "multi-label":
        if positive:
            raise UserError(
                "--positive sums the scores of classes that exclude each other; it does not fit --multi-label"
            )
        return Kind(name, "macro_auroc", metrics.MULTI_LABEL)
    chosen, select_by = dict(metrics.ONE_OF), "balanced_accuracy"
    if name == "grades":
        chosen, select_by = {"quadratic_kappa": metrics.quadratic_kappa, **chosen}, "quadratic_kappa"
    if positive:
        chosen |= metrics.disease([list(classes).index(c) for c in positive])
    return Kind(name, select_by, chosen, tuple(positive))


def of(about: dict[str, Any]) -> Kind:
    """The kind that a results.json was judged by."""
    task = about["task"]
    return choose(task["kind"], list(about["data"]["classes"]), task["positive"])
