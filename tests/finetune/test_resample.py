"""Draws: the least p that few groups can show, parts that are too small to judge, and draws of the labels."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.metrics import Interval
from finetune.resample import Draws, few_groups, mean, mean_of_drawn, resample


def test_few_patients_show_nothing():
    """Two models that are equally good: 5 patients whose images vary together used to give a verdict time and again."""
    rng, p = np.random.default_rng(0), {groups: [] for groups in (1, 3, 5, 6)}
    for groups, found in p.items():
        group = np.repeat(np.arange(groups), 30)
        for _ in range(60):
            d = rng.normal(0, 0.1, groups)[group] + rng.normal(0, 0.3, len(group))
            found.append(resample({"d": lambda w, d=d: w @ d / w.sum(1)}, group, 400)["d"].p)
    assert min(p[1]) == 1
    assert min(p[3]) == 0.25
    assert min(p[5]) == 0.0625
    assert min(p[6]) == 0.03125


def test_the_floor_outlives_arithmetic():
    one, other = Draws(1.0, np.ones(999), 0.25), Draws(0.0, np.zeros(999), 0.5)
    assert (one - other).p == 0.5
    assert mean([one, other]).floor == mean_of_drawn([one, other]).floor == 0.5
    assert np.isnan(Draws(1.0, np.ones(999), 1.0).interval.low)


def test_parts_of_few_patients_are_named():
    group, part = np.r_[np.repeat(np.arange(40), 10), np.repeat([40, 41], 20)], np.arange(440) >= 400
    assert few_groups(group, part, 30) == "40 images of 2 patients or lesions, fewer than 10"
    assert few_groups(group, part, 2) == "", "so few were asked for"
    assert few_groups(group, ~part, 30) == ""
    assert few_groups(np.arange(440), np.arange(5), 30) == "", "images that are their own groups are only counted"


def test_draws_of_labels_widen_the_interval_and_one_changes_nothing():
    rng = np.random.default_rng(1)
    runs = {str(s): rng.random(200) < 0.5 + 0.08 * s for s in range(4)}
    draws = resample({s: lambda w, r=r: w @ r / w.sum(1) for s, r in runs.items()}, np.arange(200))
    own = list(draws.values())
    whole, fixed = mean_of_drawn(own), mean(own)
    width = lambda i: i.high - i.low  # noqa: E731
    assert whole.value == fixed.value == pytest.approx(np.mean([d.value for d in own]))
    assert width(whole.interval) > 1.3 * width(fixed.interval)
    assert isinstance(whole.interval, Interval)
    np.testing.assert_array_equal(mean_of_drawn(own[:1]).drawn, own[0].drawn)
    assert width((whole - mean_of_drawn(own)).interval) == 0, "equal seeds are picked together"
    assert width((whole - mean_of_drawn(own, 1)).interval) > 0
