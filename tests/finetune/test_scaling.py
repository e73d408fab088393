"""scaling through the door on the small index: cells, bands, comparisons, and going on after a cut-off."""

from __future__ import annotations

import json

import numpy as np
import pytest

from finetune import adapt, metrics, probe, results, scaling, scaling_page, ways
from finetune.__main__ import main
from finetune.resample import enough
from tests.finetune.judging import point
from tests.finetune.looked import look

FAST = ["--epochs", 1, "--steps", 1, "--train-batch", 8, "--lr", 1e-3]


@pytest.fixture(scope="module", autouse=True)
def short_sweep():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "CS", (0.01, 1.0))
        yield


def arguments(out, index, export_folder, *options):
    fixed = ["scaling", "--backbone", export_folder, "--data", index.root, "--out", out, "--device", "cpu"]
    return list(map(str, [*fixed, *options]))


@pytest.fixture(scope="module")
def done(index, export_folder, tmp_path_factory):
    """Two backbones, three methods, two shares, two seeds."""
    out = tmp_path_factory.mktemp("scaling")
    options = ["--shares", 0.2, 1, "--methods", "knn", "logistic", "adapt-lora", "--seeds", 0, 1]
    assert main(arguments(out, index, export_folder, *options, "--also", "histogram", *FAST)) == 0
    return results.read(out / "scaling" / "results.json")


def test_every_possible_cell_is_there_and_is_a_result_of_its_own(done):
    rows = done.about["detail"]["rows"]
    cells = {(row["backbone"].split("/")[-1], row["method"], row["share"]) for row in rows}
    expected = {("exported", method, share) for method in ("knn", "logistic", "adapt-lora") for share in (0.2, 1)}
    assert cells == expected | {("histogram", method, share) for method in ("knn", "logistic") for share in (0.2, 1)}
    assert any("left out adapt-lora: histogram has no weights" in note for note in done.about["notes"])
    for row in rows:
        cell = results.read(done.path.parent / row["result"])
        assert cell.protocol == row["method"]
        assert cell.about["data"]["labels"] == row["share"]
        assert cell.about["selected"]["grid"].get("class_weight") == (None if row["method"] == "knn" else "balanced")
        assert row["labels"] == np.mean(cell.about["cost"]["labels_used"]["train"])
        predictions = cell.predictions()
        each = [point("balanced_accuracy", predictions["y"], run) for run in predictions["scores"]]
        assert row["seeds"] == pytest.approx(each, abs=1e-9)
        assert row["value"] == pytest.approx(np.mean(each))
        assert row["value"] == pytest.approx(cell.metrics["balanced_accuracy"].value, abs=1e-6)
        assert row["low"] <= row["value"] <= row["high"]
    assert {row["labels"] for row in rows if row["share"] == 1} == {done.about["data"]["splits"]["train"]}
    assert len(done.metrics) == len(rows)
    lora = [row for row in rows if row["method"] == "adapt-lora"]
    assert all(row["parameters"] > 0 for row in lora)


def test_bands_hold_groups_and_seeds(done):
    """One image a group: the same draw written out by hand, group by group and seed by seed."""
    row = done.about["detail"]["rows"][0]
    predictions = results.read(done.path.parent / row["result"]).predictions()
    runs, y, group = predictions["scores"].astype(np.float64), predictions["y"], predictions["group"]
    names = np.unique(group)
    drawn = np.random.default_rng(0).integers(len(names), size=(metrics.RESAMPLES, len(names)))
    picked = np.random.default_rng(0).integers(len(runs), size=(metrics.RESAMPLES, len(runs)))
    by_hand = []
    for groups, seeds in zip(drawn[:40], picked, strict=False):
        rows = np.concatenate([np.flatnonzero(group == names[g]) for g in groups])
        by_hand.append(np.mean([point("balanced_accuracy", y[rows], runs[s][rows]) for s in seeds]))
    np.testing.assert_allclose(done.predictions()["drawn"][0, :40], by_hand, atol=1e-9)


def test_comparisons_are_paired_and_adjusted(done):
    rows, pairs = done.about["detail"]["rows"], done.about["detail"]["paired"]
    drawn = done.predictions()["drawn"]
    at = {(row["backbone"], row["method"], row["share"]): n for n, row in enumerate(rows)}
    assert len(pairs) == 2 * (2 + 1 + 2), "a share: two methods against knn, one there, and two backbones by each"
    assert drawn.shape[1] == enough(10), "more of them for more comparisons"
    for entry in pairs:
        a, b = (at[(*entry[side], entry["share"])] for side in "ab")
        assert entry["value"] == pytest.approx(rows[a]["value"] - rows[b]["value"])
        assert entry["low"] == pytest.approx(np.percentile(drawn[a] - drawn[b], 2.5))
        assert 0 < entry["p"] <= entry["p_holm"] <= 1
        assert entry["a"] == entry["b"] or entry["a"][0] == entry["b"][0] or entry["a"][1] == entry["b"][1]


def test_the_page_links_every_cell_and_says_what_was_not_shown(done):
    page = (done.path.parent / "report.html").read_text()
    look(done.path.parent / "report.html")
    for row in done.about["detail"]["rows"]:
        assert f'href="{row["result"]}"' in page
    assert page.count("<polygon") == (3 + 2) + (2 + 2 + 1), "charts by backbone, then by method"
    assert "Not shown: labels chosen with care" in page
    assert "Val keeps its" in page
    assert "of 10 differences are shown" in page


def test_sentences_name_the_better_side():
    base = {"share": 0.1, "a": ["x", "knn"], "b": ["y", "knn"], "value": -0.2, "low": -0.3, "high": -0.1}
    row = {"backbone": "x", "method": "knn", "share": 0.1, "labels": 12, "value": 0.6, "low": 0.4, "high": 0.8}
    rows = [row | {"seeds": [0.5, 0.7]}, row | {"share": 1, "labels": 120, "value": 0.7, "seeds": [0.7, 0.7]}]
    said = scaling_page.said([{**base, "p_holm": 0.01}, {**base, "value": 0.3, "p_holm": 0.2}], rows, "accuracy", 2)
    few, many = "10 % (12) of the labels knn on x 0.600", "100 % (120) of the labels knn on x 0.700"
    assert said[0] == f"The highest accuracy: with {few} [0.400, 0.800]; with {many} [0.400, 0.800]."
    assert said[2] == "With 0.1 of the labels, knn on y is better than knn on x: accuracy +0.200 [0.100, 0.300]."
    assert said[1].startswith("1 of 2 differences are shown")
    assert "up to 0.200" in said[-2]
    assert said[-1].startswith("Not shown: ")


def test_a_cut_off_run_goes_on_and_keeps_its_cells(index, export_folder, tmp_path, monkeypatch):
    asked, fit = [], scaling.heads.fit

    def counted(method, *rest):
        asked.append((method, len(rest[2])))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return fit(method, *rest)

    monkeypatch.setattr(scaling.heads, "fit", counted)
    command = arguments(tmp_path, index, export_folder, "--shares", 0.3, 1, "--methods", "knn", "logistic")
    assert main(command) == 130
    assert not (tmp_path / "scaling" / "results.json").exists()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("results.json")}
    assert len(before) == 2
    assert main(command) == 0
    assert len(asked) == 3 + 2, "two cells were there"
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    assert main([*command, "--shares", "0.3", "0.6", "1"]) == 0
    assert len(asked) == 5 + 2, "only the new share"


def test_cells_of_other_settings_are_not_mixed_in(index, export_folder, tmp_path, capsys):
    plain = arguments(tmp_path, index, export_folder, "--shares", 0.5, "--methods", "knn")
    assert main(plain) == 0
    assert main([*plain, "--seeds", "0", "1"]) == 2
    assert "was made with other settings or seeds" in capsys.readouterr().err
    assert main([*plain, "--seeds", "0", "1", "--overwrite"]) == 0
    assert results.read(tmp_path / "scaling" / "results.json").about["seeds"] == [0, 1]


def test_settings_tell_trainings_apart(index, export_folder):
    from finetune.__main__ import parser

    read = lambda *more: parser("scaling").parse_args(arguments("o", index, export_folder, *more))  # noqa: E731
    a, b = (ways.settings(read(*more), "adapt-lora") for more in ([], ["--mixup", 0]))
    assert a != b
    assert a == json.loads(json.dumps(a))
    assert ways.settings(read(), "knn") == ways.settings(read("--mixup", 0), "knn")
    assert set(scaling.USUAL) < set(ways.METHODS)
    assert {f"adapt-{mode}" for mode in adapt.MODES} - set(ways.METHODS) == {"adapt-partial"}


def test_impossible_shares_are_refused(index, export_folder, tmp_path, capsys):
    assert main(arguments(tmp_path / "o", index, export_folder, "--shares", 0, 1)) == 2
    assert "above 0 and at most 1" in capsys.readouterr().err
    assert main(arguments(tmp_path / "o", index, export_folder, "--labels", 0.5)) == 2
    assert "say --shares, not --labels" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
