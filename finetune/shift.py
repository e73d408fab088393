"""Are two sets of features drawn from the same distribution? Two-sample tests on patients or lesions, not on images.

The unit is one image a group, drawn at random: images of one patient are alike, and tests that take them for
independent raise false alarms. The threshold of the kernel test comes from halves of the reference itself, so it holds
for these features and these numbers of patients; the classifier test says how far apart the sets are on a scale that
means something (0.5: not to be told apart, 1: told apart every time).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import RidgeClassifierCV
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.model_selection import train_test_split

from finetune.metrics import BLOCK, RESAMPLES, Interval, bootstrap, group_weights, macro_auroc
from finetune.others import nearest
from finetune.probe import spread

Array = np.ndarray
MOST = 2000  # units a side: the kernel matrix is its square
RATE = 0.05  # of false alarms
NEAR = 5  # the neighbour whose distance tells how far out an image lies


@dataclass(frozen=True)
class Comparison:
    """New features against reference features, as `compare` found them."""

    reference: int  # units compared
    new: int
    mmd2: Interval
    null: Array  # float64 [R]: MMD^2 of parts of the reference, of the same sizes
    auroc: Interval  # of a classifier that tells the two apart

    @property
    def threshold(self) -> float:
        return float(np.quantile(self.null, 1 - RATE))

    @property
    def p(self) -> float:
        """Share of the null at or above the value; the value itself counts, so it is never 0."""
        return float((1 + (self.null >= self.mmd2.value).sum()) / (1 + len(self.null)))


def one_a_group(group: Array, seed: int, most: int | None = None) -> Array:
    """Positions of one random image of every group, of at most `most` groups; in random order."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(group))
    first = np.unique(group[order], return_index=True)[1]
    return rng.permutation(order[first])[:most]


def mmd2(aa: Array, ab: Array, bb: Array, wa: Array, wb: Array) -> Array:
    """Unbiased squared maximum mean discrepancy (Gretton et al. 2012, equation 3), for R weightings of the units at
    once.

    aa [n, n], ab [n, m], bb [m, m]: the kernel, zero on the diagonals of aa and bb; wa [R, n], wb [R, m]: how often
    each unit counts. A unit that counts several times makes no pair with itself. -> [R]
    """

    def inside(kernel: Array, w: Array) -> Array:
        return ((w @ kernel) * w).sum(1) / (w.sum(1) ** 2 - (w**2).sum(1))

    across = ((wa @ ab) * wb).sum(1) / (wa.sum(1) * wb.sum(1))
    return inside(aa, wa) + inside(bb, wb) - 2 * across


def compare(reference: Array, new: Array, seed: int = 0, resamples: int = RESAMPLES - 1) -> Comparison:
    """reference [N, D], new [M, D]: features of units, one a group. resamples: of the null; where there are several
    comparisons, one less than `resample.enough`.

    Where the new set has more units than half of the reference, both take part with so many, drawn at random: the null
    is made of disjoint parts of the reference, and is a null only for parts of the same sizes.
    """
    rng = np.random.default_rng(seed)
    reference, new = (x[rng.permutation(len(x))[:MOST]] for x in (reference, new))
    mean, scale = spread(reference)
    reference, new = (((x - mean) * scale).astype(np.float32) for x in (reference, new))
    new = new[: len(reference) // 2]
    a, b = len(reference) - len(new), len(new)
    between = euclidean_distances(reference, squared=True)
    width = float(np.median(between[np.triu_indices(len(reference), 1)]))  # sigma: the median distance, section 8 there

    def kernel(squares: Array) -> Array:
        return np.exp(-squares / max(2 * width, 1e-12)).astype(np.float32)

    rr, rn = kernel(between), kernel(euclidean_distances(reference, new, squared=True))
    nn = kernel(euclidean_distances(new, squared=True))
    np.fill_diagonal(rr, 0)
    np.fill_diagonal(nn, 0)
    null = _null(rr, b, resamples, rng)
    aa, ab = rr[:a, :a], rn[:a]
    value = mmd2(aa, ab, nn, np.ones((1, a), np.float32), np.ones((1, b), np.float32))[0]
    draws = (np.concatenate(list(group_weights(np.arange(n), RESAMPLES, seed + n))) for n in (a, b))
    drawn = mmd2(aa, ab, nn, *(w.astype(np.float32) for w in draws))
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Comparison(a, b, Interval(float(value), float(low), float(high)), null, told_apart(reference, new, seed))


def _null(kernel: Array, part: int, resamples: int, rng: np.random.Generator) -> Array:
    """float64 [R]: MMD^2 of `part` of the units, drawn at random, against all the others. kernel [N, N], its diagonal
    zero. In blocks, so that memory does not grow with the resamples."""
    inside = (np.arange(len(kernel)) < part).astype(np.float32)
    block, found = max(1, BLOCK // len(kernel)), []
    for start in range(0, resamples, block):
        drawn = rng.permuted(np.tile(inside, (min(block, resamples - start), 1)), axis=1)
        found.append(mmd2(kernel, kernel, kernel, 1 - drawn, drawn))
    return np.concatenate(found)


def told_apart(a: Array, b: Array, seed: int = 0) -> Interval:
    """AUROC of a classifier of a [N, D] against b [M, D], trained on one half of them and judged on the other (the
    classifier two-sample test of Lopez-Paz & Oquab, 1610.06545). The interval resamples the units judged.

    A ridge classifier, as in the probe of the training loop; cross-validation would use more of the data, but says less
    than 0.5 of equals.
    """
    x, side = np.concatenate([a, b]), np.repeat([0, 1], [len(a), len(b)])
    train, judged = train_test_split(np.arange(len(x)), test_size=0.5, stratify=side, random_state=seed)
    model = RidgeClassifierCV(np.logspace(0, 4, 9), class_weight="balanced").fit(x[train], side[train])
    score = model.decision_function(x[judged])
    return bootstrap(side[judged], np.stack([-score, score], 1), np.asarray(judged), {"auroc": macro_auroc}, seed=seed)[
        "auroc"
    ]


def distances(reference: Array, group: Array, asked: Array, asked_group: Array) -> tuple[Array, Array]:
    """How far out images lie: distance (1 - cosine) to the fifth nearest reference image of another group (Sun et al.,
    2204.06507), and which reference image is the nearest. [N, D], [N], [M, D], [M] -> [M], int64 [M].

    The reference asked about itself gives the distances of images that are held out with all of their group.
    """
    cosine, index = nearest(reference, group, asked, asked_group, NEAR)
    return 1 - cosine[:, -1], index[:, 0]


def percentile(own: Array, asked: Array) -> Array:
    """Share of `own` [N] below each of `asked` [M], in per cent."""
    return 100 * np.searchsorted(np.sort(own), asked) / len(own)
