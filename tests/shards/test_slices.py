"""Slices in files of their own: one image of many channels, in the order in which they lie."""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.__main__ import main
from shards.build import build, build_part, join
from shards.errors import DataError
from shards.format import decode
from shards.index import Index
from shards.options import BuildOptions
from tests.shards.test_dicom import SALT, SECRETS, everything, make, save

Table = Callable[[Path, list[dict[str, str]]], Path]
SERIES = BuildOptions(channels=4, slices="series", salt=SALT, window="2048,4096")


def plane(level: int, height: int = 12, width: int = 16) -> np.ndarray:
    """A slice of one grey value, but for a mark, so that its place in an image can be told."""
    values = np.full((height, width), level, np.uint16)
    values[0, 0] = 0
    return values


def series(folder: Path, name: str, depths: list[float], levels: list[int], **tags: object) -> None:
    """Axial slices at these depths, in files whose names say nothing of their order."""
    for n, (depth, level) in enumerate(zip(depths, levels, strict=True)):
        place = {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "ImagePositionPatient": [-5, 9, depth]}
        file = make(plane(level), SeriesInstanceUID=f"1.2.826.0.1.4711.{name}", **{**place, **tags})
        save(file, folder / f"{(n * 7) % 5}-{name}.{n}.dcm")


def levels(index: Index, i: int) -> list[int]:
    """The grey value of each channel."""
    return decode(index.read(i).image, 0, index.channels)[5, 5].tolist()


def numbered(folder: Path, names: list[str], step: int = 10) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for n, name in enumerate(names):
        Image.fromarray(np.full((12, 16), step * (n + 1), np.uint8)).save(folder / name)


def test_a_series_is_stacked_by_position_whatever_the_names(tmp_path: Path) -> None:
    series(tmp_path / "in/a", "11", [20, -10, 30.5, 0], [3072, 1024, 4080, 2048])
    series(tmp_path / "in/b", "12", [3, 2, 1, 0], [512, 1024, 1536, 2048], PatientID="MRN-9")
    built = build(tmp_path / "in", tmp_path / "out", options=SERIES)
    index = built.index
    assert (len(index), index.channels, built.left.ignored, built.quarantined) == (2, 4, 0, 0)
    assert sorted(levels(index, i) for i in range(2)) == [[64, 128, 192, 255], [128, 96, 64, 32]]
    assert len({index.read(i).group for i in range(2)}) == 2
    index.verify()


def test_without_positions_the_instance_numbers_order_them(tmp_path: Path) -> None:
    for n, (instance, level) in enumerate([(10, 3072), (9, 2048), (2, 1024), (1, 512)]):
        save(make(plane(level), InstanceNumber=instance), tmp_path / f"in/{n}.dcm")
    assert levels(build(tmp_path / "in", tmp_path / "out", options=SERIES).index, 0) == [32, 64, 128, 192]


def test_at_most_so_many_slices_evenly_spread(tmp_path: Path) -> None:
    series(tmp_path / "in", "1", list(range(12)), [256 * (n + 1) for n in range(12)])
    index = build(tmp_path / "in", tmp_path / "out", options=replace(SERIES, frames=4)).index
    assert levels(index, 0) == [32, 80, 128, 176]  # the middle of each quarter
    with pytest.raises(DataError, match=r"12 planes where --channels says 4; --frames 4 takes so many"):
        build(tmp_path / "in", tmp_path / "out", options=replace(SERIES, overwrite=True))


def test_numbered_pictures_of_a_folder(tmp_path: Path) -> None:
    numbered(tmp_path / "in/case1", ["slice8.png", "slice9.png", "slice10.png"])
    numbered(tmp_path / "in/case2", ["1.png", "02.png", "3.png"], 20)
    Image.fromarray(np.full((12, 16, 3), 90, np.uint8)).save(tmp_path / "in/case2/2b.jpg")  # grey, as JPEGs often come
    (tmp_path / "in/case2/3.png").unlink()
    index = build(tmp_path / "in", tmp_path / "out", options=BuildOptions(slices="folder")).index
    assert sorted(levels(index, i) for i in range(2)) == [[10, 20, 30], [20, 40, 90]]


def test_a_column_groups_within_a_patient(tmp_path: Path, write_table: Table) -> None:
    """Patients number their series alike; words of the slices join where they agree, and empty cells do not count."""
    rows = []
    for patient in "pq":
        numbered(tmp_path / f"in/{patient}", ["1.png", "2.png"], 10 if patient == "p" else 40)
        for n in (2, 1):
            label = "bleeding" if (patient, n) == ("p", 2) else ""
            place = {"label": label, "group": patient, "scan": "1", "mm": str(5 * n), "kv": "120"}
            rows.append({"path": f"{patient}/{n}.png", **place})
    numbered(tmp_path / "in", ["alone.png"])
    rows.append({"path": "alone.png", "label": "", "group": "r", "scan": "", "mm": "", "kv": ""})
    table = write_table(tmp_path / "t.csv", rows)
    built = build(tmp_path / "in", tmp_path / "out", table, BuildOptions(slices="scan", channels=2))
    index = built.index
    found = {index.read(i).group: (levels(index, i), index.read(i).labels, index.read(i).meta) for i in range(2)}
    assert found["p"][:2] == ([10, 20], ("bleeding",))
    assert found["q"][:2] == ([40, 80], ())
    assert found["p"][2] == {"scan": "1", "kv": "120", "path": "p/1.png"}
    assert built.left.ignored == 0
    (line,) = (tmp_path / "out/quarantine.jsonl").read_text().splitlines()
    assert json.loads(line) == {"path": "alone.png", "reason": "an image of 1 planes where --channels says 2"}
    with pytest.raises(DataError, match=r"--slices scam: the table has no such column.*did you mean 'scan'"):
        build(tmp_path / "in", tmp_path / "no", table, BuildOptions(slices="scam"))
    rows[1]["label"] = "none"
    table = write_table(tmp_path / "t.csv", rows)
    with pytest.raises(DataError, match=r"the 2 slices of p/1.png have 2 different labels: an image has one"):
        build(tmp_path / "in", tmp_path / "no", table, BuildOptions(slices="scan", channels=2))
    with pytest.raises(DataError, match="no DICOM file here names its series"):
        build(tmp_path / "in", tmp_path / "no", options=BuildOptions(slices="series"))


def test_what_does_not_fit_together_is_set_aside_with_the_reason(tmp_path: Path) -> None:
    numbered(tmp_path / "in/good", ["1.png", "2.png"])
    numbered(tmp_path / "in/unequal", ["1.png", "2.png"])
    Image.fromarray(np.zeros((10, 16), np.uint8)).save(tmp_path / "in/unequal/2.png")
    numbered(tmp_path / "in/cut", ["1.png", "2.png"])
    (tmp_path / "in/cut/2.png").write_bytes((tmp_path / "in/cut/2.png").read_bytes()[:40])
    numbered(tmp_path / "in/depths", ["1.png", "2.png"])
    Image.fromarray(np.full((12, 16), 4000, np.uint16)).save(tmp_path / "in/depths/2.png")
    built = build(tmp_path / "in", tmp_path / "out", options=BuildOptions(slices="folder", channels=2))
    assert (len(built.index), built.quarantined) == (1, 3)
    lines = map(json.loads, (tmp_path / "out/quarantine.jsonl").read_text().splitlines())
    reasons = {line["path"]: line["reason"] for line in lines}
    assert (
        "several sizes or depths cannot be the channels of one image: 16 x 10, 8 bits; 16 x 12, 8 bits"
        in (reasons["unequal/1.png"])
    )
    assert "16 x 12, 16 bits; 16 x 12, 8 bits" in reasons["depths/1.png"]
    assert reasons["cut/1.png"].startswith("slice 2 of 2 (2.png): 40 bytes that are no JPEG, PNG")


def test_slices_of_two_patients_are_no_image_and_nobody_is_named(tmp_path: Path) -> None:
    series(tmp_path / "in/x", "1", [0, 1], [512, 1024])
    series(tmp_path / "in/x", "2", [2, 3], [512, 1024], PatientID="MRN-9")
    series(tmp_path / "in/MUELLER", "3", [0, 1], [512, 1024])
    series(tmp_path / "in/y", "4", [0, 1, 2, 3], [512, 1024, 1536, 2048])
    (tmp_path / "in/MUELLER/HANS.dcm").write_bytes(b"MUELLER^HANS" * 30)
    options = replace(SERIES, slices="folder")
    built = build(tmp_path / "in", tmp_path / "out", options=options)
    assert (len(built.index), built.quarantined) == (1, 2)
    reasons = (tmp_path / "out/quarantine.jsonl").read_text()
    assert "its 4 slices are of several patients" in reasons
    assert "slice 3 of 3: " in reasons
    assert not any(secret.encode() in everything(tmp_path / "out") for secret in SECRETS)


def test_parts_and_one_build_are_the_same_and_the_linkage_names_every_file(tmp_path: Path) -> None:
    for n in range(6):
        series(tmp_path / f"in/{n}", f"7{n}", [3, 1, 2, 0], [256 * k for k in range(n + 1, n + 5)])
    options = replace(SERIES, shard_size="2", salt="")
    (tmp_path / "salt.txt").write_text(SALT)
    words = ["build", "--images", tmp_path / "in", "--out", tmp_path / "one", "--channels", "4", "--shard-size", "2"]
    words += ["--slices", "series", "--window", "2048,4096", "--salt-file", tmp_path / "salt.txt"]
    assert main([str(word) for word in [*words, "--linkage", tmp_path / "linkage.csv"]]) == 0
    for number in (3, 1, 2):
        build_part(tmp_path / "in", tmp_path / "parts", None, replace(options, salt=SALT, part=(number, 3)), _quiet)
    index = join(tmp_path / "parts").index
    assert everything(tmp_path / "parts") == everything(tmp_path / "one")
    with (tmp_path / "linkage.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24
    assert {row["key"] for row in rows} == {index.key(i) for i in range(6)}
    assert len({row["path"].split("/")[0] for row in rows if row["key"] == index.key(0)}) == 1


def test_a_changed_slice_is_packed_again(tmp_path: Path) -> None:
    numbered(tmp_path / "in/a", ["1.png", "2.png"])
    options = BuildOptions(slices="folder", channels=2)
    build_part(tmp_path / "in", tmp_path / "out", None, options, _quiet)
    Image.fromarray(np.full((12, 16), 99, np.uint8)).save(tmp_path / "in/a/2.png")
    os.utime(tmp_path / "in/a/2.png", (time.time() + 5, time.time() + 5))  # of the same size, so told by its time alone
    assert levels(build(tmp_path / "in", tmp_path / "out", options=options).index, 0) == [10, 99]


def _quiet(done: int, total: int) -> None:
    pass
