"""Is a probability of 0.8 right eight times out of ten? Calibration errors, proper scores, temperature, thresholds.

Errors and scores take image weights [R, N] and return [R], as in `metrics`, so that intervals resample groups. One
class an image: the events are "the first choice is right" (Guo et al. 2017). Several labels: one event a label, and the
mean over labels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_softmax, logit

from finetune.metrics import Array

BINS = 15
TINY = 2.0**-23  # the resolution of the float32 in which scores are kept: a score of 0 counts as this much
HOTTEST = 100.0  # temperatures are sought from 1/HOTTEST to HOTTEST


# -- errors and scores ------------------------------------------------------------------------------------------------


def events(y: Array, scores: Array) -> list[tuple[Array, Array]]:
    """(confidence [N], came true [N] of 0 and 1): one pair for the first choice, or one for each of several labels."""
    if y.ndim == 2:
        return [(scores[:, k], y[:, k].astype(float)) for k in range(y.shape[1])]
    return [(scores.max(1), (scores.argmax(1) == y).astype(float))]


def ece(y: Array, scores: Array, weight: Array) -> Array:
    """Expected calibration error over bins of equal width (Naeini et al. 2015; Guo et al. 2017, eq. 3 and 5)."""
    return np.mean([_error(*event, _equal_width(event[0]), weight) for event in events(y, scores)], axis=0)


def adaptive_ece(y: Array, scores: Array, weight: Array) -> Array:
    """The same over bins of equally many images (Nguyen & O'Connor 2015, section 3): confident models put nearly all
    images into one or two of the bins of equal width. The bins are those of the data, not of each resample."""
    return np.mean([_error(*event, _equal_count(event[0]), weight) for event in events(y, scores)], axis=0)


def brier(y: Array, scores: Array, weight: Array) -> Array:
    """Mean squared distance to what came true: summed over classes, 0 to 2 (Brier 1950); of labels the mean, 0 to 1."""
    true = y if y.ndim == 2 else np.eye(scores.shape[1])[y]
    squared = (scores - true) ** 2
    distance = squared.mean(1) if y.ndim == 2 else squared.sum(1)
    return weight @ distance / weight.sum(1)


def nll(y: Array, scores: Array, weight: Array) -> Array:
    """Mean negative log likelihood, in nats an image; with several labels a label."""
    return weight @ _surprise(y, scores) / weight.sum(1)


def _surprise(y: Array, scores: Array) -> Array:
    """[N]: -log of the probability given to what came true."""
    if y.ndim == 2:
        return -np.log(np.clip(np.where(y > 0, scores, 1 - scores), TINY, 1)).mean(1)
    return -np.log(np.clip(scores[np.arange(len(y)), y], TINY, 1))


def _equal_width(confidence: Array) -> Array:
    return np.minimum((confidence * BINS).astype(int), BINS - 1)


def _equal_count(confidence: Array) -> Array:
    """Equal scores share a bin, so where many images tie (neighbours' votes do) there are fewer bins."""
    edges = np.quantile(confidence, np.arange(1, BINS) / BINS)
    return np.searchsorted(edges, confidence, side="right")


def _error(confidence: Array, true: Array, at: Array, weight: Array) -> Array:
    """sum over bins of (share of images in the bin) x |frequency - mean confidence|."""
    surplus = (true - confidence)[:, None] * (at[:, None] == np.arange(BINS))  # [N, BINS]
    return np.abs(weight @ surplus).sum(1) / weight.sum(1)


def reliability(y: Array, scores: Array) -> list[dict[str, Any]]:
    """The reliability diagram: for each bin of equal width that is not empty its ends, mean confidence, frequency of
    what came true, and count. Labels are pooled. scores: [N, K], or [S, N, K] of S seeds, which are pooled too."""
    runs = scores if scores.ndim == 3 else scores[None]
    pairs = [pair for run in runs for pair in events(y, run)]
    confidence, true = (np.concatenate(side) for side in zip(*pairs, strict=True))
    at = _equal_width(confidence)
    return [
        {
            "from": b / BINS,
            "to": (b + 1) / BINS,
            "confidence": float(confidence[at == b].mean()),
            "frequency": float(true[at == b].mean()),
            "count": int((at == b).sum()) / len(runs),
        }
        for b in range(BINS)
        if (at == b).any()
    ]


# -- temperature ------------------------------------------------------------------------------------------------------


def temperature(y: Array, scores: Array) -> float:
    """The T that makes softmax(logits / T) most likely (Guo et al. 2017, section 4.2); one T for all labels.

    Logits are log probabilities, which differ from any others by a constant an image, which softmax does not see. A
    score of 0 counts as TINY: a neighbours' vote without a voice is not proof of absence.
    """
    one = np.ones((1, len(y)))
    found = minimize_scalar(
        lambda t: nll(y, soften(scores, np.exp(t), y.ndim == 2), one)[0],
        bounds=(-np.log(HOTTEST), np.log(HOTTEST)),
        method="bounded",
        options={"xatol": 1e-5},
    )
    return float(np.exp(found.x))


def soften(scores: Array, temperature: float, multi_label: bool) -> Array:
    """Probabilities [..., K] at a temperature; above 1 they become less sure. The first choice stays the same."""
    if multi_label:
        return expit(logit(np.clip(scores, TINY, 1 - TINY)) / temperature)
    return np.exp(log_softmax(np.log(np.maximum(scores, TINY)) / temperature, axis=-1))


# -- thresholds -------------------------------------------------------------------------------------------------------


def threshold_for_sensitivity(score: Array, ill: Array, least: float) -> float:
    """The highest threshold t at which "score >= t" finds at least the share `least` of the ill."""
    found = np.sort(score[ill])[::-1]
    return float(found[_ceil(least * len(found)) - 1])


def threshold_for_specificity(score: Array, ill: Array, least: float) -> float:
    """The lowest threshold t at which "score >= t" spares at least the share `least` of the well."""
    spared = np.sort(score[~ill])
    return float(np.nextafter(spared[_ceil(least * len(spared)) - 1], np.inf))


def _ceil(x: float) -> int:
    """Rounded up, at least 1; 0.9 x 10 is 9 although floats say 9.000000000000002 for some products."""
    return max(1, int(np.ceil(x - 1e-9)))
