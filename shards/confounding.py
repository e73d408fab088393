"""How well something that is not in the picture predicts the label: the source, a column, the rim, the size.

A classifier can learn any of these instead of the disease. Each is judged by the best guess that it allows, with a null
distribution from permuted labels, since many values predict something by chance alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PERMUTATIONS = 999

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


def confounding(name: str, factor: Array, label: Array, group: Array, seed: int = 0) -> Confounding | None:
    """factor, label: int [N], -1 for unknown (left out); group: int64 [N], 0 for none. A group counts once: its first.

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
    table = _counts(f, y, len(values), len(classes))
    rng = np.random.default_rng(seed)
    null = [_best_guess(_counts(f, rng.permutation(y), *table.shape[::-1])) for _ in range(PERMUTATIONS)]
    found = _best_guess(table)
    return Confounding(
        factor=name,
        units=len(known),
        values=len(values),
        classes=len(classes),
        balanced_accuracy=found,
        by_chance=float(np.mean(null)),
        by_chance_95=float(np.quantile(null, 0.95)),
        p=float((1 + np.sum(np.array(null) >= found - 1e-12)) / (1 + PERMUTATIONS)),
        cramers_v=float(association(table, method="cramer")),
        mutual_information=float(normalized_mutual_info_score(y, f)),
    )


def _counts(f: Array, y: Array, values: int, classes: int) -> Array:
    """int [classes, values]."""
    return np.bincount(y * values + f, minlength=values * classes).reshape(classes, values)


def _best_guess(table: Array) -> float:
    """Mean recall over the classes of argmax_class P(value | class)."""
    typical = table / table.sum(axis=1, keepdims=True)
    return float(typical.max(axis=0).sum() / len(table))
