"""The verb `crossdomain`: gaps on the same images and classes, domains left out with a reason, and a second index."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from finetune import kinds, results
from finetune.__main__ import main
from finetune.crossdomain import renames
from finetune.domains import Pair, Pool, eligible, judge
from hybridssl.errors import UserError
from tests.finetune.conftest import make_index, rows
from tests.finetune.looked import look

SITES = ("north", "south", "tiny")


def site(row):
    """Whole groups a site; south's camera swaps the classes blue and red, so that a head from elsewhere is wrong."""
    number = int(row["group"].rsplit("-", 1)[1])
    return "tiny" if number == 0 else SITES[number % 2]


SWAP = {"blue": "red", "red": "blue", "brown": "brown"}


@pytest.fixture(scope="module")
def index(new_index):
    table = rows(splits={"train": 21, "val": 11, "test": 17})
    return new_index(
        [
            {**row, "site": site(row), "label": SWAP[row["label"]] if site(row) == "south" else row["label"]}
            for row in table
        ]
    )


def run(index, out, *options):
    arguments = ["crossdomain", "--backbone", "histogram", "--data", str(index.root), "--out", str(out)]
    return main([*arguments, "--device", "cpu", *map(str, options)])


@pytest.fixture(scope="module")
def result(index, tmp_path_factory):
    out = tmp_path_factory.mktemp("cross")
    assert run(index, out, "--by", "site", "--methods", "knn", "--min-images", 15) == 0
    return results.read(out / "crossdomain-site-knn" / "results.json")


def test_a_head_from_elsewhere_is_wrong_where_the_classes_are_swapped(result):
    detail = result.about["detail"]
    assert set(detail["domains"]) == {"north", "south"}
    matrix = {(row["train"], row["test"]): row for row in detail["matrix"]}
    for home, away in (("north", "south"), ("south", "north")):
        assert matrix[home, home]["away"]["value"] > 0.75
        assert matrix[home, home]["gap"] == {"value": 0, "low": 0, "high": 0}
        crossed = matrix[away, home]
        assert crossed["away"]["value"] < 0.5
        assert crossed["home"]["value"] == pytest.approx(matrix[home, home]["away"]["value"])
        assert crossed["gap"]["value"] == pytest.approx(crossed["home"]["value"] - crossed["away"]["value"])
        assert crossed["gap"]["low"] > 0.2
    assert result.metrics["transfer_gap"].value == pytest.approx(
        np.mean([matrix["north", "south"]["gap"]["value"], matrix["south", "north"]["gap"]["value"]])
    )


def test_an_adapted_backbone_travels_too(index, export_folder, tmp_path):
    """LoRA taught in one place, in the other, and in both: a classifier each, chosen in the places that taught it."""
    fast = ["--epochs", 2, "--steps", 30, "--lr", 0.02, "--train-batch", 8]
    arguments = ["crossdomain", "--backbone", export_folder, "--data", index.root, "--out", tmp_path, "--device", "cpu"]
    options = ["--by", "site", "--methods", "adapt-lora", "--min-images", 15, *fast]
    assert main([*map(str, [*arguments, *options])]) == 0
    found = results.read(tmp_path / "crossdomain-site-adapt-lora" / "results.json")
    assert set(found.about["detail"]["domains"]) == {"north", "south"}
    (choice,) = found.about["selected"]["choices"]
    assert {frozenset(name.split(" + ")) for name in choice} == {
        frozenset(names) for names in (["seed"], ["north"], ["south"], ["north", "south"])
    }
    assert all(chosen["lr"] == 0.02 for name, chosen in choice.items() if name != "seed")
    arrays = found.predictions()
    assert not np.allclose(arrays["scores"], arrays["home_scores"])
    assert {"in_domain", "out_of_domain", "gap"} <= found.metrics.keys()


def test_two_indexes_are_judged_on_frozen_features(index, tmp_path, capsys):
    assert run(index, tmp_path, "--to", index.root, "--methods", "adapt-lora") == 2
    assert "--to judges frozen features: adapt-lora asks for one index with --by" in capsys.readouterr().err


def test_unseen_figures_are_those_of_scikit_learn_on_the_kept_scores(result, index):
    arrays, detail = result.predictions(), result.about["detail"]
    where = np.array([index.read(int(n)).meta["site"] for n in arrays["number"]])
    assert set(where) == {"north", "south"}
    values = {}
    for row in detail["held_out"]:
        here = where == row["domain"]
        for part, name in (("away", "scores"), ("home", "home_scores")):
            expected = balanced_accuracy_score(arrays["y"][here], arrays[name][0][here].argmax(1))
            assert row[part]["value"] == pytest.approx(expected)
        assert row["images"] == here.sum()
        values[row["domain"]] = row["gap"]["value"]
    assert result.metrics["gap"].value == pytest.approx(np.mean(list(values.values())))
    assert result.metrics["gap_south"].value == pytest.approx(values["south"])


def test_its_scores_are_for_fair_and_not_for_calibrate(result, capsys):
    """The heads that were not taught in a place differ from place to place: no one temperature makes them honest."""
    assert main(["fair", str(result.path.parent), "--by", "site", "--metric", "accuracy", "--least", "10"]) == 0
    assert main(["calibrate", str(result.path.parent)]) == 2
    assert "(crossdomain-site-knn) holds no scores of val" in capsys.readouterr().err


def test_a_small_domain_is_left_out_with_its_reason(result):
    skipped = result.about["detail"]["skipped"]
    assert list(skipped) == ["tiny"]
    assert re.fullmatch(r"\d+ train and \d+ test images, fewer than 15", skipped["tiny"])
    assert any("tiny" in note for note in result.about["notes"])


def test_the_page_links_its_numbers_and_says_what_was_not_shown(result):
    page = (result.path.parent / "report.html").read_text()
    look(result.path.parent / "report.html")
    linked = re.findall(r'<a href="results.json">([+−-]?[0-9.]+)</a>', page)
    for row in result.about["detail"]["held_out"]:
        assert f"{row['gap']['value']:+.3f}" in linked
        assert f"{row['away']['value']:.3f}" in linked
    assert "is lower on" in page
    assert "Not shown: which part of a gap comes from the camera" in page


def pool(domains, classes_of, images=40, classes=4):
    """A pool without features: `classes_of[domain]` says which classes a domain has."""
    rng, y, domain, part = np.random.default_rng(0), [], [], []
    for name in domains:
        for split in ("train", "val", "test"):
            y += rng.choice(classes_of[name], images).tolist()
            domain += [name] * images
            part += [split] * images
    at = {split: np.flatnonzero(np.array(part) == split) for split in ("train", "val", "test")}
    names = tuple(f"c{k}" for k in range(classes))
    numbers, kind = np.arange(len(y)), kinds.choose("one-of", names)
    split = lambda seed: (at["train"], at["val"])  # noqa: E731
    return Pool({}, np.array(y), numbers // 2, numbers, np.array(domain), at["test"], split, names, kind)


def test_only_classes_that_both_heads_were_taught_are_judged():
    """b was never taught c0, and always names it right otherwise: that must not count as a shift."""
    images = pool(["a", "b"], {"a": [0, 1, 2], "b": [1, 2, 3]})
    y = images.y[images.test]
    right = np.eye(4)[y][None]
    never = right.copy()
    never[:, y == 0] = np.eye(4)[3]
    heads = {("a",): right, ("b",): never}
    taught = {(d,): [images.parts(0, d)[0]] for d in "ab"}
    (gap,) = judge(images, [Pair("a", ("a",), ("b",))], heads, taught).values()
    assert gap.classes == ["c1", "c2"]
    assert gap.images == int(np.isin(images.y[images.of(images.test, "a")], [1, 2]).sum())
    assert gap.gap.interval == gap.gap.interval.__class__(0, 0, 0)
    alone = pool(["a", "b"], {"a": [0, 1], "b": [1, 2]})
    taught = {(d,): [alone.parts(0, d)[0]] for d in "ab"}
    scores = {head: np.full((1, len(alone.test), 4), 0.25) for head in taught}
    assert judge(alone, [Pair("a", ("a",), ("b",))], scores, taught) == {}, "one class in common is no question"


def test_scores_are_read_among_the_shared_classes():
    """A head whose first choice is a class that the other does not know is read by its next choice."""
    images = pool(["a", "b"], {"a": [0, 1, 2], "b": [1, 2]})
    y = images.y[images.test]
    scores = 0.3 * np.eye(4)[y][None] + 0.7 * np.eye(4)[0]
    taught = {(d,): [images.parts(0, d)[0]] for d in "ab"}
    (gap,) = judge(images, [Pair("b", ("b",), ("a",))], {("a",): scores, ("b",): scores}, taught).values()
    assert gap.away.value == 1


def test_domains_that_cannot_be_judged_say_why():
    images = pool(["a", "b", "", "c"], {"a": [0, 1], "b": [0, 1], "": [0, 1], "c": [2]})
    kept, skipped = eligible(images, [0], images=30, classes=2)
    assert kept == ["a", "b"]
    assert skipped == {
        "(unknown)": "120 images name no domain",
        "c": "1 classes with 5 train and 5 test images, fewer than 2",
    }


def test_a_domain_that_one_draw_of_the_labels_leaves_a_single_class_is_left_out():
    images = pool(["a", "b", "c"], {"a": [0, 1], "b": [0, 1], "c": [0, 1]})
    train, val = images.split(0)

    def split(seed):
        """Every second label; of c, by the second seed, only those of one class."""
        half = [rows[::2] for rows in (images.of(train, "a"), images.of(train, "b"))]
        own = images.of(train, "c")
        return np.concatenate([*half, own[images.y[own] == 0][:10] if seed else own[:10]]), val

    kept, skipped = eligible(replace(images, split=split), [0, 1], images=10, classes=2)
    assert kept == ["a", "b"]
    assert skipped == {"c": "1 classes with 5 train and 5 test images, fewer than 2"}


def test_a_domain_of_few_test_patients_is_left_out():
    images = pool(["a", "b", "c"], {"a": [0, 1], "b": [0, 1], "c": [0, 1]})
    group = np.where(images.domain == "c", images.group % 3, images.group + 3)
    kept, skipped = eligible(replace(images, group=group), [0], images=30, classes=2)
    assert (kept, skipped) == (["a", "b"], {"c": "test has 40 images of 3 patients or lesions, fewer than 10"})
    assert eligible(replace(images, group=group), [0], images=3, classes=2)[0] == ["a", "b", "c"]


def test_a_head_of_one_class_is_refused(index, tmp_path, capsys):
    assert run(index, tmp_path, "--by", "site", "--min-classes", 1) == 2
    assert "--min-classes 1 must be 2 or more" in capsys.readouterr().err


def test_one_domain_is_an_error_that_names_the_options(index, tmp_path, capsys):
    assert run(index, tmp_path / "o") == 2
    assert "source: fewer than two domains can be judged (all are ward)" in capsys.readouterr().err
    assert run(index, tmp_path / "o", "--by", "sitte") == 2
    assert "has a column 'sitte'; did you mean 'site'?" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.fixture(scope="module")
def pad(tmp_path_factory):
    """A second index: the same diseases under other names, one more class, and the same group names."""
    names = {"blue": "BLU", "brown": "BRO", "red": "XXX"}
    table = rows(seed=1, splits={"train": 8, "val": 4, "test": 8})
    return make_index(
        tmp_path_factory.mktemp("pad"),
        [{**row, "label": names[row["label"]], "path": f"p{row['path']}"} for row in table],
    )


def test_another_index_under_other_class_names(index, pad, tmp_path, capsys):
    options = ["--to", pad.root, "--map", "blue=BLU", "brown=BRO", "--min-images", 15]
    assert run(index, tmp_path, *options) == 0
    (path,) = tmp_path.rglob("results.json")
    result = results.read(path)
    detail = result.about["detail"]
    assert len(detail["domains"]) == 2
    assert all(row["classes"] == ["blue", "brown"] for row in detail["held_out"])
    assert result.about["to"]["sha256"] == pad.sha256
    arrays = result.predictions()
    assert set(arrays["number"]) == set(index.select(["test"])), "scores of --data's own images, for fair"
    assert arrays["scores"].shape[2] == len(index.classes) == len(result.about["data"]["classes"])
    away = next(row for row in detail["held_out"] if row["domain"] == "ward-2")
    y, scores = arrays["to_y"], arrays["to_scores"][0]
    asked = np.isin(y, [0, 1])
    assert set(arrays["to_number"]) == set(pad.select(["test"]))
    expected = balanced_accuracy_score(y[asked], scores[asked][:, :2].argmax(1))
    assert away["away"]["value"] == pytest.approx(expected)
    assert away["images"] == asked.sum()


def test_an_image_in_both_indexes_stops_the_evaluation(index, tmp_path, capsys, new_index):
    table = rows(splits={"train": 21, "val": 11, "test": 17})
    for row in table:  # what judges there taught here
        row["split"] = {"train": "test", "test": "train"}.get(row["split"], row["split"])
    other = new_index(table)
    assert run(index, tmp_path / "o", "--to", other.root, "--min-images", 15) == 2
    assert "identical images are in more than one split" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_rules_for_names():
    assert renames(["nv=NEV", "mel=MEL"], ("mel", "nv"), ("MEL", "NEV")) == {"NEV": "nv", "MEL": "mel"}
    with pytest.raises(UserError, match=r"--to has no class 'NV'; did you mean 'NEV'\? It has MEL, NEV"):
        renames(["nv=NV"], ("mel", "nv"), ("MEL", "NEV"))
    with pytest.raises(UserError, match="gives 'NEV' two names, 'nv' and 'mel'"):
        renames(["nv=NEV", "mel=NEV"], ("mel", "nv"), ("MEL", "NEV"))
