"""What the studies of hospitals share: a head by its name, and a result with figures beyond one score a test image."""

from __future__ import annotations

import argparse
from typing import Any, Protocol

import numpy as np

from finetune import knn, probe, results, task
from finetune.kinds import Kind
from finetune.metrics import Interval

Array = np.ndarray
GRIDS: dict[str, dict[str, Any]] = {
    **{name: grid for name, (_, grid) in probe.METHODS.items()},
    "knn": {"k": knn.KS, "temperature": knn.TEMPERATURE},
}


class Head(Protocol):
    """A fitted probe or a set of voters."""

    @property
    def val(self) -> float: ...
    @property
    def choice(self) -> dict[str, Any]: ...
    def predict(self, x: dict[str, Array]) -> Array: ...


def add_arguments(parser: argparse.ArgumentParser) -> None:
    task.add_arguments(parser)
    more = "what is fitted on the frozen features (logistic)"
    parser.add_argument("--methods", nargs="+", choices=GRIDS, default=["logistic"], help=more)


def fit(
    method: str, x: dict[str, Array], y: Array, train: Array, val: Array, kind: Kind, classes: int, seed: int
) -> Head:
    """A head of GRIDS, taught by the rows `train` and chosen on the rows `val`."""
    if method == "knn":
        return knn.fit(x, y, train, val, kind, classes)
    return probe.fit(x, y, train, val, kind, classes, seed, method)


def take(x: dict[str, Array], rows: Array) -> dict[str, Array]:
    """The rows of every kind of feature."""
    return {kind: values[rows] for kind, values in x.items()}


def write(
    work: task.Task,
    protocol: str,
    found: dict[str, Interval],
    selected: dict[str, Any],
    labels_used: dict[str, list[int]],
    arrays: dict[str, Array],
    notes: list[str],
    **more: Any,
) -> results.Result:
    """OUT/PROTOCOL/results.json and the table on the terminal; more: further entries."""
    split = "val" if "val" in work.rows else f"val, carved out of train: {task.CARVED:.0%} by groups"
    about = work.about(protocol) | {
        "selected": {"split": split, "by": work.kind.select_by, **selected},
        "cost": {"seconds": work._seconds(), "labels_used": labels_used, "peak_memory_mb": task._peak_mb()},
        "notes": notes,
        **more,
    }
    path = results.write(work.args.out / protocol, about, found, **arrays)
    task.show(protocol, about, found, path)
    return results.read(path)


def as_dict(interval: Interval) -> dict[str, float]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}
