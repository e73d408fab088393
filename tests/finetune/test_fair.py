"""fair: subgroups of a column, their metrics and gaps, and what is not ranked."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn import metrics as reference

from finetune import kinds, metrics, results
from finetune.__main__ import main
from finetune.fairness import judge
from finetune.judged import Part
from finetune.subgroups import UNKNOWN, names, subgroup
from hybridssl.errors import UserError
from tests.finetune.judging import CLASSES, flip, opened, patients, without_scores, write
from tests.finetune.looked import look

ACCURACY = kinds.Kind("one-of", "accuracy", {"accuracy": metrics.accuracy})

# -- subgroups --------------------------------------------------------------------------------------------------------


def test_numbers_go_into_bins_and_the_last_edge_is_inside():
    found = subgroup(np.array(["0", "29.9", "30", "60.0", "85", "", "nan"]), "age", [0, 30, 60, 85])
    assert found.tolist() == ["0 to <30", "0 to <30", "30 to <60", *["60 to 85"] * 2, UNKNOWN, UNKNOWN]
    assert names(subgroup(np.array(["5", "100", "20", ""]), "age", [0, 10, 90, 110])) == [
        "0 to <10", "10 to <90", "90 to 110", UNKNOWN,
    ]  # fmt: skip


def test_values_merge_whatever_the_spelling_of_a_number():
    found = subgroup(np.array(["1.0", "2", "3.0", "6", ""]), "fitspatrick", None, ["I-II=1,2", "III-VI=3,6"])
    assert found.tolist() == ["I-II", "I-II", "III-VI", "III-VI", UNKNOWN]
    assert subgroup(np.array(["M", "F", "unknown"]), "sex").tolist() == ["M", "F", UNKNOWN]


@pytest.mark.parametrize(
    ("values", "bins", "merges", "message"),
    [
        (["a", "b"], [0, 1], [], "'a' is not a number"),
        (["1", "2"], [2, 1], [], "at least two edges"),
        (["1", "9"], [0, 5], [], "9 lies outside --bins 0 ... 5"),
        ([str(n / 7) for n in range(40)], None, [], "40 different numbers; say --bins"),
        (["a", "b"], None, ["x=a,c"], "no test image has sex 'c'; there are a, b"),
        (["a", "b"], None, ["x=a", "y=a"], "puts 'a' into 'x' and 'y'"),
        (["a", "b"], None, ["x"], "is not NAME=VALUE"),
        (["a", "", "a"], None, [], "all test images are of one subgroup"),
        (["a", "b"], None, ["x=a,b"], "all test images are of one subgroup"),
    ],
)
def test_columns_that_do_not_fit_are_refused(values, bins, merges, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        subgroup(np.array(values), "sex", bins, merges)


# -- metrics of subgroups ---------------------------------------------------------------------------------------------


@pytest.fixture
def unequal(tmp_path):
    """Worse for women: half of their images have the scores of another class."""
    part = patients(600, 1, size=2)
    sex = np.where(part.group % 2 == 0, "female", "male")
    worse = flip(part, 0.5)
    scores = np.where((sex == "female")[:, None], worse.scores, part.scores)
    part = replace(part, scores=scores)
    return write(tmp_path / "mine/knn", part), part, sex


def test_each_subgroup_is_the_metric_of_scikit_learn_on_its_images(unequal):
    folder, part, sex = unequal
    kind = kinds.choose("one-of", CLASSES, ["mel"])
    found = judge(opened(folder), kind, sex, 30, "balanced_accuracy")
    said, ill = part.scores.argmax(1), part.y == 1
    flagged = part.scores[:, 1] > 0.5
    for s in ("female", "male"):
        rows = sex == s
        expected = {
            "balanced_accuracy": reference.balanced_accuracy_score(part.y[rows], said[rows]),
            "accuracy": (said == part.y)[rows].mean(),
            "sensitivity": reference.recall_score(ill[rows], flagged[rows]),
            "specificity": reference.recall_score(~ill[rows], ~flagged[rows]),
            "disease_auroc": reference.roc_auc_score(ill[rows], part.scores[rows, 1]),
        }
        for name, value in expected.items():
            assert found.standing[name][s].value.value == pytest.approx(value, abs=1e-6), name
    gap = found.gaps["balanced_accuracy"]
    assert (gap.worst, gap.best) == ("female", "male")
    rows = found.standing["balanced_accuracy"]
    assert gap.difference.value == pytest.approx(rows["male"].value.value - rows["female"].value.value)
    assert gap.difference.value == pytest.approx(-rows["female"].against_rest.value)
    assert rows["female"].verdict == "lower than the rest"
    assert rows["male"].verdict == "higher than the rest"
    assert rows["female"].p == rows["male"].p == pytest.approx(2 / 1001), "two sides of one test, not two tests"
    which, wide = found.equalised_odds or ("", gap)
    larger = max(("sensitivity", "specificity"), key=lambda m: found.gaps[m].difference.value)
    assert (which, wide) == (larger, found.gaps[larger])


def test_one_bad_hospital_of_thirty_is_found(tmp_path):
    """Holm multiplies by 30: of 1,000 resamples no p would have been left below .06."""
    part = patients(600, 1, size=2)
    site = np.array([f"site {n}" for n in part.group % 30])
    wrong = np.where((site == "site 7")[:, None], np.roll(np.eye(3)[part.y], 1, axis=1), part.scores)
    found = judge(opened(write(tmp_path / "mine/knn", replace(part, scores=wrong))), ACCURACY, site, 10, "accuracy")
    assert found.standing["accuracy"]["site 7"].verdict == "lower than the rest"


def test_the_gap_is_the_paired_difference_over_resampled_groups(unequal):
    folder, part, sex = unequal
    found = judge(opened(folder), ACCURACY, sex, 30, "accuracy")
    right = part.scores.argmax(1) == part.y
    drawn = []
    for weight in metrics.group_weights(part.group):
        by = {s: weight @ (right & (sex == s)) / (weight @ (sex == s)) for s in ("female", "male")}
        drawn.append(by["male"] - by["female"])
    ends = np.percentile(np.concatenate(drawn), [2.5, 97.5])
    gap = found.gaps["accuracy"].difference
    assert (gap.low, gap.high) == pytest.approx(tuple(ends))


def test_no_difference_is_shown_where_there_is_none(tmp_path):
    """Five subgroups drawn by lot, twenty times: Holm's correction keeps false alarms to about one time in twenty."""
    alarms, uncorrected = 0, 0
    for seed in range(20):
        part = patients(400, seed)
        by_lot = np.random.default_rng(100 + seed).integers(5, size=400).astype(str)
        found = judge(opened(write(tmp_path / f"{seed}/knn", part)), ACCURACY, by_lot, 30, "accuracy")
        rows = found.standing["accuracy"].values()
        alarms += any(s.verdict != "not shown to differ" for s in rows)
        uncorrected += any(not s.against_rest.low < 0 < s.against_rest.high for s in rows)
        assert found.gaps["accuracy"].difference.value > 0, "the range of noise is never 0"
    assert alarms <= 3
    assert alarms < uncorrected, "nothing was corrected: the case tests too little"


def test_small_and_incomplete_subgroups_are_listed_and_not_ranked(tmp_path):
    part = patients(300, 2)
    values = np.full(300, "torso", dtype=object)
    values[:120] = "face"
    values[120:130] = "foot"
    values[130:140] = ""
    hand = np.flatnonzero(part.y[140:] != 0)[:40] + 140
    values[hand] = "hand"  # 40 images, none of akiec
    one = opened(write(tmp_path / "a/knn", part))
    found = judge(one, one.kind, subgroup(values, "site"), 30, "balanced_accuracy")
    assert found.unranked["balanced_accuracy"] == {
        "foot": "10 images, fewer than 30",
        "hand": "no image of akiec",
        UNKNOWN: "the column says nothing",
    }
    assert set(found.standing["balanced_accuracy"]) == {"face", "torso"}
    assert set(found.standing["accuracy"]) == {"face", "hand", "torso"}, "accuracy needs no class"
    assert found.sizes["foot"] == (10, 10)
    assert found.sizes["face"] == (120, 120)


def test_a_subgroup_of_two_patients_is_not_ranked(tmp_path):
    """40 images are enough, their 2 patients are not: without a difference 15 of 40 such runs gave a verdict."""
    part = patients(440)
    part = replace(part, group=np.r_[np.repeat(np.arange(40), 10), np.repeat([40, 41], 20)])
    one = opened(write(tmp_path / "a/knn", part))
    tone = np.where(part.group >= 40, "VI", np.where(part.group % 2, "I", "II"))
    found = judge(one, one.kind, tone, 30, "accuracy")
    assert found.unranked["accuracy"] == {"VI": "40 images of 2 patients or lesions, fewer than 10"}
    assert set(found.standing["accuracy"]) == {"I", "II"}
    assert "VI" in judge(one, one.kind, tone, 2, "accuracy").standing["accuracy"], "--least 2 says so"
    with pytest.raises(UserError, match=r"of 2 patients or lesions, fewer than 10.*or a smaller --least"):
        judge(one, one.kind, np.where(tone == "VI", "VI", "I"), 30, "accuracy")


def test_several_labels_an_image(tmp_path):
    rng = np.random.default_rng(3)
    scores = rng.random((200, 3))
    y = (rng.random((200, 3)) < scores).astype(np.uint8)
    kind = kinds.choose("multi-label", CLASSES)
    part = Part(scores, y, np.arange(200), np.arange(200))
    one = opened(write(tmp_path / "m/knn", part, kind=kind))
    sex = np.array(["f", "m"])[np.arange(200) % 2]
    found = judge(one, kind, sex, 30, "macro_auroc")
    expected = reference.roc_auc_score(y[sex == "f"], scores[sex == "f"], average="macro")
    assert found.standing["macro_auroc"]["f"].value.value == pytest.approx(expected, abs=1e-6)


# -- the verb ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hospital(new_index):
    """An index of 120 images, two a patient, with sex and age."""
    rows = [
        {
            "path": f"test-{('blue', 'brown', 'red')[n % 3]}-{n // 2}-{n % 2}.png",
            "label": CLASSES[n % 3],
            "split": "test" if n < 100 else "train",
            "group": f"p{n // 2}",
            "source": "ward",
            "sex": "female" if n // 2 % 2 else "male",
            "age": "" if n == 7 else str(20 + n // 2),
        }
        for n in range(120)
    ]
    return new_index(rows)


@pytest.fixture
def folder(hospital, tmp_path):
    numbers = hospital.select(["test"])
    y = np.array([CLASSES.index(hospital.read(int(n)).labels[0]) for n in numbers])
    scores = 0.1 + 0.7 * np.eye(3)[y]
    women = np.array([hospital.read(int(n)).meta["sex"] == "female" for n in numbers])
    scores[women & (np.arange(len(y)) % 4 < 2)] = [0.1, 0.1, 0.8]
    part = Part(scores, y, np.array(hospital.column("group")[numbers]), numbers)
    return write(tmp_path / "mine/knn", part, index=str(hospital.root), sha256=hospital.sha256)


def test_the_verb_finds_who_is_served_worse(folder, capsys):
    assert main(["fair", str(folder), "--by", "sex", "--positive", "akiec", "mel", "--metric", "accuracy"]) == 0
    result = results.read(folder.parent / "fair-sex-knn/results.json")
    detail = result.about["detail"]
    assert detail["gaps"]["accuracy"]["worst"] == "female"
    assert detail["standing"]["accuracy"]["female"]["verdict"] == "lower than the rest"
    assert result.metrics["accuracy in male"].value == 1
    assert result.metrics["accuracy_worst"] == result.metrics["accuracy in female"]
    assert result.metrics["equalised_odds_gap"].value == detail["gaps"]["sensitivity"]["value"]
    assert detail["subgroups"] == {"female": {"images": 50, "groups": 25}, "male": {"images": 50, "groups": 25}}
    assert result.about["judged"]["result"] == str(folder / "results.json")
    assert result.predictions()["subgroup"].sum() == 50
    text = (folder.parent / "fair-sex-knn/report.html").read_text()
    look(folder.parent / "fair-sex-knn/report.html")
    assert "female is lower than the rest" in text
    assert 'href="results.json"' in text
    assert "female" in capsys.readouterr().out


def test_ages_in_bins_and_what_is_left_out_is_said(folder):
    bins = ["--bins", "20", "30", "50", "90", "--metric", "accuracy", "--least", "21"]
    assert main(["fair", str(folder), "--by", "age", *bins]) == 0
    result = results.read(folder.parent / "fair-age-knn/results.json")
    assert set(result.about["detail"]["standing"]["accuracy"]) == {"30 to <50", "50 to 90"}
    notes = " ".join(result.about["notes"])
    assert "20 to <30 (19 images, fewer than 21); (unknown) (the column says nothing)" in notes


def test_mistakes_are_named_before_any_work(folder, hospital, tmp_path, capsys):
    for arguments, message in [
        (["--by", "sexx"], "did you mean 'sex'?"),
        (["--by", "sex", "--metric", "f7"], "--metric f7"),
        (["--by", "sex", "--positive", "wart"], "no such class here"),
        (["--by", "sex", "--least", "99"], "fewer than two subgroups can be ranked"),
        (["--by", "age"], "different numbers; say --bins"),
        (["--by", "sex", "--data", tmp_path / "none"], "holds no index.json"),
    ]:
        assert main(["fair", str(folder), *map(str, arguments)]) == 2
        assert message in capsys.readouterr().err
    other = write(tmp_path / "other/knn", patients(60), index=str(hospital.root))
    assert main(["fair", str(other), "--by", "sex"]) == 2
    assert "is not the index that" in capsys.readouterr().err
    assert not list(tmp_path.rglob("fair-*"))


def test_a_folder_of_many_results_is_judged_where_there_are_scores(folder, capsys):
    bare = without_scores(folder.parent / "retrieve", folder)
    judge = ["--by", "sex", "--metric", "accuracy"]
    assert main(["fair", str(folder.parent), *judge]) == 0
    assert f"left out, as they hold no class scores of test: {bare}\n" in capsys.readouterr().out
    assert main(["fair", str(folder.parent), *judge]) == 0, "what was written by then is no reason to stop"
    assert {path.parent.name for path in folder.parent.rglob("results.json")} == {"knn", "retrieve", "fair-sex-knn"}
    capsys.readouterr()
    for named in (bare, bare / "results.json"):
        assert main(["fair", str(named), str(folder), *judge]) == 2
        assert f"{bare / 'results.json'} (retrieve) holds no class scores" in capsys.readouterr().err
    assert main(["fair", str(folder.parent / "fair-sex-knn"), *judge]) == 2
    assert "(fair-sex-knn) judges another result" in capsys.readouterr().err


def test_a_folder_without_any_scores_is_an_error(folder, tmp_path, capsys):
    without_scores(tmp_path / "only/retrieve", folder)
    assert main(["fair", str(tmp_path / "only"), "--by", "sex"]) == 2
    assert f"{tmp_path / 'only'}: no result there can be judged" in capsys.readouterr().err
