from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from urllib.parse import unquote

import numpy as np
import pytest

from finetune import calibrate, explain, kinds, masks, results
from finetune.__main__ import main
from finetune.better import direction
from finetune.metrics import Interval
from tests.finetune.looked import words

HEAD = {"format": "hybridssl-results", "version": 1}
NASTY = "<script>alert(1)</script>"


def document(protocol, name, sha, labels=1.0, baseline=False, leak=0, classes=("mel", "nv")):
    return {
        "protocol": protocol,
        "backbone": {"name": name, "sha256": sha, "baseline": baseline, "dim": 8, "input_size": 32},
        "data": {
            "index": "data/derm",
            "sha256": "d" * 64,
            "synthetic": False,
            "source": None,
            "labels": labels,
            "splits": {"train": 100, "val": 20, "test": 40},
            "groups": {"train": 50, "val": 10, "test": 20},
            "group_column": "group",
            "classes": {c: {"train": 50, "val": 10, "test": 20} for c in classes},
            "bad": [],
        },
        "selected": {
            "split": "val",
            "by": "balanced_accuracy",
            "grid": {},
            "choices": [{"seed": 0, "k": 5, "val": 0.4}],
        },
        "seeds": [0],
        "cost": {"seconds": 3.25, "labels_used": {"train": [100], "val": [20]}, "peak_memory_mb": 100.0},
        "leaks": {"pretraining": leak, "groups": 0, "images": 0, "allowed": bool(leak)},
        "notes": [],
    }


@pytest.fixture
def write(tmp_path):
    def make(where, value, *about, **more):
        found = {
            "balanced_accuracy": Interval(value, value - 0.05, value + 0.05),
            "macro_auroc": Interval(0.777, 0.7, 0.8),
        }
        return results.write(tmp_path / where, document(*about, **more), found, y=np.zeros(3, dtype=np.int64))

    return make


class Page(HTMLParser):
    """Texts, links and tags of a page."""

    def __init__(self, text):
        super().__init__()
        self.links, self.tags, self.notes = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        found = dict(attributes)
        if tag == "a" and not found["href"].startswith("#"):
            self.links.append(found["href"])


def test_the_page_holds_every_number_and_links_it_to_its_file(write, tmp_path):
    a = write("a/knn", 0.4321, "knn", "models/mine", "1")
    b = write("b # odd?/knn", 0.2468, "knn", "histogram", "2", baseline=True)
    c = write("c/logistic", 0.5555, "logistic", "models/mine", "1", labels=0.1)
    out = tmp_path / "pages" / "report.html"
    assert main(["report", str(tmp_path), "--out", str(out)]) == 0
    text = out.read_text()
    for number in ("0.432", "[0.382, 0.482]", "0.247", "[0.197, 0.297]", "0.555", "0.777", "[0.700, 0.800]"):
        assert number.replace(", ", ",&nbsp;") in text, number
    assert "histogram (baseline)" in text
    linked = {(out.parent / unquote(link)).resolve() for link in Page(text).links}
    assert linked == {path.resolve() for path in (a, b, c)}
    assert text.index("0.432") < text.index("0.247"), "the best comes first"
    assert "No null baseline" not in text
    with open(out.with_suffix(".csv"), newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 6
    row = next(r for r in lines if (r["backbone"], r["metric"]) == ("histogram", "balanced_accuracy"))
    assert (float(row["value"]), float(row["low"]), row["baseline"]) == (0.2468, pytest.approx(0.1968), "True")


def test_few_labels_or_none_are_told_by_their_count(write, tmp_path, capsys):
    """zeroshot and fewshot use no share of the labels: "100 %" beside them would say that they saw all."""
    for protocol, used in (("zeroshot", [0]), ("fewshot", [140, 140]), ("efficiency", [10, 140])):
        path = write(f"{protocol}/{protocol}", 0.4, protocol, "models/mine", "1")
        about = json.loads(path.read_text())
        about["selected"]["split"] = results.FIXED if protocol != "efficiency" else "a part"
        about["cost"]["labels_used"]["train"] = used
        path.write_text(json.dumps(about))
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "report.html")]) == 0
    text = words((tmp_path / "report.html").read_text())
    for told in ("no train labels", "140 train labels", "10 to 140 train labels"):
        assert told in text
    assert "100 %" not in text + capsys.readouterr().out


def test_names_are_escaped(write, tmp_path):
    write("a/knn", 0.4, NASTY[:1] + "b>&", NASTY, "1", classes=(NASTY, "nv"))
    out = tmp_path / "report.html"
    assert main(["report", str(tmp_path / "a"), "--out", str(out), "--title", NASTY]) == 0
    text = out.read_text()
    assert "script" not in Page(text).tags
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 3
    assert "No null baseline here" in text


def test_nothing_in_the_table_runs_in_a_spreadsheet(write, tmp_path):
    write("a/knn", -0.4, "knn", "=HYPERLINK(1)", "1")
    out = tmp_path / "report.html"
    assert main(["report", str(tmp_path / "a"), "--out", str(out)]) == 0
    with open(out.with_suffix(".csv"), newline="") as file:
        lines = list(csv.DictReader(file))
    assert {row["backbone"] for row in lines} == {"'=HYPERLINK(1)"}
    assert min(float(row["value"]) for row in lines) == -0.4


def test_a_leak_is_shown_in_red(write, tmp_path):
    write("a/knn", 0.9, "knn", "models/mine", "1", leak=7)
    out = tmp_path / "report.html"
    main(["report", str(tmp_path / "a"), "--out", str(out)])
    text = out.read_text()
    assert re.search(r'class="note bad">[^<]*models/mine \(knn\): 7 val or test images were read', text)
    assert "models/mine — LEAK" in text


def test_the_first_sentence_claims_no_more_than_was_tested(write, tmp_path):
    write("a/knn", 0.4321, "knn", "models/mine", "1")
    write("b/knn", 0.2468, "knn", "histogram", "2", baseline=True)
    main(["report", str(tmp_path), "--out", str(tmp_path / "r.html")])
    first = words(re.findall(r'<p class="answer">(.*?)</p>', (tmp_path / "r.html").read_text(), re.DOTALL)[0])
    assert first == "kNN: the highest balanced accuracy of 2 is that of models/mine, 0.432 [0.382, 0.482]."
    assert "only python -m finetune compare tells" in (tmp_path / "r.html").read_text()
    compared = {**document("compare-knn", "models/mine", "1"), "detail": {"said": ["By accuracy: it is better."]}}
    results.write(tmp_path / "c", compared, {"x": Interval(0.5, 0.4, 0.6)}, y=np.zeros(2))
    main(["report", str(tmp_path), "--out", str(tmp_path / "r.html")])
    answers = re.findall(r'<p class="answer">(.*?)</p>', (tmp_path / "r.html").read_text(), re.DOTALL)
    assert answers == ["By accuracy: it is better."]


def bold(page):
    """The figures in bold, without their intervals."""
    return {words(cell).partition(" ")[0] for cell in re.findall(r'<td class="[nt ]*b">(.*?)</td>', page, re.DOTALL)}


def test_the_best_is_bold_whichever_way_better_lies_and_what_has_no_best_is_not(tmp_path):
    figures = {"a": (0.31, 0.12, 0.05, 0.9), "b": (0.42, 0.23, 0.06, 0.8)}
    names = ("macro_auroc@5", "ece_scaled", "gap", "nll_change")
    for name, values in figures.items():
        found = {metric: Interval(v, v - 0.01, v + 0.01) for metric, v in zip(names, values, strict=True)}
        results.write(tmp_path / name, document("x", f"models/{name}", name), found, y=np.zeros(2))
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "r.html")]) == 0
    assert bold((tmp_path / "r.html").read_text()) == {"0.420", "0.120"}


@pytest.mark.parametrize(
    ("metric", "answer"),
    [
        ("ece", "X: the lowest ece of 2 is that of models/a, 0.120 [0.110, 0.130]."),
        ("macro_auroc", "X: the highest macro AUROC of 2 is that of models/b, 0.230 [0.220, 0.240]."),
        ("mmd2", None),
    ],
)
def test_the_answer_says_highest_only_where_that_is_best(tmp_path, metric, answer):
    for name, value in (("a", 0.12), ("b", 0.23)):
        found = {metric: Interval(value, value - 0.01, value + 0.01)}
        results.write(tmp_path / name, document("x", f"models/{name}", name), found, y=np.zeros(2))
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "r.html")]) == 0
    answers = re.findall(r'<p class="answer">(.*?)</p>', (tmp_path / "r.html").read_text(), re.DOTALL)
    assert [words(said) for said in answers[:1]] == ([answer] if answer else [])


def test_every_metric_of_a_verb_has_its_direction():
    metrics = [*kinds.choose("grades", ("a", "b"), ["b"]).metrics, *kinds.choose("multi-label", ("a", "b")).metrics]
    metrics += [*masks.overlap_metrics(("a", "gap")), *explain.PURITY, "area icc_2_1", "iou (a box)", "icc"]
    metrics += ["balanced_mAP", "precision@5", "balanced_accuracy_worst", "macro_auroc_unseen", "recall in women"]
    assert {name for name in metrics if direction(name) != 1} == set()
    errors = [f"{name}{mark}" for name in calibrate.ERRORS for mark in ("", "_scaled")]
    assert {name for name in errors if direction(name) != -1} == set()
    neither = ["ece_change", "balanced_accuracy_gap", "transfer_gap", "gap_ham", "mean_drop", "drop_hair", "far_share"]
    neither += ["c2st_auroc", "nearest_distance", "set size (lac)", "coverage (aps)", "accuracy: a minus b"]
    neither += ["sensitivity at specificity=0.9", "specificity at specificity=0.9"]
    assert {name for name in neither if direction(name)} == set()


def test_notes_of_all_come_first_and_those_of_some_last(write, tmp_path):
    for name, notes in (("a", ["few patients", "one seed"]), ("b", ["few patients"])):
        about = {**document("knn", name, name), "notes": notes}
        results.write(tmp_path / name, about, {"accuracy": Interval(0.5, 0.4, 0.6)}, y=np.zeros(2))
    main(["report", str(tmp_path), "--out", str(tmp_path / "r.html")])
    text = words((tmp_path / "r.html").read_text(), between=" ")
    assert text.index("Few patients.") < text.index("Labelled images a class") < text.index("One seed.")
    assert "One seed. Holds for a (kNN)." in re.sub(" +", " ", text)


def test_values_that_are_not_there_become_dashes_not_nonsense(write, tmp_path):
    path = write("a/knn", 0.4, "knn", "m", "1")
    found = {"balanced_accuracy": Interval(float("nan"), float("nan"), float("nan"))}
    results.write(tmp_path / "b", document("knn", "n", "2"), found, y=np.zeros(2))
    assert np.isnan(results.read(tmp_path / "b/results.json").metrics["balanced_accuracy"].value)
    out = tmp_path / "report.html"
    assert main(["report", str(path.parent), str(tmp_path / "b"), "--out", str(out)]) == 0
    assert "nan" not in re.sub(r"<style>.*?</style>", "", out.read_text()).lower()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "is not a result"),
        ('{"format": "other"}', "is not a result"),
        ('{"format": "hybridssl-results", "version": 99}', "update it"),
        ('{"format": "hybridssl-results", "version": 1, "protocol": "knn"}', "lacks backbone, data"),
        (json.dumps({**document("knn", "m", "1"), **HEAD, "metrics": {"accuracy": 0.9}}), "is not whole"),
        (json.dumps({**document("knn", "m", "1"), **HEAD, "metrics": {}, "leaks": {"x": 1}}), "is not whole"),
    ],
)
def test_a_foreign_or_broken_file_is_named(tmp_path, capsys, content, message):
    (tmp_path / "results.json").write_text(content)
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "r.html")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(tmp_path / "results.json") in error
    assert not (tmp_path / "r.html").exists()


def test_predictions_that_are_gone_are_named(write):
    path = write("a", 0.4, "knn", "m", "1")
    path.with_name("predictions.safetensors").unlink()
    with pytest.raises(results.UserError, match=r"predictions\.safetensors cannot be read"):
        results.read(path).predictions()
