"""Few-shot episodes: what is drawn, what is computed from it, and how sure the mean is."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import NearestCentroid

from finetune import episodes, metrics, results
from finetune.__main__ import main
from finetune.backbones import load
from finetune.features import extract
from tests.finetune.looked import look


@pytest.fixture(scope="module")
def labelled():
    """(y, group): 3 classes, groups of 1 to 4 images; class 2 has 6 images in 2 groups."""
    rng = np.random.default_rng(0)
    sizes = {0: rng.integers(1, 5, 20), 1: rng.integers(1, 5, 9), 2: np.array([2, 4])}
    y = np.concatenate([np.full(s.sum(), c) for c, s in sizes.items()])
    group = np.concatenate([100 * c + np.repeat(np.arange(len(s)), s) for c, s in sizes.items()])
    order = rng.permutation(len(y))
    return y[order], group[order]


def test_episodes_hold_k_images_a_class_from_as_few_groups_as_can_be(labelled):
    y, group = labelled
    order = episodes.draw(y, group, 3, 5, 200, seed=1)
    assert order.shape == (200, 3, 5)
    for chosen in order:
        for c, rows in enumerate(chosen):
            assert (y[rows] == c).all()
            assert len(set(rows.tolist())) == 5
            left = [g for g in set(group[rows]) if (group == g).sum() > (group[rows] == g).sum()]
            assert len(left) <= 1, "only the last group may be cut"
            if left:
                assert group[rows[-1]] == left[0]
    assert len({tuple(o) for o in order[:, 0].tolist()}) > 190, "draws differ"
    np.testing.assert_array_equal(order, episodes.draw(y, group, 3, 5, 200, seed=1))
    assert (order != episodes.draw(y, group, 3, 5, 200, seed=2)).any()


def test_a_class_that_has_fewer_gives_all(labelled):
    y, group = labelled
    order = episodes.draw(y, group, 4, 10, 5, seed=0)  # class 3 has no image at all
    for chosen in order:
        assert sorted(chosen[2][chosen[2] >= 0]) == np.flatnonzero(y == 2).tolist()
        assert (chosen[2, 6:] == -1).all()
        assert (chosen[3] == -1).all()


def test_every_group_is_as_likely_to_come_first(labelled):
    y, group = labelled
    first = group[episodes.draw(y, group, 3, 1, 4000, seed=0)[:, 0, 0]]
    _, counts = np.unique(first, return_counts=True)
    assert len(counts) == 20
    assert counts.min() > 130
    assert counts.max() < 280  # 200 expected, deviation 14


@pytest.fixture(scope="module")
def vectors(labelled):
    """Unit features of the labelled images, of 30 queries, and the episodes."""
    y, group = labelled
    x = np.random.default_rng(1).normal(size=(len(y) + 30, 7)) + 1
    x[: len(y)] += np.eye(7)[y]
    x = episodes.centre(x, x.mean(0))
    return x[: len(y)], x[len(y) :], episodes.draw(y, group, 3, 5, 6, seed=0)


def test_centring_and_length(vectors):
    x, _, _ = vectors
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, atol=1e-5)
    a = np.array([[3.0, 4.0], [1.0, 0.0]])
    np.testing.assert_allclose(episodes.centre(a, np.array([1.0, 0.0])), [[0.4472136, 0.8944272], [0, 0]], atol=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value")  # its deviation of a single image
def test_nearest_mean_is_scikit_learns(vectors, labelled):
    x, queries, order = vectors
    for k, scores in zip((1, 3, 5), episodes.nearest_mean(x, order, (1, 3, 5), queries), strict=True):
        assert scores.shape == (6, 30, 3)
        np.testing.assert_allclose(scores.sum(2), 1, atol=1e-5)
        for chosen, own in zip(order[:, :, :k], scores, strict=True):
            rows = chosen.ravel()
            model = NearestCentroid().fit(x[rows], labelled[0][rows])
            np.testing.assert_array_equal(own.argmax(1), model.predict(queries))
            squared = ((queries[:, None] - model.centroids_) ** 2).sum(2)
            expected = np.exp(-squared) / np.exp(-squared).sum(1, keepdims=True)
            np.testing.assert_allclose(own, expected, atol=1e-5)


def test_logistic_is_scikit_learns_and_reports_every_fit(vectors, labelled):
    x, queries, order = vectors
    fits = []
    for k, scores in zip((2, 5), episodes.logistic(x, order, (2, 5), queries, lambda: fits.append(1)), strict=True):
        for chosen, own in zip(order[:, :, :k], scores, strict=True):
            model = LogisticRegression(C=1.0, max_iter=1000).fit(x[chosen.ravel()], labelled[0][chosen.ravel()])
            np.testing.assert_allclose(own, model.predict_proba(queries), atol=1e-4)
    assert len(fits) == 12


def test_a_class_without_an_image_is_never_chosen(labelled):
    y, group = labelled
    x = np.random.default_rng(2).normal(size=(len(y), 5)).astype(np.float32)
    order = episodes.draw(y, group, 4, 2, 3, seed=0)
    for classify in (episodes.nearest_mean, episodes.logistic):
        (scores,) = classify(x, order, (2,), x[:8])
        assert (scores[:, :, 3] == 0).all()
        assert np.isfinite(scores).all()


@pytest.mark.parametrize("noise", [0.3, 3.0])
def test_spread_is_that_of_a_bootstrap_over_episodes_and_groups(noise):
    """Against the plain two-way bootstrap, which evaluates every drawn episode on every drawn set of groups."""
    rng = np.random.default_rng(5)
    y, groups = rng.integers(3, size=90), np.repeat(np.arange(30), 3)
    shared = np.eye(3)[y] + rng.normal(0, 0.7, (90, 3))
    scores = shared + rng.normal(0, noise, (25, 1, 3)) + rng.normal(0, 0.2, (25, 90, 3))
    found, each = episodes.spread(metrics.balanced_accuracy, y, scores, groups, resamples=2000)
    assert found.value == pytest.approx(np.mean([balanced_accuracy_score(y, s.argmax(1)) for s in scores]))
    assert each == pytest.approx([balanced_accuracy_score(y, s.argmax(1)) for s in scores])
    drawn = []
    for weight in metrics.group_weights(groups, 600, seed=9):
        table = np.stack([metrics.balanced_accuracy(y, s, weight) for s in scores], axis=1)
        drawn += [row[rng.integers(25, size=25)].mean() for row in table]
    low, high = np.percentile(drawn, [2.5, 97.5])
    assert found.interval.low == pytest.approx(low, abs=0.015)
    assert found.interval.high == pytest.approx(high, abs=0.015)


# ------------------------------------------------------------------------------------------------------------ the verb


@pytest.fixture
def arguments(index, export_folder, tmp_path):
    base = [
        "--backbone",
        str(export_folder),
        "--data",
        str(index.root),
        "--out",
        str(tmp_path / "o"),
        "--device",
        "cpu",
    ]
    return ["fewshot", *base, "--shots", "1", "4", "--episodes", "12"]


def test_the_verb_reports_what_its_parts_compute(arguments, index, export_folder, tmp_path):
    assert main([*arguments, "--seeds", "0", "7", "--positive", "red"]) == 0
    result = results.read(tmp_path / "o/fewshot/results.json")
    features = extract(load(str(export_folder)), index, index.select(["train", "test"]))
    train, test = (np.isin(features.numbers, index.select([s])) for s in ("train", "test"))
    mean = features.x["cls"][train].mean(0)
    x, queries = (episodes.centre(features.x["cls"][rows], mean) for rows in (train, test))
    values = []
    for seed in (0, 7):
        order = episodes.draw(features.label[train], features.group[train], 3, 4, 12, seed)
        (scores,) = episodes.nearest_mean(x, order, (4,), queries)
        values += [balanced_accuracy_score(features.label[test], s.argmax(1)) for s in scores]
    assert result.metrics["balanced_accuracy@4"].value == pytest.approx(np.mean(values))
    assert result.about["detail"]["episodes"]["balanced_accuracy@4"] == pytest.approx(values, abs=1e-4)
    assert {"macro_auroc@1", "sensitivity@4"} <= result.metrics.keys()
    assert result.about["cost"]["labels_used"] == {"train": [12, 12], "val": [0, 0]}
    assert result.about["selected"]["split"] == "no split: all was fixed beforehand"
    assert result.predictions()["scores"].shape == (24, test.sum(), 3)
    for m in result.metrics.values():
        assert m.low <= m.value <= m.high
    page = (tmp_path / "o/fewshot/report.html").read_text()
    look(tmp_path / "o/fewshot/report.html")
    assert f">{result.metrics['balanced_accuracy@4'].value:.3f}</a>" in page
    assert page.count('href="results.json"') >= len(result.metrics)
    assert "<polygon" in page


def test_the_logistic_verb_has_a_folder_of_its_own(arguments, tmp_path):
    assert main([*arguments, "--methods", "mean", "logistic", "--shots", "100"]) == 0
    notes = results.read(tmp_path / "o/fewshot-logistic/results.json").about["notes"]
    assert any("fewer than 100 train images of blue" in note for note in notes)
    assert (tmp_path / "o/fewshot/report.html").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--shots", "0"], "--shots must be 1"), (["--episodes", "1"], "--episodes 2"), (["--multi-label"], "one class")],
)
def test_what_makes_no_sense_is_refused(arguments, tmp_path, options, message, capsys):
    assert main([*arguments, *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
