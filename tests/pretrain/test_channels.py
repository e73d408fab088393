"""From files that are no photographs to a run and an export: DICOM of one channel, and planes of five."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from safetensors.torch import load_file

from hybridssl import backbone
from hybridssl.__main__ import main as hybridssl
from pretrain.command import load
from pretrain.loop import main as pretrain
from shards.__main__ import main as shards
from tests.pretrain.conftest import TINY, lines

UNLABELLED = ("objectives.labels=null", "stream.labelled_fraction=0")


def blob(seed: int, top: int) -> np.ndarray:
    """A disc on a slope, uint16 [40, 48] of 0..top; odd seeds have a dark centre."""
    rng, (y, x) = np.random.default_rng(seed), np.mgrid[0:40, 0:48]
    radius = np.hypot(y - rng.uniform(14, 26), x - rng.uniform(16, 32))
    values = x / 96 + 0.5 * (radius < 12) - 0.4 * (seed % 2) * (radius < 5)
    return (np.clip(values, 0, 1) * top).astype(np.uint16)


def slice_of_ct(path: Path, seed: int, **tags: object) -> None:
    file, values = Dataset(), blob(seed, 4095)
    file.file_meta = FileMetaDataset()
    file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file.file_meta.MediaStorageSOPClassUID = file.SOPClassUID = CTImageStorage
    file.file_meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID = f"1.2.3.{seed}"
    file.PatientName, file.PatientID, file.Modality = "MUELLER^HANS", f"P{seed // 6}", "CT"
    file.Rows, file.Columns, file.SamplesPerPixel = *values.shape, 1
    file.PhotometricInterpretation, file.PixelRepresentation = "MONOCHROME2", 0
    file.BitsAllocated, file.BitsStored, file.HighBit = 16, 12, 11
    file.RescaleSlope, file.RescaleIntercept = 1, -1024
    file.PixelData = values.tobytes()
    for name, value in tags.items():
        setattr(file, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    file.save_as(path, enforce_file_format=True)


def run(out: Path, data: Path, *keys: str) -> None:
    assert (
        pretrain([*TINY, f"data.train={data}", f"out={out}", "steps=2", "views.mean=[0.5]", "views.std=[0.25]", *keys])
        == 0
    )
    assert all(np.isfinite(line["loss/dino"]) for line in lines(out))


def test_dicom_goes_to_a_run_and_an_export(tmp_path: Path) -> None:
    for seed in range(24):
        slice_of_ct(tmp_path / "ct" / ("dark", "plain")[seed % 2] / f"{seed}.dcm", seed)
    (tmp_path / "salt.txt").write_text("sixteen characters and more\n")
    data = tmp_path / "data"
    words = ["build", "--images", tmp_path / "ct", "--out", data, "--channels", 1, "--salt-file", tmp_path / "salt.txt"]
    words += ["--window", "0,4000", "--folders", "label", "--split", "80/20"]
    assert shards([str(word) for word in words]) == 0
    run(tmp_path / "run", data)
    assert "loss/labels" in lines(tmp_path / "run")[0]
    assert hybridssl(["export", str(tmp_path / "run"), "--out", str(tmp_path / "model")]) == 0
    model = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True, num_classes=0)
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 32)
    written = b"".join(
        p.read_bytes() for f in ("data", "run", "model") for p in (tmp_path / f).rglob("*") if p.is_file()
    )
    assert b"MUELLER" not in written


def test_slices_in_files_of_their_own_go_to_a_run(tmp_path: Path) -> None:
    for seed in range(36):
        slice_of_ct(tmp_path / "ct" / f"{seed}.dcm", seed, SeriesInstanceUID=f"1.2.9.{seed // 3}", InstanceNumber=-seed)
    (tmp_path / "salt.txt").write_text("sixteen characters and more\n")
    words = ["build", "--images", tmp_path / "ct", "--out", tmp_path / "data", "--channels", 3, "--slices", "series"]
    words += ["--window", "0,4000", "--salt-file", tmp_path / "salt.txt"]
    assert shards([str(word) for word in words]) == 0
    run(tmp_path / "run", tmp_path / "data", *UNLABELLED)


@pytest.fixture
def bands(tmp_path: Path) -> Path:
    """24 files of five pages of 16 bits, as an index."""
    (tmp_path / "bands").mkdir()
    for seed in range(24):
        pages = [Image.fromarray(blob(seed, 900 * (i + 1))) for i in range(5)]
        buffer = io.BytesIO()
        pages[0].save(buffer, "TIFF", save_all=True, append_images=pages[1:])
        (tmp_path / f"bands/{seed}.tif").write_bytes(buffer.getvalue())
    words = ["build", "--images", tmp_path / "bands", "--out", tmp_path / "data", "--channels", 5, "--stack"]
    assert shards([str(word) for word in [*words, "--bits", 13]]) == 0
    return tmp_path / "data"


def test_five_planes_continue_from_weights_of_three(bands: Path, weights: Path, tmp_path: Path) -> None:
    keys = [*UNLABELLED, f"backbone.weights={weights}"]
    options = load([*TINY, "data.train=d", "out=o", *keys]).backbone
    inflated = backbone.build(options, 5, 32)
    backbone.load_weights(inflated, options)
    three = load_file(weights)["patch_embed.proj.weight"]
    found = inflated.model.state_dict()["patch_embed.proj.weight"]
    assert torch.allclose(found, three[:, [0, 1, 2, 0, 1]] * 3 / 5)  # in turn, and as bright as before
    run(tmp_path / "run", bands, *keys)
    assert hybridssl(["export", str(tmp_path / "run"), "--out", str(tmp_path / "model")]) == 0
    model = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True, num_classes=0)
    assert model(torch.zeros(1, 5, 32, 32)).shape == (1, 32)


def test_statistics_of_three_channels_do_not_fit_five(
    bands: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = [*TINY, f"data.train={bands}", f"out={tmp_path / 'run'}", *UNLABELLED]
    assert pretrain([*arguments, "views.mean=[0.5,0.5,0.5]", "views.std=[0.2,0.2,0.2]"]) == 2
    assert "views.mean has 3 numbers, the images 5 channels" in capsys.readouterr().err


def test_the_doctor_measures_five_planes(bands: Path, tmp_path: Path) -> None:
    assert hybridssl(["doctor", "--data", str(bands), "--out", str(tmp_path / "recipe.yaml")]) == 0
    text = (tmp_path / "recipe.yaml").read_text()
    mean = next(line for line in text.splitlines() if line.strip().startswith("mean:"))
    assert mean.count(",") == 4
