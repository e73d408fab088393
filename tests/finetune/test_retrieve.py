"""Retrieval, held to torchmetrics and to a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torchmetrics import retrieval

from finetune import results
from finetune.__main__ import main
from finetune.backbones import load
from finetune.features import extract
from finetune.ranking import measure, rank
from finetune.retrieve import draw
from tests.finetune.looked import look


@pytest.fixture(scope="module")
def case():
    """(x, gallery x, y, gallery y, group, gallery group): some groups are shared, and class 4 has no answer."""
    rng = np.random.default_rng(0)
    qx, gx = rng.normal(size=(23, 6)), rng.normal(size=(60, 6))
    qy, gy = rng.integers(5, size=23), rng.integers(4, size=60)
    return qx, gx, qy, gy, rng.integers(30, size=23), rng.integers(30, size=60)


def by_torchmetrics(case, metric):
    """The mean over queries of a torchmetrics metric, the query's own group left out of the gallery."""
    qx, gx, qy, gy, qg, gg = case
    cosine = (qx / np.linalg.norm(qx, axis=1, keepdims=True)) @ (gx / np.linalg.norm(gx, axis=1, keepdims=True)).T
    keep = qg[:, None] != gg
    query = np.repeat(np.arange(len(qx))[:, None], len(gx), 1)
    parts = (cosine[keep] + 2, (qy[:, None] == gy)[keep], query[keep])
    # + 2, because RetrievalMAP of torchmetrics 1.9 takes what scores 0 or less as not relevant
    return float(metric(*(torch.from_numpy(p) for p in parts[:2]), indexes=torch.from_numpy(parts[2])))


@pytest.mark.parametrize("room", [2**24, 200])
def test_measures_are_those_of_torchmetrics(case, room, monkeypatch):
    monkeypatch.setattr("finetune.ranking.ROOM", room)  # 200: blocks of three queries
    qx, gx, qy, gy, qg, gg = case
    done = []
    ranked = rank(qx, gx, lambda rows, order: qy[rows, None] == gy[order], qg, gg, (1, 5, 10), done.append)
    assert sum(done) == 23
    assert len(done) == (1 if room > 1000 else 8)
    for k in (1, 5, 10):
        for name, kind in (
            ("precision", retrieval.RetrievalPrecision),
            ("recall", retrieval.RetrievalRecall),
            ("hit", retrieval.RetrievalHitRate),
        ):
            expected = by_torchmetrics(case, kind(top_k=k))
            assert ranked.measures[f"{name}@{k}"].mean() == pytest.approx(expected, abs=1e-6), (name, k)
    expected = by_torchmetrics(case, retrieval.RetrievalMAP())
    assert ranked.measures["average_precision"].mean() == pytest.approx(expected, abs=1e-6)
    assert (ranked.measures["average_precision"][qy == 4] == 0).all()


def test_average_precision_is_scikit_learns():
    rng = np.random.default_rng(3)
    hits, score = rng.random((20, 50)) < 0.2, -np.arange(50)
    expected = [average_precision_score(row, score) for row in hits]
    assert measure(hits, ())["average_precision"] == pytest.approx(expected)


def test_the_own_group_is_never_an_answer(case):
    qx, gx, qy, gy, qg, gg = case
    ranked = rank(qx, gx, lambda rows, order: qy[rows, None] == gy[order], qg, gg, (60,))
    for q, (near, cosine) in enumerate(zip(ranked.nearest, ranked.cosine, strict=True)):
        allowed = np.flatnonzero(gg != qg[q])
        assert sorted(near[near >= 0]) == allowed.tolist()
        assert np.isnan(cosine[near < 0]).all()
        assert (np.diff(cosine[near >= 0]) <= 1e-6).all(), "nearest first"
    assert (ranked.nearest < 0).any()


def test_measures_by_hand():
    found = measure(np.array([[1, 0, 1, 0, 0]], dtype=bool), (2, 10))
    assert found["average_precision"][0] == pytest.approx((1 + 2 / 3) / 2)
    assert (found["precision@2"][0], found["recall@2"][0], found["hit@2"][0]) == (0.5, 0.5, 1)
    assert found["precision@10"][0] == pytest.approx(0.2)


def test_queries_of_the_page_are_spread_over_the_classes():
    y = np.repeat([0, 1, 2], [50, 20, 3])
    chosen = y[draw(y, 12)]
    assert np.bincount(chosen).tolist() == [4, 4, 3]


# ------------------------------------------------------------------------------------------------------------ the verb


@pytest.fixture
def evaluate(index, export_folder, tmp_path):
    def run(*options, data=index.root, name="o"):
        base = ["--backbone", str(export_folder), "--data", str(data), "--out", str(tmp_path / name), "--device", "cpu"]
        assert main(["retrieve", *base, *map(str, options)]) == 0
        return results.read(tmp_path / name / "retrieve/results.json")

    return run


def test_the_verb_against_a_plain_loop(evaluate, index, export_folder, tmp_path):
    result = evaluate("--k", 1, 3)
    features = extract(load(str(export_folder)), index, index.select(["train", "test"]))
    train, test = (np.flatnonzero(np.isin(features.numbers, index.select([s]))) for s in ("train", "test"))
    x = features.x["cls"] / np.linalg.norm(features.x["cls"], axis=1, keepdims=True)
    label, right = features.label, {c: [] for c in range(3)}
    for q in test:
        near = train[np.argsort(-x[train] @ x[q])[:3]]
        right[label[q]].append((label[near] == label[q]).mean())
    assert result.metrics["precision@3"].value == pytest.approx(np.mean(np.concatenate(list(right.values()))))
    balanced = np.mean([np.mean(values) for values in right.values()])
    assert result.metrics["balanced_precision@3"].value == pytest.approx(balanced)
    assert result.metrics["mAP"].low < result.metrics["mAP"].value < result.metrics["mAP"].high
    kept = result.predictions()
    assert np.isin(kept["nearest"], features.numbers[train]).all()
    assert kept["average_precision"].mean() == pytest.approx(result.metrics["mAP"].value, abs=1e-6)

    page = (tmp_path / "o/retrieve/report.html").read_text()
    look(tmp_path / "o/retrieve/report.html")
    assert page.count("✓</b>") + page.count("✗</b>") == 24 * 6
    assert f">{result.metrics['precision@3'].value:.3f}</a>" in page
    assert "confidential" in page


def test_the_test_split_can_be_its_own_gallery(evaluate):
    """Every image is in the gallery: without the rule about groups each query would find itself."""
    kept = evaluate("--gallery", "test").predictions()
    group = dict(zip(kept["number"].tolist(), kept["group"].tolist(), strict=True))
    for own, near in zip(kept["group"], kept["nearest"][0], strict=True):
        assert own not in {group[n] for n in near.tolist() if n >= 0}


def test_several_labels_match_when_they_share_one(evaluate, new_index, table):
    many = [{**row, "label": "blue|red"} if row["label"] == "red" else row for row in table]
    result = evaluate("--multi-label", data=new_index(many).root)
    kept = result.predictions()
    assert kept["y"].shape == (len(kept["group"]), 3)
    blue = [row["label"] == "blue" for row in table if row["split"] == "test"]
    assert result.about["data"]["classes"]["blue"]["test"] > sum(blue)
    assert 0 < result.metrics["balanced_mAP"].value < 1


def test_a_class_that_the_gallery_lacks_is_said(evaluate, new_index, table):
    changed = [row for row in table if not (row["label"] == "red" and row["split"] == "train")]
    result = evaluate(data=new_index(changed).root)
    assert any(note.startswith("no train image of red") for note in result.about["notes"])
    assert result.metrics["balanced_hit@10"].value < 2 / 3 + 1e-6


def test_no_val_is_carved_where_nothing_is_chosen(evaluate, new_index, table):
    data = new_index([row for row in table if row["split"] != "val"]).root
    result = evaluate(data=data)
    assert result.about["cost"]["labels_used"]["train"] == [result.about["data"]["splits"]["train"]]


def test_options_that_would_change_nothing_are_refused(index, tmp_path, capsys):
    arguments = ["--backbone", "histogram", "--data", str(index.root), "--out", str(tmp_path / "o")]
    for options in (["--positive", "red"], ["--grades", "blue", "brown", "red"]):
        assert main(["retrieve", *arguments, *options]) == 2
        assert "leave --positive and --grades out" in capsys.readouterr().err


def test_a_gallery_that_is_not_there(index, new_index, table, tmp_path, capsys):
    data = new_index([row for row in table if row["split"] != "val"]).root
    arguments = ["--backbone", "histogram", "--data", str(data), "--out", str(tmp_path / "o"), "--gallery", "val"]
    assert main(["retrieve", *arguments]) == 2
    assert "--gallery val" in capsys.readouterr().err
