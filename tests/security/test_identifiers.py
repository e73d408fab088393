"""A patient's name in every field that a DICOM file has, in its path and in its faults: it is nowhere afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pydicom import datadict
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence

from finetune.__main__ import main as finetune
from pretrain.loop import main as pretrain
from shards.__main__ import main as shards
from shards.index import Index
from tests.pretrain.conftest import TINY
from tests.shards.test_dicom import make, ramp, save

# Long numbers: six digits in a row come up by chance among the decimals of a report.
SECRETS = (
    "QUASTENFLOSSER",
    "QUASTENFLOßER",
    "Latimeria",
    "XQ-998877665544",
    "998877665544",
    "19380223",
    "1.2.40.0.13.998877665544",
)
NAME, BIRTHDAY, NUMBER = "QUASTENFLOSSER^Latimeria", "19380223", "XQ-998877665544"
# A value that fits each kind of text field, as somebody in a hurry would type it there.
TYPED = {
    "PN": NAME, "LO": "Frau Latimeria QUASTENFLOSSER", "SH": "QUASTENFLOSSER", "ST": NAME, "LT": NAME, "UT": NAME,
    "UC": NAME, "CS": "QUASTENFLOSSER", "AE": "QUASTENFLOSSER", "DA": BIRTHDAY, "UI": "1.2.40.0.13.998877665544",
}  # fmt: skip
KEPT_OUT = {"PatientID", "SOPClassUID", "PhotometricInterpretation", "BurnedInAnnotation", "SpecificCharacterSet"}
MEANT = ("BodyPartExamined", "ViewPosition", "Laterality", "ImageLaterality", "Manufacturer", "ManufacturerModelName")


def infected(n: int, height: int = 48) -> Dataset:
    """Every keyword of some text kinds filled, private ones and nested ones too."""
    file = make(ramp(0, 4095, np.uint16, height, 48), PatientID=NUMBER, PatientName=NAME, PatientBirthDate=BIRTHDAY)
    file.SpecificCharacterSet = "ISO_IR 192"
    for tag, entry in list(datadict.DicomDictionary.items())[n::7]:
        kind, keyword = entry[0], entry[4]
        if kind in TYPED and keyword and keyword not in KEPT_OUT and tag >> 16 > 2 and not hasattr(file, keyword):
            setattr(file, keyword, TYPED[kind])
    file.StudyInstanceUID = file.SeriesInstanceUID = "1.2.40.0.13.998877665544"
    for keyword in MEANT:
        setattr(file, keyword, "QUASTENFLOSSER" if n % 2 else "LATIMERIA 1")
    file.Modality = "CT"
    block = file.private_block(0x0099, "QUASTENFLOSSER", create=True)
    block.add_new(0x01, "LO", NAME)
    block.add_new(0x02, "UN", NAME.encode())
    item = Dataset()
    item.PatientName, item.PatientComments = NAME, "QUASTENFLOßER"
    file.RequestAttributesSequence = Sequence([item])
    file.ImageType = MultiValue(str, ["ORIGINAL", "QUASTENFLOSSER"])
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hospital")
    ward = root / "in" / "QUASTENFLOSSER Latimeria 19380223"
    for n in range(14):
        save(infected(n), ward / f"XQ-998877665544-{n}.dcm")
    faults = [infected(n) for n in range(6)]
    faults[0].PixelData = faults[0].PixelData[:40]
    faults[1].NumberOfFrames = 3
    faults[2].BurnedInAnnotation = "YES"
    faults[3].Rows = 0
    faults[4].BitsAllocated = 13
    faults[5].file_meta.TransferSyntaxUID = "1.2.40.0.13.998877665544"
    for n, file in enumerate(faults):
        file.save_as(ward / f"Latimeria-{n}.dcm", implicit_vr=False, little_endian=True, enforce_file_format=False)
    whole = (ward / "XQ-998877665544-0.dcm").read_bytes()
    at = whole.index(NAME.encode())
    (ward / "cut.dcm").write_bytes(whole[: at + 12])
    (ward / "wrong-length.dcm").write_bytes(whole[: at - 2] + b"\xff\xff" + whole[at:])
    (ward / "no-charset.dcm").write_bytes(
        whole.replace(b"ISO_IR 192", b"Latimeria ").replace(b"QUASTEN", b"QUAST\xff\xfe")
    )
    (ward / "Latimeria.jpg").write_bytes(b"\xff\xd8" + NAME.encode())
    (ward / "Latimeria.tif").write_bytes(b"II*\0" + NAME.encode() * 9)
    (ward / "unreadable.dcm").symlink_to(ward / "QUASTENFLOSSER")
    (root / "salt.txt").write_text("a salt of the tests, long enough\n")
    return root


def assert_nobody(text: str, where: str) -> None:
    found = [secret for secret in (*SECRETS, *(s.lower() for s in SECRETS)) if secret in text]
    assert not found, f"{where} tells {found}"


def assert_no_file(out: Path) -> None:
    for path in [p for p in out.rglob("*") if p.is_file()]:
        data = path.read_bytes()
        for text in (data.decode("latin-1"), data.decode("utf-8", "ignore")):
            assert_nobody(text, path.name)
        assert_nobody(path.name, "a name")


def test_from_the_files_to_the_pages(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data, out = folder / "shards", folder / "out"
    build = ["build", "--images", str(folder / "in"), "--out", str(data), "--salt-file", str(folder / "salt.txt")]
    assert shards([*build, "--channels", "1", "--short-side", "32", "--split", "60/20/20", "--by", "group"]) == 0
    index = Index.open(data)
    assert len(index) >= 14
    set_aside = [json.loads(line) for line in (data / "quarantine.jsonl").read_text().splitlines()]
    assert len(set_aside) >= 6
    kept = {key for i in range(len(index)) for key in index.meta(i)}
    assert {"Modality", "study", "PixelSpacing"} <= kept
    assert not kept & set(MEANT)
    assert shards(["stats", str(data)]) == 0
    assert shards(["audit", str(data), "--out", str(out / "audit")]) == 0
    (split,) = [s for s in index.splits if (index.column("split") == index.splits.index(s)).any()]  # of one patient
    keys = ["steps=1", "objectives.labels=null", "stream.labelled_fraction=0", f"data.splits=['{split}']"]
    keys += ["batch.size=4", "objectives.spread.group=2", "views.mean=[0.5]", "views.std=[0.25]"]
    assert pretrain([*TINY, *keys, f"data.train={data}", f"out={out / 'run'}"]) == 0
    assert finetune(["knn", "--backbone", str(out / "run"), "--data", str(data), "--out", str(out / "r")]) == 2
    assert_no_file(data)
    assert_no_file(out)
    said = capfd.readouterr()
    assert_nobody(said.out + said.err, "the terminal")


def test_a_name_of_the_file_itself_is_kept_out_of_every_tag(folder: Path, tmp_path: Path) -> None:
    """And what has nothing of it stays."""
    plain = make(ramp(0, 4095, np.uint16), PatientName="LI^BO", PatientID="7", Manufacturer="Bolide Li-Ion GmbH")
    plain.BodyPartExamined, plain.ManufacturerModelName = "CHEST", "Bolide 3"
    save(plain, tmp_path / "in" / "a.dcm")
    build = ["build", "--images", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--channels", "1"]
    assert shards([*build, "--salt-file", str(folder / "salt.txt")]) == 0
    meta = Index.open(tmp_path / "out").meta(0)
    assert meta["BodyPartExamined"] == "CHEST"
    assert meta["ManufacturerModelName"] == "Bolide 3"
    assert "Manufacturer" not in meta
