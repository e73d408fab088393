"""Few-shot episodes: draw k images a class many times, classify from them alone, and say how sure the mean is.

Shapes: E episodes, K classes, N images, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression

from finetune.metrics import RESAMPLES, Metric, group_weights
from finetune.resample import Draws, least_p

Array = np.ndarray
SOME = 20  # episodes on which the share of the test groups in the spread is measured


def draw(y: Array, group: Array, classes: int, shots: int, episodes: int, seed: int) -> Array:
    """int64 [E, K, shots]: positions in `y` of the images of each class, -1 where a class has no more.

    Groups come in random order and whole, the images of one in random order, so k images come from as few patients as
    a clinic would label for them; the group in which the k-th image lies is cut. The first k of an episode are its
    k-shot task: more shots keep the images of fewer.
    """
    rng = np.random.default_rng([seed, shots, episodes])
    out = np.full((episodes, classes, shots), -1, dtype=np.int64)
    for c in range(classes):
        rows = np.flatnonzero(y == c)
        if not len(rows):
            continue
        _, member = np.unique(group[rows], return_inverse=True)
        turn = rng.random((episodes, int(member.max()) + 1)).argsort(1).argsort(1)  # [E, groups]: when it comes
        order = np.argsort(turn[:, member] + rng.random((episodes, len(rows))), axis=1)[:, :shots]
        out[:, c, : order.shape[1]] = rows[order]
    return out


def centre(x: Array, mean: Array) -> Array:
    """Features minus `mean`, at unit length: CL2N of SimpleShot (1911.04623, section 3). float32 [N, D]."""
    moved = x - mean
    return (moved / np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def nearest_mean(x: Array, order: Array, shots: Sequence[int], queries: Array) -> Iterator[Array]:
    """For each number of shots, in rising order, softmax of minus the squared distance to the class means: [E, N, K].

    Nearest centroid in SimpleShot; the softmax is that of prototypical networks (1703.05175, eq. 2). x [., D] holds
    the images that `order` [E, K, shots] names, queries [N, D]; a class without an image gets 0.
    """
    total = np.zeros((*order.shape[:2], x.shape[1]), dtype=np.float32)
    for j in range(max(shots)):
        there = order[:, :, j] >= 0
        total[there] += x[order[:, :, j][there]]
        if j + 1 in shots:
            count = (order[:, :, : j + 1] >= 0).sum(2)  # [E, K]
            mean = total / np.maximum(count, 1)[..., None]
            inner = np.moveaxis(np.tensordot(queries, mean, (1, 2)), 0, 1)  # [E, N, K]
            logits = 2 * inner - np.square(mean).sum(2)[:, None]  # the query's own length is the same for all classes
            yield softmax(np.where(count[:, None] > 0, logits, -np.inf), axis=2)


def logistic(
    x: Array, order: Array, shots: Sequence[int], queries: Array, step: Callable[[], None] = lambda: None
) -> Iterator[Array]:
    """As `nearest_mean`, by multinomial logistic regression with C = 1 on the unit features (2003.11539, section 3.2).

    step is called after every fit.
    """
    episodes, classes, _ = order.shape
    for k in sorted(shots):
        scores = np.zeros((episodes, len(queries), classes))
        for e, chosen in enumerate(order[:, :, :k]):
            rows, label = chosen[chosen >= 0], np.nonzero(chosen >= 0)[0]
            model = LogisticRegression(C=1.0, max_iter=1000).fit(x[rows], label)
            scores[e][:, model.classes_] = model.predict_proba(queries)
            step()
        yield scores


def spread(
    metric: Metric, y: Array, scores: Array, groups: Array, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[Draws, Array]:
    """The mean of a metric over episodes, resampled over episodes and over test groups; and its value in each, [E].

    scores [E, N, K]. The two sources of chance are added: a resample's episodes are drawn with replacement, and what
    its groups do to the mean is measured on SOME of the episodes, since all 100 on 1,000 resamples would take minutes.
    What is left out is the interaction of the two, of which the mean over E episodes keeps one part in E.
    """
    each = np.array([metric(y, one, np.ones((1, len(y))))[0] for one in scores])
    some = np.unique(np.linspace(0, len(scores) - 1, SOME).round().astype(int))
    weights = group_weights(groups, resamples, seed)
    shift = np.concatenate([np.mean([metric(y, scores[e], weight) for e in some], axis=0) for weight in weights])
    drawn = each[np.random.default_rng([seed, 1]).integers(len(each), size=(resamples, len(each)))].mean(1)
    return Draws(float(each.mean()), drawn + shift - each[some].mean(), least_p(groups)), each
