"""compare: p-values, Holm's correction, verdicts, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score

from finetune import compare, kinds, metrics, results
from finetune.__main__ import main
from finetune.judged import Part
from finetune.resample import Draws, enough, holm, resample
from tests.finetune.judging import CLASSES, flip, opened, patients, write
from tests.finetune.looked import look

# -- resamples --------------------------------------------------------------------------------------------------------


def test_interval_and_p_agree_with_scipy_when_every_image_is_its_own_group():
    part = patients(300, seed=5)
    other = flip(part, 0.1)
    right = [(p.scores.argmax(1) == part.y).astype(float) for p in (part, other)]
    draws = resample({str(n): lambda w, r=r: w @ r / w.sum(1) for n, r in enumerate(right)}, part.group, 4000)
    ours = draws["0"] - draws["1"]
    theirs = stats.bootstrap((right[0] - right[1],), np.mean, n_resamples=9999, method="percentile", rng=1)
    assert (ours.interval.low, ours.interval.high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.006)
    drawn = theirs.bootstrap_distribution
    assert ours.p == pytest.approx(2 * min((drawn <= 0).mean(), (drawn >= 0).mean()), abs=0.015)


def test_p_is_uniform_when_nothing_differs():
    """Two models that are equally good: a 5 % test rejects about 5 %, so its p-value can be believed."""
    found = []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        a, b = (rng.random(80) < 0.7 for _ in range(2))
        draws = resample({"a": lambda w, a=a: w @ a / 80, "b": lambda w, b=b: w @ b / 80}, np.arange(80), 400, seed)
        found.append((draws["a"] - draws["b"]).p)
    assert 0.02 < np.mean(np.array(found) <= 0.05) < 0.095
    assert 0.4 < np.mean(np.array(found) <= 0.5) < 0.6


def test_p_of_clear_cases():
    assert Draws(1.0, np.full(999, 1.0)).p == pytest.approx(2 / 1000), "never 0"
    assert Draws(0.0, np.zeros(999)).p == 1
    assert Draws(np.nan, np.full(9, np.nan)).p == 1
    assert Draws(0.2, np.r_[np.full(15, -0.1), np.full(984, 0.3), np.nan]).p == pytest.approx(2 * 16 / 1000)


# -- Holm -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 6, 54, 600])
def test_a_difference_in_every_resample_outlives_its_correction(count):
    p = Draws(1.0, np.ones(enough(count))).p
    assert max(holm([p] * count)) <= 0.01


def test_holms_worked_example():
    """The example of the encyclopaedia's article on the method: H4 and H1 are rejected at 0.05, H3 and H2 are not."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@pytest.mark.parametrize("count", [1, 2, 5, 7])
def test_holm_is_the_closed_test_of_bonferroni(count):
    """By the closure principle (Marcus et al. 1976): a hypothesis falls with every intersection that it is part of."""
    rng = np.random.default_rng(count)
    for _ in range(20):
        p = (rng.random(count) ** 3).round(2)
        sets = [s for size in range(1, count + 1) for s in combinations(range(count), size)]
        expected = [max(min(1, len(s) * min(p[list(s)])) for s in sets if i in s) for i in range(count)]
        assert holm(p) == pytest.approx(expected)


# -- the verb ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    """good; twin, whose scores are as good; poor. The order of the images differs, as it may."""
    part = patients(240, size=2)
    turned = np.random.default_rng(0).permutation(240)
    poor = flip(part, 0.5)
    shuffled = Part(poor.scores[turned], poor.y[turned], poor.group[turned], poor.number[turned])
    return {
        "good": write(tmp_path / "good/knn", part, name="good"),
        "twin": write(tmp_path / "twin/knn", flip(part, 0.02, 3), name="twin"),
        "poor": write(tmp_path / "poor/knn", shuffled, name="poor"),
    }


def run(out, *arguments):
    assert main(["compare", *map(str, arguments), "--out", str(out)]) == 0
    return results.read(out / "compare-knn/results.json")


def test_verdicts(folders, tmp_path, capsys):
    result = run(tmp_path / "out", *folders.values())
    said = {(c["a"], c["b"]): c for c in result.about["detail"]["comparisons"]}
    assert {pair: c["verdict"] for pair, c in said.items()} == {
        ("twin", "good"): "not shown to be better",
        ("poor", "good"): "worse",
    }
    worse = said["poor", "good"]
    assert worse["p_holm"] == pytest.approx(2 * worse["p"]) == pytest.approx(2 * 2 / 10_001)
    assert worse["difference"]["high"] < 0
    assert set(worse["others"]) == set(metrics.ONE_OF) - {"balanced_accuracy"}
    m = result.metrics
    value = m["balanced_accuracy: poor"].value - m["balanced_accuracy: good"].value
    assert m["balanced_accuracy: poor minus good"].value == pytest.approx(value)
    assert value == pytest.approx(worse["difference"]["value"])
    text = (tmp_path / "out/compare-knn/report.html").read_text()
    look(tmp_path / "out/compare-knn/report.html")
    assert "poor is worse than good" in text
    assert "twin is not shown to be better or worse than good" in text
    assert 'href="../../poor/knn/results.json"' in text
    assert "no null baseline among them" in capsys.readouterr().out


def test_many_comparisons_get_more_resamples(folders, monkeypatch):
    """At 10,000, the p of a difference that every resample shows would become .06 by its 300 comparisons."""
    monkeypatch.setattr(compare, "RESAMPLES", 1000)  # fast, and as far too few for 30 comparisons
    named = {str(n): opened(folders["good"]) for n in range(30)} | {"poor": opened(folders["poor"])}
    _, compared = compare.compare(named, [("poor", str(n)) for n in range(30)], "accuracy")
    assert {c.verdict for c in compared} == {"worse"}


def test_against_another_and_each_with_each(folders, tmp_path):
    result = run(tmp_path / "a", *folders.values(), "--against", folders["poor"])
    said = {(c["a"], c["b"]): c["verdict"] for c in result.about["detail"]["comparisons"]}
    assert said == {("good", "poor"): "better", ("twin", "poor"): "better"}
    assert result.about["backbone"]["name"] == "poor"
    every = run(tmp_path / "b", *folders.values(), "--all-pairs", "--metric", "accuracy")
    assert len(every.about["detail"]["comparisons"]) == 3
    least = [c for c in every.about["detail"]["comparisons"] if c["p"] < 0.01]
    assert all(c["p_holm"] >= 2 * c["p"] for c in least)


def test_another_comparison_is_not_replaced_unseen(folders, tmp_path, capsys):
    out, against = tmp_path / "out", ["--against", str(folders["good"])]
    run(out, folders["poor"], *against)
    run(out, folders["poor"], *against, "--metric", "accuracy")
    assert main(["compare", str(folders["twin"]), *against, "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert "compares other results (good, poor): name all of them in one call" in said
    assert set(results.read(out / "compare-knn/results.json").about["detail"]["results"]) == {"good", "poor"}
    run(out, folders["twin"], *against, "--overwrite")


def test_one_patient_gets_no_verdict(tmp_path, capsys):
    part = replace(patients(60), group=np.ones(60, dtype=np.int64))
    good, poor = write(tmp_path / "a/knn", part, name="good"), write(tmp_path / "b/knn", flip(part, 0.9), name="poor")
    (only,) = run(tmp_path / "out", good, poor).about["detail"]["comparisons"]
    assert (only["verdict"], only["p"], only["difference"]["low"]) == ("not shown to be better", 1, None)
    page, said = look(tmp_path / "out/compare-knn/report.html"), capsys.readouterr().out
    assert "one patient tells nothing of others" in page
    assert "nan" not in page.lower() + said.lower()


def test_draws_of_labels_are_resampled_and_seeds_of_all_labels_are_not(tmp_path):
    """Three draws that differ by more than patients do: their luck is part of the interval."""
    part = patients(400)
    runs = np.stack([flip(part, share, seed).scores for seed, share in enumerate((0.0, 0.2, 0.4))])
    width = {}
    for share in (1.0, 0.1):
        good = write(tmp_path / f"a{share}/knn", part, name="one", labels=share)
        three = write(tmp_path / f"b{share}/knn", replace(part, scores=runs), name="three", labels=share)
        result = run(tmp_path / f"out{share}", good, three)
        difference = result.about["detail"]["comparisons"][0]["difference"]
        width[share] = difference["high"] - difference["low"]
        told = [note for note in result.about["notes"] if "the seeds drew different labels" in note]
        assert len(told) == (share < 1)
    assert width[0.1] > 1.5 * width[1.0]


def test_several_labels_an_image(tmp_path):
    """Each label is drawn from its own score, so the scores are as good as any; with half of them turned, worse."""
    rng = np.random.default_rng(0)
    scores, group = rng.random((400, 3)), np.arange(400) // 2
    part = Part(scores, (rng.random((400, 3)) < scores).astype(np.uint8), group, np.arange(400))
    turned = np.where(rng.random((400, 1)) < 0.5, 1 - scores, scores)
    kind = kinds.choose("multi-label", CLASSES)
    good = write(tmp_path / "good/knn", part, name="good", kind=kind)
    poor = write(tmp_path / "poor/knn", Part(turned, part.y, group, part.number), name="poor", kind=kind)
    result = run(tmp_path / "out", good, poor)
    (only,) = result.about["detail"]["comparisons"]
    assert (only["a"], only["verdict"]) == ("poor", "worse")
    assert list(only["others"]) == ["average_precision"]
    areas = [roc_auc_score(part.y, s, average="macro") for s in (turned, scores)]
    assert only["difference"]["value"] == pytest.approx(areas[0] - areas[1], abs=1e-6)
    precisions = [average_precision_score(part.y, s, average="macro") for s in (turned, scores)]
    assert only["others"]["average_precision"]["value"] == pytest.approx(precisions[0] - precisions[1], abs=1e-6)
    assert "By macro AUROC: poor is worse than good." in look(tmp_path / "out/compare-knn/report.html")
    one_label = write(tmp_path / "one/knn", patients(400), name="one")
    assert main(["compare", str(good), str(one_label), "--out", str(tmp_path / "out2")]) == 2


def test_backbones_of_one_name_are_told_apart(folders, tmp_path):
    again = write(tmp_path / "again/knn", patients(240, size=2), name="good")
    result = run(tmp_path / "out", folders["good"], again)
    (only,) = result.about["detail"]["comparisons"]
    assert only["a"] != only["b"]
    assert only["p"] == 1
    assert only["verdict"] == "not shown to be better"


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"protocol": "logistic"}, "differ in protocol (knn; logistic)"),
        ({"sha256": "e" * 64}, "differ in index (sha256)"),
        ({"labels": 0.1}, "differ in share of labels (1.0; 0.1)"),
        ({"source": "ward"}, "differ in source (None; ward)"),
        ({"classes": ("akiec", "mel", "wart")}, "differ in task"),
    ],
)
def test_another_question_is_refused(folders, tmp_path, capsys, about, message):
    other = write(tmp_path / "other/x", patients(240, size=2), **about)
    assert main(["compare", str(folders["good"]), str(other), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_few_labels_are_compared_with_as_few(tmp_path, capsys):
    """The scores that are compared are those of the largest number of labelled images a class."""
    shots = {"two": [1, 2], "ten": [1, 10], "also-ten": [10]}
    paths = {
        name: write(
            tmp_path / name / "fewshot", patients(240, size=2), name=name, protocol="fewshot", grid={"shots": k}
        )
        for name, k in shots.items()
    }
    assert main(["compare", str(paths["two"]), str(paths["ten"]), "--out", str(tmp_path / "out")]) == 2
    assert "differ in most labelled images a class (2; 10)" in capsys.readouterr().err
    assert main(["compare", str(paths["ten"]), str(paths["also-ten"]), "--out", str(tmp_path / "out")]) == 0


def test_other_images_labels_and_a_lone_result_are_refused(folders, tmp_path, capsys):
    part = patients(240, size=2)
    fewer = write(tmp_path / "fewer/knn", Part(part.scores[:230], part.y[:230], part.group[:230], part.number[:230]))
    other = write(tmp_path / "relabelled/knn", Part(part.scores, (part.y + 1) % 3, part.group, part.number))
    for arguments, message in [
        ([folders["good"], fewer], "not judged on the same test images (10 in only one of them)"),
        ([folders["good"], other], "do not agree on labels or groups"),
        ([folders["good"]], "is alone"),
        ([folders["good"], folders["poor"], "--metric", "f7"], "allows balanced_accuracy"),
    ]:
        assert main(["compare", *map(str, arguments), "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err


def test_a_comparison_is_not_compared_again(folders, tmp_path, capsys):
    run(tmp_path / "out", *folders.values())
    assert main(["compare", str(tmp_path / "out"), "--out", str(tmp_path / "more")]) == 2
    assert f"{tmp_path / 'out'}: no result there can be judged" in (error := capsys.readouterr().err)
    assert "(compare-knn) judges another result" in error
