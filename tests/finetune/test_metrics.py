from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as reference

from finetune import metrics
from finetune.resample import resample
from tests.finetune.judging import point


@pytest.fixture
def case():
    """(y [N], scores [N, 4] with ties, groups [N]); class 3 has two images, so resamples lack it."""
    rng = np.random.default_rng(0)
    y = rng.choice(3, size=180, p=[0.5, 0.3, 0.2])
    y[[5, 90]] = 3
    scores = rng.random((180, 4)).round(1)
    scores[np.arange(180), y] += 0.3
    return y, scores / scores.sum(1, keepdims=True), rng.integers(70, size=180)


def by_sklearn(name: str, y: np.ndarray, scores: np.ndarray) -> float:
    """On a set that may lack classes, over the classes that it has."""
    present, said = np.unique(y), scores.argmax(1)
    if name == "accuracy":
        return reference.accuracy_score(y, said)
    if name == "balanced_accuracy":
        return reference.recall_score(y, said, labels=present, average="macro")
    if name == "macro_f1":
        return reference.f1_score(y, said, labels=present, average="macro")
    binary = {"macro_auroc": reference.roc_auc_score, "average_precision": reference.average_precision_score}[name]
    return float(np.mean([binary(y == k, scores[:, k]) for k in present]))


@pytest.mark.parametrize("name", metrics.ONE_OF)
def test_point_equals_sklearn(case, name):
    y, scores, _ = case
    assert point(name, y, scores) == pytest.approx(by_sklearn(name, y, scores), abs=1e-12)


@pytest.mark.parametrize("name", metrics.ONE_OF)
def test_every_resample_equals_sklearn_on_the_resampled_images(case, name):
    y, scores, groups = case
    weight = np.concatenate(list(metrics.group_weights(groups, 80, seed=3)))
    drawn = [np.repeat(np.arange(len(y)), row.astype(int)) for row in weight]
    assert any(len(np.unique(y[rows])) < 4 for rows in drawn), "no resample lacks a class: the case tests too little"
    expected = [by_sklearn(name, y[rows], scores[rows]) for rows in drawn]
    np.testing.assert_allclose(metrics.ONE_OF[name](y, scores, weight), expected, atol=1e-12)


def test_multi_label_metrics_equal_sklearn():
    rng = np.random.default_rng(1)
    y, scores, one = rng.integers(2, size=(90, 5)), rng.random((90, 5)).round(1), np.ones((1, 90))
    expected = reference.roc_auc_score(y, scores, average="macro")
    assert metrics.macro_auroc(y, scores, one)[0] == pytest.approx(expected)
    expected = reference.average_precision_score(y, scores, average="macro")
    assert metrics.average_precision(y, scores, one)[0] == pytest.approx(expected)


def test_interval_agrees_with_scipy_when_every_image_is_its_own_group(case):
    y, scores, _ = case
    ours = metrics.bootstrap(y, scores, np.arange(len(y)), {"accuracy": metrics.accuracy}, 4000)["accuracy"]
    right = (scores.argmax(1) == y).astype(float)
    theirs = stats.bootstrap((right,), np.mean, n_resamples=9999, method="percentile", random_state=1)
    assert ours.value == right.mean()
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.008)


def test_two_groups_by_hand():
    """Groups {right, right} and {wrong}: resamples have accuracy 1, 2/3 and 0, each end with probability 1/4."""
    y, scores = np.array([0, 0, 0]), np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    weight = np.concatenate(list(metrics.group_weights(np.array([7, 7, 9]), 400)))
    values, counts = np.unique(metrics.accuracy(y, scores, weight).round(9), return_counts=True)
    assert values.tolist() == pytest.approx([0, 2 / 3, 1], abs=1e-8)
    assert counts / 400 == pytest.approx([0.25, 0.5, 0.25], abs=0.08)


def test_copies_of_images_inside_their_groups_do_not_shrink_the_interval(case):
    y, scores, groups = case
    chosen = {"accuracy": metrics.accuracy}
    once = metrics.bootstrap(y, scores, groups, chosen)["accuracy"]
    rows = np.tile(np.arange(len(y)), 5)
    copies = metrics.bootstrap(y[rows], scores[rows], groups[rows], chosen)["accuracy"]
    assert (copies.low, copies.high) == pytest.approx((once.low, once.high), abs=1e-12)
    naive = metrics.bootstrap(y[rows], scores[rows], np.arange(len(rows)), chosen)["accuracy"]
    assert naive.high - naive.low < 0.6 * (once.high - once.low), "images as units would have hidden it"


def test_blocks_do_not_change_the_draws(case):
    groups = case[2]
    whole = np.concatenate(list(metrics.group_weights(groups, 50)))
    many = np.tile(groups, 4000)  # so many images that the resamples come in blocks
    blocks = list(metrics.group_weights(many, 50))
    assert len(blocks) > 1
    np.testing.assert_array_equal(np.concatenate([b[:, : len(groups)] for b in blocks]), whole)


def test_seeds_are_averaged_inside_a_resample(case):
    y, scores, groups = case
    other = np.roll(scores, 1, axis=1)
    chosen = {"accuracy": metrics.accuracy}
    a, b = (metrics.bootstrap(y, s, groups, chosen)["accuracy"] for s in (scores, other))
    both = metrics.bootstrap(y, np.stack([scores, other]), groups, chosen)["accuracy"]
    assert both.value == pytest.approx((a.value + b.value) / 2)
    assert both.low < both.value < both.high


def both(y, a, b, groups, metric):
    """The draws of a metric of two models, on the same resamples."""
    return resample({n: lambda w, s=s: metric(y, s, w) for n, s in (("a", a), ("b", b))}, groups)


def test_paired_difference(case):
    y, scores, groups = case
    worse = scores.copy()
    worse[::3] = np.roll(worse[::3], 1, axis=1)
    draws = both(y, scores, worse, groups, metrics.balanced_accuracy)
    found, back = (draws["a"] - draws["b"]).interval, (draws["b"] - draws["a"]).interval
    assert found.value == pytest.approx(point("balanced_accuracy", y, scores) - point("balanced_accuracy", y, worse))
    assert 0 < found.low < found.value < found.high
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low))
    same = (draws["a"] - draws["a"]).interval
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_paired_interval_is_narrower_than_two_separate_ones(case):
    y, scores, groups = case
    other = scores.copy()
    other[:6] = np.roll(other[:6], 1, axis=1)
    draws = both(y, scores, other, groups, metrics.accuracy)
    paired, alone = (draws["a"] - draws["b"]).interval, draws["a"].interval
    assert alone == metrics.bootstrap(y, scores, groups, {"accuracy": metrics.accuracy})["accuracy"]
    assert paired.high - paired.low < 0.6 * (alone.high - alone.low)


def test_one_group_has_no_interval(case):
    y, scores, _ = case
    for groups, width in ((np.zeros(180), np.nan), (np.arange(180) < 60, 0.1)):
        by_draws = both(y, scores, scores, groups, metrics.accuracy)["a"].interval
        for found in (metrics.bootstrap(y, scores, groups, {"accuracy": metrics.accuracy})["accuracy"], by_draws):
            assert found.high - found.low == pytest.approx(width, abs=0.1, nan_ok=True)
            assert ("(no interval)" in str(found)) == ("(no interval)" in found.signed()) == np.isnan(width)


def test_a_metric_without_any_class_is_nan():
    y, scores = np.zeros(5, dtype=int), np.tile([0.9, 0.1], (5, 1))
    assert np.isnan(point("macro_auroc", y, scores))
    assert point("balanced_accuracy", y, scores) == 1
