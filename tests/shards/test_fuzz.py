"""Damaged and hostile files: a DataError or a sample, never another exception, a hang, or memory without bound."""

from __future__ import annotations

import io
import json
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from shards import scan
from shards.errors import DataError
from shards.format import MAX_PIXELS, decode, decode_mask
from shards.index import Index
from shards.stream import Order, SampleDataset, StreamOptions

ROOT = Path(__file__).parents[2]
FEW = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
MANY = settings(max_examples=5_000, deadline=None, suppress_health_check=list(HealthCheck))
BOTH = [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=pytest.mark.slow)]


@st.composite
def damage(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes changed, lost, doubled or swapped in, and perhaps the end cut off."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        kind = draw(st.sampled_from(("set", "set", "set", "drop", "double", "insert", "cut")))
        span = draw(st.integers(1, 40))
        if kind == "set" and data:
            data[at] = draw(st.integers(0, 255))
        elif kind == "drop":
            del data[at : at + span]
        elif kind == "double":
            data[at:at] = data[at : at + span]
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=span))
        elif kind == "cut":
            del data[at:]
    return bytes(data)


def run(how: settings, strategy: Any, check: Callable[[Any], None]) -> None:
    how(given(strategy)(check))()


def picture(kind: str, mode: str = "RGB") -> bytes:
    grid = np.random.default_rng(3).integers(0, 256, (24, 20, 3), np.uint8)
    image = Image.fromarray(grid).convert("L").convert(mode) if mode != "RGB" else Image.fromarray(grid)
    file = io.BytesIO()
    image.save(file, kind, **({"progressive": True} if kind == "JPEG" and mode == "RGB" else {}))
    return file.getvalue()


PICTURES = {
    "jpeg": picture("JPEG"),
    "grey jpeg": picture("JPEG", "L"),
    "png": picture("PNG"),
    "16-bit png": picture("PNG", "I;16"),
    "palette png": picture("PNG", "P"),
    "webp": picture("WEBP"),
    "tiff": picture("TIFF"),
    "16-bit tiff": picture("TIFF", "I;16"),
}


@pytest.mark.parametrize("how", BOTH)
@pytest.mark.parametrize("name", PICTURES)
def test_images(name: str, how: settings) -> None:
    def check(data: bytes) -> None:
        for read in (decode, lambda d: decode(d, 8, 1), decode_mask):
            try:
                image = read(data)
            except DataError:
                continue
            else:
                assert image.shape[0] * image.shape[1] <= MAX_PIXELS

    # a changed size may be as large as MAX_PIXELS, which is slow: those bytes are left to `bombs`
    run(how, damage(PICTURES[name]).filter(lambda data: not claims_much(data)), check)


def claims_much(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size[0] * image.size[1] > 4_000_000
    except Exception:
        return False


def png_of(width: int, height: int) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1 << 20))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def jpeg_of(width: int, height: int) -> bytes:
    data = bytearray(picture("JPEG", "L"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def webp_of(width: int, height: int) -> bytes:
    """An extended file, whose first chunk says how large its canvas is."""
    inner = picture("WEBP")[12:]
    canvas = b"VP8X" + struct.pack("<I", 10) + bytes(4) + (width - 1).to_bytes(3, "little")
    body = b"WEBP" + canvas + (height - 1).to_bytes(3, "little") + inner
    return b"RIFF" + struct.pack("<I", len(body)) + body


GROWS = """
import sys
from pathlib import Path
from shards.errors import DataError
from shards.format import decode
def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024
data = sys.stdin.buffer.read()
Path("/proc/self/clear_refs").write_text("5")  # the imports may have held more than is held now
before, said = memory("VmRSS"), "decoded"
try:
    decode(data)
except DataError as error:
    said = str(error)
print(memory("VmHWM") - before, said)
"""


def peak(data: bytes) -> tuple[str, float]:
    """What decoding says, and by how many MB a new process grows by it: an older one has freed memory to fill first."""
    done = subprocess.run([sys.executable, "-c", GROWS], input=data, capture_output=True, check=True, cwd=ROOT)
    grew, said = done.stdout.decode().split(maxsplit=1)
    return said.strip(), float(grew)


needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from Linux's /proc")


@needs_proc
@pytest.mark.parametrize("make", [png_of, jpeg_of, webp_of])
def test_a_size_beyond_the_bound_is_refused_before_decoding(make: Callable[[int, int], bytes]) -> None:
    side = 16_383 if make is webp_of else 65_000
    said, grew = peak(make(side, side))
    assert said != "decoded"
    assert grew < 64


@needs_proc
def test_memory_follows_the_size_that_a_file_claims() -> None:
    """Pillow, which takes over where a JPEG is damaged, needs up to 12 bytes a pixel: 2.4 GB for MAX_PIXELS."""
    _, grew = peak(jpeg_of(4_000, 4_000))
    assert 4_000 * 4_000 / 2**20 < grew < 4_000 * 4_000 * 12 / 2**20 + 32


def tar_of(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


TAR = tar_of(
    {
        "a.jpg": PICTURES["jpeg"],
        "a.json": b'{"label": ["x", "y"], "source": "s", "meta": {"age": 3}}',
        "b.png": PICTURES["png"],
        "b.mask.png": PICTURES["16-bit png"],
        "b.txt": "Bläschen".encode(),
        "c.webp": PICTURES["webp"],
        "c.cls": b"3",
    }
)
HEADERS = [at for at in range(0, len(TAR), 512) if TAR[at + 257 : at + 262] == b"ustar"]


@st.composite
def forged(draw: st.DrawFn) -> bytes:
    """A field of a header replaced, and the checksum set right, as an attacker would."""
    data, at = bytearray(TAR), draw(st.sampled_from(HEADERS))
    field, size = draw(
        st.sampled_from([(0, 100), (100, 8), (124, 12), (124, 12), (156, 1), (157, 100), (257, 8), (345, 155)])
    )
    text = draw(
        st.one_of(
            st.binary(max_size=size),
            st.sampled_from(
                [b"../../a.jpg", b"/etc/a.jpg", b"a.pkl", b"77777777777", b"x", b"g", b"L", b"S", b"1", b"2"]
            ),
            st.just(b"\x80" + b"\xff" * 11),
            st.just(b"\xff" * 12),
            st.integers(0, 8**11 - 1).map(lambda n: b"%011o" % n),
        )
    )
    data[at + field : at + field + size] = text[:size].ljust(size, b"\0")
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    return bytes(data)


def check_tar(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "x.tar").write_bytes(data)
        try:
            index = scan.write(folder)
        except DataError:
            return
        read_through(index)


def read_through(index: Index) -> None:
    for i in range(min(len(index), 10)):
        try:
            sample = index.read(i)
            assert not sample.key.startswith("/")
            assert ".." not in sample.key.split("/")
            if not claims_much(sample.image):
                decode(sample.image, 0, index.channels)
        except DataError:
            pass


@pytest.mark.parametrize("how", BOTH)
def test_tars(how: settings) -> None:
    run(how, damage(TAR), check_tar)


@pytest.mark.parametrize("how", BOTH)
def test_forged_headers(how: settings) -> None:
    run(how, forged(), check_tar)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    (folder / "x.tar").write_bytes(TAR)
    scan.write(folder)
    return folder


def check_index(small: Path, name: str, data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for file in small.iterdir():
            shutil.copy(file, folder)
        (Path(folder) / name).write_bytes(data)
        try:
            index = Index.open(folder)
            read_through(index)
            order = Order(index, index.select(None), StreamOptions(labelled_fraction=0.5))
            dataset = SampleDataset(index, order, lambda sample, *_: sample.key)
            if not any(claims_much(index.read(i).image) for i in range(len(index))):
                dataset[0]
        except DataError:
            pass


@pytest.mark.parametrize("how", BOTH)
@pytest.mark.parametrize("name", ["index.json", "index.safetensors"])
def test_index_files(small: Path, name: str, how: settings) -> None:
    run(how, damage((small / name).read_bytes()), lambda data: check_index(small, name, data))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def replaced(draw: st.DrawFn, tree: Any) -> Any:
    """The tree with one of its values replaced by any other."""
    if not tree or not isinstance(tree, dict | list) or draw(st.integers(0, 3)) == 0:
        return draw(VALUES)
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key = draw(st.sampled_from(keys))
    changed = tree.copy()
    changed[key] = draw(replaced(tree[key]))
    return changed


@pytest.mark.parametrize("how", BOTH)
def test_headers_of_another_kind(small: Path, how: settings) -> None:
    header = json.loads((small / "index.json").read_text())
    run(how, replaced(header), lambda tree: check_index(small, "index.json", json.dumps(tree).encode()))


@pytest.mark.parametrize("how", BOTH)
def test_rows_of_another_kind(how: settings) -> None:
    row = {"label": ["x"], "source": "s", "group": "g", "split": "train", "meta": {"age": 3}}
    run(
        how,
        replaced(row),
        lambda tree: check_tar(tar_of({"a.jpg": PICTURES["jpeg"], "a.json": json.dumps(tree).encode()})),
    )


@pytest.mark.parametrize(
    "text", [b"[" * 200_000, b'{"label": ' * 50_000, b'{"label": 1' + b"0" * 5000 + b"}", b"\xff\xfe"]
)
def test_json_that_is_not(text: bytes) -> None:
    check_tar(tar_of({"a.jpg": PICTURES["jpeg"], "a.json": text}))
