"""Tars, images, rows and an index that were made to do harm: an error that names the file, and nothing outside it."""

from __future__ import annotations

import io
import json
import shutil
import struct
import tarfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from finetune import backbones, results, to_label
from finetune.__main__ import main as finetune
from hybridssl.errors import UserError
from hybridssl.views import ViewOptions, crop, generator, resize_for_eval
from shards import scan
from shards.address import below
from shards.errors import DataError, FetchError
from shards.format import MAX_PIXELS, decode
from shards.index import Index, file_sha256
from shards.mix import open_sets
from shards.remote import Remote
from shards.stream import Order, SampleDataset, StreamOptions
from tests.security.conftest import picture, tar


def special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


SPECIAL = {
    "symbolic link": special("a.png", tarfile.SYMTYPE, "/etc/passwd"),
    "link within": special("b.png", tarfile.LNKTYPE, "a.png"),
    "character device": special("a.png", tarfile.CHRTYPE),
    "block device": special("a.png", tarfile.BLKTYPE),
    "pipe": special("a.png", tarfile.FIFOTYPE),
    "sparse file": special("a.png", tarfile.GNUTYPE_SPARSE),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_members_that_are_no_files(tmp_path: Path, kind: str) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT) as file:
        info = tarfile.TarInfo("0.png")
        info.size = len(picture())
        file.addfile(info, io.BytesIO(picture()))
        file.addfile(SPECIAL[kind])
    with pytest.raises(DataError, match=r"x\.tar"):
        scan.write(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "/etc/x.png",
        "../x.png",
        "a/../../x.png",
        "..\\x.png",
        "C:\\x.png",
        "a/..",
        "x\x1b[2J.png",
        "x\r.png",
        "\u202egnp.x",
    ],
)
def test_names_that_lead_elsewhere(tmp_path: Path, name: str) -> None:
    tar(tmp_path / "x.tar", {name: picture()})
    with pytest.raises(DataError, match=r"x\.tar: member .* refused"):
        scan.write(tmp_path)


def header(size: bytes, name: bytes = b"a.png") -> bytes:
    """A tar of one member whose header says that it has so many bytes."""
    block = bytearray(tarfile.TarInfo(name.decode()).tobuf()[:512])
    block[124:136] = size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + picture() + bytes(2048)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "size",
    [
        b"77777777777\0",
        b"\x80" + b"\xff" * 11,
        b"\xff" * 12,
        b"\x80" + b"\0" * 10 + b"\x80",
        b"-0000000001\0",
        b"99999999999\0",
    ],
    ids=["8 GiB", "2^88", "-1", "128", "minus", "no octal"],
)
def test_sizes_that_lie(tmp_path: Path, size: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(header(size))
    try:
        index = scan.write(tmp_path)
    except DataError as error:
        assert "x.tar" in str(error)  # noqa: PT017
        return
    with pytest.raises(DataError):  # 128 bytes of an image
        decode(index.read(0).image)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "make", [lambda: b"", lambda: bytes(10_240), lambda: b"\x1f\x8b" + bytes(600), lambda: picture()]
)
def test_what_is_no_tar(tmp_path: Path, make: Callable[[], bytes]) -> None:
    (tmp_path / "x.tar").write_bytes(make())
    with pytest.raises(DataError, match=r"x\.tar|no sample with an image"):
        scan.write(tmp_path)


def test_extended_headers_cannot_lead_elsewhere(tmp_path: Path) -> None:
    for n, pax in enumerate(({"path": "/etc/x.png"}, {"path": "../../x.png"}, {"linkpath": "/etc/passwd"})):
        with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as file:
            info = special("a.png", tarfile.SYMTYPE) if "linkpath" in pax else tarfile.TarInfo("a.png")
            info.pax_headers = pax
            info.size = 0 if "linkpath" in pax else len(picture())
            file.addfile(info, io.BytesIO(picture()))
        with pytest.raises(DataError, match=r"x\.tar"):
            scan.write(tmp_path)
        assert n < 3


# ------------------------------------------------------------------------------------------------------------ images


def png(width: int, height: int, kind: int = 2, body: bytes | None = None, extra: bytes = b"") -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    planes = {0: 1, 2: 3, 6: 4}[kind]
    rows = body if body is not None else zlib.compress(bytes((width * planes + 1) * height), 9)
    head = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def saved(mode: str, kind: str, size: tuple[int, int] = (40, 30), **options: object) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, 7 if mode in ("L", "P", "I;16", "1") else None).save(file, kind, **options)
    return file.getvalue()


REFUSED = {
    "a bomb of a PNG": png(60_000, 60_000, body=zlib.compress(bytes(1 << 20))),
    "a bomb of a TIFF": saved("1", "TIFF", (20_000, 20_000), compression="group4"),
    "a PNG without its pixels": png(40, 30, body=zlib.compress(b"")),
    "a PNG cut off": picture()[:200],
    "a JPEG cut off": saved("RGB", "JPEG")[:60],
    "no pixels": png(0, 0),
    "a script": b"#!/bin/sh\nrm -rf /\n",
    "an SVG": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n(x) run\n",
    "a GIF": saved("P", "GIF"),
    "nothing": b"",
}
READ = {
    "one pixel high": png(100_000, 1),
    "one pixel wide": png(1, 100_000),
    "one pixel": png(1, 1),
    "CMYK": saved("CMYK", "JPEG"),
    "CMYK TIFF": saved("CMYK", "TIFF"),
    "grey": saved("L", "JPEG"),
    "palette": saved("P", "PNG"),
    "one bit": saved("1", "PNG"),
    "16 bits": saved("I;16", "PNG"),
    "transparent": saved("RGBA", "PNG"),
    "transparent grey": saved("LA", "PNG"),
    "YCbCr": saved("YCbCr", "TIFF"),
    "float": saved("F", "TIFF"),
    "text behind": saved("RGB", "JPEG") + b"<?php system($_GET['c']); ?>",
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", REFUSED)
def test_images_that_are_refused(name: str) -> None:
    start = time.process_time()
    with pytest.raises(DataError) as caught:
        decode(REFUSED[name])
    assert len(str(caught.value)) < 400
    assert time.process_time() - start < 5


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", READ)
def test_odd_images_become_crops_of_the_usual_size(name: str) -> None:
    """A picture of one row must not become one of a thousand columns for every pixel that it lacks in height."""
    image = decode(READ[name])
    assert image.dtype == np.uint8
    assert image.shape[0] * image.shape[1] <= MAX_PIXELS
    views = crop(image, generator(0, 0, 0), ViewOptions(global_size=32, local_size=16), 8, 0)
    assert views.global_.shape == (2, 3, 32, 32)
    assert views.local.shape[1:] == (3, 16, 16)
    assert resize_for_eval(image, 32).shape == (3, 32, 32)


# -------------------------------------------------------------------------------------------------------------- rows

ROWS = {
    "deep": b"[" * 100_000,
    "deep under a key": b'{"meta": ' * 100_000,
    "a number of many digits": b'{"label": 1' + b"0" * 100_000 + b"}",
    "no UTF-8": b'{"label": "\xff"}',
    "a lone surrogate": b'{"label": "\\ud800"}',
    "NaN": b'{"label": NaN, "meta": {"a": Infinity}}',
    "keys twice": b'{"label": "a", "label": "b"}',
    "no mapping": b"[1, 2]",
    "a mapping for a label": b'{"label": {"a": 1}}',
    "lists of lists": b'{"label": [["a"], null, 1.5, true]}',
    "a mapping for a source": b'{"label": "a", "source": {"a": 1}, "split": ["x"], "group": {"b": 2}, "meta": "x"}',
    "control characters": b'{"label": "\\u001b[2J\\u0000\\r"}',
    "a path": b'{"label": "../../etc/passwd", "source": "/etc", "split": "../x"}',
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ROWS)
def test_rows(tmp_path: Path, name: str) -> None:
    tar(tmp_path / "x.tar", {"a.png": picture(), "a.json": ROWS[name]})
    before = set(tmp_path.iterdir())
    try:
        index = scan.write(tmp_path)
    except DataError as error:
        assert "x.tar" in str(error)  # noqa: PT017
        assert set(tmp_path.iterdir()) == before  # nothing half-written stays
        return
    sample = index.read(0)
    assert all(isinstance(text, str) for text in (*sample.labels, sample.source, sample.group, sample.split))
    json.dumps([sample.meta, index.classes, index.sources])


# ------------------------------------------------------------------------------------------------------------- index


@pytest.fixture
def mutable(index: Index, tmp_path: Path) -> Path:
    shutil.copytree(index.root, tmp_path / "set")
    return tmp_path / "set"


def rewrite(folder: Path, change: Callable[[dict], object]) -> None:
    header = json.loads((folder / "index.json").read_text())
    change(header)
    (folder / "index.json").write_text(json.dumps(header))


@pytest.mark.parametrize(
    "name",
    [
        "../x.tar",
        "/etc/passwd",
        "/etc/x.tar",
        "a/../../x.tar",
        "..\\x.tar",
        "x.tar\0",
        "https://evil/x.tar",
        "",
        "x.zip",
    ],
)
def test_shards_that_lead_elsewhere(mutable: Path, name: str) -> None:
    rewrite(mutable, lambda header: header["shards"][0].update(name=name))
    with pytest.raises(DataError, match=r"index\.json"):
        Index.open(mutable)


@pytest.mark.parametrize("channels", [0, -1, 10**9, 3.0, "3", None, True])
def test_channels_that_no_image_has(mutable: Path, channels: object) -> None:
    """A network is built for them."""
    rewrite(mutable, lambda header: header.update(channels=channels))
    if channels is True:
        return
    with pytest.raises(DataError, match=r"index\.json.*channels|index\.json.*another kind"):
        Index.open(mutable)


def with_keys(folder: Path, keys: list[str]) -> None:
    """The same samples under other keys, and all digests right, as an attacker would leave them."""
    columns = load_file(folder / "index.safetensors")
    data = [key.encode() for key in keys]
    columns["keys"] = np.frombuffer(b"".join(data), np.uint8).copy()
    columns["key_at"] = np.cumsum([0, *map(len, data)]).astype(np.int64)
    save_file(columns, folder / "index.safetensors")
    rewrite(folder, lambda header: header.update(columns_sha256=file_sha256(folder / "index.safetensors")))


def test_keys_that_lead_elsewhere_name_no_file_there(mutable: Path, tmp_path: Path) -> None:
    """`select` writes the images that it proposes under their keys."""
    count, target = len(Index.open(mutable)), tmp_path / "target"
    target.mkdir()
    names = [f"../../../target/a{n}" if n % 2 else f"{target}/b{n}" for n in range(count)]
    with_keys(mutable, names)
    columns = load_file(mutable / "index.safetensors")
    unlabelled = np.arange(count) % 3 == 0
    columns["label"] = np.where(unlabelled, -1, columns["label"]).astype(np.int32)
    save_file(columns, mutable / "index.safetensors")
    rewrite(mutable, lambda header: header.update(columns_sha256=file_sha256(mutable / "index.safetensors")))
    out = tmp_path / "results"
    words = ["--backbone", "histogram", "--data", str(mutable), "--count", "3", "--out", str(out)]
    index = Index.open(mutable)
    to_label.write_images(index, np.arange(6), out / "images")
    assert len(list((out / "images").iterdir())) == 6
    assert finetune(["select", *words, "--per-group", "0"]) in (0, 2)
    assert not list(target.iterdir())
    assert {p.name for p in tmp_path.iterdir()} <= {"set", "target", "results"}


def test_offsets_outside_a_shard(mutable: Path) -> None:
    columns = load_file(mutable / "index.safetensors")
    for row, (offset, size) in enumerate([(2**62, 10), (-5, 10), (512, -1), (512, 2**62), (0, 5)]):
        columns["image"][row] = offset, size
    save_file(columns, mutable / "index.safetensors")
    index = Index.open(mutable)
    dataset = SampleDataset(index, Order(index, np.arange(5), StreamOptions()), lambda *args: args)
    for row in range(5):
        with pytest.raises(DataError):
            decode(index.read(row).image)
    with pytest.raises(DataError, match="32 samples in a row"):
        dataset[0]


def test_a_hostile_address_writes_into_the_cache_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRIDSSL_CACHE", str(tmp_path / "cache"))
    for url in (
        "https://host/../../etc",
        "https://../../..",
        "s3://a/../../../b",
        "https://host/%2e%2e/%2e%2e",
        "http:///etc",
    ):
        there = Remote(url)
        assert there.folder.parent == tmp_path / "cache" / "at"
        assert ".." not in there.folder.relative_to(tmp_path / "cache").parts
    assert below("https://host/a", "../x.tar") == "https://host/a/../x.tar"  # which index.json may not name
    for digest in ("../../x", "/etc/passwd", "", "A" * 64, "a" * 63, "a" * 64 + "/"):
        with pytest.raises(FetchError, match="gives no sha256"):
            there.open("x.tar", digest, 5)
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").glob("*.part"))


@pytest.mark.parametrize(
    "spec", ["hf:../../etc", "hf:/etc/passwd", "timm:../../etc", "timm:hf-hub:evil/x", "hf:", "\0", ""]
)
def test_backbones_that_are_no_names(spec: str) -> None:
    with pytest.raises(UserError):
        backbones.load(spec)


def test_the_same_set_twice_or_in_a_circle_of_links(mutable: Path, tmp_path: Path) -> None:
    (tmp_path / "again").symlink_to(mutable)
    with pytest.raises(DataError, match="are the same set"):
        open_sets([str(mutable), str(tmp_path / "again")])
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for read in (lambda: Index.open(tmp_path / "loop"), lambda: results.find([tmp_path / "loop"])):
        with pytest.raises((DataError, UserError)):
            read()
