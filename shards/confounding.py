"""How well something that is not in the picture predicts the label: the source, a column, the rim, the size.

A classifier can learn any of these instead of the disease. Each is judged by the best guess that it allows, with a null
distribution from permuted labels, since many values predict something by chance alone. What is counted are tables of
value by class, so they are drawn with the margins of the observed one: what permuting the labels gives, but quickly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PERMUTATIONS = 999  # at least
FOR_A_TEST = 100  # more for each of many tests: at 20, only what no permutation equals would pass .05 / tests
AT_A_TIME = 1000  # tables in memory

Array = np.ndarray


@dataclass(frozen=True)
class Confounding:
    """What a factor tells of the label, over units (patients or lesions; images where no group is known)."""

    factor: str
    units: int
    values: int
    classes: int
    balanced_accuracy: float  # of the best guess from the factor alone; 1 / classes: it tells nothing
    by_chance: float  # the same when labels are permuted: mean
    by_chance_95: float  # and 95th percentile
    p: float  # share of permutations that do as well, the observed one counted
    cramers_v: float  # 0: independent, 1: one determines the other
    mutual_information: float  # normalised by the mean of both entropies


def confounding(
    name: str, factor: Array, label: Array, group: Array, seed: int = 0, tests: int = 1
) -> Confounding | None:
    """factor, label: int [N], -1 for unknown (left out); group: int64 [N], 0 for none. A group counts once: its first.
    tests: how many factors are judged, by whose number p will be multiplied.

    None when fewer than two values or two classes are left. The guess: for each value, the class that it is most
    typical of (Bayes' rule at equal class frequencies), so that a class common everywhere earns nothing.
    """
    from scipy.stats.contingency import association
    from sklearn.metrics import normalized_mutual_info_score

    known = np.flatnonzero((factor >= 0) & (label >= 0))
    unit = np.where(group[known] == 0, -1 - known, group[known])
    known = known[np.unique(unit, return_index=True)[1]]
    values, f = np.unique(factor[known], return_inverse=True)
    classes, y = np.unique(label[known], return_inverse=True)
    if len(values) < 2 or len(classes) < 2:
        return None
    table = np.bincount(y * len(values) + f, minlength=len(values) * len(classes)).reshape(len(classes), len(values))
    null = _null(table, max(PERMUTATIONS, FOR_A_TEST * tests - 1), seed)
    found = float(_best_guess(table))
    return Confounding(
        factor=name,
        units=len(known),
        values=len(values),
        classes=len(classes),
        balanced_accuracy=found,
        by_chance=float(np.mean(null)),
        by_chance_95=float(np.quantile(null, 0.95)),
        p=float((1 + np.sum(null >= found - 1e-12)) / (1 + len(null))),
        cramers_v=float(association(table, method="cramer")),
        mutual_information=float(normalized_mutual_info_score(y, f)),
    )


def _null(table: Array, draws: int, seed: int) -> Array:
    """[draws] best guesses from tables with the margins of `table` [classes, values]."""
    from scipy.stats import random_table

    tables = random_table(table.sum(axis=1), table.sum(axis=0), seed=np.random.default_rng(seed))
    sizes = [min(AT_A_TIME, draws - start) for start in range(0, draws, AT_A_TIME)]
    return np.concatenate([_best_guess(tables.rvs(size)) for size in sizes])


def _best_guess(table: Array) -> Array:
    """Of [..., classes, values]: mean recall over the classes of argmax_class P(value | class)."""
    typical = table / table.sum(axis=-1, keepdims=True)
    return typical.max(axis=-2).sum(axis=-1) / table.shape[-2]
