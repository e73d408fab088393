from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from shards.__main__ import main
from shards.build import BuildOptions, build
from shards.errors import DataError
from shards.format import decode, decode_mask, mask_values
from shards.index import Index
from shards.pack import key_of
from shards.split import parse_split, split_of
from shards.stats import stats
from shards.table import find_images

Table = Callable[[Path, list[dict[str, str]]], Path]


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def by_path(index: Index) -> dict[str, int]:
    return {index.read(i).meta["path"]: i for i in range(len(index))}


def test_what_goes_in_comes_out(photos: Path, index: Index) -> None:
    at = by_path(index)
    for i in range(60):
        name = f"{'one' if i % 2 else 'two'}/bild {i:02d}.v1 ä.jpg"
        sample = index.read(at[name])
        labels = () if i % 3 == 0 else ("nevus",) if i % 2 else ("melanoma",) if i % 4 else ("melanoma", "ulcer")
        assert sample.image == (photos / "images" / name).read_bytes()
        assert (sample.labels, sample.source, sample.group) == (labels, "ab"[i % 2], f"p{i // 2}")
        assert sample.meta == {"age": str(30 + i), "path": name}
        assert "." not in sample.key
        assert sample.key.isascii()


def test_same_input_same_bytes(photos: Path, index: Index, tmp_path: Path, write_table: Table) -> None:
    lines = (photos / "labels.csv").read_text(encoding="utf-8").splitlines()
    shuffled = [lines[0], *random.Random(0).sample(lines[1:], 60)]
    table = tmp_path / "other name.csv"
    table.write_text("\n".join(shuffled), encoding="utf-8-sig")
    build(photos / "images", tmp_path / "again", table, BuildOptions(shard_size="7", workers=3))
    assert digests(tmp_path / "again") == digests(index.root)


def test_without_a_table_every_image_is_there(photos: Path, tmp_path: Path) -> None:
    index = build(photos / "images", tmp_path / "out").index
    assert len(index) == 60
    assert index.classes == index.sources == ()
    assert (index.column("label") == -1).all()
    assert (index.column("source") == -1).all()


def test_the_ways_to_name_an_image(photos: Path, tmp_path: Path, write_table: Table) -> None:
    cells = ["one/bild 01.v1 ä", "bild 03.v1 ä.jpg", "bild 05.v1 ä", "./one/bild 07.v1 ä.jpg", "one\\bild 09.v1 ä.jpg"]
    cells += ["one/bild 11.v1 a\u0308.jpg"]  # as macOS spells it
    table = write_table(tmp_path / "t.csv", [{"path": cell, "label": "x"} for cell in cells])
    built = build(photos / "images", tmp_path / "out", table)
    assert sorted(by_path(built.index)) == [f"one/bild {i:02d}.v1 ä.jpg" for i in (1, 3, 5, 7, 9, 11)]
    assert built.left.ignored == 54
    assert built.index.sources == ("default",)
    beside = write_table(photos / "beside.csv", [{"path": "images/one/bild 01.v1 ä.jpg"}])
    assert len(build(photos / "images", tmp_path / "out2", beside).index) == 1


def test_other_column_names_and_separators(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(
        'bild;Diagnose;klinik;befund;x\n"one/bild 01.v1 ä.jpg";nevus;b;"rund; braun";7\n', encoding="utf-8"
    )
    columns = {"path": "bild", "label": "Diagnose", "source": "klinik", "text": "befund"}
    sample = build(photos / "images", tmp_path / "out", tmp_path / "t.csv", BuildOptions(columns)).index.read(0)
    assert (sample.labels, sample.source, sample.text) == (("nevus",), "b", "rund; braun")
    assert sample.meta == {"x": "7", "path": "one/bild 01.v1 ä.jpg"}


def test_damaged_images_are_set_aside(tmp_path: Path, jpeg: Callable[..., bytes]) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for i in range(5):
        (images / f"{i}.jpg").write_bytes(jpeg(i))
    (images / "cut.jpg").write_bytes(jpeg(9)[:300])
    (images / "empty.png").write_bytes(b"")
    built = build(images, tmp_path / "out")
    assert (len(built.index), built.quarantined) == (5, 2)
    lines = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").read_text().splitlines()]
    assert {line["path"] for line in lines} == {"cut.jpg", "empty.png"}
    assert {line["reason"] for line in lines if line["path"] == "empty.png"} == {"the file is empty (0 bytes)"}
    assert all(line["reason"] for line in lines)
    assert stats(built.index).quarantined == 2
    with (tmp_path / "out/quarantine.jsonl").open("a") as file:
        file.write('{"key": "a", "reason": "a copy of b"}\n')  # left out on purpose
    assert stats(built.index).quarantined == 2
    for i in range(5):
        (images / f"{i}.jpg").unlink()
    with pytest.raises(DataError, match="none of 2 images can be read"):
        build(images, tmp_path / "out2")
    assert {path.name for path in tmp_path.iterdir()} == {"images", "out"}


def test_shrinking(photos: Path, tmp_path: Path, write_table: Table) -> None:
    mask = np.zeros((48, 64), np.uint8)
    mask[:, 32:] = 255
    cv2.imwrite(str(tmp_path / "m.png"), mask)
    table = write_table(tmp_path / "t.csv", [{"path": "bild 01.v1 ä", "mask": "m.png"}])
    options = BuildOptions(short_side=24)
    sample = build(photos / "images", tmp_path / "out", table, options).index.read(0)
    assert decode(sample.image).shape == (24, 32, 3)
    assert sample.mask is not None
    assert np.array_equal(decode_mask(sample.mask), np.tile(np.arange(32) >= 16, (24, 1)))


def test_a_shrunken_mask_keeps_its_numbers_and_its_shape(photos: Path, tmp_path: Path, write_table: Table) -> None:
    mask = np.zeros((48, 64), np.uint8)
    mask[:, 32:] = 2
    cv2.imwrite(str(tmp_path / "m.png"), mask)
    cv2.imwrite(str(tmp_path / "tall.png"), mask.T)
    names = {"bild 01.v1 ä": "m.png", "bild 03.v1 ä": "tall.png"}
    table = write_table(tmp_path / "t.csv", [{"path": path, "mask": mask} for path, mask in names.items()])
    built = build(photos / "images", tmp_path / "out", table, BuildOptions(short_side=24))
    kept = built.index.read(0).mask
    assert len(built.index) == 1
    assert kept is not None
    assert np.array_equal(mask_values(kept), 2 * np.tile(np.arange(32) >= 16, (24, 1)))
    assert "its mask is 48 x 64, and the image has another shape" in (tmp_path / "out/quarantine.jsonl").read_text()


def test_masks_of_tiff_keep_their_numbers(photos: Path, tmp_path: Path, write_table: Table) -> None:
    mask = np.zeros((48, 64), np.uint16)
    mask[:, 32:] = 300
    for number, values in enumerate([mask, (mask > 0).astype(np.uint8), mask.astype(np.float32) + 0.5]):
        cv2.imwrite(str(tmp_path / f"{number}.tif"), values)
    rows = [{"path": f"bild 0{2 * number + 1}.v1 ä", "mask": f"{number}.tif"} for number in range(3)]
    built = build(photos / "images", tmp_path / "out", write_table(tmp_path / "t.csv", rows))
    found = [built.index.read(i) for i in range(len(built.index))]
    kept = {sample.meta["path"]: mask_values(sample.mask or b"") for sample in found}
    assert np.array_equal(kept["one/bild 01.v1 ä.jpg"], mask)
    assert np.array_equal(kept["one/bild 03.v1 ä.jpg"], mask > 0)
    assert "its mask has other numbers than 0, 1, ... 65535" in (tmp_path / "out/quarantine.jsonl").read_text()


def test_an_open_quote_is_named_by_its_row(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('path,label\n"bild 01.v1 ä","a"b\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"t\.csv row 2 cannot be read as CSV .*: look for a quote that is not closed"):
        build(photos / "images", tmp_path / "out", tmp_path / "t.csv")


def test_a_table_of_classes_written_by_hand_outlives_a_new_build(photos: Path, tmp_path: Path) -> None:
    classes = tmp_path / "out" / "classes.csv"
    build(photos / "images", tmp_path / "out")
    classes.write_text("class\nnevus\n")
    build(photos / "images", tmp_path / "out", options=BuildOptions(overwrite=True))
    assert classes.read_text() == "class\nnevus\n"


def test_a_name_that_is_no_utf8_is_packed(tmp_path: Path, jpeg: Callable[..., bytes]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in (b"M\xfcller.jpg", b"plain.jpg"):
        (folder / os.fsdecode(name)).write_bytes(jpeg(len(name)))
    index = build(folder, tmp_path / "out").index
    assert sorted(by_path(index)) == ["M\\udcfcller.jpg", "plain.jpg"]


def test_what_drops_duplicates_must_be_an_audit(photos: Path, index: Index, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no audit\.json that can be read"):
        build(photos / "images", tmp_path / "out", options=BuildOptions(drop_duplicates=str(index.root / "index.json")))


def test_the_length_of_a_pixel_is_that_of_the_stored_image(tmp_path: Path, write_table: Table) -> None:
    """Of a JPEG, which is decoded at a smaller scale, of 16 bits, of what is small enough, and of what is no number."""
    (tmp_path / "in").mkdir()
    for name, height, width in (("a.jpg", 480, 640), ("small.jpg", 20, 30), ("said.jpg", 48, 64)):
        cv2.imwrite(str(tmp_path / "in" / name), np.zeros((height, width, 3), np.uint8))
    cv2.imwrite(str(tmp_path / "in/wide.tif"), np.zeros((100, 60), np.uint16))
    given = {"a": "0.05", "small": "0.05", "said": "0,05", "wide": "1"}
    rows = [{"path": path, "mm_per_pixel": mm} for path, mm in given.items()]
    table = write_table(tmp_path / "t.csv", rows)
    index = build(tmp_path / "in", tmp_path / "out", table, BuildOptions(short_side=24)).index
    found = {Path((meta := index.meta(i))["path"]).stem: meta["mm_per_pixel"] for i in range(len(index))}
    assert found == {"a": "1", "small": "0.05", "said": "0,05", "wide": "2.5"}


def test_tiff_and_bmp_become_png_without_loss(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    array = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    for name in ("a.tif", "b.bmp"):
        Image.fromarray(array).save(tmp_path / "in" / name)
    index = build(tmp_path / "in", tmp_path / "out").index
    assert all(np.array_equal(decode(index.read(i).image), array) for i in range(2))


def test_split_by_group_is_stable_and_keeps_groups_together(photos: Path, tmp_path: Path) -> None:
    index = build(photos / "images", tmp_path / "out", photos / "labels.csv", BuildOptions(split="50/20/30")).index
    splits: dict[str, set[str]] = {}
    for i in range(60):
        sample = index.read(i)
        splits.setdefault(sample.group, set()).add(sample.split)
    assert all(len(found) == 1 for found in splits.values())
    parts = parse_split("50/20/30")
    assert all(found == {split_of(group, parts)} for group, found in splits.items())  # of the name alone
    names = [split_of(f"p{i}", parse_split("70/10/20")) for i in range(10_000)]
    shares = [names.count(name) / 10_000 for name in ("train", "val", "test")]
    assert np.allclose(shares, [0.7, 0.1, 0.2], atol=0.015)


def test_keys_are_safe_and_unique() -> None:
    keys = [key_of(name) for name in ("a/b c.1.jpg", "b/b c.1.jpg", "ü.png", "...jpg", "x" * 300 + ".jpg")]
    assert len(set(keys)) == 5
    assert all(set(key) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-x") and len(key) < 70 for key in keys)


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        ("path,label\nnone.jpg,x\n", {}, r"t.csv row 2: image 'none.jpg' is not in"),
        ("path,label\none/bild 10.v1 ä.jpg,x\n", {}, r"did you mean 'one/bild \d1.v1 ä.jpg'\?"),
        ("pfad,label\nx.jpg,y\n", {}, "no column 'path' among pfad, label: name the right one with --path-column"),
        ("filename,patient\nx.jpg,y\n", {}, r"--path-column; did you mean 'filename'\?"),
        (
            "path,Label\nx.jpg,y\n",
            {"columns": {"label": "label"}},
            r"no column 'label' among .* did you mean 'Label'\?",
        ),
        ("path,label\n", {}, "has a header and no row"),
        ("", {}, "has no column 'path' among none at all"),
        ("path\n\na,b\n", {}, "row 3 has 2 cells where the header has 1"),
        ("path,label\n,x\n", {}, "row 2: the column 'path' is empty"),
        ("path\nbild 01.v1 ä\none/bild 01.v1 ä.jpg\n", {}, r"row 3 names one/bild 01.v1 ä.jpg, and so does row 2"),
        ("path,path\na,b\n", {}, "two columns are called 'path'"),
        ("path,mask\nbild 01.v1 ä,m.png\n", {}, "mask 'm.png' is neither"),
        ("path\nbild 01.v1 ä\n", {"split": "70/20"}, "the shares sum to 90 where 100 is needed"),
        ("path\nbild 01.v1 ä\n", {"split": "most"}, "such as 70/10/20"),
        ("path,patient\nbild 01.v1 ä,p\n", {"split": "80/20", "by": "pat"}, "no such column; did you mean 'patient'"),
        ("path\nbild 01.v1 ä\n", {"shard_size": "big"}, "write a size such as 256MB"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(
    photos: Path, tmp_path: Path, text: str, options: dict[str, object], says: str
) -> None:
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=says):
        build(photos / "images", tmp_path / "out", tmp_path / "t.csv", BuildOptions(**options))
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


def test_a_table_that_is_not_utf8(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("path,label\nä,x\n".encode("latin-1"))
    with pytest.raises(DataError, match="is not UTF-8 text"):
        build(photos / "images", tmp_path / "out", tmp_path / "t.csv")


def test_empty_and_missing_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        build(tmp_path / "none", tmp_path / "out")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="holds no image"):
        build(tmp_path / "none", tmp_path / "out")


def test_only_an_index_that_build_wrote_is_replaced(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(DataError, match="nothing was touched"):
            build(photos / "images", out, options=BuildOptions(overwrite=overwrite))
    (out / "thesis.txt").unlink()
    build(photos / "images", out)
    with pytest.raises(DataError, match="add --overwrite"):
        build(photos / "images", out)
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="did not write"):
        build(photos / "images", out, options=BuildOptions(overwrite=True))
    (out / "thesis.txt").unlink()
    (out / "index.safetensors").unlink()  # also what is damaged
    build(photos / "images", out, photos / "labels.csv", BuildOptions(overwrite=True))
    assert Index.open(out).sources == ("a", "b")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_links_lead_out_and_never_around(photos: Path, tmp_path: Path) -> None:
    folder, far = tmp_path / "images", tmp_path / "far" / "away"
    for name, place in {"one": folder / "own", "two": far}.items():
        shutil.copytree(photos / "images" / name, place)
    (folder / "linked").symlink_to(far)
    (folder / "same").symlink_to(far)
    (folder / "again").symlink_to(folder / "own")
    (far / "back").symlink_to(tmp_path)
    (folder / "own" / "up").symlink_to("..")
    names = find_images(folder).images
    assert len(names) == 60
    assert {name.split("/")[0] for name in names} == {"linked", "own"}


def test_pictures_that_are_not_read_are_told(photos: Path, tmp_path: Path, capsys) -> None:
    folder = shutil.copytree(photos / "images", tmp_path / "images")
    for name in ("a.HEIC", "b.heic", "c.svs", "notes.txt", "scan.MUELLER"):
        (folder / name).write_bytes(b"x")
    next(folder.rglob("*.jpg")).rename(folder / "d.JFIF")
    assert main(["build", "--images", str(folder), "--out", str(tmp_path / "out")]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert f"of {folder}, 2 .heic, 1 .svs not read: convert them" in told
    assert "MUELLER" not in told
    assert len(Index.open(tmp_path / "out")) == 60
    for path in (*folder.glob("one"), *folder.glob("two"), folder / "d.JFIF"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(DataError, match=r"holds no image \(.*\); 2 .heic, 1 .svs not read"):
        find_images(folder)


def test_a_folder_that_cannot_be_listed_is_named(photos: Path, monkeypatch) -> None:
    scandir = os.scandir

    def closed(path: str):
        if path.endswith("two"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(DataError, match=r"two cannot be listed \(Permission denied\)"):
        find_images(photos / "images")
