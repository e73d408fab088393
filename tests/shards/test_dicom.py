"""DICOM through a window into shards, and nobody's name anywhere."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import imagecodecs
import numpy as np
import pytest
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_voi_lut
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, RLELossless, SecondaryCaptureImageStorage

from shards import dicom
from shards.__main__ import main
from shards.build import build
from shards.errors import DataError
from shards.format import decode
from shards.index import Index
from shards.options import BuildOptions
from shards.privacy import Salt

SALT = "a salt of the tests, long enough"
SECRETS = ("MUELLER", "HANS", "MRN-4711", "1955", "1.2.826.0.1.4711", "Klinikum", "ACC99", "Dr^House")
OPTIONS = BuildOptions(channels=1, salt=SALT)


def make(pixels: np.ndarray, bits: int = 12, **tags: object) -> Dataset:
    """A file as a hospital has it; pixels [H, W], [F, H, W] or [H, W, 3]."""
    colour = pixels.ndim == 3 and pixels.shape[2] == 3
    file = Dataset()
    file.file_meta = FileMetaDataset()
    file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file.file_meta.MediaStorageSOPClassUID = file.SOPClassUID = SecondaryCaptureImageStorage
    file.file_meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID = "1.2.826.0.1.4711.3"
    file.PatientName, file.PatientID, file.PatientBirthDate = "MUELLER^HANS", "MRN-4711", "19550101"
    file.PatientSex, file.PatientAge, file.InstitutionName = "M", "093Y", "Klinikum"
    file.StudyInstanceUID, file.SeriesInstanceUID = "1.2.826.0.1.4711.1", "1.2.826.0.1.4711.2"
    file.AccessionNumber, file.ReferringPhysicianName = "ACC99", "Dr^House"
    file.Modality, file.BodyPartExamined, file.Manufacturer = "CT", "CHEST", "Maker"
    file.PixelSpacing = [0.5, 0.25]
    file.Rows, file.Columns = pixels.shape[-3:-1] if colour else pixels.shape[-2:]
    file.SamplesPerPixel, file.PhotometricInterpretation = (3, "RGB") if colour else (1, "MONOCHROME2")
    if colour:
        file.PlanarConfiguration = 0
    elif pixels.ndim == 3:
        file.NumberOfFrames = len(pixels)
    wide = pixels.dtype.itemsize == 2
    file.BitsAllocated, file.BitsStored = (16, bits) if wide else (8, 8)
    file.HighBit, file.PixelRepresentation = file.BitsStored - 1, int(pixels.dtype.kind == "i")
    file.PixelData = pixels.tobytes()
    for name, value in tags.items():
        setattr(file, name, value)
    return file


def ramp(low: int, high: int, dtype: type = np.int16, height: int = 16, width: int = 20) -> np.ndarray:
    return np.linspace(low, high, height * width).reshape(height, width).astype(dtype)


def save(file: Dataset, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    file.save_as(path, enforce_file_format=True)
    return path


def packed(tmp_path: Path, file: Dataset, **options: object) -> Index:
    save(file, tmp_path / "in/a.dcm")
    return build(
        tmp_path / "in", tmp_path / "out", options=BuildOptions(**{"channels": 1, "salt": SALT, **options})
    ).index


def grey(index: Index, i: int = 0) -> np.ndarray:
    return decode(index.read(i).image, 0, 1)[..., 0].astype(int)


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_window_equals_pydicoms(function: str) -> None:
    values = ramp(-1024, 3071).astype(np.float64)
    file = make(values.astype(np.int16), WindowCenter=40, WindowWidth=400, VOILUTFunction=function)
    low, high = -(2**11), 2**11 - 1  # the output range of pydicom: what 12 signed bits hold
    expected = (apply_voi_lut(values, file) - low) / (high - low)
    assert np.allclose(dicom.window(values, 40, 400, function), expected, atol=1e-9)


def test_the_spacing_of_a_shrunken_image_is_that_of_its_pixels(tmp_path: Path) -> None:
    file = make(ramp(0, 4095, np.uint16), ImagerPixelSpacing=[0.1, 0.1])
    meta = packed(tmp_path, file, short_side=4, tags=("ImagerPixelSpacing",)).meta(0)
    assert meta["PixelSpacing"] == [2.0, 1.0]
    assert meta["ImagerPixelSpacing"] == pytest.approx([0.4, 0.4])
    assert packed(tmp_path, file, overwrite=True).meta(0)["PixelSpacing"] == [0.5, 0.25]


def test_rescale_and_windows(tmp_path: Path) -> None:
    stored = ramp(0, 4095, np.uint16)
    units = stored.astype(float) * 2 - 1000
    file = make(stored, RescaleSlope=2, RescaleIntercept=-1000, WindowCenter=[40, 500], WindowWidth=[400, 2000])
    own = dicom.window(units, 40, 400) * 255
    assert np.abs(grey(packed(tmp_path, file)) - own).max() <= 1
    for asked, share in (("full", stored / 4095), ("1000,3000", dicom.window(units, 1000, 3000))):
        assert np.abs(grey(packed(tmp_path, file, window=asked, overwrite=True)) - share * 255).max() <= 1
    with pytest.raises(DataError, match="write file, full, or CENTRE,WIDTH"):
        BuildOptions(window="lung")


def test_16_bits_of_the_window_are_stored(tmp_path: Path) -> None:
    index = packed(tmp_path, make(ramp(0, 60, np.uint16), WindowCenter=2048, WindowWidth=4096))
    assert grey(index).max() in (3, 4)  # 60 of 4095: dark stays dark
    stored = np.asarray(Image.open(io.BytesIO(index.read(0).image)))
    assert len(np.unique(stored)) == 61


def test_monochrome1_is_inverted(tmp_path: Path) -> None:
    dark = grey(packed(tmp_path, make(ramp(0, 4095, np.uint16))))
    light = packed(tmp_path, make(ramp(0, 4095, np.uint16), PhotometricInterpretation="MONOCHROME1"), overwrite=True)
    assert np.abs(grey(light) - (255 - dark)).max() <= 1
    assert dark[0, 0] == 0


@pytest.mark.parametrize("kind", ["US", "OW"])
def test_a_lookup_table_is_a_window(tmp_path: Path, kind: str) -> None:
    item, values = Dataset(), [255 - i // 16 for i in range(4096)]
    item.add_new("LUTDescriptor", "US", [4096, 0, 8])
    item.add_new("LUTData", kind, values if kind == "US" else np.array(values, "<u2").tobytes())
    file = make(ramp(0, 4095, np.uint16))
    file.VOILUTSequence = Sequence([item])
    assert np.abs(grey(packed(tmp_path, file)) - (255 - ramp(0, 4095, np.uint16) // 16)).max() <= 1


def test_frames_are_samples_of_one_patient_or_channels(tmp_path: Path) -> None:
    stack = np.stack([ramp(i * 100, i * 100 + 99, np.uint16) for i in range(5)])
    index = packed(tmp_path, make(stack), window="250,501", split="50/50")
    samples = [index.read(i) for i in range(5)]
    assert [index.key(i)[-5:] for i in range(5)] == [f"{i:05d}" for i in range(5)]
    assert {sample.group for sample in samples} == {Salt(SALT).hash("group", "MRN-4711")}
    assert len({sample.split for sample in samples}) == 1
    each = np.stack([grey(index, i) for i in range(5)], 2)
    assert np.array_equal(np.argsort(each.mean((0, 1))), np.arange(5))
    one = packed(tmp_path, make(stack), window="250,501", stack=True, channels=5, overwrite=True)
    assert np.array_equal(decode(one.read(0).image, 0, 5), each)
    three = packed(tmp_path, make(stack), window="250,501", stack=True, channels=3, frames=3, overwrite=True)
    assert np.array_equal(decode(three.read(0).image, 0, 3), each[..., [0, 2, 4]])


def test_windows_of_single_frames(tmp_path: Path) -> None:
    """Enhanced multi-frame: rescale for all frames, a window for each."""

    def item(name: str, **values: float) -> Dataset:
        group, inner = Dataset(), Dataset()
        for key, value in values.items():
            setattr(inner, key, value)
        setattr(group, name, Sequence([inner]))
        return group

    file = make(np.stack([ramp(0, 1000, np.uint16)] * 2))
    file.SharedFunctionalGroupsSequence = Sequence(
        [item("PixelValueTransformationSequence", RescaleSlope=1, RescaleIntercept=-500)]
    )
    file.PerFrameFunctionalGroupsSequence = Sequence(
        [item("FrameVOILUTSequence", WindowCenter=c, WindowWidth=100) for c in (-400, 400)]
    )
    index = packed(tmp_path, file)
    for i, centre in enumerate((-400, 400)):
        expected = dicom.window(ramp(0, 1000, np.uint16) - 500.0, centre, 100) * 255
        assert np.abs(grey(index, i) - expected).max() <= 1


def test_colour_and_compressed_files(tmp_path: Path) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    index = packed(tmp_path, make(rgb), channels=3)
    assert np.array_equal(decode(index.read(0).image), rgb)
    file = make(ramp(0, 4095, np.uint16))
    plain = grey(packed(tmp_path, file, overwrite=True))
    file.compress(RLELossless)
    assert np.array_equal(grey(packed(tmp_path, file, overwrite=True)), plain)


def lossless_jpeg(values: np.ndarray) -> bytes:
    return imagecodecs.jpeg8_encode(values, lossless=True, bitspersample=12)


@pytest.mark.parametrize(
    ("syntax", "encode"),
    [
        pytest.param(uid.JPEGLossless, lossless_jpeg, id="JPEG lossless"),
        pytest.param(uid.JPEGLosslessSV1, lossless_jpeg, id="JPEG lossless, first order"),
        pytest.param(uid.JPEGLSLossless, imagecodecs.jpegls_encode, id="JPEG-LS"),
        pytest.param(uid.JPEG2000Lossless, partial(imagecodecs.jpeg2k_encode, codecformat="j2k"), id="JPEG 2000"),
    ],
)
def test_lossless_compression_changes_no_value(
    tmp_path: Path, syntax: str, encode: Callable[[np.ndarray], bytes]
) -> None:
    """12 bits in two frames, written by another library than the one that reads them."""
    frames = np.stack([ramp(0, 4095, np.uint16), ramp(4095, 7, np.uint16)])
    plain = packed(tmp_path, make(frames), window="2048,4096")
    file = make(frames)
    file.file_meta.TransferSyntaxUID = syntax
    file.PixelData = encapsulate([encode(frame) for frame in frames])
    file["PixelData"].VR = "OB"
    there = packed(tmp_path, file, window="2048,4096", overwrite=True)
    assert [there.read(i).image for i in range(2)] == [plain.read(i).image for i in range(2)]


@pytest.mark.parametrize(
    ("syntax", "words"),
    [
        (uid.MPEG2MPML, r"MPEG2 Main Profile / Main Level cannot be read here: convert the file"),
        (uid.HTJ2KLossless, r"needs another package: pip install pylibjpeg>=2.0 pylibjpeg-openjpeg>=2.0"),
        (uid.JPEG2000Lossless, r"cannot be decoded \(\w+; JPEG 2000 Image Compression \(Lossless Only\)\)"),
        ("1.2.3.4711.24680.13579", r"its transfer syntax is unknown"),
    ],
)
def test_what_cannot_be_decoded_says_what_is_missing(tmp_path: Path, syntax: str, words: str) -> None:
    save(make(ramp(0, 99, np.uint16)), tmp_path / "in/good.dcm")
    file = make(ramp(0, 99, np.uint16))
    known = uid.JPEG2000Lossless if syntax.startswith("1.2.3.") else uid.UID(syntax)
    file.file_meta.TransferSyntaxUID = known
    file.PixelData = encapsulate([b"no picture"])
    file["PixelData"].VR = "OB"
    written = save(file, tmp_path / "in/bad.dcm")
    written.write_bytes(written.read_bytes().replace(known.encode(), syntax.encode()))
    built = build(tmp_path / "in", tmp_path / "out", options=replace(OPTIONS, keep_paths=True))
    assert (len(built.index), built.quarantined) == (1, 1)
    line = json.loads((tmp_path / "out/quarantine.jsonl").read_text())
    assert line["path"] == "bad.dcm"
    assert re.search(words, line["reason"])
    assert "4711" not in line["reason"]


def test_without_a_decoder_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = SimpleNamespace(
        is_available=False, missing_dependencies=["pylibjpeg - requires x", "imagecodecs - requires y"]
    )
    monkeypatch.setattr("pydicom.pixels.get_decoder", lambda syntax: decoder)
    assert dicom._syntax(uid.JPEGLossless).endswith("needs another package: pip install 'hybridssl[dicom]'")


def test_a_file_from_before_there_were_headers(tmp_path: Path) -> None:
    file = make(ramp(0, 4095, np.uint16))
    plain = grey(packed(tmp_path, file))
    del file.file_meta
    (tmp_path / "in/a.dcm").unlink()
    file.save_as(tmp_path / "in/a.dcm", implicit_vr=True, little_endian=True)
    assert b"DICM" not in (tmp_path / "in/a.dcm").read_bytes()
    options = replace(OPTIONS, overwrite=True)
    assert np.array_equal(grey(build(tmp_path / "in", tmp_path / "out", options=options).index), plain)


def everything(folder: Path) -> bytes:
    return b"".join(path.read_bytes() + path.name.encode() for path in sorted(folder.rglob("*")) if path.is_file())


def on_screen(capfd: pytest.CaptureFixture[str]) -> str:
    """What was printed, without the running number of pytest's folders: that may be a year of birth."""
    return re.sub(r"pytest-\d+", "", "".join(capfd.readouterr()))


def test_no_identifier_reaches_the_shards_or_the_screen(
    tmp_path: Path, write_table: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "in"
    save(make(ramp(0, 4095, np.uint16)), images / "MUELLER^HANS/MRN-4711.dcm")
    save(make(ramp(0, 4095, np.uint16), PatientID="MRN-4711 "), images / "MUELLER^HANS/1.2.826.0.1.4711.9")
    save(make(ramp(0, 99, np.uint16), BurnedInAnnotation="YES"), images / "MUELLER^HANS/text.dcm")
    broken = make(ramp(0, 99, np.uint16))
    broken.PixelData = broken.PixelData[:40]
    save(broken, images / "MUELLER^HANS/cut.dcm")
    (images / "MUELLER^HANS/HANS.dcm").write_bytes(b"MUELLER^HANS" * 30)
    (images / "MUELLER^HANS/HANS.jpg").write_bytes(b"\xff\xd8MUELLER")
    (tmp_path / "salt.txt").write_text(SALT + "\n")
    out = tmp_path / "out"
    command = ["build", "--images", str(images), "--out", str(out), "--salt-file", str(tmp_path / "salt.txt")]
    command += ["--linkage", str(tmp_path / "linkage.csv"), "--channels", "1", "--folders", "group", "--split", "80/20"]
    assert main(command) == 0
    said = on_screen(capfd)
    index = Index.open(out)
    assert len(index) == 2
    assert len((out / "quarantine.jsonl").read_text().splitlines()) == 4
    for secret in (*SECRETS, SALT):
        assert secret.encode() not in everything(out), secret
        assert secret not in said, secret
    samples = [index.read(i) for i in range(2)]
    assert samples[0].group == samples[1].group == Salt(SALT).hash("group", "MUELLER^HANS")
    assert samples[0].meta["Modality"] == "CT"
    assert samples[0].meta["PixelSpacing"] == [0.5, 0.25]
    assert not {"PatientSex", "PatientAge"} & samples[0].meta.keys()
    assert samples[0].meta["study"] == Salt(SALT).hash("study", "1.2.826.0.1.4711.1")
    with (tmp_path / "linkage.csv").open() as file:
        found = {row["key"]: row["path"] for row in csv.DictReader(file)}
    assert {found[index.key(i)] for i in range(2)} == {"MUELLER^HANS/MRN-4711.dcm", "MUELLER^HANS/1.2.826.0.1.4711.9"}


def test_errors_about_a_table_do_not_quote_it(
    tmp_path: Path, write_table: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    save(make(ramp(0, 99, np.uint16)), tmp_path / "in/a.dcm")
    (tmp_path / "salt.txt").write_text(SALT)
    for rows in ([{"path": "MUELLER^HANS.dcm"}], [{"path": "a"}, {"path": "a.dcm"}], [{"path": "a", "mask": "HANS"}]):
        table = write_table(tmp_path / "t.csv", rows)
        command = ["build", "--images", str(tmp_path / "in"), "--table", str(table), "--out", str(tmp_path / "out")]
        assert main([*command, "--salt-file", str(tmp_path / "salt.txt")]) == 2
        said = on_screen(capfd)
        assert "row" in said
        assert not any(secret in said for secret in SECRETS)


def test_a_table_and_a_file_name_the_same_patient(tmp_path: Path, write_table: Callable[..., Path]) -> None:
    save(make(ramp(0, 99, np.uint16)), tmp_path / "in/a.dcm")
    save(make(ramp(0, 98, np.uint16)), tmp_path / "in/b.dcm")
    rows = [{"path": name, "group": "MRN-4711", "label": kind, "case": "MRN-1"} for name, kind in ("ax", "by")]
    rows[1]["group"] = ""
    table = write_table(tmp_path / "t.csv", rows)
    options = replace(OPTIONS, split="50/50", by="case")
    index = build(tmp_path / "in", tmp_path / "out", table, options).index
    assert {index.read(i).meta["case"] for i in range(2)} == {Salt(SALT).hash("group", "MRN-1")}
    assert len({index.read(i).split for i in range(2)}) == 1
    assert len({index.read(i).group for i in range(2)}) == 1
    assert index.classes == ("x", "y")
    assert all("in" not in index.read(i).meta["path"] and len(index.read(i).meta["path"]) == 24 for i in range(2))
    kept = BuildOptions(channels=1, salt=SALT, keep_paths=True, overwrite=True)
    index = build(tmp_path / "in", tmp_path / "out", table, kept).index
    assert {index.read(i).meta["path"] for i in range(2)} == {"a.dcm", "b.dcm"}


def test_without_a_good_salt_nothing_is_packed(tmp_path: Path) -> None:
    save(make(ramp(0, 99, np.uint16)), tmp_path / "in/a.dcm")
    with pytest.raises(DataError, match=r"1 DICOM files name their patients.*--salt-file"):
        build(tmp_path / "in", tmp_path / "out", options=BuildOptions(channels=1))
    with pytest.raises(DataError, match="has 5 characters and needs 16"):
        BuildOptions(salt="short")
    one, other = (Salt(SALT + end).hash("group", "MRN-4711") for end in "ab")
    assert one != other != Salt(SALT + "a").hash("study", "MRN-4711")


@pytest.mark.parametrize(
    "name", ["PatientName", "PatientID", "StudyDate", "InstitutionName", "AccessionNumber", "StationName"]
)
def test_tags_that_could_name_someone_are_refused(name: str) -> None:
    with pytest.raises(DataError, match="may name a person, a place or a day"):
        dicom.check_tags((name,))


def test_tags_on_request(tmp_path: Path) -> None:
    file = make(ramp(0, 99, np.uint16), KVP="120", ViewPosition="PA^HANS")
    meta = packed(tmp_path, file, tags=("PatientSex", "PatientAge", "KVP")).read(0).meta
    assert (meta["PatientSex"], meta["PatientAge"], meta["KVP"]) == ("M", "90+", 120.0)
    assert "ViewPosition" not in meta  # no code, so it may be anything
    with pytest.raises(DataError, match="knows no such keyword"):
        dicom.check_tags(("Sex",))


def test_what_is_set_aside_has_a_reason(tmp_path: Path) -> None:
    file = make(ramp(0, 99, np.uint16), BurnedInAnnotation="YES")
    assert len(packed(tmp_path, file, keep_burned_in=True)) == 1
    save(make(np.stack([ramp(0, 99, np.uint16)] * 3), NumberOfFrames=5), tmp_path / "in/b.dcm")
    save(make(ramp(0, 99, np.uint16)), tmp_path / "in/c.dcm")
    built = build(tmp_path / "in", tmp_path / "out2", options=OPTIONS)
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "out2/quarantine.jsonl").read_text().splitlines()]
    assert built.quarantined == 2
    assert any("BurnedInAnnotation" in reason for reason in reasons)
    assert any("cannot be decoded" in reason for reason in reasons)
