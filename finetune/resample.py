"""Statistics and their differences over the same resampled groups, with intervals and p-values.

`metrics.bootstrap` answers "how large is it"; this file answers "is it larger than that": the draws are kept, so that
two statistics that were computed on the same resamples can be subtracted, which is what makes a comparison paired.

A few groups cannot show much however often they are drawn: of G groups that all differ the same way, chance alone does
so in one case of 2^(G - 1). No p-value is below that (`least_p`), one group has no interval, and a part of the images
with fewer groups than GROUPS is not judged by itself (`few_groups`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from rich.progress import Progress

from finetune.metrics import RESAMPLES, Interval, group_weights
from shards.terminal import Terminal

Array = np.ndarray
Statistic = Callable[[Array], Array]  # image weights [R, N] -> [R]
GROUPS = 10  # patients or lesions that a part of the images (a subgroup, a hospital) needs to be judged by itself


@dataclass(frozen=True)
class Draws:
    """A statistic on the data as they are, and on every resample (the same resamples for all of one `resample`)."""

    value: float
    drawn: Array  # float64 [R]; NaN where a resample does not allow the statistic
    floor: float = 0.0  # the smallest p that so few groups can show: `least_p`

    def __sub__(self, other: Draws) -> Draws:
        return Draws(self.value - other.value, self.drawn - other.drawn, max(self.floor, other.floor))

    @property
    def interval(self) -> Interval:
        """95 % percentile interval, as in `metrics.bootstrap`; NaN where there is but one group."""
        drawn = self.drawn[np.isfinite(self.drawn)]
        known = len(drawn) and self.floor < 1
        low, high = np.percentile(drawn, [2.5, 97.5]) if known else (np.nan, np.nan)
        return Interval(self.value, float(low), float(high))

    @property
    def reflected(self) -> Interval:
        """95 % basic interval [2v - q97.5, 2v - q2.5] (Davison & Hinkley 1997, section 5.2).

        For statistics that resampling inflates, as it does every calibration error: a mean of absolute deviations grows
        with the noise that a resample adds, so its percentile interval lies above the value itself.
        """
        there = self.interval
        return Interval(self.value, 2 * self.value - there.high, 2 * self.value - there.low)

    @property
    def p(self) -> float:
        """Two-sided bootstrap p-value of "it is 0": twice the smaller share of resamples on either side of 0, the data
        themselves counted as one of them, so that it is never 0 (Davison & Hinkley 1997, section 4.2), and not below
        what so few groups can show (`floor`)."""
        drawn = self.drawn[np.isfinite(self.drawn)]
        if not len(drawn) or not np.isfinite(self.value):
            return 1.0
        side = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
        return min(1.0, max(self.floor, 2 * (side + 1) / (len(drawn) + 1)))


def resample(
    statistics: Mapping[str, Statistic], groups: Array, resamples: int = RESAMPLES, seed: int = 0, doing: str = ""
) -> dict[str, Draws]:
    """Every statistic on the data and on the same resamples of whole groups [N]. doing: what the progress bar says."""
    ones, drawn = np.ones((1, len(groups))), {name: [] for name in statistics}
    bars = Progress(console=Terminal(stderr=True), transient=True, disable=not doing)
    with bars as progress, np.errstate(all="ignore"):
        bar = progress.add_task(doing, total=resamples * len(statistics))
        for weight in group_weights(groups, resamples, seed):
            for name, statistic in statistics.items():
                drawn[name].append(statistic(weight))
                progress.advance(bar, len(weight))
        floor = least_p(groups)
        return {name: Draws(float(f(ones)[0]), np.concatenate(drawn[name]), floor) for name, f in statistics.items()}


def least_p(groups: Array) -> float:
    """2^(1 - G) for G distinct groups: the smallest two-sided p of a test that flips the signs of their differences,
    where all point one way. Resamples alone know of no such floor: all of them agree as soon as the groups do."""
    return 2.0 ** (1 - len(np.unique(groups)))


def few_groups(groups: Array, part: Array, images: int) -> str:
    """Why the images `part` (positions or a mask) of `groups` [N] are of too few patients or lesions to be judged by
    themselves; "" where they are not, or where every image is a group of its own.

    images: how many images were asked for; where these are fewer than GROUPS, so many groups do.
    """
    own, least = groups[part], min(GROUPS, images)
    count = len(np.unique(own))
    if count >= least or len(np.unique(groups)) == len(groups):
        return ""
    return f"{len(own):,} images of {count:,} patients or lesions, fewer than {least}"


def mean(draws: Sequence[Draws]) -> Draws:
    """The mean of statistics on the same resamples."""
    value = float(np.mean([draw.value for draw in draws]))
    return Draws(value, np.mean([draw.drawn for draw in draws], axis=0), max(draw.floor for draw in draws))


def mean_of_drawn(draws: Sequence[Draws], seed: int = 0) -> Draws:
    """The mean of a statistic over S draws of the labels, resampled over these draws as well as over the groups.

    The two are drawn independently (the pigeonhole bootstrap of Owen, 0712.1111). Of equal S and `seed` the same draws
    are picked, so that differences are paired in both. One draw comes back as it is.
    """
    each = np.stack([draw.drawn for draw in draws], axis=1)  # [R, S]
    picked = np.random.default_rng(seed).integers(len(draws), size=each.shape)
    return replace(mean(draws), drawn=np.take_along_axis(each, picked, axis=1).mean(1))


def enough(comparisons: int, least: int = RESAMPLES) -> int:
    """Resamples for p-values that `holm` adjusts for so many comparisons: the smallest there is, 2 / (resamples + 1),
    stays below .01 then. With a fixed number of resamples, many comparisons could never show anything."""
    return max(least, 200 * comparisons)


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted for their number, in the order given: Holm (1979), the sequentially rejective Bonferroni test.

    Rejecting where the adjusted value is at most alpha keeps the chance of any false rejection below alpha, whatever
    the dependence between the tests.
    """
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    steps = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(steps, 1)
    return adjusted.tolist()
