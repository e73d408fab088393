"""Grey images with reports, a convolutional backbone, a text encoder that moves: from the first step to the export."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from hybridssl.export import export
from pretrain.loop import main
from shards import scan
from tests.hybridssl.conftest import tiny_encoder
from tests.pretrain.conftest import lines, losses

DENSENET = "{growth_rate: 4, block_config: [1, 1, 1, 1]}"


@pytest.fixture(scope="module")
def grey(index: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shards, read with one channel."""
    folder = Path(shutil.copytree(index, tmp_path_factory.mktemp("grey") / "shards"))
    scan.write(folder, channels=1, synthetic=True)
    return folder


def command(data: Path, out: Path, *more: str) -> list[str]:
    small = ["steps=4", "data.workers=0", "batch={size: 8, micro: 4}", "views.global_size=64", "views.local_size=32"]
    small += ["threads=1"]  # two may add up in another order, and what is left here is left to other tests
    small += [f"backbone.args={DENSENET}", f"text.encoder={tiny_encoder()}", "objectives.text_pairs.width=8"]
    small += ["objectives.dino={prototypes: 16, hidden: 32, bottleneck: 8}", "objectives.spread.group=4"]
    small += ["log.every=1", "save={every: 2, keep: 9}", "probe.every=0", "precision=no"]
    return ["recipe=cxr-densenet121", f"data.train={data}", f"out={out}", *small, *more]


@pytest.fixture(scope="module")
def run(grey: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "cxr"
    assert main(command(grey, out)) == 0
    return out


def test_reports_are_compared_and_only_what_moves_is_saved(run: Path) -> None:
    first = lines(run)[0]
    assert first["loss/text_pairs"] > 0
    assert 0 < first["health/with_report"] <= 1
    tensors = load_file(run / "checkpoints" / "step-4" / "model.safetensors")
    tower = {name for name in tensors if "text_pairs.moving" in name}
    assert tower
    assert all("lora_" in name for name in tower)
    before = load_file(run / "checkpoints" / "step-2" / "model.safetensors")
    moved = {name for name in tensors if not torch.equal(tensors[name], before[name])}
    assert {name for name in tower if "lora_B" in name} <= moved
    for who in ("student", "teacher"):
        assert any(name.startswith(f"{who}.backbone") and "running_var" in name for name in moved)
    html = (run / "report.html").read_text()
    assert "Reports found" in html
    assert "Inside the image" in html


def test_a_run_that_stopped_goes_on_bit_for_bit(run: Path, grey: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("pretrain.report.write", lambda run, *_: run / "report.html")
    again = Path(shutil.copytree(run, tmp_path / "again"))
    shutil.rmtree(again / "checkpoints" / "step-4")
    assert main(command(grey, again)) == 0
    assert losses(again) == losses(run)
    ours, theirs = (load_file(r / "checkpoints" / "step-4" / "model.safetensors") for r in (again, run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_export_is_a_grey_densenet_that_dapt_continues(run: Path, grey: Path, tmp_path: Path, capsys) -> None:
    export(run, tmp_path / "model")
    model = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True, num_classes=0)
    assert model(torch.zeros(1, 1, 64, 64)).shape == (1, model.num_features)
    more = [f"backbone.weights={tmp_path / 'model'}", "objectives.text_pairs=null", "steps=1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pretrain.report.write", lambda run, *_: run / "report.html")
        assert main(command(grey, tmp_path / "dapt", *more)) == 0
    total = len(model.state_dict())
    assert f"{total} of {total} backbone tensors loaded" in capsys.readouterr().out


def test_an_objective_that_hides_patches_is_refused_before_anything_is_written(grey, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert main(command(grey, out, "objectives.ibot={prototypes: 16}")) == 2
    message = capsys.readouterr().err
    for words in ("objectives.ibot", "densenet121", "objectives.ibot=null", "backbone.name"):
        assert words in message
    assert not out.exists()


@pytest.mark.gpu
@pytest.mark.parametrize("tower", ["frozen", "trained"])
def test_it_runs_on_the_device_in_bf16(grey: Path, tmp_path: Path, tower: str) -> None:
    more = ["precision=bf16", f"objectives.text_pairs.tower={tower}", "steps=2"]
    assert main(command(grey, tmp_path / "out", *more)) == 0
    assert all(math.isfinite(value) for line in losses(tmp_path / "out") for value in line.values())
