"""Neighbours, ridge, balanced accuracy, and the in-loop probe made of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hybridssl import probe
from hybridssl.health import rankme


def blobs(count: int, classes: int = 3, width: int = 8, spread: float = 0.3, seed: int = 0):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, width))
    y = rng.integers(classes, size=count)
    return (centres[y] + spread * rng.normal(size=(count, width))).astype(np.float32), y


def test_knn_equals_the_naive_loop():
    (train_x, train_y), (test_x, _) = blobs(40, spread=2), blobs(15, spread=2, seed=1)
    found = probe.knn(train_x, train_y, test_x, k=7, classes=4, temperature=0.1)
    for row, x in zip(found, test_x, strict=True):
        cosine = [float(x @ t / math.sqrt(x @ x) / math.sqrt(t @ t)) for t in train_x]
        votes = [0.0] * 4
        for i in sorted(range(40), key=lambda i: -cosine[i])[:7]:
            votes[train_y[i]] += math.exp(cosine[i] / 0.1)
        assert row == pytest.approx([v / sum(votes) for v in votes], rel=1e-3)


def test_knn_takes_what_neighbours_there_are_and_tensors():
    (train_x, train_y), (test_x, _) = blobs(5), blobs(4, seed=1)
    scores = probe.knn(torch.from_numpy(train_x), train_y, torch.from_numpy(test_x), k=200, classes=3)
    assert scores.shape == (4, 3)
    np.testing.assert_allclose(scores.sum(1), 1)
    nearest = probe.knn(train_x, train_y, train_x, k=1, classes=3)
    assert (nearest.argmax(1) == train_y).all()


def test_knn_is_blind_to_scale_and_sharp_at_a_tiny_temperature():
    (train_x, train_y), (test_x, _) = blobs(30, spread=2), blobs(9, spread=2, seed=1)
    one = probe.knn(train_x, train_y, test_x, 5, 3)
    np.testing.assert_allclose(one, probe.knn(train_x * 100, train_y, test_x / 9, 5, 3), rtol=1e-3)
    sharp = probe.knn(train_x, train_y, test_x, 5, 3, temperature=1e-4)
    assert np.isfinite(sharp).all()
    assert (sharp.argmax(1) == probe.knn(train_x, train_y, test_x, 1, 3).argmax(1)).all()


def test_balanced_accuracy_counts_each_class_alike():
    assert probe.balanced_accuracy([0, 0, 0, 1], [0, 0, 0, 0]) == 0.5
    assert probe.balanced_accuracy([0, 0, 0, 1], [0, 0, 2, 1]) == pytest.approx((2 / 3 + 1) / 2)


def test_linear_finds_what_is_linear_and_heeds_the_rare_class():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(600, 6)) * [1, 100, 0.01, 1, 1, 1]
    y = (x[:, 2] > 0.012).astype(int)  # one in nine, along the smallest axis
    prediction = probe.linear(x[:400], y[:400], x[400:])
    assert probe.balanced_accuracy(y[400:], prediction) > 0.85
    assert (probe.linear(x[:5], np.full(5, 3), x[:2]) == 3).all()  # a single class


def test_quick_probe_judges_labelled_rows_only():
    (train_x, train_y), (val_x, val_y) = blobs(60), blobs(30, seed=1)
    clean = probe.quick_probe(train_x, train_y, val_x, val_y)
    assert clean["probe/knn"] > 0.95
    assert clean["probe/linear"] > 0.95
    assert clean["probe/rankme"] == pytest.approx(float(rankme(torch.from_numpy(train_x))))
    junk = np.full((20, 8), 7.0, np.float32)
    mixed_x, mixed_y = np.concatenate([train_x, junk]), np.concatenate([train_y, np.full(20, -1)])
    dirty = probe.quick_probe(mixed_x, mixed_y, np.concatenate([val_x, junk]), np.concatenate([val_y, np.full(20, -1)]))
    assert dirty["probe/knn"] == clean["probe/knn"]
    assert dirty["probe/linear"] == clean["probe/linear"]
    assert probe.quick_probe(train_x, np.full(60, -1), val_x, val_y).keys() == {"probe/rankme"}


def test_random_features_score_at_chance():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(800, 8)).astype(np.float32), rng.integers(4, size=800)
    found = probe.quick_probe(x[:400], y[:400], x[400:], y[400:])
    assert abs(found["probe/knn"] - 0.25) < 0.08
    assert abs(found["probe/linear"] - 0.25) < 0.08
