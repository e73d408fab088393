"""The verb `robust`: drops against scikit-learn, faults that matter, and a page whose numbers have their source."""

from __future__ import annotations

import re

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from finetune import results
from finetune.__main__ import main
from finetune.metrics import ONE_OF, Interval, group_weights
from finetune.resample import GROUPS, few_groups
from finetune.robust import drops_of
from finetune.robust_page import said
from tests.finetune.looked import look


def run(index, out, *options, backbone="histogram"):
    arguments = ["robust", "--backbone", str(backbone), "--data", str(index.root), "--out", str(out)]
    return main([*arguments, "--device", "cpu", *map(str, options)])


@pytest.fixture(scope="module")
def out(index, tmp_path_factory):
    """One run with two heads and two faults: the classes differ in colour, so light must cost more than a ruler."""
    folder = tmp_path_factory.mktemp("robust")
    options = [
        "--corruptions",
        "exposure",
        "ruler",
        "--severities",
        5,
        1,
        "--methods",
        "logistic",
        "knn",
        "--seeds",
        0,
        1,
    ]
    assert run(index, folder, *options) == 0
    return folder


@pytest.fixture(scope="module")
def result(out):
    return results.read(out / "robust-logistic" / "results.json")


def test_drops_are_those_of_scikit_learn(result):
    arrays, detail = result.predictions(), result.about["detail"]

    def reached(name):
        return np.mean([balanced_accuracy_score(arrays["y"], run.argmax(1)) for run in arrays[name]])

    assert [(row["corruption"], row["severity"]) for row in detail["rows"]] == [
        (name, s) for name in ("exposure", "ruler") for s in (1, 5)
    ]
    for row in detail["rows"]:
        value = reached(f"scores/{row['corruption']}-{row['severity']}")
        assert row["value"]["value"] == pytest.approx(value)
        assert row["drop"]["value"] == pytest.approx(reached("scores") - value)
    drops = [row["drop"]["value"] for row in detail["rows"]]
    assert result.metrics["mean_drop"].value == pytest.approx(np.mean(drops))
    assert result.metrics["drop_exposure"].value == pytest.approx(np.mean(drops[:2]))
    assert result.metrics["balanced_accuracy"].value == pytest.approx(reached("scores"))


def test_light_costs_a_colour_histogram_more_than_a_ruler_does(result):
    drop = {(row["corruption"], row["severity"]): row["drop"]["value"] for row in result.about["detail"]["rows"]}
    assert drop["exposure", 5] > drop["ruler", 5] + 0.05
    assert drop["exposure", 5] > drop["exposure", 1] + 0.05


def test_intervals_are_paired_over_groups():
    """By hand: the same resampled groups on both sides, and images of a group always together."""
    rng = np.random.default_rng(0)
    y, group = rng.integers(0, 3, 60), rng.integers(0, 12, 60)
    clean, blurred = rng.random((2, 60, 3)), rng.random((2, 60, 3))
    detail, found = drops_of(y, clean, {("blur", 1): blurred}, group, ONE_OF["balanced_accuracy"])
    metric = ONE_OF["balanced_accuracy"]
    drawn = [
        np.mean([metric(y, a, w) - metric(y, b, w) for a, b in zip(clean, blurred, strict=True)], axis=0)
        for w in group_weights(group)
    ]
    low, high = np.percentile(np.concatenate(drawn), [2.5, 97.5])
    assert detail["rows"][0]["drop"]["low"] == pytest.approx(low)
    assert found["mean_drop"].high == pytest.approx(high)
    same, none = drops_of(y, clean, {("blur", 1): clean}, group, metric)
    assert same["rows"][0]["drop"] == {"value": 0, "low": 0, "high": 0}, "no luck of the draw in a pair"
    assert none["mean_drop"].high == 0


def test_few_patients_show_no_fault_to_cost_anything():
    detail = {"metric": "balanced_accuracy", "rows": [{"corruption": "blur", "severity": 1}]}
    drops = {"drop_blur": Interval(0.2, 0.1, 0.3)}
    assert said(detail, drops)[0].startswith("Faults that cost balanced accuracy: blur 0.200")
    few = few_groups(np.arange(60) // 20, np.ones(60, bool), GROUPS)
    told = said(detail, drops, few)
    assert told[0] == (
        "No fault can be shown to cost balanced accuracy: 60 images of 3 patients or lesions, fewer than 10."
    )
    assert told[2].startswith("No loss is shown for blur")


def test_the_head_is_fitted_and_chosen_on_clean_images(result, index, out, tmp_path):
    """The clean figures are those of `probe`, and a result can be judged like any other."""
    options = ["--backbone", "histogram", "--data", str(index.root), "--out", str(tmp_path), "--device", "cpu"]
    assert main(["probe", *options, "--methods", "logistic", "--seeds", "0", "1"]) == 0
    probe = results.read(tmp_path / "logistic" / "results.json")
    assert result.metrics["balanced_accuracy"] == probe.metrics["balanced_accuracy"]
    assert result.about["selected"]["choices"] == probe.about["selected"]["choices"]
    assert result.about["selected"]["grid"]["class_weight"] == "balanced", "calibrate warns by it"
    assert "class_weight" not in results.read(out / "robust-knn/results.json").about["selected"]["grid"]
    mine, theirs = result.predictions(), probe.predictions()
    for name in theirs:
        np.testing.assert_array_equal(mine[name], theirs[name])
    assert "k" in results.read(out / "robust-knn" / "results.json").about["selected"]["choices"][0]


def test_the_page_links_every_drop_and_says_what_was_not_shown(out, result):
    page = (out / "robust-logistic" / "report.html").read_text()
    look(out / "robust-logistic" / "report.html")
    cells = re.findall(r'<a href="results.json">([+−-][0-9.]+)</a>', page)
    assert [float(c) for c in cells] == [round(row["drop"]["value"], 3) for row in result.about["detail"]["rows"]]
    assert "Not shown: what a head fitted on such images would reach" in page
    assert page.count("data:image/jpeg") == 2 * 3
    assert "aria-label" in page


def test_bad_options_stop_before_any_work(index, tmp_path, capsys):
    assert run(index, tmp_path / "o", "--corruptions", "blurr") == 2
    assert "no such fault; did you mean blur? There are blur, noise" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_grey_images_have_no_colour_cast():
    from finetune.robust import chosen
    from hybridssl.errors import UserError

    assert "colour" not in chosen(None, 1)
    with pytest.raises(UserError, match="no colour"):
        chosen(["blur", "colour"], 1)
