"""Drift: the tests on features against naive loops and null sets, then the verb on images whose colour moved."""

from __future__ import annotations

import re
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from finetune import drift, results, shift
from finetune.__main__ import main
from finetune.features import Features
from shards.build import build as build_shards
from tests.finetune.conftest import make_index, rows
from tests.finetune.looked import look, without_pictures


def naive_mmd2(a: np.ndarray, b: np.ndarray, sigma: float) -> float:
    """Equation 3 of Gretton et al. 2012, as it is written."""
    k = lambda x, y: float(np.exp(-((x - y) ** 2).sum() / (2 * sigma**2)))  # noqa: E731
    n, m = len(a), len(b)
    inside = sum(k(a[i], a[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    inside += sum(k(b[i], b[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return inside - 2 * sum(k(x, y) for x in a for y in b) / (n * m)


def kernels(a: np.ndarray, b: np.ndarray, sigma: float) -> list[np.ndarray]:
    out = []
    for x, y in ((a, a), (a, b), (b, b)):
        out.append(np.exp(-((x[:, None] - y) ** 2).sum(-1) / (2 * sigma**2)))
        if x is y:
            np.fill_diagonal(out[-1], 0)
    return out


def test_mmd_equals_a_double_loop_and_a_weight_is_a_repetition():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(13, 3)), rng.normal(0.5, 1, (9, 3))
    got = shift.mmd2(*kernels(a, b, 1.7), np.ones((1, 13)), np.ones((1, 9)))[0]
    assert got == pytest.approx(naive_mmd2(a, b, 1.7), rel=1e-9)
    keep = rng.permutation(13)[:6]
    weight = np.isin(np.arange(13), keep)[None].astype(float)
    got = shift.mmd2(*kernels(a, b, 1.7), weight, np.ones((1, 9)))[0]
    assert got == pytest.approx(naive_mmd2(a[keep], b, 1.7), rel=1e-9)


def test_the_comparison_takes_the_median_distance_of_the_standardised_reference(kernel_only):
    rng = np.random.default_rng(1)
    a, b = rng.normal(3, [1, 20], (60, 2)), rng.normal([3, 3], [1, 25], (30, 2))
    found = shift.compare(a, b, seed=4, resamples=50)
    x, y = ((z - a.mean(0)) / a.std(0) for z in (a, b))
    assert (found.reference, found.new) == (30, 30)
    far = np.sqrt(((x[:, None] - x) ** 2).sum(-1))[np.triu_indices(60, 1)]
    half = x[np.random.default_rng(4).permutation(60)][:30]
    assert found.mmd2.value == pytest.approx(naive_mmd2(half, y, float(np.median(far))), abs=1e-5)
    assert found.mmd2.low < found.mmd2.value < found.mmd2.high
    assert found.threshold == np.quantile(found.null, 0.95)


@pytest.fixture
def kernel_only(monkeypatch):
    monkeypatch.setattr(shift, "told_apart", lambda *args: None)


def test_false_alarms_come_at_the_stated_rate_and_a_shift_is_found(kernel_only):
    """60 pairs from one distribution: as many alarms as 5 % allow (binomial, 99.9 %). With a shift: nearly all."""
    alarms = shifted = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        a, b = rng.normal(size=(100, 6)), rng.normal(size=(40, 6))
        alarms += shift.compare(a, b, seed, resamples=99).p <= shift.RATE
        shifted += seed < 20 and shift.compare(a, b + 0.7, seed, resamples=99).p <= shift.RATE
    assert alarms <= 9
    assert shifted >= 19


def test_images_of_one_patient_are_one_unit(kernel_only):
    """Patients with many alike images: taken image by image the same hospital looks shifted; by patient it does not."""
    by_image = by_patient = 0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(60, 4)).repeat(6, 0) + rng.normal(0, 0.1, (360, 4))
        group = np.arange(60).repeat(6)
        old, new = group < 40, group >= 40
        by_image += shift.compare(x[old], x[new], seed, 99).p <= 0.05
        units = [x[rows][shift.one_a_group(group[rows], seed)] for rows in (old, new)]
        assert [len(u) for u in units] == [40, 20]
        by_patient += shift.compare(*units, seed, 99).p <= 0.05
    assert by_patient <= 3
    assert by_image >= 8


def test_classifier_says_half_for_the_same_and_one_for_the_different():
    rng = np.random.default_rng(0)
    same = [shift.told_apart(rng.normal(size=(80, 5)), rng.normal(size=(60, 5)), seed).value for seed in range(12)]
    assert np.mean(same) == pytest.approx(0.5, abs=0.06)
    apart = shift.told_apart(rng.normal(size=(80, 5)), rng.normal(4, 1, (60, 5)))
    assert apart.low > 0.97


def test_a_month_can_raise_an_alarm_however_many_there_are(kernel_only):
    """Sixty months, the last of which differ. Of 999 parts of the reference, no p would be left below .06."""
    rng = np.random.default_rng(0)

    def features(x):
        numbers, none = np.arange(len(x)), np.zeros((len(x), 0), np.uint8)
        index = SimpleNamespace(sources=())
        return Features({"cls": x}, none, numbers, np.full(len(x), -1), numbers, (), index)

    months = np.repeat([f"{n:02d}" for n in range(60)], drift.LEAST)
    new = rng.normal(size=(len(months), 2)) + 3 * (months >= "58")[:, None]
    lines, _ = drift.compare_parts(features(rng.normal(size=(80, 2))), features(new), months, np.zeros(len(new)), 0)
    alarms = [line.name for line in lines if line.kind == "time" and line.alarm]
    assert {"58", "59"} <= set(alarms)
    assert len(alarms) <= 3


def test_distance_is_to_the_fifth_of_another_group():
    rng = np.random.default_rng(0)
    x, group = rng.normal(size=(50, 4)).astype(np.float32), rng.integers(0, 12, 50)
    asked, asked_group = rng.normal(size=(7, 4)).astype(np.float32), np.array([0, 3, 5, 99, 98, 97, 1])
    distance, nearest = shift.distances(x, group, asked, asked_group)
    unit = lambda z: z / np.linalg.norm(z, axis=1, keepdims=True)  # noqa: E731
    for row in range(7):
        others = np.flatnonzero(group != asked_group[row])
        sorted_ = np.sort(1 - unit(x)[others] @ unit(asked)[row])
        assert distance[row] == pytest.approx(sorted_[4], abs=1e-5)
        assert nearest[row] == others[np.argmax(unit(x)[others] @ unit(asked)[row])]
    own, _ = shift.distances(x, group, x, group)
    assert (own > 1e-3).all(), "nobody is a neighbour of itself"


def test_periods_are_months_or_equal_parts_and_nonsense_is_refused():
    assert drift.periods_of(np.array(["2026-01-30", "2026-02-01", "", "2026-01"])).tolist() == [
        "2026-01", "2026-02", "", "2026-01",
    ]  # fmt: skip
    ages = drift.periods_of(np.arange(80).astype(str))
    assert len(np.unique(ages)) == drift.PERIODS
    assert [name[0] for name in np.unique(ages)] == list("12345678")
    assert (np.unique(ages, return_counts=True)[1] == 10).all()
    with pytest.raises(drift.UserError, match="no date"):
        drift.periods_of(np.array([f"week {n}" for n in range(40)]))


# -- the verb ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table():
    """Two halves of one ward by patients: 24 groups a class each."""
    return rows(3, {"train": 24}), [
        {**row, "month": "2026-01" if int(row["group"].split("-")[2]) % 2 else "2026-02"}
        for row in rows(4, {"later": 24})
    ]


@pytest.fixture(scope="module")
def reference(table, new_index):
    return new_index(table[0])


@pytest.fixture
def compared(reference, tmp_path):
    def run(new, *options, backbone="histogram"):
        arguments = ["drift", "--backbone", str(backbone), "--data", str(reference.root), "--new", str(new.root)]
        assert main([*arguments, "--out", str(tmp_path / "out"), "--device", "cpu", *options]) == 0
        return results.read(tmp_path / "out" / "drift" / "results.json")

    return run


def test_no_alarm_for_the_same_ward_later(compared, table, new_index):
    result = compared(new_index(table[1]), "--time", "month")
    detail = result.about["detail"]
    assert detail["verdict"]["words"].startswith("No drift shown")
    assert not detail["verdict"]["due"]
    assert [row["name"] for row in detail["comparisons"]] == ["all", "2026-01", "2026-02"]
    assert all(not row["alarm"] and row["mmd2"]["value"] < row["threshold"] * 1.5 for row in detail["comparisons"])
    assert result.metrics["far_share"].low <= 0.05
    assert result.about["data"]["group_column"] == "group"
    assert "does not record" in result.about["notes"][0]
    page = (result.path.parent / "report.html").read_text()
    look(result.path.parent / "report.html")
    assert "No drift shown" in page
    assert page.count("data:image/jpeg") == 48
    assert not re.search(r"https?:|<script|\bnan\b", without_pictures(page))


def moved(folder, table, change):
    """The index of the same pictures with their pixels changed."""
    make_index(folder, table)
    for row in table:
        path = str(folder / "images" / row["path"])
        cv2.imwrite(path, change(row, cv2.imread(path)))
    return build_shards(folder / "images", folder / "moved", folder / "table.csv").index


def test_alarm_for_another_camera(compared, table, tmp_path):
    """Its blue and red are swapped: every picture stays a picture of the ward, and every colour is another."""
    result = compared(moved(tmp_path / "new", table[1], lambda row, image: image[..., ::-1] // 2 + 60))
    (row,) = result.about["detail"]["comparisons"]
    assert row["alarm"]
    assert row["p"] == 1 / 1000
    verdict = result.about["detail"]["verdict"]
    assert verdict["due"]
    assert verdict["words"].startswith("Retraining is due")
    assert result.metrics["c2st_auroc"].low > 0.9
    assert result.metrics["mmd2"].low > 0
    assert "Retraining is due" in (result.path.parent / "report.html").read_text()


def test_the_month_that_drifts_is_named(compared, table, tmp_path):
    pale = lambda row, image: image // 2 + 120 if row["month"] == "2026-02" else image  # noqa: E731
    result = compared(moved(tmp_path / "new", table[1], pale), "--time", "month")
    alarms = {row["name"]: row["alarm"] for row in result.about["detail"]["comparisons"]}
    assert alarms["2026-02"]
    assert not alarms["2026-01"]
    assert "2026-02" in result.about["detail"]["verdict"]["words"]


def test_a_new_source_is_named(compared, table, tmp_path):
    other = [{**row, "source": "clinic" if row["month"] == "2026-02" else "ward"} for row in table[1]]
    pale = lambda row, image: image // 2 + 120 if row["source"] == "clinic" else image  # noqa: E731
    detail = compared(moved(tmp_path / "new", other, pale)).about["detail"]
    assert {row["name"]: row["alarm"] for row in detail["comparisons"] if row["kind"] == "source"} == {
        "clinic (not in the reference)": True, "ward": False,
    }  # fmt: skip


def test_what_is_too_small_to_be_compared_is_named(compared, table, new_index):
    """Seven patients of another hospital, and nine of a third month."""
    groups = list(dict.fromkeys(row["group"] for row in table[1]))
    few, late = groups[:7], groups[20:29]
    rows = [{**r, "source": "clinic" if r["group"] in few else "ward"} for r in table[1]]
    rows = [{**r, "month": "2026-03" if r["group"] in late else r["month"]} for r in rows]
    result = compared(new_index(rows), "--time", "month")
    assert {"clinic (not in the reference)", "2026-03"}.isdisjoint(
        row["name"] for row in result.about["detail"]["comparisons"]
    )
    said = "fewer than 20 patients, lesions or single images: clinic (not in the reference) (7), 2026-03 (9)"
    assert any(said in note for note in result.about["notes"])
    assert said in (result.path.parent / "report.html").read_text()


def test_the_farthest_image_is_the_planted_one(compared, table, tmp_path):
    planted = table[1][17]["path"]

    def draw(row, image):
        return np.full_like(image, [0, 255, 0]) if row["path"] == planted else image

    result = compared(moved(tmp_path / "new", table[1], draw))
    first = result.about["detail"]["farthest"][0]
    assert first["key"].startswith(planted.removesuffix(".png"))
    assert first["percentile"] == 100
    assert not result.about["detail"]["verdict"]["due"], "one strange image is no drift"


def test_the_reference_is_what_the_backbone_read_and_the_rest_is_a_control(
    compared, new_index, export_folder, tmp_path
):
    import shutil

    from safetensors.numpy import save_file

    both = rows(5, {"train": 24, "test": 16})
    data = new_index(both)
    folder = shutil.copytree(export_folder, tmp_path / "model")
    read = data.select(["train"])
    save_file({"digest": np.array(data.column("digest")[read])}, folder / "pretraining.safetensors")
    new = new_index(rows(6, {"later": 16}))
    arguments = ["drift", "--backbone", str(folder), "--data", str(data.root), "--new", str(new.root)]
    assert main([*arguments, "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    about = results.read(tmp_path / "out" / "drift" / "results.json").about
    assert about["reference"]["images"] == len(read)
    assert about["notes"] == []
    control = about["detail"]["comparisons"][-1]
    assert (control["kind"], control["images"]) == ("control", len(data.select(["test"])))


def test_errors_name_the_remedy(reference, new_index, tmp_path, capsys):
    arguments = ["drift", "--backbone", "histogram", "--data", str(reference.root), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--new", str(reference.root)]) == 2
    assert "there is nothing new to compare" in capsys.readouterr().err
    few = new_index(rows(8, {"later": 3}))
    assert main([*arguments, "--new", str(few.root)]) == 2
    assert "has 9 patients, lesions or single images to compare; 20 are needed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
