"""Agreement held to the papers' worked examples, to scipy and torchmetrics, and to the coverage that it claims."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torchmetrics.functional import concordance_corrcoef

from finetune.agreement import bland_altman, icc, lin, mean_squares, pearson, ranks, spearman, statistics
from finetune.resample import resample

# Bland & Altman 1986, table 1: peak expiratory flow (l/min) by a Wright and a mini Wright meter, first readings.
WRIGHT = np.array([494, 395, 516, 434, 476, 557, 413, 442, 650, 433, 417, 656, 267, 478, 178, 423, 427])
MINI = np.array([512, 430, 520, 428, 500, 600, 364, 380, 658, 445, 432, 626, 260, 477, 259, 350, 451])
# Shrout & Fleiss 1979, table 2: six subjects, four judges.
JUDGES = np.array([[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]], dtype=float)


def agree(measured, truth, groups):
    """Name -> the statistic with its interval over groups."""
    return {name: draws.interval for name, draws in resample(statistics(measured, truth), groups).items()}


def test_bland_altman_of_the_peak_flow_meters():
    found = bland_altman(WRIGHT, MINI)
    assert found.n == 17
    assert found.bias.value == pytest.approx(-2.1, abs=0.05)
    assert found.sd == pytest.approx(38.8, abs=0.05)
    assert (found.bias.low, found.bias.high) == pytest.approx((-22.0, 17.8), abs=0.06)
    # The paper takes 2 standard deviations where 1999 takes 1.96, and 3 / n where 1999 has the term it rounds.
    moved = 0.04 * found.sd
    assert found.lower.value - moved == pytest.approx(-79.7, abs=0.1)
    assert found.upper.value + moved == pytest.approx(75.5, abs=0.1)
    assert (found.lower.low - moved, found.lower.high - moved) == pytest.approx((-114.3, -45.1), abs=0.3)
    assert (found.upper.low + moved, found.upper.high + moved) == pytest.approx((40.9, 110.1), abs=0.3)
    assert np.corrcoef(WRIGHT, MINI)[0, 1] == pytest.approx(0.94, abs=0.005), "and yet they do not agree"


def test_bland_altman_of_the_blood_pressures():
    """Bland & Altman 1999, section 2: 85 subjects, mean difference -16.29, deviation 19.61 mmHg, intervals printed."""
    shape = np.random.default_rng(0).normal(size=85)
    difference = (shape - shape.mean()) / shape.std(ddof=1) * 19.61 - 16.29
    found = bland_altman(difference, np.zeros(85))
    assert (found.lower.value, found.upper.value) == pytest.approx((-54.7, 22.1), abs=0.1)
    assert (found.bias.low, found.bias.high) == pytest.approx((-20.5, -12.1), abs=0.1)
    assert (found.lower.low, found.lower.high) == pytest.approx((-61.9, -47.5), abs=0.15)
    assert (found.upper.low, found.upper.high) == pytest.approx((14.9, 29.3), abs=0.15)


def test_shrout_and_fleiss():
    between, judges, error = (float(ms[0]) for ms in mean_squares(JUDGES, np.ones((1, 6))))
    assert (between, judges, error) == pytest.approx((11.24, 32.49, 1.02), abs=0.005)  # their table 3
    two, three = icc(JUDGES), icc(JUDGES, absolute=False)
    assert round(two.value, 2) == 0.29
    assert round(three.value, 2) == 0.71
    # Intervals as the R package psych prints them for the same table.
    assert (two.low, two.high) == pytest.approx((0.019, 0.761), abs=0.001)
    assert (three.low, three.high) == pytest.approx((0.342, 0.946), abs=0.001)


def test_icc_agrees_with_pingouin():
    """What pingouin 0.7 prints for these pairs (it is not among our requirements)."""
    rng = np.random.default_rng(5)
    a = rng.normal(10, 2, 25)
    pairs = np.stack([a, a * 1.1 + rng.normal(0, 1, 25)], 1)
    for absolute, value, low, high in ((True, 0.878054, 0.69, 0.95), (False, 0.901728, 0.79, 0.96)):
        found = icc(pairs, absolute)
        assert found.value == pytest.approx(value, abs=1e-6)
        assert (found.low, found.high) == pytest.approx((low, high), abs=0.005)


def test_weights_are_repetitions():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=12).round(1), rng.normal(size=12).round(1)
    weight = rng.integers(0, 4, size=(5, 12)).astype(float)
    for name, statistic in statistics(a, b).items():
        for row, value in zip(weight, statistic(weight), strict=True):
            again = np.repeat(np.arange(12), row.astype(int))
            expected = statistics(a[again], b[again])[name](np.ones((1, len(again))))[0]
            assert value == pytest.approx(expected), name


def test_the_statistics_agree_with_other_libraries():
    rng = np.random.default_rng(2)
    a = rng.normal(3, 1, 40).round(1)  # with ties
    b, ones = a * 0.8 + rng.normal(0, 0.4, 40).round(1), np.ones((1, 40))
    assert pearson(a, b, ones)[0] == pytest.approx(stats.pearsonr(a, b).statistic)
    assert spearman(a, b, ones)[0] == pytest.approx(stats.spearmanr(a, b).statistic)
    np.testing.assert_allclose(ranks(a, ones)[0], stats.rankdata(a))
    # torchmetrics divides by n - 1 where Lin divides by n: the same but for the means, so take those out.
    x, y = torch.tensor(a - a.mean()), torch.tensor(b - b.mean())
    assert lin(a - a.mean(), b - b.mean(), ones)[0] == pytest.approx(float(concordance_corrcoef(x, y)), rel=1e-5)
    found = {name: f(ones)[0] for name, f in statistics(a, b).items()}
    exact, pair = bland_altman(a, b), np.stack([a, b], 1)
    assert found["limit_low"] == pytest.approx(exact.lower.value)
    assert found["limit_high"] == pytest.approx(exact.upper.value)
    assert found["icc_2_1"] == pytest.approx(icc(pair).value)
    assert found["icc_3_1"] == pytest.approx(icc(pair, absolute=False).value)


def test_what_a_bias_and_a_scale_do():
    """A method that reads too much: correlation and ICC(3,1) do not see it; concordance, ICC(2,1) and the bias do."""
    truth = np.arange(20.0)
    found = {name: f(np.ones((1, 20)))[0] for name, f in statistics(truth + 10, truth).items()}
    assert found["bias"] == pytest.approx(10)
    assert (found["limit_low"], found["limit_high"]) == pytest.approx((10, 10))
    assert (found["pearson"], found["spearman"], found["icc_3_1"]) == pytest.approx((1, 1, 1))
    variance = truth.var()
    assert found["lin"] == pytest.approx(2 * variance / (2 * variance + 100))
    assert found["icc_2_1"] < 0.5
    doubled = {name: f(np.ones((1, 20)))[0] for name, f in statistics(2 * truth, truth).items()}
    assert doubled["pearson"] == pytest.approx(1)
    assert doubled["icc_3_1"] == pytest.approx(0.8), "2 * 2 / (4 + 1)"


def test_identical_measurements():
    truth = np.array([1.0, 5, 2, 8])
    found = agree(truth, truth, np.arange(4))
    assert all(found[name].value == pytest.approx(1) for name in ("icc_2_1", "icc_3_1", "lin", "pearson", "spearman"))
    assert found["bias"].value == 0
    assert (icc(np.stack([truth, truth], 1)).value, icc(np.stack([truth, truth], 1)).low) == (1, 1)


def test_intervals_hold_what_they_promise():
    """Judges and subjects drawn anew 300 times: the 95 % intervals hold the truth 92 to 98 times of 100."""
    rng = np.random.default_rng(3)
    held = np.zeros(3)
    for _ in range(300):
        ratings = rng.normal(0, 2, (40, 1)) + rng.normal(0, 1, (40, 3))  # ICC = 4 / (4 + 1), judges without bias
        for at, absolute in enumerate((True, False)):
            interval = icc(ratings, absolute)
            held[at] += interval.low <= 0.8 <= interval.high
        upper = bland_altman(ratings[:, 0], ratings[:, 1]).upper
        held[2] += upper.low <= 1.96 * 2**0.5 <= upper.high
    assert ((held > 0.92 * 300) & (held < 0.985 * 300)).all(), held / 300


def test_groups_are_resampled_whole():
    """Five equal images of a patient are no more than one: the interval over patients is as wide as from one each."""
    rng = np.random.default_rng(4)
    truth = rng.normal(10, 2, 30)
    measured, patients = truth + rng.normal(0, 1, 30), np.arange(30)
    once = agree(measured, truth, patients)
    many = agree(np.repeat(measured, 5), np.repeat(truth, 5), np.repeat(patients, 5))
    alone = agree(np.repeat(measured, 5), np.repeat(truth, 5), np.arange(150))
    for name in ("bias", "icc_2_1", "lin", "spearman"):
        width = {k: v[name].high - v[name].low for k, v in {"once": once, "many": many, "alone": alone}.items()}
        assert width["many"] == pytest.approx(width["once"], rel=0.05), name
        assert width["alone"] < 0.7 * width["once"], name
