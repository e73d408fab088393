"""The arithmetic of benchmarks/budget.py on planted results."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks import arms, budget
from finetune.results import FORMAT, NEEDED


def plant(folder, skill: float, seed: int = 0) -> None:
    """An arm's seven results: 60 images of 20 groups, of which a share `skill` is right."""
    rng = np.random.default_rng(seed)
    y = np.arange(60) % 3
    right = rng.random(60) < skill
    guess = np.where(right, y, (y + 1) % 3)
    group = np.arange(60) // 3
    about = dict.fromkeys(NEEDED) | {"format": FORMAT, "version": 1, "protocol": "knn", "metrics": {}}
    about |= {"backbone": {"name": "arm", "sha256": "0", "baseline": False}, "seeds": [0]}
    sizes = {"index": "ham", "splits": {"test": 60}, "groups": {"test": 20}, "classes": {"test": {"nv": 60}}}
    about |= {"data": {"sha256": "0", "labels": 1.0, "source": None, "synthetic": False, **sizes}}
    about |= {"leaks": {"groups": 0, "pretraining": 0, "images": 0}, "selected": {"split": "val", "choices": [{}]}}
    about |= {"cost": {"seconds": 1.0, "labels_used": {}}}
    for where in budget.FIGURES.values():
        (folder / where).mkdir(parents=True)
        (folder / where / "results.json").write_text(json.dumps(about))
        arrays = {"y": y, "scores": np.eye(3)[guess][None], "group": group, "number": np.arange(60)}
        if where.startswith("masks"):
            arrays = {"iou": right.astype(np.float32)[None, :, None], "group": group, "number": np.arange(60)}
        save_file(arrays, folder / where / "predictions.safetensors")


def results(work, labels: float = 0.1):
    return arms.folder(work, "quick", labels, "labels") / "results"


def runs(work, labels: float = 0.1, size: str = "quick"):
    return arms.folder(work, size, labels, "labels") / "runs"


def test_composite_noise_and_differences(tmp_path):
    for arm, skills in {"random": [0.3], "ssl": [0.6, 0.7], "hybrid-text": [0.95]}.items():
        for seed, skill in enumerate(skills):
            plant(results(tmp_path) / f"{arm}-{seed}", skill, seed)
    (results(tmp_path) / "labels-0").mkdir()  # begun, not judged: it is left out
    found = budget.collect(tmp_path, "quick", 0.1)
    assert {arm: sorted(seeds) for arm, seeds in found.items()} == {"random": [0], "ssl": [0, 1], "hybrid-text": [0]}
    table = budget.table(found)
    arms = table["arms"]
    for row in arms.values():
        figures = [row[name]["value"] for name in budget.FIGURES]
        assert row["composite"]["value"] == pytest.approx(np.mean(figures))
        assert row["composite"]["low"] < row["composite"]["value"] < row["composite"]["high"]
    composites = [row["composite"] for row in table["by_seed"]["ssl"].values()]
    assert arms["ssl"]["composite"]["value"] == pytest.approx(np.mean(composites))
    assert table["noise_threshold"] == pytest.approx(2 * np.std(composites, ddof=1))
    gap = next(d for d in table["differences"] if (d["a"], d["b"]) == ("random", "hybrid-text"))
    expected = arms["random"]["composite"]["value"] - arms["hybrid-text"]["composite"]["value"]
    assert gap["composite"]["value"] == pytest.approx(expected)
    assert gap["composite"]["high"] < 0
    assert gap["p_holm"] < 0.05
    gap = next(d for d in table["differences"] if (d["a"], d["b"]) == ("ssl", "hybrid-text"))  # of the seed of both
    expected = composites[0] - arms["hybrid-text"]["composite"]["value"]
    assert gap["composite"]["value"] == pytest.approx(expected)


def test_one_seed_has_no_noise_threshold(tmp_path):
    plant(results(tmp_path) / "ssl-0", 0.5)
    table = budget.table(budget.collect(tmp_path, "quick", 0.1))
    assert table["noise_threshold"] is None
    assert table["differences"] == []


def test_arms_without_a_common_seed_are_not_compared(tmp_path):
    plant(results(tmp_path) / "ssl-0", 0.5)
    plant(results(tmp_path) / "labels-1", 0.5)
    assert budget.table(budget.collect(tmp_path, "quick", 0.1))["differences"] == []


def test_what_saw_no_label_stands_beside_the_arms_of_any_share(tmp_path):
    plant(results(tmp_path) / "ssl-0", 0.5)
    plant(results(tmp_path) / "labels-0", 0.6)
    plant(results(tmp_path, 1) / "labels-0", 0.7, seed=1)
    tenth, all_labels = (budget.collect(tmp_path, "quick", labels) for labels in (0.1, 1.0))
    assert tenth["ssl"] == all_labels["ssl"]
    assert tenth["labels"][0]["ham knn"].path != all_labels["labels"][0]["ham knn"].path


def test_what_saves_time_is_a_family_of_its_own(tmp_path):
    for arm in ("ssl", "ssl-pixels", "ssl-curriculum"):
        plant(results(tmp_path) / f"{arm}-0", 0.5)
    assert list(budget.collect(tmp_path, "quick", 0.1)) == ["ssl", "ssl-pixels"]
    assert list(budget.collect(tmp_path, "quick", 0.1, arms.SECONDS)) == ["ssl-pixels", "ssl-curriculum"]
    assert set(arms.PARTS) | set(arms.SECONDS) == {"random", *arms.ARMS}


@pytest.mark.parametrize(
    ("words", "complaint"),
    [("--arms ssl-pixels ssl-brief", "ssl-brief: add --seconds"), ("--seconds --arms labels", "leave out --seconds")],
)
def test_an_arm_that_the_results_would_leave_out_is_not_trained(words, complaint, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["budget", "--size", "quick", *words.split()])
    monkeypatch.setattr(arms, "train", lambda *_: pytest.fail("it was"))
    with pytest.raises(SystemExit):
        budget.main()
    assert complaint in capsys.readouterr().err


def test_seconds_and_images_are_those_of_the_runs_own_log(tmp_path):
    found = {"random": {0: {}}, "ssl": {0: {}, 1: {}}, "ssl-curriculum": {1: {}}}
    for name, seconds in {"ssl-0": 40.0, "ssl-1": 50.0, "ssl-curriculum-1": 20.0}.items():
        (run := runs(tmp_path) / name).mkdir(parents=True)
        lines = [{"step": 0, "probe/knn": 0.1}, {"step": 5, "seconds": 1.0, "images": 40}]
        lines += [{"step": 10, "seconds": seconds, "images": 80}, {"step": 10, "probe/knn": 0.2}]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert budget.training(tmp_path, "quick", 0.1, found) == {
        "ssl": {"0": {"seconds": 40.0, "images": 80}, "1": {"seconds": 50.0, "images": 80}},
        "ssl-curriculum": {"1": {"seconds": 20.0, "images": 80}},
    }


@pytest.mark.parametrize(
    ("arm", "labels", "trunk"),
    [("hybrid-late", 1, "ssl"), ("ssl-pixels", 0.1, arms.RECIPE), (arms.RECIPE, 1, arms.RECIPE)],
)
def test_a_branch_has_cost_its_trunk_too(arm, labels, trunk, tmp_path):
    join = arms.JOIN["quick"]
    for run, steps in {
        runs(tmp_path) / f"{trunk}-0": (join, 500),
        runs(tmp_path, labels) / f"{arm}-0": (join + 1, 500),
    }.items():
        run.mkdir(parents=True)
        lines = [{"step": step, "seconds": 2.0 * step, "images": 8 * step} for step in steps]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = budget.training(tmp_path, "quick", labels, {arm: {0: {}}})
    assert found == {arm: {"0": {"seconds": 2.0 * join + 1000, "images": 4000}}}
