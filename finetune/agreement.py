"""Do two ways of measuring agree? Bland-Altman limits, intraclass correlation, Lin's concordance, plain correlation.

Two kinds of interval. `bland_altman` and `icc` give those of the papers, which take the cases as independent;
`statistics` are made to be resampled by whole groups, as the rest of the evaluation is, and are what to report where
patients have several images.
A correlation alone is no agreement: a method that reads twice the truth correlates perfectly with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats

from finetune.metrics import Interval

Array = np.ndarray
LIMIT = 1.96  # standard deviations of the differences that hold 95 % of them
LEVEL = 0.975


@dataclass(frozen=True)
class BlandAltman:
    """Differences measured - truth: their mean, and the limits between which 95 % of them lie."""

    n: int
    sd: float
    bias: Interval
    lower: Interval
    upper: Interval


def bland_altman(measured: Array, truth: Array) -> BlandAltman:
    """Bias and limits of agreement of [N] pairs, each with its 95 % interval (Bland & Altman 1986, Lancet 327:307).

    Intervals by Student's t with n - 1 degrees of freedom; the variance of a limit is s² (1 / n + 1.96² / (2 (n - 1)))
    (Bland & Altman 1999, Stat Methods Med Res 8:135, section 2.1; the 3 s² / n of 1986 rounds it). Pairs are taken as
    independent. Raises ValueError for fewer than two pairs.
    """
    difference = np.asarray(measured, dtype=float) - np.asarray(truth, dtype=float)
    n = len(difference)
    if n < 2:
        raise ValueError("limits of agreement need two pairs at least")
    bias, sd, t = float(difference.mean()), float(difference.std(ddof=1)), stats.t.ppf(LEVEL, n - 1)
    of_bias, of_limit = t * sd / n**0.5, t * sd * (1 / n + LIMIT**2 / (2 * (n - 1))) ** 0.5

    def around(value: float, half: float) -> Interval:
        return Interval(float(value), float(value - half), float(value + half))

    ends = (around(bias + sign * LIMIT * sd, of_limit) for sign in (-1, 1))
    return BlandAltman(n, sd, around(bias, of_bias), *ends)


def icc(ratings: Array, absolute: bool = True) -> Interval:
    """Intraclass correlation of single ratings [N subjects, K judges], with its 95 % interval from the F distribution.

    absolute: ICC(2,1), judges are a sample of all judges and their bias counts; else ICC(3,1), these judges only, and a
    constant bias does not count. Shrout & Fleiss 1979, Psychol Bull 86:420: estimates on p. 423, intervals on p. 424.
    """
    n, k = ratings.shape
    between, judges, error = (float(ms[0]) for ms in mean_squares(ratings, np.ones((1, n))))
    freedom = (n - 1) * (k - 1)
    if not absolute:
        value = (between - error) / (between + (k - 1) * error)
        f = between / error if error else np.inf
        low, high = f / stats.f.ppf(LEVEL, n - 1, freedom), f * stats.f.ppf(LEVEL, freedom, n - 1)
        return Interval(value, *(float(1 - k / (end + k - 1)) for end in (low, high)))
    value = (between - error) / (between + (k - 1) * error + k * (judges - error) / n)
    if not error:  # perfect agreement but for a bias: the F of the judges is infinite and no interval follows
        return Interval(value, value if not judges else np.nan, value if not judges else np.nan)
    f, rest = judges / error, n * (1 + (k - 1) * value) - k * value
    v = freedom * (k * value * f + rest) ** 2 / ((n - 1) * k**2 * value**2 * f**2 + rest**2)
    down, up = stats.f.ppf(LEVEL, n - 1, v), stats.f.ppf(LEVEL, v, n - 1)
    spread = k * judges + (k * n - k - n) * error
    low = n * (between - down * error) / (down * spread + n * between)
    high = n * (up * between - error) / (spread + n * up * between)
    return Interval(value, float(low), float(high))


def mean_squares(ratings: Array, weight: Array) -> tuple[Array, Array, Array]:
    """Two-way analysis of variance without repetition: mean squares between subjects, between judges, and of the rest.

    ratings [N, K]; weight [R, N], how often each subject counts -> three times [R].
    """
    k, n = ratings.shape[1], weight.sum(1)
    ratings = ratings - ratings.mean()  # sums of squares of large numbers would cancel
    grand = weight @ ratings.mean(1) / n
    subject = k * (weight @ ratings.mean(1) ** 2 - n * grand**2)
    judge = n * (((weight @ ratings) / n[:, None]) ** 2).sum(1) - n * k * grand**2
    total = weight @ (ratings**2).sum(1) - n * k * grand**2
    rest = np.maximum(total - subject - judge, 0)
    rest = np.where(rest < 1e-12 * total, 0, rest)  # the rounding of a difference of sums
    return subject / (n - 1), np.maximum(judge, 0) / (k - 1), rest / ((n - 1) * (k - 1))


# -- statistics of pairs under image weights [R, N], for the bootstrap: each -> [R] ------------------------------------


def moments(a: Array, b: Array, weight: Array) -> tuple[Array, ...]:
    """Weighted means, variances (divided by n) and covariance of a and b, each [N] or [R, N] -> five times [R]."""
    n, origin_a, origin_b = weight.sum(1), a.mean(), b.mean()
    a, b = a - origin_a, b - origin_b  # near 0, so that the squares of the means are small beside the mean squares

    def mean(x: Array) -> Array:
        return (weight @ x if x.ndim == 1 else (weight * x).sum(1)) / n

    mean_a, mean_b = mean(a), mean(b)
    variances = (np.maximum(mean(x * x) - m * m, 0) for x, m in ((a, mean_a), (b, mean_b)))
    return mean_a + origin_a, mean_b + origin_b, *variances, mean(a * b) - mean_a * mean_b


def pearson(a: Array, b: Array, weight: Array) -> Array:
    _, _, var_a, var_b, both = moments(a, b, weight)
    with np.errstate(invalid="ignore", divide="ignore"):
        return both / np.sqrt(var_a * var_b)


def spearman(a: Array, b: Array, weight: Array) -> Array:
    """Pearson's correlation of the ranks that a and b have in the resample."""
    return pearson(ranks(a, weight), ranks(b, weight), weight)


def lin(a: Array, b: Array, weight: Array) -> Array:
    """Concordance correlation: 2 cov / (var a + var b + (mean a - mean b)²) (Lin 1989, Biometrics 45:255, eq. 2)."""
    mean_a, mean_b, var_a, var_b, both = moments(a, b, weight)
    with np.errstate(invalid="ignore", divide="ignore"):
        return 2 * both / (var_a + var_b + (mean_a - mean_b) ** 2)


def ranks(values: Array, weight: Array) -> Array:
    """Mid-ranks [R, N] of values [N] when each counts `weight` times: those of the resampled values themselves."""
    order = np.argsort(values, kind="stable")
    first = np.r_[True, np.diff(values[order]) != 0]  # of those that are equal
    block = np.add.reduceat(weight[:, order], np.flatnonzero(first), axis=1)
    middle = np.cumsum(block, axis=1) - block / 2 + 0.5
    return middle[:, np.cumsum(first)[np.argsort(order)] - 1]


def statistics(measured: Array, truth: Array) -> dict[str, Callable[[Array], Array]]:
    """Name -> the statistic of the pairs as a function of image weights."""
    difference, pair = measured - truth, np.stack([measured, truth], axis=1)

    def limit(sign: int) -> Callable[[Array], Array]:
        def of(weight: Array) -> Array:
            n = weight.sum(1)
            mean, _, variance, _, _ = moments(difference, difference, weight)
            return mean + sign * LIMIT * np.sqrt(variance * n / (n - 1))

        return of

    def intraclass(absolute: bool) -> Callable[[Array], Array]:
        def of(weight: Array) -> Array:
            between, judges, error = mean_squares(pair, weight)
            bias = 2 * (judges - error) / weight.sum(1) if absolute else 0
            return (between - error) / (between + error + bias)

        return of

    return {
        "bias": lambda weight: weight @ difference / weight.sum(1),
        "limit_low": limit(-1),
        "limit_high": limit(1),
        "icc_2_1": intraclass(True),
        "icc_3_1": intraclass(False),
        "lin": lambda weight: lin(measured, truth, weight),
        "pearson": lambda weight: pearson(measured, truth, weight),
        "spearman": lambda weight: spearman(measured, truth, weight),
    }
