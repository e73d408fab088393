"""A folder of images and a table become tar shards. Same input, same bytes."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import Any

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from shards import scan
from shards.errors import DataError
from shards.format import FORMAT, bound, decode, decode_mask, extension
from shards.index import Index
from shards.table import Row, find_images, nearest, parse_split, read_table, split_of

PARTS = re.compile(r"(shard-\d+\.tar|index\.json|index\.safetensors|quarantine\.jsonl|classes\.csv)")


@dataclass(frozen=True)
class BuildOptions:
    """How images are packed."""

    columns: dict[str, str] = field(default_factory=dict)  # role -> column, where it is not called like the role
    shard_size: str = "256MB"  # of a shard: "256MB", or a number of samples
    short_side: int = 0  # shrink to this short side; 0 keeps the bytes as they come
    quality: int = 92  # of the JPEG that a shrunken image becomes
    split: str = ""  # "70/10/20": split by hash instead of by the table
    by: str = ""  # the column whose values stay together in a split; "": group where there is one, else the image
    split_seed: int = 0
    channels: int = 3
    workers: int = 0  # threads that read and check images; 0: one a core
    overwrite: bool = False


@dataclass(frozen=True)
class Built:
    """What `build` made."""

    index: Index
    ignored: int  # images of the folder that the table does not name
    quarantined: int  # images that do not decode, listed in quarantine.jsonl


def build(
    images: str | Path,
    out: str | Path,
    table: str | Path | None = None,
    options: BuildOptions | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Built:
    """Pack a folder (with a table, the images that it names) into `out`. DataError names what to mend.

    Everything is written beside `out` and renamed at the end, so a failure leaves nothing behind.
    """
    options = options or BuildOptions()
    folder, out = Path(images), Path(out)
    found = find_images(folder)
    rows = [Row(path, name) for name, path in found.items()]
    if table is not None:
        rows = read_table(Path(table), folder, found, options.columns)
    if options.split:
        rows = _split(rows, options, Path(table) if table else None)
    if any(row.labels for row in rows):  # labels belong to a source, whose vocabulary says what it can name
        rows = [replace(row, source=row.source or "default") for row in rows]
    ignored = len(found) - len(rows)

    with writing(out, options.overwrite) as partial:
        quarantined = 0
        samples = _packed(rows, options)
        with (partial / "quarantine.jsonl").open("w", encoding="utf-8") as bad:

            def good() -> Iterator[dict[str, Any]]:
                nonlocal quarantined
                for done, (row, sample, reason) in enumerate(samples, 1):
                    progress(done, len(rows))
                    if sample is None:
                        quarantined += 1
                        bad.write(json.dumps({"path": row.name, "reason": reason}, ensure_ascii=False) + "\n")
                    else:
                        yield sample

            write_shards(partial, good(), options.shard_size)
        if quarantined == len(rows):
            first = json.loads((partial / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()[0])
            raise DataError(f"none of {len(rows):,} images can be read; the first, {first['path']}: {first['reason']}")
        if not quarantined:
            (partial / "quarantine.jsonl").unlink()
        scan.write(partial, channels=options.channels)
    return Built(Index.open(out), ignored, quarantined)


class writing:
    """`with writing(out) as partial`: fill `partial`, and it becomes `out` at the end, or nothing stays on an error."""

    def __init__(self, out: Path, overwrite: bool):
        self.out, self.overwrite = out.absolute(), overwrite
        self.partial = self.out.with_name(self.out.name + ".partial")

    def __enter__(self) -> Path:
        if self.out.exists():
            self._check_replaceable()
        if self.partial.exists():
            if not _only_ours(self.partial):
                raise DataError(f"{self.partial} is in the way and not ours to delete: move it elsewhere")
            shutil.rmtree(self.partial)
        self.partial.mkdir(parents=True)
        return self.partial

    def _check_replaceable(self) -> None:
        if self.out.is_dir() and not any(self.out.iterdir()):
            return
        if not is_index(self.out):
            raise DataError(
                f"{self.out} exists and holds no index of shards: choose another --out, nothing was touched"
            )
        if not self.overwrite:
            raise DataError(
                f"{self.out} already holds an index: add --overwrite to replace it, or choose another --out"
            )
        if Index.open(self.out).header.get("in_place") or not _only_ours(self.out):
            raise DataError(
                f"{self.out} holds files that `build` did not write, so it is not replaced: choose another --out"
            )

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            shutil.rmtree(self.partial, ignore_errors=True)
            return
        old = self.out.with_name(self.out.name + ".old.partial")
        if self.out.exists():
            os.replace(self.out, old)
        os.replace(self.partial, self.out)
        shutil.rmtree(old, ignore_errors=True)


def is_index(folder: Path) -> bool:
    try:
        return json.loads((folder / "index.json").read_text(encoding="utf-8"))["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _only_ours(folder: Path) -> bool:
    return folder.is_dir() and all(PARTS.fullmatch(path.name.removesuffix(".new")) for path in folder.iterdir())


def write_shards(folder: Path, samples: Iterable[dict[str, Any]], shard_size: str) -> None:
    """Write dicts of `__key__` and members to `shard-000000.tar`, ...; nothing in them depends on the moment."""
    from webdataset.writer import ShardWriter  # it imports torch, and not every verb needs seconds to start

    pattern = str(folder.absolute()).replace("%", "%%") + "/shard-%06d.tar"
    fixed: dict[str, Any] = {"encoder": False, "mtime": 0.0, "user": "", "group": "", "verbose": 0}
    with ShardWriter(pattern, **_limits(shard_size), **fixed) as writer:
        for sample in samples:
            writer.write(sample)


def _limits(shard_size: str) -> dict[str, int]:
    match = re.fullmatch(r"(\d+)\s*([kmg]b)?", shard_size.strip().lower())
    if not match or not int(match[1]):
        raise DataError(f"--shard-size {shard_size}: write a size such as 256MB, or a number of samples such as 1000")
    if not match[2]:
        return {"maxcount": int(match[1]), "maxsize": 1 << 62}
    return {"maxcount": 1 << 62, "maxsize": int(match[1]) * {"kb": 1 << 10, "mb": 1 << 20, "gb": 1 << 30}[match[2]]}


def _split(rows: list[Row], options: BuildOptions, table: Path | None) -> list[Row]:
    parts = parse_split(options.split)
    name = options.by or "group"
    whole = name == options.columns.get("group", "group")
    if options.by and not any(row.group if whole else row.meta.get(name) for row in rows):
        have = sorted({key for row in rows for key in row.meta} | ({"group"} if any(r.group for r in rows) else set()))
        raise DataError(f"--by {name}: {table or 'without --table'} has no such column{nearest(name, have)}")
    values = [(row.group if whole else row.meta.get(name, "")) or row.name for row in rows]
    return [
        replace(row, split=split_of(value, parts, options.split_seed)) for row, value in zip(rows, values, strict=True)
    ]


def _packed(rows: list[Row], options: BuildOptions) -> Iterator[tuple[Row, dict[str, Any] | None, str]]:
    """(row, sample to write or None, why not), in an order that mixes folders and classes and depends on names only."""
    rows = sorted(rows, key=lambda row: (_digest(row.name), row.name))
    threads = options.workers or os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        for at in range(0, len(rows), 32 * threads):  # in chunks, so that no more than a chunk is in memory
            yield from pool.map(lambda row: _pack(row, options), rows[at : at + 32 * threads])


def _pack(row: Row, options: BuildOptions) -> tuple[Row, dict[str, Any] | None, str]:
    try:
        image, data = _image(row, options)
    except DataError as error:
        return row, None, str(error)
    json_member = {
        "label": None if not row.labels else row.labels[0] if len(row.labels) == 1 else list(row.labels),
        "source": row.source,
        "group": row.group,
        "split": row.split,
        "meta": row.meta | {"path": row.name},
    }
    sample: dict[str, Any] = {"__key__": key_of(row.name), extension(data): data}
    sample["json"] = json.dumps(json_member, ensure_ascii=False, sort_keys=True).encode()
    if row.text:
        sample["txt"] = row.text.encode()
    if row.mask is not None:
        sample["mask.png"] = _mask(row.mask, image.shape[:2] if options.short_side else None)
    return row, sample, ""


def _image(row: Row, options: BuildOptions) -> tuple[np.ndarray, bytes]:
    """The decoded image (which proves that it can be read), and the bytes to store."""
    data = _read(row.image)
    if row.image.suffix.lower() in (".tif", ".tiff", ".bmp"):
        data = _as_png(data)
    if not options.short_side:
        return decode(data, 1, options.channels), data  # at the smallest scale: every byte is still parsed
    image = decode(data, options.short_side, options.channels)
    height, width = image.shape[:2]
    scale = options.short_side / min(height, width)
    if scale < 1:
        size = max(1, round(width * scale)), max(1, round(height * scale))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA).reshape(size[1], size[0], options.channels)
    space = "RGB" if options.channels == 3 else "GRAY"
    subsampling = "420" if options.channels == 3 else "Gray"
    return image, simplejpeg.encode_jpeg(np.ascontiguousarray(image), options.quality, space, subsampling)


def _mask(path: Path, size: tuple[int, int] | None) -> bytes:
    """The mask as PNG: as it is, or (of another type, or of a shrunken image) black and white."""
    data = _read(path)
    try:
        if extension(data) == "png" and size is None:
            decode_mask(data)
            return data
        values = decode_mask(data) if extension(data) == "png" else decode(data, 0, 1)[..., 0] > 127  # JPEG rings
    except DataError as error:
        raise DataError(f"mask {path}: {error}") from None
    mask = values.astype(np.uint8) * 255
    if size is not None and mask.shape != size:
        mask = cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST)
    return cv2.imencode(".png", mask)[1].tobytes()


def _as_png(data: bytes) -> bytes:
    """TIFF and BMP as PNG, without loss."""
    try:
        image = Image.open(io.BytesIO(data), formats=("TIFF", "BMP"))
        bound(*image.size)
        if (frames := getattr(image, "n_frames", 1)) > 1:
            raise DataError(f"a TIFF of {frames} frames: save the one that counts")
        png = io.BytesIO()
        (image.convert("RGB") if image.mode in ("CMYK", "YCbCr", "LAB", "F") else image).save(png, "PNG")
        return png.getvalue()
    except DataError:
        raise
    except Exception as error:  # Pillow raises many types on damaged files
        raise DataError(f"damaged TIFF or BMP image: {error}") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _digest(name: str) -> str:
    return blake2b(name.encode(), digest_size=8).hexdigest()


def key_of(name: str) -> str:
    """A WebDataset key (no dot, ASCII, unique) from a path: its readable part and a hash of the whole."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", PurePosixPath(name).stem)[:48].strip("_") + "-" + _digest(name)[:10]
