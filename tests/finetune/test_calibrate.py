"""calibrate: errors and scores held to torchmetrics and scikit-learn, promises held to simulated patients."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import logit, softmax
from sklearn import metrics as reference
from sklearn.calibration import calibration_curve
from torchmetrics.functional.classification import multiclass_calibration_error

from finetune import calibration, conformal, kinds, results
from finetune.__main__ import main
from finetune.metrics import group_weights
from tests.finetune.judging import CLASSES, patients, write
from tests.finetune.looked import look


@pytest.fixture
def case():
    part = patients(300, size=2)
    return part.y, part.scores, part.group


def ones(y):
    return np.ones((1, len(y)))


# -- errors and scores ------------------------------------------------------------------------------------------------


def by_torchmetrics(y, scores):
    p, target = torch.from_numpy(scores), torch.from_numpy(y)
    return multiclass_calibration_error(p, target, scores.shape[1], n_bins=15, norm="l1").item()


def test_ece_equals_torchmetrics_on_the_data_and_on_resamples(case):
    y, scores, group = case
    weight = np.concatenate([ones(y), *group_weights(group, 10)])
    rows = [np.repeat(np.arange(len(y)), w.astype(int)) for w in weight]
    expected = [by_torchmetrics(y[r], scores[r]) for r in rows]
    np.testing.assert_allclose(calibration.ece(y, scores, weight), expected, atol=1e-6)
    assert np.ptp(expected) > 0.005, "the resamples do not differ: nothing was tested"


def test_brier_and_nll_equal_scikit_learn_on_the_data_and_on_resamples(case):
    y, scores, group = case
    weight = np.concatenate([ones(y), *group_weights(group, 5)])
    brier, nll = calibration.brier(y, scores, weight), calibration.nll(y, scores, weight)
    for n, w in enumerate(weight):
        one_hot = np.eye(3)[y]
        assert brier[n] == pytest.approx(np.average(((scores - one_hot) ** 2).sum(1), weights=w))
        assert nll[n] == pytest.approx(reference.log_loss(y, scores, sample_weight=w, labels=[0, 1, 2]))
    halves = [reference.brier_score_loss(y == k, scores[:, k]) for k in range(3)]
    assert brier[0] == pytest.approx(sum(halves)), "Brier's own sum is that of the one-against-rest scores"


def test_several_labels_are_a_mean_over_labels():
    rng = np.random.default_rng(2)
    scores = rng.random((200, 4))
    y = (rng.random((200, 4)) < scores**2).astype(np.uint8)
    brier = np.mean([reference.brier_score_loss(y[:, k], scores[:, k]) for k in range(4)])
    nll = np.mean([reference.log_loss(y[:, k], scores[:, k]) for k in range(4)])
    assert calibration.brier(y, scores, ones(y))[0] == pytest.approx(brier)
    assert calibration.nll(y, scores, ones(y))[0] == pytest.approx(nll)
    per = [binary_ece(y[:, k], scores[:, k], "uniform") for k in range(4)]
    assert calibration.ece(y, scores, ones(y))[0] == pytest.approx(np.mean(per))


def binary_ece(true, p, strategy):
    """From scikit-learn's curve, whose bins that are not empty come in order."""
    frequency, confidence = calibration_curve(true, p, n_bins=15, strategy=strategy)
    edges = np.linspace(0, 1, 16) if strategy == "uniform" else np.quantile(p, np.linspace(0, 1, 16))
    count = np.histogram(p, edges)[0]
    return np.sum(count[count > 0] / len(p) * np.abs(frequency - confidence))


def test_adaptive_ece_and_reliability_equal_scikit_learns_curve(case):
    y, scores, _ = case
    confidence, right = scores.max(1), scores.argmax(1) == y
    assert calibration.adaptive_ece(y, scores, ones(y))[0] == pytest.approx(binary_ece(right, confidence, "quantile"))
    frequency, mean = calibration_curve(right, confidence, n_bins=15, strategy="uniform")
    ours = calibration.reliability(y, scores)
    assert [b["frequency"] for b in ours] == pytest.approx(frequency)
    assert [b["confidence"] for b in ours] == pytest.approx(mean)
    assert sum(b["count"] for b in ours) == len(y)
    assert all(b["from"] <= b["confidence"] <= b["to"] for b in ours)


def test_ties_share_a_bin_and_certainty_is_no_trouble():
    y, scores = np.array([0, 0, 1, 1]), np.array([[1.0, 0.0]] * 4)
    assert calibration.ece(y, scores, ones(y))[0] == calibration.adaptive_ece(y, scores, ones(y))[0] == 0.5
    assert np.isfinite(calibration.nll(y, scores, ones(y))[0])


# -- temperature ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("true", [0.5, 2.5])
def test_temperature_recovers_a_known_one(true):
    part = patients(4000, seed=1)
    distorted = softmax(np.log(part.scores) * true, axis=1)
    found = calibration.temperature(part.y, distorted)
    assert found == pytest.approx(true, rel=0.06)
    mended = calibration.soften(distorted, found, False)
    before, after = (calibration.ece(part.y, s, ones(part.y))[0] for s in (distorted, mended))
    assert after < 0.03 < before
    np.testing.assert_array_equal(mended.argmax(1), distorted.argmax(1))
    np.testing.assert_allclose(calibration.soften(distorted, true, False), part.scores, atol=0.004)  # TINY


def test_temperature_of_several_labels():
    rng = np.random.default_rng(3)
    p = rng.uniform(0.02, 0.98, size=(3000, 3))
    y = (rng.random(p.shape) < p).astype(np.uint8)
    sharper = 1 / (1 + np.exp(-3 * logit(p)))
    assert calibration.temperature(y, sharper) == pytest.approx(3, rel=0.06)
    np.testing.assert_allclose(calibration.soften(sharper, 3, True), p, atol=1e-4)


# -- thresholds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("least", [0.5, 0.9, 0.95, 1.0])
def test_thresholds_are_the_best_that_scikit_learns_roc_allows(least):
    rng = np.random.default_rng(4)
    ill = rng.random(200) < 0.3
    score = (rng.random(200) + ill).round(1)  # with ties
    fpr, tpr, lines = reference.roc_curve(ill, score, drop_intermediate=False)
    line = calibration.threshold_for_sensitivity(score, ill, least)
    assert line == lines[tpr >= least - 1e-12].max()
    assert (score[ill] >= line).mean() >= least - 1e-12
    line = calibration.threshold_for_specificity(score, ill, least)
    assert (score[ill] >= line).mean() == pytest.approx(tpr[fpr <= 1 - least + 1e-12].max())
    assert (score[~ill] < line).mean() >= least - 1e-12


# -- prediction sets --------------------------------------------------------------------------------------------------


def covered(method, alpha, wrong=0.0, size=1, repeats=150):
    """Mean coverage over repeated draws of (val, test); `wrong` shifts the quantile's level."""
    found = []
    for seed in range(repeats):
        part = patients(60 * size + 200, seed, size, sharp=1.5)
        val, test = np.split(np.arange(len(part.y)), [60 * size])
        fit = conformal.METHODS[method](part.scores, conformal.noise(part.number, seed))
        own = conformal.right(fit, part.y)
        line = conformal.quantile(own[val], part.group[val], alpha + wrong)
        found.append((own[test] <= line).mean())
    return np.mean(found)


@pytest.mark.parametrize("method", conformal.METHODS)
def test_sets_cover_what_they_promise_and_not_with_a_wrong_quantile(method):
    share = covered(method, 0.2)
    assert 0.8 - 0.01 < share < 0.8 + 0.035, "at least 1 - alpha, at most 1 / (n + 1) more, in the mean over draws"
    assert covered(method, 0.2, wrong=0.06) < 0.78, "a level that is too low would go unseen"


def test_spread_is_that_of_coverage_over_draws_of_val():
    """Infinitely many test images: the coverage of a line q of uniform scores is q itself."""
    rng = np.random.default_rng(6)
    lines = [conformal.quantile(rng.random(99), np.arange(99), 0.2) for _ in range(800)]
    assert np.mean(lines) == pytest.approx(0.8, abs=0.005)
    assert 1.96 * np.std(lines) == pytest.approx(conformal.spread(0.2, 99), rel=0.1)


def test_sets_cover_images_of_new_groups_when_val_groups_are_clustered():
    assert 0.8 - 0.015 < covered("lac", 0.2, size=4) < 0.86


def test_quantile_by_hand():
    score = np.array([0.1, 0.2, 0.3, 0.4])
    alone = np.arange(4)
    assert conformal.quantile(score, alone, 0.2) == 0.4  # the ceil(5 x 0.8) = 4th of 4
    assert conformal.quantile(score, alone, 0.4) == 0.3  # the 3rd
    assert conformal.quantile(score, alone, 0.1) == np.inf  # the 5th of 4
    # three groups weigh 1/4 each; the two images of the first 1/8 each: .125 .25 .5 .75
    assert conformal.quantile(score, np.array([1, 1, 2, 3]), 0.5) == 0.3
    assert conformal.quantile(score, np.array([1, 1, 2, 3]), 0.25) == 0.4


def test_aps_by_hand():
    scores, u = np.array([[0.2, 0.5, 0.3]]), np.array([0.5])
    np.testing.assert_allclose(conformal.aps(scores, u), [[0.9, 0.25, 0.65]])
    np.testing.assert_allclose(conformal.aps(scores, np.ones(1)), [[1.0, 0.5, 0.8]])
    np.testing.assert_allclose(conformal.lac(scores, u), [[0.8, 0.5, 0.7]])


def test_noise_belongs_to_the_image():
    both, one = conformal.noise(np.array([5, 9])), conformal.noise(np.array([9]))
    assert both[1] == one[0] != both[0]
    many = conformal.noise(np.arange(2000))
    assert (many.mean(), many.std()) == pytest.approx((0.5, 12**-0.5), abs=0.02)


# -- the verb ---------------------------------------------------------------------------------------------------------


def sharpened(part, by=2.0):
    return replace(part, scores=softmax(np.log(part.scores) * by, axis=1))


@pytest.fixture
def folder(tmp_path):
    """Overconfident by a temperature of 2, two seeds, groups of two images."""
    test = sharpened(patients(400, 7, size=2, sharp=1))
    val = [sharpened(patients(400, seed, size=2, sharp=1, first=10_000)) for seed in (8, 9)]
    return write(tmp_path / "mine/knn", replace(test, scores=np.stack([test.scores, test.scores])), val)


def test_the_verb_mends_a_model_that_is_too_sure(folder, capsys):
    assert main(["calibrate", str(folder), "--positive", "mel", "akiec", "--at", "0.8"]) == 0
    result = results.read(folder.parent / "calibrate-knn/results.json")
    m, choices = result.metrics, result.about["selected"]["choices"]
    assert [c["temperature"] for c in choices] == pytest.approx([2, 2], rel=0.25)
    assert m["nll_change"].high < 0
    assert m["ece_change"].value < 0
    assert m["ece"].low <= m["ece"].value <= m["ece"].high
    for name in ("coverage (lac)", "coverage (aps)"):
        assert m[name].low < 0.9 + 0.04
        assert m[name].high > 0.9 - 0.04
    assert m["specificity at specificity=0.8"].value == pytest.approx(0.8, abs=0.1)
    assert m["sensitivity at sensitivity=0.8"].value == pytest.approx(0.8, abs=0.1)
    saved = result.predictions()
    assert saved["sets_lac"].shape == (2, 400, 3)
    held = saved["sets_lac"][:, np.arange(400), saved["y"]].mean()
    assert m["coverage (lac)"].value == pytest.approx(held)
    per_class = [result.about["detail"]["coverage"][f"coverage (lac, class {c})"]["value"] for c in CLASSES]
    assert np.average(per_class, weights=np.bincount(saved["y"])) == pytest.approx(held)
    text = (folder.parent / "calibrate-knn/report.html").read_text()
    text = look(folder.parent / "calibrate-knn/report.html")
    for said in result.about["detail"]["said"]:
        assert said in text
    assert f"{m['nll_scaled'].value:.3f}" in text
    assert "lowered the negative log likelihood" in " ".join(capsys.readouterr().out.split())


def test_nothing_but_val_sets_temperature_thresholds_and_lines(folder, tmp_path):
    """The same scores with every test label wrong: the same choices."""
    assert main(["calibrate", str(folder), "--positive", "mel"]) == 0
    arrays = results.read(folder / "results.json").predictions()
    about = json.loads((folder / "results.json").read_text())
    arrays["y"] = (arrays["y"] + 1) % 3
    results.write(tmp_path / "poisoned/knn", {k: v for k, v in about.items() if k != "metrics"}, {}, **arrays)
    assert main(["calibrate", str(tmp_path / "poisoned/knn"), "--positive", "mel"]) == 0
    a, b = (results.read(p / "calibrate-knn/results.json") for p in (folder.parent, tmp_path / "poisoned"))
    assert a.about["selected"] == b.about["selected"]
    assert {"temperature", "threshold at sensitivity=0.9", "lac line", "aps line"} <= set(
        a.about["selected"]["choices"][0]
    )
    assert b.metrics["nll"].value > a.metrics["nll"].value + 0.5


def test_an_interval_of_a_calibration_error_holds_the_error(tmp_path):
    """A calibrated model: resampled errors lie above the error, so the percentile interval would miss what is true."""
    test = patients(500, 3)
    assert main(["calibrate", str(write(tmp_path / "a/knn", test, [patients(300, 4, first=9_000)]))]) == 0
    m = results.read(tmp_path / "a/calibrate-knn/results.json").metrics["ece"]
    drawn = np.concatenate([calibration.ece(test.y, test.scores, w) for w in group_weights(test.group)])
    assert np.percentile(drawn, 2.5) > m.low
    assert m.low < 0.02, "the true error is 0"


def test_several_labels_get_no_sets(tmp_path, capsys):
    rng = np.random.default_rng(5)
    kind = kinds.choose("multi-label", CLASSES)

    def part(n, first):
        p = rng.random((n, 3))
        base = patients(n, n, first=first)
        return replace(base, scores=p, y=(rng.random((n, 3)) < p).astype(np.uint8))

    folder = write(tmp_path / "m/logistic", part(200, 0), [part(150, 900)], kind=kind, protocol="logistic")
    assert main(["calibrate", str(folder)]) == 0
    result = results.read(tmp_path / "m/calibrate-logistic/results.json")
    assert result.about["selected"]["choices"][0]["temperature"] == pytest.approx(1, abs=0.15)
    assert not any("coverage" in name for name in result.metrics)
    assert any("one class an image" in note for note in result.about["notes"])
    shown = look(tmp_path / "m/calibrate-logistic/report.html")
    first = result.about["detail"]["said"][0]
    assert re.match(r"As it is, it gives a label 0\.\d\d on average, and 0\.\d\d have it: too (high|low) by", first)
    assert "Share that had the label, by its probability" in shown
    assert "right" not in first + shown, "most labels are absent: that is no share of being right"
    assert main(["calibrate", str(folder), "--by", "sex"]) == 2
    assert "--by tells the coverage of prediction sets, and with several" in capsys.readouterr().err
    assert main(["calibrate", str(folder), "--positive", "mel", "--overwrite"]) == 2
    assert "does not fit --multi-label" in capsys.readouterr().err


def test_votes_that_round_to_a_little_more_than_one_are_probabilities(tmp_path, capsys):
    test = patients(60)
    scores = np.eye(3)[test.scores.argmax(1)] * (1 + 3e-7)  # as float32 sums of weights come out
    val = patients(60, 1, first=900)
    assert main(["calibrate", str(write(tmp_path / "a/knn", replace(test, scores=scores), [val]))]) == 0
    assert main(["calibrate", str(write(tmp_path / "b/knn", replace(test, scores=scores * 2), [val]))]) == 2
    assert "its scores are no probabilities" in capsys.readouterr().err


def test_what_cannot_be_calibrated_is_refused_before_anything_is_written(folder, tmp_path, capsys):
    bare = write(tmp_path / "bare/knn", patients(50))
    for arguments, message in [
        ([bare], "holds no scores of val"),
        ([folder, "--positive", "wart"], "no such class here"),
        ([folder, "--positive", *CLASSES], "all images of val are with disease"),
        ([folder, "--alpha", 1.5], "--alpha must lie between 0 and 1"),
        ([folder, folder.parent.parent / "other", "--out", tmp_path / "o"], "holds no results.json"),
    ]:
        (folder.parent.parent / "other").mkdir(exist_ok=True)
        assert main(["calibrate", *map(str, arguments)]) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("calibrate-*"))


def test_a_folder_of_many_results_is_calibrated_where_val_was_scored(folder, capsys):
    other = write(folder.parent / "fewshot", patients(50), protocol="fewshot")
    assert main(["calibrate", str(folder.parent)]) == 0
    assert f"left out, as they hold no class scores of test and val: {other}\n" in capsys.readouterr().out
    assert [path.name for path in folder.parent.glob("calibrate-*")] == ["calibrate-knn"]
    assert main(["calibrate", str(folder), str(other)]) == 2
    assert f"{other / 'results.json'} (fewshot) holds no scores of val" in capsys.readouterr().err
