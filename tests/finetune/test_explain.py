"""explain through the door: neighbours and purity against scikit-learn, the worst errors, attention and similarity."""

from __future__ import annotations

import re
import shutil

import cv2
import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from finetune import explain, explain_page, results
from finetune.__main__ import main
from finetune.backbones import load
from finetune.features import extract
from finetune.others import nearest
from hybridssl.pictures import cls_attention
from shards.build import build as build_shards
from tests.finetune.conftest import make_index, rows
from tests.finetune.looked import look, without_pictures


@pytest.fixture
def explained(index, export_folder, tmp_path):
    def run(*options, backbone=export_folder, data=index, code=0):
        arguments = ["--backbone", str(backbone), "--data", str(data.root), "--out", str(tmp_path / "out")]
        assert main(["explain", *arguments, "--device", "cpu", *map(str, options)]) == code
        return results.read(tmp_path / "out" / "explain" / "results.json") if not code else None

    return run


@pytest.fixture(scope="module")
def result(index, export_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("probed")
    arguments = ["--backbone", str(export_folder), "--data", str(index.root), "--out", str(out), "--device", "cpu"]
    assert main(["knn", *arguments, "--k", "5"]) == 0
    return out / "knn"


def test_options_that_would_change_nothing_are_refused(explained, capsys):
    for options, message in (
        (["--positive", "red"], "leave --positive and --grades out"),
        (["--grades", "blue", "brown", "red"], "leave --positive and --grades out"),
        (["--seeds", 0, 1], "one draw of the labels"),
    ):
        explained("--keys", "x", *options, code=2)
        assert message in capsys.readouterr().err


def test_neighbours_are_of_other_groups_and_purity_is_their_share(explained, index, export_folder):
    found = explained("--keys", index.key(int(index.select(["train"])[3])))
    encoder = load(str(export_folder))
    train, test = (extract(encoder, index, index.select([name])) for name in ("train", "test"))
    near = NearestNeighbors(n_neighbors=5, metric="cosine").fit(train.x["cls"]).kneighbors(test.x["cls"])[1]
    same = train.label[near] == test.label[:, None]
    assert found.metrics["neighbour_purity"].value == pytest.approx(same.mean())
    by_class = [same[test.label == k].mean() for k in range(3)]
    assert found.metrics["balanced_purity"].value == pytest.approx(np.mean(by_class))
    share = np.bincount(train.label) / len(train)
    assert found.about["detail"]["chance"]["neighbour_purity"] == pytest.approx(share[test.label].mean())
    np.testing.assert_array_equal(found.predictions()["neighbour"], train.numbers[near])
    (case,) = found.about["detail"]["cases"]
    group = {index.key(i): index.read(i).group for i in range(len(index))}
    assert len(case["neighbours"]) == 5
    assert group[case["key"]] not in {group[n["key"]] for n in case["neighbours"]}, "the case itself is in train"
    assert [n["cosine"] for n in case["neighbours"]] == sorted((n["cosine"] for n in case["neighbours"]), reverse=True)


def test_the_nearest_of_other_groups_by_hand():
    rng = np.random.default_rng(0)
    x, group = rng.normal(size=(40, 3)), rng.integers(0, 6, 40)
    cosine, at = nearest(x, group, x, group, 4)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    every = np.where(group[:, None] == group, -2, unit @ unit.T)
    np.testing.assert_array_equal(at, np.argsort(-every, axis=1)[:, :4])
    np.testing.assert_allclose(cosine, -np.sort(-every, axis=1)[:, :4], atol=1e-5)


def test_the_worst_errors_of_a_result_with_what_it_said(explained, index, result):
    found = explained("--result", result, "--worst", 3)
    arrays = results.read(result / "results.json").predictions()
    wrong = 1 - arrays["scores"][0][np.arange(len(arrays["y"])), arrays["y"]]
    cases = found.about["detail"]["cases"]
    numbers = {index.key(i): i for i in range(len(index))}
    rows_ = [int(np.flatnonzero(arrays["number"] == numbers[case["key"]])[0]) for case in cases]
    assert wrong[rows_[0]] == wrong.max()
    assert len(set(arrays["group"][rows_])) == 3, "one a patient"
    better = np.isin(arrays["group"], arrays["group"][rows_], invert=True)
    assert wrong[better].max() <= wrong[rows_].min()
    for case, row in zip(cases, rows_, strict=True):
        assert list(case["probabilities"].values()) == pytest.approx(arrays["scores"][0][row].tolist(), abs=1e-6)
        assert case["label"] == [index.classes[arrays["y"][row]]]
    page = (found.path.parent / "report.html").read_text()
    look(found.path.parent / "report.html")
    assert page.count("The classifier said") == 3
    assert page.count("data:image/jpeg") == 3 * (3 + 2 * 5), "case, attention, similarity; neighbours and theirs"
    assert not re.search(r"https?:|<script|\bnan\b", without_pictures(page))


def case_of(index, number):
    return explain_page.Case(index.key(number), number, ("blue",), None, [(number + 1, ("red",), 0.5)])


def test_similarity_is_to_the_patch_most_attended_asked_for_or_in_the_mask(index, export_folder, tmp_path):
    encoder = load(str(export_folder))
    number = int(index.select(["test"])[0])
    seen = explain_page.look(encoder, index, case_of(index, number), None)
    image = torch.from_numpy(explain_page.gallery.read(index, np.array([number]), 32))
    attention = cls_attention(encoder.model, 1, lambda: encoder.features(image))
    np.testing.assert_allclose(seen.attention, attention[0])
    assert seen.patch == np.unravel_index(attention[0].argmax(), (4, 4))
    assert seen.similarity.shape == (2, 4, 4)
    assert seen.similarity[0][seen.patch] == pytest.approx(1, abs=1e-5)
    assert seen.similarity.max() <= 1.00001
    asked = explain_page.look(encoder, index, case_of(index, number), (0.99, 0.3))
    assert asked.patch == (1, 3)
    assert asked.similarity[0][1, 3] == pytest.approx(1, abs=1e-5)
    masked = with_masks(tmp_path)
    seen = explain_page.look(encoder, masked, case_of(masked, 0), None)
    assert seen.why == "the mean of the patches in the lesion's mask"
    assert seen.patch is None
    inside = explain_page._mask(masked, 0, 4).reshape(4, 4)
    assert inside[:, :2].all()
    assert not inside[:, 2:].any()


def with_masks(folder):
    """An index whose masks are the left half of every image."""
    table = rows(0, {"train": 1, "test": 1})
    make_index(folder, table)
    half = np.zeros((40, 48), dtype=np.uint8)
    half[:, :24] = 255
    cv2.imwrite(str(folder / "images" / "half.mask.png"), half)
    text = (folder / "table.csv").read_text().splitlines()
    lines = [text[0] + ",mask", *(line + ",half.mask.png" for line in text[1:])]
    (folder / "masked.csv").write_text("\n".join(lines) + "\n")
    return build_shards(folder / "images", folder / "masked", folder / "masked.csv").index


def test_a_backbone_without_patches_says_so(explained, index):
    found = explained("--keys", index.key(0), index.key(1), backbone="histogram")
    assert [case["attention"] for case in found.about["detail"]["cases"]] == [False, False]
    page = (found.path.parent / "report.html").read_text()
    assert "no attention over a grid of patches and no square grid of patches to show" in page
    assert page.count("data:image/jpeg") == 2 * 6


def test_purity_of_several_labels():
    y = np.array([[1, 1, 0], [0, 0, 1]], dtype=np.uint8)
    assert explain.shared(y[:, None], y[None]).tolist() == [[True, False], [False, True]]
    assert explain.chance_of(np.array([[1, 0, 0], [1, 0, 1], [0, 0, 1], [0, 0, 1]]), y).tolist() == [0.5, 0.75]
    share, weight = np.array([[0.4], [0.8]]), np.array([[1.0, 1.0], [3.0, 1.0]])
    np.testing.assert_allclose(explain.purity(y, share, weight), [0.6, 0.5])
    np.testing.assert_allclose(explain.balanced_purity(y, share, weight), [(0.4 + 0.4 + 0.8) / 3] * 2)


def test_errors_name_the_remedy(explained, index, result, new_index, table, export_folder, tmp_path, capsys):
    explained(code=2)
    assert "which cases? Name some with --keys" in capsys.readouterr().err
    explained("--keys", index.key(0)[:-1] + "#", code=2)
    assert re.search(r"has no image 'train-.*#'; near: .*train-", capsys.readouterr().err)
    explained("--keys", "train-blue", code=2)
    assert re.search(r"has \d+ images whose key begins with 'train-blue'", capsys.readouterr().err)
    explained("--result", result, backbone="histogram", code=2)
    assert "is a result of another backbone" in capsys.readouterr().err
    explained("--result", result, data=new_index(table[:-1]), code=2)
    assert "is a result on another index" in capsys.readouterr().err
    explained("--keys", index.key(0), "--patch", 3, 0.5, code=2)
    assert "--patch 3 0.5: X and Y are shares" in capsys.readouterr().err
    twice = shutil.copytree(result, tmp_path / "both" / "a") and shutil.copytree(result, tmp_path / "both" / "b")
    explained("--result", twice.parent, code=2)
    assert "holds 2 results: name the folder of one" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
