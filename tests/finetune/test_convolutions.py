"""What a convolutional run needs of finetune: features as trained, a probe, masks, LP-FT that saves what it made."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from finetune import probe, results, segmenters
from finetune.__main__ import main
from finetune.backbones import load
from hybridssl import checkpoint, run
from hybridssl.backbone import BackboneOptions, build
from hybridssl.export import export
from hybridssl.recipe import to_dict
from hybridssl.student import update_teacher
from hybridssl.views import normalise
from shards.index import Index
from tests.finetune.conftest import _Holder
from tests.finetune.masked import make

DENSENET = BackboneOptions(name="densenet121", args={"growth_rate": 4, "block_config": (1, 1, 1, 1)})


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """A run of one checkpoint, whose batch norms have seen images, and its export."""
    torch.manual_seed(1)
    student, teacher = _Holder(build(DENSENET, 3, 64)), _Holder(build(DENSENET, 3, 64)).eval()
    for _ in range(10):
        student.backbone(torch.randn(8, 3, 64, 64))
        update_teacher(teacher, student, 0.5)
    about = {"options": to_dict(DENSENET), "channels": 3, "image_size": 64, "mean": [0.5] * 3, "std": [0.25] * 3}
    data = {"index": "i", "index_sha256": "s", "splits": ["train"], "samples": 1, "sources": [], "classes": []}
    state = run.RunState(3, 96, {"seed": 0}, about, {**data, "synthetic": True})
    folder = tmp_path_factory.mktemp("runs") / "dense"
    checkpoint.save(folder, state, student, teacher, torch.optim.AdamW(student.parameters()))
    export(folder, folder.parent / "exported")
    return folder, folder.parent / "exported"


def test_features_of_run_and_export_are_those_of_the_teacher(folders) -> None:
    ours, _ = run.load_backbone(folders[0])
    images = torch.randint(0, 256, (3, 3, 64, 64), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    tokens = ours(normalise(images, [0.5] * 3, [0.25] * 3))
    for folder in folders:
        encoder = load(str(folder))
        assert (encoder.dim, encoder.input_size) == (ours.dim, 64)
        torch.testing.assert_close(encoder.features(images)["cls"], tokens.cls)
        torch.testing.assert_close(encoder.patches(images), tokens.patches)
    assert load(str(folders[0])).sha256 == load(str(folders[1])).sha256
    assert load(str(folders[1]), size=96).patches(images.repeat(1, 1, 2, 2)[..., :96, :96]).shape == (3, 9, ours.dim)


def arguments(verb: str, folder: Path, index: Index, out: Path) -> list[str]:
    return [verb, "--backbone", str(folder), "--data", str(index.root), "--out", str(out), "--device", "cpu"]


def test_a_probe_then_fine_tuning_and_what_it_saves_loads(folders, index, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(probe, "CS", (0.01, 1.0))
    out = tmp_path / "out"
    assert main([*arguments("probe", folders[0], index, out), "--methods", "logistic"]) == 0
    assert results.read(out / "logistic" / "results.json").metrics["macro_auroc"].value > 0.55
    short = ["--epochs", "1", "--steps", "2", "--train-batch", "8", "--lr", "1e-3"]
    assert main([*arguments("adapt", folders[1], index, out), "--mode", "lpft", *short]) == 0
    (saved,) = (path.parent for path in (out / "adapt-lpft").rglob("adapted.json"))
    assert json.loads((saved / "config.json").read_text())["architecture"] == "densenet121"
    before, after = (load(str(folder)).model.state_dict() for folder in (folders[1], saved))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if "running" in name)  # noise of a few images


def test_masks_from_the_cells_of_the_map(folders, tmp_path, monkeypatch) -> None:
    for name, value in (("WIDTH", 8), ("MIN_STEPS", 4), ("CHECKS", 1)):
        monkeypatch.setattr(segmenters, name, value)
    command = arguments("segment", folders[0], make(tmp_path / "discs"), tmp_path / "out")
    assert main([*command, "--epochs", "1", "--lr", "1e-2"]) == 0
    for head in ("linear", "knn", "upernet"):
        found = results.read(tmp_path / "out" / f"segment_{head}" / "results.json")
        assert np.isfinite(found.metrics["iou"].value)
