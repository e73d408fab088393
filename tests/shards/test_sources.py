"""What files there are: class folders, Parquet, 16 bits, many planes, pages."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
from PIL import Image

from shards.build import build
from shards.errors import DataError
from shards.format import decode
from shards.index import Index
from shards.options import BuildOptions


def only(index: Index) -> np.ndarray:
    assert len(index) == 1
    return decode(index.read(0).image, 0, index.channels)


def planes(count: int, height: int = 20, width: int = 30, top: int = 256, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(count).integers(0, top, (height, width, count)).astype(dtype)


def pages(array: np.ndarray, **options: object) -> bytes:
    images = [Image.fromarray(np.ascontiguousarray(array[..., i])) for i in range(array.shape[2])]
    buffer = io.BytesIO()
    images[0].save(buffer, "TIFF", save_all=True, append_images=images[1:], **options)
    return buffer.getvalue()


def test_folders_say_split_and_label(tmp_path: Path, jpeg: Callable[..., bytes], write_table: Callable) -> None:
    for i, name in enumerate(("train/nevus/a.jpg", "Training/melanoma/more/b.jpg", "test/nevus/c.jpg", "d.jpg")):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(jpeg(i))

    def read(options: BuildOptions, table: Path | None = None) -> dict[str, tuple]:
        index = build(tmp_path / "in", tmp_path / "out", table, options).index
        samples = [index.read(i) for i in range(len(index))]
        return {sample.meta["path"][-5:]: (sample.split, sample.labels, sample.source) for sample in samples}

    assert read(BuildOptions(folders="split/label", source="us")) == {
        "a.jpg": ("train", ("nevus",), "us"),
        "b.jpg": ("train", ("melanoma",), "us"),
        "c.jpg": ("test", ("nevus",), "us"),
        "d.jpg": ("", (), "us"),
    }
    table = write_table(tmp_path / "t.csv", [{"image": "a.jpg", "label": "x"}, {"image": "c.jpg", "label": ""}])
    said = read(BuildOptions(folders="-/label", overwrite=True), table)
    assert said == {"a.jpg": ("", ("x",), "default"), "c.jpg": ("", ("nevus",), "default")}
    with pytest.raises(DataError, match=r"--folders class: a level is one of label, split"):
        BuildOptions(folders="class")


def test_a_parquet_table(photos: Path, tmp_path: Path) -> None:
    rows = {
        "bild": ["one/bild 01.v1 ä.jpg", "two/bild 02.v1 ä.jpg", "two/bild 04.v1 ä.jpg"],
        "dx": [["nevus", "ulcer"], None, ["melanoma"]],
        "age": pa.array([41, None, 7], pa.int32()),
        "thickness": [0.5, float("nan"), 2.0],
    }
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    columns = {"path": "bild", "label": "dx"}
    index = build(photos / "images", tmp_path / "out", tmp_path / "t.parquet", BuildOptions(columns)).index
    found = {(sample := index.read(i)).meta["path"]: (sample.labels, sample.meta) for i in range(3)}
    assert found["one/bild 01.v1 ä.jpg"][0] == ("nevus", "ulcer")
    assert found["one/bild 01.v1 ä.jpg"][1] == {"age": "41", "thickness": "0.5", "path": "one/bild 01.v1 ä.jpg"}
    assert found["two/bild 02.v1 ä.jpg"] == ((), {"path": "two/bild 02.v1 ä.jpg"})
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        build(photos / "images", tmp_path / "out2", tmp_path / "bad.parquet")


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("short", [0, 10])
def test_16_bits_stay_16_bits(tmp_path: Path, suffix: str, short: int) -> None:
    values = cv2.resize(planes(1, 4, 6, 4096, np.uint16), (30, 20), interpolation=cv2.INTER_LINEAR)
    (tmp_path / "in").mkdir()
    Image.fromarray(values).save(tmp_path / f"in/a.{suffix}")
    index = build(tmp_path / "in", tmp_path / "out", options=BuildOptions(channels=1, short_side=short)).index
    stored = np.asarray(Image.open(io.BytesIO(index.read(0).image)))
    expected = cv2.resize(values, (15, 10), interpolation=cv2.INTER_AREA) if short else values
    assert stored.dtype == np.uint16
    assert np.array_equal(stored, expected)


def test_bits_that_are_told_are_not_guessed_from_one_dark_image(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, top in (("dark.png", 200), ("bright.tif", 16383)):
        Image.fromarray(np.full((8, 8), top, np.uint16)).save(tmp_path / "in" / name)
    index = build(tmp_path / "in", tmp_path / "out", options=BuildOptions(channels=1, bits=14)).index
    found = {(s := index.read(i)).meta["path"]: int(decode(s.image, 0, 1).max()) for i in range(2)}
    assert found == {"dark.png": 200 >> 6, "bright.tif": 255}


@pytest.mark.parametrize("short", [0, 4])
@pytest.mark.parametrize("stack", [False, True])
def test_a_dark_file_that_says_its_range_keeps_it(tmp_path: Path, stack: bool, short: int) -> None:
    """MaxSampleValue 65535: at most 2048 of it, whatever the other pages hold, and however the image is stored."""
    (tmp_path / "in").mkdir()
    pages = [
        Image.fromarray(np.full((8, 8), value, np.uint16)) for value in ((2048, 1024, 0, 512) if stack else (2048,))
    ]
    pages[0].save(tmp_path / "in/a.tif", save_all=True, append_images=pages[1:], tiffinfo={281: 65535})
    options = BuildOptions(channels=len(pages), stack=stack, short_side=short)
    image = only(build(tmp_path / "in", tmp_path / "out", options=options).index)
    assert image[0, 0].tolist() == ([8, 4, 0, 2] if stack else [8])
    told = replace(options, bits=12)  # who says so knows the camera better than the file does
    image = only(build(tmp_path / "in", tmp_path / "told", options=told).index)
    assert image[0, 0].tolist() == ([128, 64, 0, 32] if stack else [128])


def test_fractions_and_wide_integers_fill_16_bits(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    ramp = np.linspace(-1, 3, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "in/a.tif")
    image = only(build(tmp_path / "in", tmp_path / "out", options=BuildOptions(channels=1)).index)
    assert np.abs(image[..., 0] - (ramp + 1) / 4 * 255).max() <= 1


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("layout", ["contig", "separate", "lzw", "pages"])
def test_five_planes_whatever_the_layout(tmp_path: Path, dtype: type, layout: str) -> None:
    array = planes(5, top=256 if dtype == np.uint8 else 65536, dtype=dtype)
    (tmp_path / "in").mkdir()
    path = tmp_path / "in/a.tif"
    if layout == "pages":
        path.write_bytes(pages(array))
    elif layout == "separate":
        tifffile.imwrite(path, array.transpose(2, 0, 1), photometric="minisblack", planarconfig="separate")
    else:
        packing = {"compression": "lzw"} if layout == "lzw" else {}
        tifffile.imwrite(path, array, photometric="minisblack", planarconfig="contig", **packing)
    options = BuildOptions(channels=5, stack=layout == "pages")
    index = build(tmp_path / "in", tmp_path / "out", options=options).index
    assert index.channels == 5
    assert np.array_equal(only(index), array if dtype == np.uint8 else array >> 8)
    stored = tifffile.imread(io.BytesIO(index.read(0).image))  # any tool opens it, a page a channel
    assert np.array_equal(stored.transpose(1, 2, 0), array)


def test_planes_shrink_and_keep_their_depth(tmp_path: Path) -> None:
    array = cv2.merge([cv2.resize(planes(1, 4, 6), (60, 40)) for _ in range(6)])
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.tif").write_bytes(pages(array))
    image = only(
        build(tmp_path / "in", tmp_path / "out", options=BuildOptions(channels=6, stack=True, short_side=20)).index
    )
    assert image.shape == (20, 30, 6)
    assert np.abs(image.astype(int) - array.reshape(20, 2, 30, 2, 6).mean((1, 3))).max() <= 1


def test_pages_are_samples_that_stay_together(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.tif").write_bytes(pages(planes(7)))
    index = build(tmp_path / "in", tmp_path / "out", options=BuildOptions(channels=1, split="50/50")).index
    samples = [index.read(i) for i in range(len(index))]
    assert len(samples) == 7
    assert len({sample.split for sample in samples}) == len({sample.group for sample in samples}) == 1
    assert np.array_equal(np.concatenate([decode(s.image, 0, 1) for s in samples], 2), planes(7))
    some = build(tmp_path / "in", tmp_path / "some", options=BuildOptions(channels=1, frames=2)).index
    assert [some.key(i)[-5:] for i in range(2)] == ["00001", "00005"]
    middle = build(tmp_path / "in", tmp_path / "one", options=BuildOptions(channels=1, frames=1)).index
    assert [middle.key(i)[-5:] for i in range(len(middle))] == ["00003"]


def test_the_wrong_number_of_channels_says_what_to_do(tmp_path: Path, jpeg: Callable[..., bytes]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.tif").write_bytes(pages(planes(5)))
    with pytest.raises(DataError, match=r"1 planes where --channels says 5; its 5 frames are, with --stack"):
        build(tmp_path / "in", tmp_path / "out", options=BuildOptions(channels=5))
    (tmp_path / "in/a.tif").unlink()
    (tmp_path / "in/b.jpg").write_bytes(jpeg(1))
    with pytest.raises(DataError, match="3 planes where 5 channels are wanted"):
        build(tmp_path / "in", tmp_path / "out", options=BuildOptions(channels=5))


def test_pages_of_two_sizes_are_no_image() -> None:
    small, large = Image.new("L", (8, 8)), Image.new("L", (9, 8))
    buffer = io.BytesIO()
    small.save(buffer, "TIFF", save_all=True, append_images=[large])
    with pytest.raises(DataError, match="do not make one image"):
        decode(buffer.getvalue(), 0, 2)


def test_planes_are_bounded_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.format.MAX_PIXELS", 700)
    assert decode(pages(planes(3))).shape == (20, 30, 3)
    with pytest.raises(DataError, match="20 pixels in 5 planes are more than"):
        decode(pages(planes(5)), 0, 5)


@pytest.mark.parametrize("cut", [9, 60, 700])
def test_a_damaged_tiff_is_named(cut: int) -> None:
    with pytest.raises(DataError):
        decode(pages(planes(5))[:cut], 0, 5)
