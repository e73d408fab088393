"""Strategies on planted clusters; the verb: what it may propose, the table it writes, the way back to an index."""

from __future__ import annotations

import csv
import re
import shlex

import numpy as np
import pytest
import tifffile

from finetune import results, select, strategies, to_label
from finetune.__main__ import main
from shards.__main__ import main as shards_main
from shards.build import build as build_shards
from shards.index import Index
from shards.options import BuildOptions
from tests.finetune.conftest import rows
from tests.finetune.looked import look, without_pictures


@pytest.fixture(scope="module")
def clusters():
    """Two large clusters and eight small ones: (features [N, D], cluster [N])."""
    rng = np.random.default_rng(0)
    centres = np.linalg.qr(rng.normal(size=(16, 16)))[0][:10] * 5
    cluster = np.repeat(np.arange(10), [400, 400, *[12] * 8])
    return (centres[cluster] + rng.normal(0, 0.3, (len(cluster), 16))).astype(np.float32), cluster


def pool_of(x, known=(), group=None, per_group=1):
    known = np.array(known, dtype=int)
    group = np.arange(len(x)) if group is None else group
    rest = np.setdiff1d(np.arange(len(x)), known)
    return strategies.pool_of(x[rest], group[rest], x[known], group[known], per_group), rest


@pytest.mark.parametrize("name", ["typiclust", "coverage"])
def test_planted_clusters_are_covered_where_random_misses_some(clusters, name):
    x, cluster = clusters
    pool, rest = pool_of(x)

    def found(strategy, count):
        return [
            len({cluster[rest[p.row]] for p in strategies.FROM_FEATURES[strategy](pool, count, s)}) for s in range(5)
        ]

    assert found(name, 10) == [10] * 5 if name == "coverage" else min(found(name, 10)) >= 8
    assert max(found("random", 10)) < 8
    assert np.mean(found(name, 10)) > np.mean(found("random", 10)) + 4


@pytest.mark.parametrize("name", ["typiclust", "coverage"])
def test_regions_with_a_label_come_last(clusters, name):
    x, cluster = clusters
    labelled = [int(np.flatnonzero(cluster == c)[0]) for c in range(2, 10)]
    pool, rest = pool_of(x, known=labelled)
    picks = strategies.FROM_FEATURES[name](pool, 2, seed=0)
    if name == "coverage":
        assert {int(cluster[rest[p.row]]) for p in picks} == {0, 1}
    else:  # the two large clusters are cut in parts, none of which has a label
        assert {int(cluster[rest[p.row]]) for p in picks} <= {0, 1}
        assert all(p.reason.endswith("0 of them labelled") for p in picks)


def test_coverage_is_the_greedy_k_centre(clusters):
    x, _ = clusters
    pool, _ = pool_of(x, known=[3, 700])
    picks = strategies.coverage(pool, 6, seed=0)
    centres = list(pool.known)
    for pick in picks:
        distance = np.min([1 - pool.x @ c for c in centres], axis=0)
        assert pick.score == pytest.approx(distance.max(), abs=1e-5)
        assert distance[pick.row] == pytest.approx(distance.max(), abs=1e-5)
        centres.append(pool.x[pick.row])


def test_typicality_is_the_inverse_mean_distance_to_the_neighbours():
    x = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    distance = np.sort(np.linalg.norm(x[:, None] - x, axis=2), axis=1)[:, 1:21]
    np.testing.assert_allclose(strategies.typicality(x), 1 / distance.mean(1), rtol=1e-4)
    assert strategies.typicality(x[:1]).tolist() == [1]


def test_uncertainty_takes_the_smallest_margins():
    probabilities = np.array([[0.9, 0.05, 0.05], [0.4, 0.35, 0.25], [0.5, 0.49, 0.01], [0.6, 0.3, 0.1]])
    pool, _ = pool_of(np.eye(4, dtype=np.float32))
    picks = strategies.uncertainty(pool, 2, probabilities, ["a", "b", "c"], multi_label=False)
    assert [p.row for p in picks] == [2, 1]
    assert picks[0].score == pytest.approx(0.99)
    assert picks[0].reason == "the probe says a 0.50, b 0.49"
    picks = strategies.uncertainty(pool, 1, np.array([[0.9, 0.1], [0.9, 0.45], [1, 0], [0, 0.3]]), ["a", "b"], True)
    assert picks[0].row == 1


@pytest.mark.parametrize("name", list(strategies.FROM_FEATURES))
def test_the_limit_a_group_counts_its_labels(clusters, name):
    x, _ = clusters
    group = np.arange(len(x)) // 3
    pool, rest = pool_of(x, known=[0, 30], group=group)
    groups = [group[rest[p.row]] for p in strategies.FROM_FEATURES[name](pool, 60, seed=1)]
    assert len(set(groups)) == 60
    assert not {0, 10} & set(groups)
    pool, rest = pool_of(x[:9], group=group[:9], per_group=0)
    assert sorted(p.row for p in strategies.FROM_FEATURES[name](pool, 9, seed=1)) == list(range(9))
    pool, rest = pool_of(x[:9], group=group[:9])
    assert len(strategies.FROM_FEATURES[name](pool, 9, seed=1)) == 3, "there are no more groups"


# -- the verb ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def partly(new_index):
    """Train with labels in a third of its groups; one unlabelled image is of a test patient."""
    table = [
        {**row, "label": "" if row["split"] == "train" and int(row["group"].split("-")[2]) > 4 else row["label"]}
        for row in rows(2)
    ]
    strays = [row for row in table if row["split"] == "train" and row["label"] == ""][:1]
    test_patient = next(row["group"] for row in table if row["split"] == "test")
    for row in strays:
        row["group"] = test_patient
    return new_index(table), strays[0]["path"]


@pytest.fixture
def propose(partly, tmp_path):
    def run(*options, code=0, data=None):
        root = partly[0].root if data is None else data.root
        arguments = ["select", "--backbone", "histogram", "--data", str(root), "--out", str(tmp_path / "out")]
        assert main([*arguments, "--device", "cpu", *map(str, options)]) == code
        return tmp_path / "out" / "select"

    return run


def read(folder):
    with (folder / "to_label.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("strategy", [*strategies.FROM_FEATURES, "uncertainty"])
def test_only_unlabelled_train_images_of_other_patients_are_proposed(propose, partly, strategy):
    index, stray = partly
    folder = propose("--count", 20, "--strategy", strategy)
    table = read(folder)
    number = {index.key(i): i for i in range(len(index))}
    chosen = [number[row["key"]] for row in table]
    assert len(set(chosen)) == 20
    assert (index.column("label")[chosen] == -1).all()
    assert {index.splits[i] for i in index.column("split")[chosen]} == {"train"}
    assert stray not in {row["original"] for row in table}, "its patient is in test"
    assert len({row["group"] for row in table}) == 20
    train = index.select(["train"])
    labelled = {index.read(int(i)).group for i in train[index.column("label")[train] >= 0]}
    assert not labelled & {row["group"] for row in table}
    assert all(row["label"] == "" and row["reason"] for row in table)
    result = results.read(folder / "results.json")
    assert result.about["detail"]["strategy"] == strategy
    if strategy == "uncertainty":
        assert result.about["selected"]["choices"][0]["C"] > 0
    page = (folder / "report.html").read_text()
    look(folder / "report.html")
    assert page.count("data:image/jpeg") == 20
    assert not re.search(r"https?:|<script|\bnan\b", without_pictures(page))


def test_copies_are_left_out(new_index):
    table = [{**row, "label": "" if row["split"] == "train" else row["label"]} for row in rows(2)]
    index = new_index(table)
    unlabelled, labelled = select.candidates(index)
    assert len(labelled) == 0
    assert len(unlabelled) == len(index.select(["train"]))
    folder, images = index.root.parent, index.root.parent / "images"
    train = [row["path"] for row in table if row["split"] == "train"]
    held = next(row["path"] for row in table if row["split"] == "test")
    (images / train[1]).write_bytes((images / train[0]).read_bytes())
    (images / train[2]).write_bytes((images / held).read_bytes())
    copied = build_shards(images, folder / "copied", folder / "table.csv").index
    assert len(select.candidates(copied)[0]) == len(unlabelled) - 2


def test_the_filled_table_builds_a_labelled_index(propose, partly, tmp_path):
    folder = propose("--count", 12)
    table = read(folder)
    truth = [row["original"].split("-")[1] for row in table]
    with (folder / "to_label.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows({**row, "label": label} for row, label in zip(table, truth, strict=True))
    made = build_shards(folder / "images", tmp_path / "labelled", folder / "to_label.csv").index
    assert sorted(made.read(i).labels[0] for i in range(len(made))) == sorted(truth)
    index = partly[0]
    before = {index.key(i): i for i in range(len(index))}
    for i in range(len(made)):
        sample = made.read(i)
        assert sample.image == index.read(before[sample.meta["key"]]).image
        assert sample.split == "train"


def test_nothing_in_the_table_runs_in_a_spreadsheet_and_all_of_it_comes_back(new_index, propose, tmp_path):
    table = [{**row, "source": "=ward()", "group": f"@{row['group']}"} for row in rows(3, {"train": 4, "test": 2})]
    table = [{**row, "label": ""} if row["split"] == "train" else row for row in table]
    index = new_index(table)
    folder = propose("--count", 3, data=index)
    assert all(row["source"] == "'=ward()" and row["group"].startswith("'@train-") for row in read(folder))
    made = build_shards(folder / "images", tmp_path / "again", folder / "to_label.csv").index
    assert {made.read(i).source for i in range(3)} == {"=ward()"}
    assert {made.read(i).group for i in range(3)} <= {row["group"] for row in table}


def test_filled_labels_are_never_written_over(propose, capsys):
    folder = propose("--count", 5)
    propose("--count", 6)  # nothing filled in yet: replaced
    table = folder / "to_label.csv"
    table.write_text(table.read_text().replace(".png,,", ".png,red,", 1))
    before = table.read_text()
    propose("--count", 5, code=2)
    assert "has 1 labels filled in" in capsys.readouterr().err
    assert table.read_text() == before
    propose("--count", 5, "--overwrite")
    assert len(list((folder / "images").iterdir())) == 5


def fill(folder, labels=("red",), delimiter=",", encoding="utf-8", column="label"):
    """The table as a spreadsheet saves it: the first rows labelled, with its own separator and encoding."""
    table = read(folder)
    for row, label in zip(table, labels, strict=False):
        row["label"] = label
    with (folder / "to_label.csv").open("w", newline="", encoding=encoding) as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow([column if name == "label" else name for name in table[0]])
        writer.writerows(row.values() for row in table)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"delimiter": ";"}, "has 1 labels filled in"),
        ({"delimiter": "\t", "labels": ("red", "", "blue")}, "has 2 labels filled in"),
        ({"column": "diagnosis"}, "has 1 labels filled in"),
        ({"labels": ("Nävus",), "encoding": "cp1252"}, "is not UTF-8 text"),
    ],
)
def test_a_table_is_kept_however_a_spreadsheet_saved_it(propose, capsys, saved, message):
    folder = propose("--count", 3)
    fill(folder, **saved)
    before = {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}
    propose("--count", 4, code=2)
    assert message in _said(capsys)
    assert {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()} == before


def test_what_others_put_beside_the_images_is_kept(propose, capsys):
    folder = propose("--count", 3)
    (folder / "images/.DS_Store").write_bytes(b"")
    propose("--count", 3)  # what a file manager leaves is no work
    image = min((folder / "images").iterdir())
    (folder / "images/red").mkdir()
    image.rename(folder / "images/red" / image.name)  # sorting into folders is labelling too
    propose("--count", 3, code=2)
    assert f"{folder / 'images/red'} is no image of" in _said(capsys)
    (folder / "to_label.csv").unlink()
    propose("--count", 3, code=2)
    assert (folder / "images/red" / image.name).is_file()
    propose("--count", 3, "--overwrite")
    assert not (folder / "images/red").exists()
    assert len(read(folder)) == 3


@pytest.mark.parametrize(("channels", "dtype"), [(5, np.uint8), (3, np.uint16)])
def test_images_of_many_planes_keep_their_type_and_the_command_builds_them(tmp_path, channels, dtype):
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for name in "ab":
        pages = rng.integers(np.iinfo(dtype).max, size=(channels, 8, 9), endpoint=True, dtype=dtype)
        tifffile.imwrite(tmp_path / f"in/{name}.tif", pages, photometric="minisblack")
    index = build_shards(tmp_path / "in", tmp_path / "old", options=BuildOptions(channels=channels, stack=True)).index
    images = tmp_path / "round/images"
    to_label.write_images(index, np.arange(2), images)
    assert {path.suffix for path in images.iterdir()} == {".tif"}
    command = to_label.feed_back(tmp_path / "round", to_label.build_options(index, images))
    words = [word.replace("NEW_INDEX", str(tmp_path / "new")) for word in shlex.split(command)]
    names = sorted(path.name for path in images.iterdir())
    (tmp_path / "round/to_label.csv").write_text("\n".join(["path,label", *(f"{name},red" for name in names)]))
    assert shards_main(words[3:]) == 0
    made = Index.open(tmp_path / "new")
    assert made.channels == channels
    assert sorted(made.read(i).image for i in range(2)) == sorted(index.read(i).image for i in range(2))


def test_errors_name_the_remedy(propose, index, new_index, capsys):
    propose("--count", 500, code=2)
    assert re.search(r"has \d+ unlabelled images to propose with 1 a patient or lesion, not --count 500", _said(capsys))
    propose("--count", 3, data=index, code=2)
    assert "has no unlabelled image in its train split" in _said(capsys)
    bare = new_index([{**row, "label": ""} for row in rows(9, {"train": 3})])
    propose("--count", 3, "--strategy", "uncertainty", data=bare, code=2)
    assert "start with --strategy typiclust" in _said(capsys)
    propose("--count", 3, data=bare)


def test_uncertainty_needs_two_classes_in_train_whatever_val_has(propose, new_index, capsys):
    table = [{**r, "label": "" if r["split"] == "train" and r["label"] != "red" else r["label"]} for r in rows(9)]
    propose("--count", 3, "--strategy", "uncertainty", data=new_index(table), code=2)
    assert "train labels of one class to fit a probe on: start with --strategy typiclust" in _said(capsys)


def test_uncertainty_takes_no_label_for_absent_that_a_source_cannot_name(propose, new_index, capsys):
    table = [
        {**row, "label": "" if i % 2 else row["label"], "source": "clinic" if row["label"] != "red" else "ward"}
        for i, row in enumerate(rows(9))
    ]
    several = [{**row, "label": "blue|brown" if row["label"] == "blue" else row["label"]} for row in table]
    propose("--count", 3, "--strategy", "uncertainty", data=new_index(several), code=2)
    assert re.search(r"clinic cannot name red.*choose another --strategy", _said(capsys))
    propose("--count", 3, "--strategy", "uncertainty", data=new_index(table))  # softmax over all: one excludes the rest


def _said(capsys):
    return capsys.readouterr().err.replace("\n", " ")
