"""The best guess from a factor, against what permuted labels allow."""

from __future__ import annotations

import numpy as np
import pytest

from shards.confounding import confounding


def test_a_factor_that_is_the_label_and_one_that_is_noise() -> None:
    rng = np.random.default_rng(0)
    label, group = rng.integers(0, 3, 300), np.zeros(300, np.int64)
    sure = confounding("scanner", label.copy(), label, group)
    noise = confounding("noise", rng.integers(0, 4, 300), label, group)
    assert sure is not None
    assert (sure.balanced_accuracy, sure.p) == (1.0, 0.001)
    assert sure.cramers_v == pytest.approx(1)
    assert sure.mutual_information == pytest.approx(1)
    assert noise is not None
    assert noise.p > 0.05
    assert noise.balanced_accuracy < noise.by_chance_95


def test_of_many_factors_the_sure_one_can_still_be_shown() -> None:
    """After 999 permutations no p is below .001, which times 60 tests is above .05 whatever the factor."""
    rng = np.random.default_rng(0)
    label, group = rng.integers(0, 3, 300), np.zeros(300, np.int64)
    found = confounding("scanner", label.copy(), label, group, tests=600)
    assert found is not None
    assert found.p * 600 <= 0.05
    few = confounding("scanner", label.copy(), label, group, tests=2)
    assert few is not None
    assert few.by_chance == pytest.approx(found.by_chance, abs=0.01)


def test_a_null_distribution_is_that_of_permuted_labels() -> None:
    rng = np.random.default_rng(1)
    factor, label = rng.integers(0, 5, 80), rng.integers(0, 3, 80)
    found = confounding("factor", factor, label, np.zeros(80, np.int64))
    assert found is not None
    permuted = []
    for _ in range(4000):
        table = np.zeros((3, 5))
        np.add.at(table, (rng.permutation(label), factor), 1)
        permuted.append((table / table.sum(axis=1, keepdims=True)).max(axis=0).sum() / 3)
    assert found.by_chance == pytest.approx(np.mean(permuted), abs=0.006)
    assert found.by_chance_95 == pytest.approx(np.quantile(permuted, 0.95), abs=0.02)
    assert found.p == pytest.approx(np.mean(np.array(permuted) >= found.balanced_accuracy - 1e-12), abs=0.06)


def test_a_class_that_is_common_everywhere_earns_nothing() -> None:
    label = np.tile([0] * 9 + [1], 40)
    found = confounding("source", np.repeat([0, 1], 200), label, np.zeros(400, np.int64))
    assert found is not None
    assert found.balanced_accuracy == pytest.approx(0.5)
    assert found.cramers_v == pytest.approx(0)


def test_a_patient_counts_once() -> None:
    """Four patients with a hundred images each are four units: nothing can be shown with four."""
    patient = np.repeat(np.arange(4), 100)
    found = confounding("source", patient % 2, patient % 2, 1 + patient.astype(np.int64))
    assert found is not None
    assert found.units == 4
    assert found.p > 0.05


def test_unknown_values_are_left_out_and_one_value_says_nothing() -> None:
    group = np.zeros(4, np.int64)
    assert confounding("source", np.array([0, 0, 0, -1]), np.array([0, 1, 0, 1]), group) is None
    found = confounding("source", np.array([0, 1, 0, -1]), np.array([0, 1, 0, 1]), group)
    assert found is not None
    assert found.units == 3
