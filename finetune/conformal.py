"""Prediction sets that hold the right class with a chosen probability, whatever the model is (split conformal).

A conformity score says how badly a class fits an image; the quantile of the scores of the right classes on val is the
line below which a class is let into the set. LAC makes the smallest sets on average and lets them shrink to nothing;
APS spreads the coverage more evenly over easy and hard images with larger sets.

The promise, P(right class in set) >= 1 - alpha, is for an image drawn like those of val. Images of one patient are not
drawn independently, so the quantile is that of whole groups: each group of val counts once, its images share its weight
(Lee, Barber & Willett 2023, "Distribution-free inference with hierarchical data", section 3), and the promise is for an
image of a new group. Without repeated groups this is the usual quantile.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from finetune.metrics import Array


def lac(scores: Array, noise: Array) -> Array:
    """[N, K] -> [N, K]: 1 - probability (Sadinle, Lei & Wasserman 2019). `noise` is not used."""
    return 1 - scores


def aps(scores: Array, noise: Array) -> Array:
    """[N, K] -> [N, K]: probability of all classes likelier than this one, and a random share of its own (Romano, Sesia
    & Candès 2020, eq. 4 to 7). noise [N]: uniform in 0..1; without it the sets would cover too much."""
    order = np.argsort(-scores, axis=1, kind="stable")
    ranked = np.take_along_axis(scores, order, axis=1)
    upto = np.cumsum(ranked, axis=1) - ranked * (1 - noise[:, None])
    return np.take_along_axis(upto, np.argsort(order, axis=1), axis=1)


Method = Callable[[Array, Array], Array]
METHODS: dict[str, Method] = {"lac": lac, "aps": aps}


def noise(numbers: Array, seed: int = 0) -> Array:
    """[N] uniform in 0..1, a function of the sample number: an image gets the same set whoever it comes with.

    SplitMix64 (Steele, Lea & Flood 2014, figure 13): a generator object an image would take most of the time.
    """
    z = (numbers.astype(np.uint64) + np.uint64(seed << 40) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


def quantile(conformity: Array, groups: Array, alpha: float) -> float:
    """The line q of the conformity scores [M] of the right classes: the smallest with weight >= 1 - alpha below or at
    it, where each of the G groups weighs 1 / (G + 1) and infinity, for the group to come, as much as one.

    Infinity, so every set holds every class, when there are too few groups for alpha (fewer than 1 / alpha - 1).
    """
    _, member, count = np.unique(groups, return_inverse=True, return_counts=True)
    weight = 1 / ((len(count) + 1) * count[member])
    order = np.argsort(conformity, kind="stable")
    reached = np.cumsum(weight[order]) >= 1 - alpha - 1e-12
    return float(conformity[order][np.argmax(reached)]) if reached.any() else np.inf


def spread(alpha: float, groups: int) -> float:
    """By how much the coverage of a line varies from one val of so many groups to the next: 1.96 deviations of the
    Beta distribution that it has over draws of val (Vovk 2012, "Conditional validity of inductive conformal
    predictors", section 3). The promise is the mean of that distribution."""
    return float(1.96 * np.sqrt(alpha * (1 - alpha) / (groups + 2)))


def right(conformity: Array, y: Array) -> Array:
    """[N]: the conformity of the right class."""
    return conformity[np.arange(len(y)), y]
