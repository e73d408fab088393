"""Metrics with intervals. The resampling unit is the group (patient, lesion), never the image.

Every metric takes image weights [R, N], one row a resample (a row of ones is the data as it is), and returns [R], so a
thousand resamples are a few matrix products. The definitions are scikit-learn's with `sample_weight`, to which the
tests hold them; a class that a resample (or the test set) does not contain is left out of that resample's mean, and a
metric that no class allows is NaN there and not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
RESAMPLES = 1000
BLOCK = 2**22  # numbers, 32 MiB: of weights of resamples that are held at once


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % percentile bootstrap interval; NaN ends where there is none, as of a single group."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return self._told(".3f")

    def signed(self) -> str:
        """As a difference is written."""
        return self._told("+.3f")

    def _told(self, form: str) -> str:
        ends = f"[{self.low:{form}}, {self.high:{form}}]" if np.isfinite(self.low) else "(no interval)"
        return f"{self.value:{form}} {ends}"


# -- metrics: y int [N] or uint8 [N, K], scores float [N, K], weight [R, N] -> [R] -------------------------------------


def accuracy(y: Array, scores: Array, weight: Array) -> Array:
    return weight @ (scores.argmax(1) == y) / weight.sum(1)


def balanced_accuracy(y: Array, scores: Array, weight: Array) -> Array:
    """Mean recall over the classes that occur."""
    hit, true, _ = _counts(y, scores, weight)
    return _mean(_ratio(hit, true))


def macro_f1(y: Array, scores: Array, weight: Array) -> Array:
    """Mean F1 over the classes that occur (one that is predicted but does not occur lowers the others)."""
    hit, true, said = _counts(y, scores, weight)
    return _mean(np.where(true > 0, _ratio(2 * hit, true + said), np.nan))


def macro_auroc(y: Array, scores: Array, weight: Array) -> Array:
    """Mean one-against-rest area under the ROC curve over the classes with both sides present; ties count half."""
    return _mean(_each_class(_auroc, y, scores, weight))


def average_precision(y: Array, scores: Array, weight: Array) -> Array:
    """Mean one-against-rest average precision over the classes that occur."""
    return _mean(_each_class(_precision, y, scores, weight))


def quadratic_kappa(y: Array, scores: Array, weight: Array) -> Array:
    """Cohen's kappa with quadratic weights over the classes as ordered grades (Cohen 1968)."""
    count = scores.shape[1]
    said, grades = scores.argmax(1), np.arange(count)
    distance = (grades[:, None] - grades) ** 2 / max(count - 1, 1) ** 2
    true, told = weight @ (y[:, None] == grades), weight @ (said[:, None] == grades)  # [R, K]
    chance = np.einsum("ri,rj,ij->r", true, told, distance) / weight.sum(1)
    return 1 - _ratio(weight @ distance[y, said], chance)


def disease(positive: Sequence[int]) -> dict[str, Metric]:
    """Sensitivity and specificity of "diseased" = the summed score of the classes `positive` is above a half, and the
    area under the ROC curve of that sum."""
    classes = list(positive)

    def sensitivity(y: Array, scores: Array, weight: Array) -> Array:
        ill, said = np.isin(y, classes), scores[:, classes].sum(1) > 0.5
        return _ratio(weight @ (ill & said), weight @ ill)

    def specificity(y: Array, scores: Array, weight: Array) -> Array:
        well, said = ~np.isin(y, classes), scores[:, classes].sum(1) > 0.5
        return _ratio(weight @ (well & ~said), weight @ well)

    def disease_auroc(y: Array, scores: Array, weight: Array) -> Array:
        return _auroc(np.isin(y, classes), scores[:, classes].sum(1), weight)

    return {"sensitivity": sensitivity, "specificity": specificity, "disease_auroc": disease_auroc}


Metric = Callable[[Array, Array, Array], Array]
ONE_OF: dict[str, Metric] = {
    "balanced_accuracy": balanced_accuracy,
    "macro_f1": macro_f1,
    "macro_auroc": macro_auroc,
    "average_precision": average_precision,
    "accuracy": accuracy,
}
MULTI_LABEL: dict[str, Metric] = {"macro_auroc": macro_auroc, "average_precision": average_precision}


# -- resampling -------------------------------------------------------------------------------------------------------


def group_weights(groups: Array, resamples: int = RESAMPLES, seed: int = 0) -> Iterator[Array]:
    """Blocks of [r, N], `resamples` rows in all: how often each image is in each resample, when as many groups as
    there are get drawn with replacement. In blocks, so that memory does not grow with resamples x images."""
    _, member = np.unique(groups, return_inverse=True)
    count, rng = int(member.max()) + 1, np.random.default_rng(seed)
    block = max(1, BLOCK // len(member))
    for start in range(0, resamples, block):
        draws = rng.integers(count, size=(min(block, resamples - start), count))
        times = np.zeros(draws.shape)
        np.add.at(times, (np.arange(len(draws))[:, None], draws), 1)
        yield times[:, member]


def bootstrap(
    y: Array, scores: Array, groups: Array, metrics: dict[str, Metric], resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Interval]:
    """Every metric with its interval over groups. scores [N, K], or [S, N, K] for S seeds, whose mean is reported.

    With one group the ends are NaN: every resample is the data themselves, and an interval without width would say that
    nothing is left to chance."""
    runs = scores if scores.ndim == 3 else scores[None]

    def mean_over_runs(metric: Metric, weight: Array) -> Array:
        return np.mean([metric(y, run, weight) for run in runs], axis=0)

    ones, drawn = np.ones((1, len(y))), {name: [] for name in metrics}
    for weight in group_weights(groups, resamples, seed):
        for name, metric in metrics.items():
            drawn[name].append(mean_over_runs(metric, weight))
    several = len(np.unique(groups)) > 1
    return {n: _interval(mean_over_runs(m, ones)[0], np.concatenate(drawn[n]), several) for n, m in metrics.items()}


def _interval(value: float, drawn: Array, several: bool) -> Interval:
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.percentile(drawn, [2.5, 97.5]) if several and len(drawn) else (np.nan, np.nan)
    return Interval(float(value), float(low), float(high))


# -- arithmetic -------------------------------------------------------------------------------------------------------


def _ratio(part: Array, whole: Array) -> Array:
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=whole > 0)


def _mean(values: Array) -> Array:
    """[R, K] -> [R], over the entries that are not NaN; NaN where there are none."""
    there = ~np.isnan(values)
    return _ratio(np.where(there, values, 0).sum(1), there.sum(1))


def _counts(y: Array, scores: Array, weight: Array) -> tuple[Array, Array, Array]:
    """[R, K] each: weight of right predictions of a class, of its images, of predictions of it."""
    classes = np.arange(scores.shape[1])
    true, said = y[:, None] == classes, scores.argmax(1)[:, None] == classes
    return weight @ (true & said), weight @ true, weight @ said


def _each_class(metric: Metric, y: Array, scores: Array, weight: Array) -> Array:
    """[R, K]: the binary metric of every class against the rest."""
    positive = y.astype(bool) if y.ndim == 2 else y[:, None] == np.arange(scores.shape[1])
    return np.stack([metric(positive[:, k], scores[:, k], weight) for k in range(scores.shape[1])], axis=1)


def _steps(positive: Array, score: Array, weight: Array) -> tuple[Array, Array]:
    """Weights of positives and negatives [R, T] at each of the T distinct scores, highest first."""
    order = np.argsort(-score, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(score[order]) != 0])
    sorted_weight = weight[:, order]
    true = positive[order]
    return tuple(np.add.reduceat(sorted_weight * side, starts, axis=1) for side in (true, ~true))  # type: ignore


def _auroc(positive: Array, score: Array, weight: Array) -> Array:
    up, down = _steps(positive, score, weight)
    above = np.cumsum(up, axis=1) - up / 2  # positives above each negative, those at the same score by half
    return _ratio((above * down).sum(1), up.sum(1) * down.sum(1))


def _precision(positive: Array, score: Array, weight: Array) -> Array:
    up, down = _steps(positive, score, weight)
    precision = np.nan_to_num(_ratio(np.cumsum(up, 1), np.cumsum(up + down, 1)))
    return _ratio((precision * up).sum(1), up.sum(1))
