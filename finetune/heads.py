"""A head on frozen features by its name: logistic, linear or knn, taught on train and chosen on val."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from finetune import knn, options, probe
from finetune.kinds import Kind
from finetune.metrics import Interval

Array = np.ndarray
GRIDS: dict[str, dict[str, Any]] = {
    **{name: grid for name, (_, grid) in probe.METHODS.items()},
    "knn": {"k": knn.KS, "temperature": knn.TEMPERATURE},
}


def weighed(grid: Mapping[str, Any], method: str, kind: Kind) -> dict[str, Any]:
    """The grid of a result, with how classes weigh in all that is trained; neighbours only vote. `calibrate` reads it:
    probabilities of balanced training are not those of the clinic."""
    return {**grid, **({} if method == "knn" else {"class_weight": probe.weighing(kind)})}


class Head(Protocol):
    """A fitted probe or a set of voters."""

    @property
    def val(self) -> float: ...
    @property
    def choice(self) -> dict[str, Any]: ...
    def predict(self, x: dict[str, Array]) -> Array: ...


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_arguments(parser)
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


def as_dict(interval: Interval) -> dict[str, float]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}
